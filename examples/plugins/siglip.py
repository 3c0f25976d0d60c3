"""SigLIP's sigmoid loss (arXiv 2303.15343) in the place of the softmax contrast, from outside the package.

    python run.py with plugins='["examples.plugins.siglip"]' task_mlm_itm_siglip_base data_root=<ARROW_ROOT> ...
    python run.py with ... get_recall_metric=True datasets='["coco"]'       # recall works as with ITC
    python run.py with ... contrast_cache=True                              # so do the cached contrast and ITM

It provides the role "contrast": matching draws its hard negatives by its similarities, recall ranks by its features.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo.config import BASE, STAGE3, losses, named
from vlmo.distributed.collectives import all_gather_rows
from vlmo.registry import TASKS
from vlmo.tasks.base import Step, TaskOutput
from vlmo.tasks.itc import ContrastTask, ITCHead, contrast_output

INITIAL_LOG_SCALE, INITIAL_BIAS = 2.303, -10.0  # log(10) and -10, section 3.2


@TASKS.register("siglip")
class SigLIP(ContrastTask):
    """Each pair of the batch is a binary question: do image and text belong together?"""

    name = "siglip"
    stage = 3
    paths = ("text", "image")
    required_heads = ("itc_text_proj", "itc_image_proj")

    def heads(self, width: int) -> dict[str, nn.Module | nn.Parameter]:
        return {
            "itc_text_proj": ITCHead(width),
            "itc_image_proj": ITCHead(width),
            "siglip_scale": nn.Parameter(torch.tensor(INITIAL_LOG_SCALE)),
            "siglip_bias": nn.Parameter(torch.tensor(INITIAL_BIAS)),
        }

    def scores(self, heads: Mapping[str, Any], image: Tensor, text: Tensor) -> Tensor:
        """(I, D), (T, D) -> (I, T) logits: positive where they belong together."""
        return heads["siglip_scale"].float().exp() * image @ text.t() + heads["siglip_bias"].float()

    def compare(self, step: Step, features: Mapping[str, Tensor]) -> TaskOutput:
        """Computes the loss over the pairs of all processes (equation 1)."""
        both = torch.cat([features["image"].float(), features["text"].float()], dim=1)
        exact = self.options.contrast_gradient == "exact"
        image, text = all_gather_rows(both, exact, [(size.samples, both.shape[1]) for size in step.sizes]).chunk(
            2, dim=1
        )
        with torch.autocast(image.device.type, enabled=False):
            logits = self.scores(step.heads, image, text)
            signs = 2 * torch.eye(len(logits), device=logits.device) - 1
            loss = -F.logsigmoid(signs * logits).sum() / max(len(logits), 1)
        output = contrast_output(loss, logits, torch.arange(len(logits), device=logits.device))
        output.scalars = {"siglip_scale": step.heads["siglip_scale"].detach().exp()}
        return output


named("task_mlm_itm_siglip_base", STAGE3, BASE, loss_names=losses(itm=1, mlm=1, siglip=1), learning_rate=2e-4)
