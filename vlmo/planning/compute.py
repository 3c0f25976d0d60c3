"""Floating-point operations by torch's counter, a multiplication with its addition as two.

It counts matrix products, convolutions and fused attention, of forward and backward pass, whatever is computed twice
included. `vlmo::attend`, the attention of a CPU, counts as torch's own fused attention does.
"""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

import vlmo.modules.attention  # noqa: F401 (its operators are registered)

Shape = torch.Size


@register_flop_formula(torch.ops.vlmo.attend)
def _attend(q: Shape, k: Shape, v: Shape, *others: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


@register_flop_formula(torch.ops.vlmo.attend_backward)
def _attend_backward(gradient: Shape, q: Shape, k: Shape, v: Shape, *others: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(gradient, q, k, v)


def counter() -> FlopCounterMode:
    """Counts the operations of what runs within it; `get_total_flops()` says how many."""
    return FlopCounterMode(display=False)


def hours(steps: int, flops: int, peak: float, mfu: float) -> float:
    """How long a run takes in which each device reaches a share of its peak.

    Args:
        flops: of a device in a step.
        peak: operations a second.
        mfu: the share.
    """
    return steps * flops / (peak * mfu) / 3600
