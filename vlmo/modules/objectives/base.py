"""The contract of an objective: a loss, the heads it needs, and what is measured of it.

An objective declares its heads but does not own them: VLMo registers each under its given name at the root, where
released files have them. To add one, write `objectives/<name>.py` with a subclass of that name, and give it a weight
in `loss_names` (`vlmo/config.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torchmetrics import Metric

from vlmo.settings import Settings

if TYPE_CHECKING:  # the module imports the objectives
    from vlmo.modules.vlmo_module import VLMo

Batch = Mapping[str, Any]


@dataclass
class ObjectiveOutput:
    """What one objective computed of a batch.

    Attributes:
        loss: scalar, weighted as published (the option `loss_names` multiplies it further).
        outputs: tensors for people and metrics: "logits", "labels", ...
        updates: per metric, the arguments of its update. A name with a slash ("dev/accuracy") names the phase itself.
        scalars: numbers to log that are no losses.
    """

    loss: Tensor
    outputs: dict[str, Tensor] = field(default_factory=dict)
    updates: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    scalars: dict[str, Tensor] = field(default_factory=dict)


class Objective:
    """Base of all objectives; stateless, one instance a model."""

    name: ClassVar[str]
    metrics: ClassVar[dict[str, type[Metric]]]
    headline: ClassVar[tuple[str, ...]]  # metrics whose mean enters `val/the_metric`
    requires: ClassVar[tuple[str, ...]] = ()  # objectives whose output this one reads
    evaluation_heads: ClassVar[tuple[str, ...]] = ()  # heads without which a loaded file cannot be evaluated

    def heads(self, embed_dim: int, settings: Settings) -> dict[str, nn.Module | nn.Parameter]:
        """Heads by attribute name at the root of VLMo; one that another objective has registered is shared."""
        raise NotImplementedError

    def compute(self, model: VLMo, batch: Batch, done: Mapping[str, ObjectiveOutput]) -> ObjectiveOutput | None:
        """The loss of a batch; `done`: the objectives before this one. None: there is nothing to learn from."""
        raise NotImplementedError
