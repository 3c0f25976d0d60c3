"""A contrast whose hard negatives count more (HN-NCE, arXiv 2301.02280) in the place of ITC, from outside the package.

    python run.py with plugins='["examples.plugins.hard_negatives"]' task_mlm_itm_hn_nce_base data_root=<ARROW_ROOT> ...
    python run.py with ... get_recall_metric=True datasets='["coco"]'       # recall works as with ITC
    python run.py with ... contrast_cache=True                              # so do the cached contrast and ITM

It provides the role "contrast": matching draws its hard negatives by its similarities, recall ranks by its features.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlmo.config import BASE, STAGE3, losses, named
from vlmo.distributed.collectives import all_gather_rows
from vlmo.registry import TASKS
from vlmo.tasks.base import Step, TaskOutput
from vlmo.tasks.itc import ContrastTask, contrast_output

HARDNESS = 0.5  # 0: all negatives alike, as in InfoNCE


def hn_nce(logits: Tensor, hardness: float = HARDNESS) -> Tensor:
    """Computes the mean over rows of -s_ii + log(exp s_ii + sum_j w_ij exp s_ij), j the negatives of i.

    The weights w_ij are proportional to exp(hardness s_ij), 1 on average, and constants for the gradient.

    Args:
        logits: (N, N), own pairs on the diagonal.
    """
    if len(logits) < 2:  # no negative
        return logits.sum() * 0
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    log_weights = (hardness * logits.detach()).masked_fill(own, -torch.inf).log_softmax(1) + math.log(len(logits) - 1)
    return ((logits + log_weights.masked_fill(own, 0)).logsumexp(1) - logits.diagonal()).mean()


@TASKS.register("hn_nce")
class HardNegatives(ContrastTask):
    """InfoNCE both ways over the pairs of all processes, the more similar negatives weighted up."""

    name = "hn_nce"
    stage = 3
    paths = ("text", "image")
    required_heads = ("itc_text_proj", "itc_image_proj")

    @classmethod
    def check(cls, settings: Any) -> list[str]:
        options = {"contrast_loss": "softmax", "same_image": "published", "label_smoothing": 0}
        wrong = [name for name, only in options.items() if getattr(settings, name) != only]
        return super().check(settings) + [f"{name}: hn_nce does not know it; drop it" for name in wrong]

    def compare(self, step: Step, features: Mapping[str, Tensor]) -> TaskOutput:
        """Computes the loss over the pairs of all processes from the features of this one's."""
        both = torch.cat([features["image"].float(), features["text"].float()], dim=1)
        exact = self.options.contrast_gradient == "exact"
        sizes = [(size.samples, both.shape[1]) for size in step.sizes]
        image, text = all_gather_rows(both, exact, sizes).chunk(2, dim=1)
        with torch.autocast(image.device.type, enabled=False):
            logits = step.heads["logit_scale"].float().exp() * image @ text.t()
            loss = (hn_nce(logits) + hn_nce(logits.t())) / 2
        output = contrast_output(loss, logits, torch.arange(len(logits), device=logits.device))
        output.scalars = {"logit_scale": step.heads["logit_scale"].detach().exp()}
        return output


named("task_mlm_itm_hn_nce_base", STAGE3, BASE, loss_names=losses(itm=1, mlm=1, hn_nce=1), learning_rate=2e-4)
