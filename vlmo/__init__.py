"""VLMo: vision-language pre-training with a mixture of modality experts (arXiv 2111.02358)."""

__version__ = "1.0.0"
