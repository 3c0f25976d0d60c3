"""The model: `from vlmo.modules import VLMo`."""

from vlmo.modules.vlmo_module import VLMo

__all__ = ["VLMo"]
