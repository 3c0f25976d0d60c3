"""What transformers' `AutoModel.from_pretrained(FOLDER, trust_remote_code=True)` gives for a saved folder."""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from vlmo.inference.predictor import Predictor
from vlmo.modules.model import VLMoModel


class VLMoConfig(PretrainedConfig):
    """The content of config.json."""

    model_type = "vlmo"


class VLMoAutoModel(PreTrainedModel):
    """A `VLMoModel` (attribute `model`) in transformers' dress."""

    config_class = VLMoConfig

    def __init__(self, config: VLMoConfig, model: VLMoModel) -> None:
        super().__init__(config)
        self.model = model

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *_: Any, config: Any = None, **options: Any
    ) -> "VLMoAutoModel":
        """Loads a folder or a name on the hub.

        Args:
            options: of transformers; `dtype`, `revision` and `token` count.
        """
        path = str(pretrained_model_name_or_path)
        if not Path(path).is_dir():
            from huggingface_hub import snapshot_download

            path = snapshot_download(path, revision=options.get("revision"), token=options.get("token"))
        config = config or VLMoConfig.from_pretrained(path)
        model = VLMoModel.from_pretrained(path)
        dtype = options.get("dtype") or options.get("torch_dtype")
        return cls(config, model if dtype in (None, "auto") else model.to(dtype)).eval()

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:  # type: ignore[override]
        """Writes the folder that it was loaded from."""
        self.model.save_pretrained(save_directory)

    def predictor(self, **options: Any) -> Predictor:
        """Gives what answers, matches, ranks, ... with these weights; options: of `Predictor`."""
        return Predictor(self.model, **options)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> ModelOutput:
        """Computes contrastive features of what is given, and, of both together, the hidden states of the pair.

        Args:
            pixel_values: (B, 3, size, size) in [-1, 1]. input_ids, attention_mask: (B, T).

        Returns:
            image_embeds, text_embeds (B, D), where the model has the heads; last_hidden_state (B, T + I, D) and
            pooler_output (B, D) of pairs.
        """
        found, model = ModelOutput(), self.model
        if input_ids is not None and attention_mask is None:
            attention_mask = (input_ids != 0).long()
        if pixel_values is not None and hasattr(model, "itc_image_proj"):
            found["image_embeds"] = model.image_features(pixel_values)
        if input_ids is not None and attention_mask is not None:
            if hasattr(model, "itc_text_proj"):
                found["text_embeds"] = model.text_features(input_ids, attention_mask)
            if pixel_values is not None:
                found["last_hidden_state"] = hidden = model.encode_pair(input_ids, attention_mask, pixel_values)
                found["pooler_output"] = model.pooler(hidden)
        return found
