"""Contrast for retrieval fine-tuning: on the L/V-FFN features alone, by which the dual encoder ranks."""

from typing import Any

from vlmo.registry import TASKS
from vlmo.tasks.itc import ContrastTask

# recall@1 in percent (paper: table 2), by data set and architecture, all at 384 px: image to text, text to image
PUBLISHED = {
    "coco": {
        "vlmo_base_patch16": (74.8, 57.2),
        "vlmo_base_plus_patch16": (76.3, 58.6),
        "vlmo_large_patch16": (78.2, 60.6),
    },
    "f30k": {
        "vlmo_base_patch16": (92.3, 79.3),
        "vlmo_base_plus_patch16": (93.2, 81.8),
        "vlmo_large_patch16": (95.3, 84.5),
    },
}


@TASKS.register("irtr")
class IRTR(ContrastTask):
    """Shares its heads with ITC, so that retrieval fine-tuning starts from the pre-trained ones."""

    name = "irtr"
    paths = ("text", "image")
    required_heads = ("itc_text_proj", "itc_image_proj")

    @classmethod
    def published(cls, settings: Any) -> dict[str, float]:
        results = PUBLISHED.get(settings.datasets[0], {}) if len(settings.datasets) == 1 else {}
        if settings.image_size != 384 or settings.model_arch not in results:
            return {}
        return dict(zip(("recalls/tr_r1", "recalls/ir_r1"), results[settings.model_arch], strict=True))
