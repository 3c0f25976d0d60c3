"""Cross-entropy over a large vocabulary without the logits of all rows in memory at once."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024  # rows; their logits over 30,522 words take 125 MB in fp32


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed along with the loss, while a chunk's logits are there: nothing is computed twice."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss = hidden.new_zeros((), dtype=torch.float32)
        predicted = torch.empty_like(labels)
        wanted = any(ctx.needs_input_grad)
        grads = [torch.zeros_like(each, dtype=torch.float32) for each in (hidden, weight, bias)] if wanted else []
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            logits = F.linear(hidden[rows], weight, bias)  # in the type that autocast gives it
            log_probabilities = logits.float().log_softmax(-1)
            predicted[rows] = logits.argmax(-1)
            loss += F.nll_loss(log_probabilities, labels[rows], reduction="sum")
            if wanted:
                by_logits = log_probabilities.exp_()
                by_logits[torch.arange(len(logits), device=labels.device), labels[rows]] -= 1
                # fp16 has no room for small gradients that no loss scale has enlarged yet
                by_logits = by_logits if logits.dtype == torch.float16 else by_logits.to(logits.dtype)
                with torch.autocast(hidden.device.type, enabled=False):
                    grads[0][rows] = by_logits @ weight.to(by_logits.dtype)
                    grads[1] += by_logits.T @ hidden[rows].to(by_logits.dtype)
                    grads[2] += by_logits.sum(0, dtype=torch.float32)
        ctx.types = [each.dtype for each in (hidden, weight, bias)]
        ctx.rows = max(len(labels), 1)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(predicted)
        return loss / ctx.rows, predicted

    @staticmethod
    def backward(ctx: Any, *by_output: Tensor) -> tuple[Tensor | None, ...]:
        by_row = by_output[0] / ctx.rows
        found = zip(ctx.saved_tensors, ctx.types, ctx.needs_input_grad, strict=False)
        return *((grad * by_row).to(kind) if needed else None for grad, kind, needed in found), None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of cross_entropy(hidden @ weight.T + bias, labels), `CHUNK` rows at a time.

    Args:
        hidden: (N, D).
        weight: (classes, D).
        bias: (classes,).
        labels: (N,); each counts.

    Returns:
        the loss, and the classes with the highest logits, (N,).
    """
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels)
