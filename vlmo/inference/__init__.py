"""Using a trained model: `from vlmo.inference import Predictor`."""

from vlmo.inference.attention_maps import AttentionMap
from vlmo.inference.inputs import InputError
from vlmo.inference.predictor import Prediction, Predictor, Ranking

__all__ = ["AttentionMap", "Prediction", "InputError", "Predictor", "Ranking"]
