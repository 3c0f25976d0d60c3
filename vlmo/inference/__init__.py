"""Using a trained model: `from vlmo.inference import Predictor`."""

from vlmo.inference.attention import AttentionMap
from vlmo.inference.inputs import InputError
from vlmo.inference.predictor import Guess, Predictor, Ranking

__all__ = ["AttentionMap", "Guess", "InputError", "Predictor", "Ranking"]
