"""Using a trained model: `from vlmo.inference import Predictor`."""

from vlmo.errors import InputError
from vlmo.inference.attention_maps import AttentionMap
from vlmo.inference.predictor import Prediction, Predictor, Ranking

__all__ = ["AttentionMap", "InputError", "Prediction", "Predictor", "Ranking"]
