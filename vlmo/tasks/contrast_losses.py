"""Other losses of a contrast than the published InfoNCE: decoupled, with smoothed labels, and SigLIP's."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlmo.distributed.collectives import all_gather_rows

SIGLIP_LOG_SCALE, SIGLIP_BIAS = math.log(10.0), -10.0  # to begin with (arXiv 2303.15343, section 3.2)
TEXTS_PER_CHUNK = 1024


def cross_entropy(
    logits: Tensor, same_image: Tensor | None, positive: bool, decoupled: bool, smoothing: float
) -> Tensor:
    """Computes the mean over rows of -sum_j target_j logit_j + log sum_(j in D) exp logit_j.

    The targets are the own pair, `smoothing` of them spread evenly over all that are not left out (arXiv 1512.00567,
    section 7). D are all that are not left out; `decoupled`: of these the negatives alone, so that a pair that is told
    apart already is still pulled together (Decoupled Contrastive Learning, arXiv 2110.06848). A row without
    a negative counts 0 then.

    Args:
        logits: (N, N), own pairs on the diagonal.
        same_image: (N, N) bool, pairs that are left out or, `positive`, right answers beside the own one.
    """
    right = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    counted = torch.ones_like(right)
    if same_image is not None:
        right, counted = (right | same_image, counted) if positive else (right, ~same_image)
    targets = right / right.sum(1, keepdim=True)
    if smoothing:
        targets = (1 - smoothing) * targets + smoothing * counted / counted.sum(1, keepdim=True)
    compared = counted & ~right if decoupled else counted
    any_compared = compared.any(1, keepdim=True)
    # (a row of -inf alone would have a gradient of NaN)
    normaliser = logits.masked_fill(~compared & any_compared, -torch.inf).logsumexp(1)
    losses = (normaliser - (targets * logits).sum(1)).where(any_compared[:, 0], 0.0)
    return losses.sum() / max(len(losses), 1)


def siglip(
    image: Tensor,
    text: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    counts: Sequence[int],
    same_image: Tensor | None,
    positive: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes SigLIP's loss of the own images with the texts of all processes (arXiv 2303.15343, section 3.2).

    Each image and text are a question of their own: do they belong together? So a process needs its own rows alone, and
    computes them for some texts at a time, whose similarities it does not keep for the backward pass.

    Args:
        image, text: (B, D), unit length, of this process; the gradient reaches the texts of the others too.
        log_scale, bias: scalars.
        counts: B of every process, by rank.
        same_image: (B, N) bool, pairs that are left out or, `positive`, right answers beside the own one.

    Returns:
        the sum over the B rows, and without a graph the logits (B, N) of the own images with all texts, and of the own
        texts with all images, the own pairs first.
    """
    both = torch.cat([image.float(), text.float()], dim=1)
    with torch.autocast(image.device.type, enabled=False):
        images, texts = all_gather_rows(both, True, [(count, both.shape[1]) for count in counts]).chunk(2, dim=1)
        image, text = both.chunk(2, dim=1)
        # (results rather than the parameters themselves, which sharding may have put away when they are needed again)
        scale, shift = log_scale.float().exp(), bias.float() + 0
        right = torch.eye(len(image), len(texts), dtype=torch.bool, device=image.device)
        counted = torch.ones_like(right)
        if same_image is not None:
            right, counted = (right | same_image, counted) if positive else (right, ~same_image)
        total, found = image.new_zeros(()), []
        chunks = texts.split(TEXTS_PER_CHUNK), *(each.split(TEXTS_PER_CHUNK, dim=1) for each in (right, counted))
        for part, *masks in zip(*chunks, strict=True):
            arguments = image, part, scale, shift, *masks
            loss, logits = checkpoint(_pairs, *arguments, use_reentrant=False, preserve_rng_state=False)
            total = total + loss
            found.append(logits.detach())
        with torch.no_grad():
            t2i_logits = scale * text @ images.t() + shift
    return total, torch.cat(found, dim=1), t2i_logits


def _pairs(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, right: Tensor, counted: Tensor
) -> tuple[Tensor, Tensor]:
    """Gives the summed loss of (B, D) images with (C, D) texts, and the logits (B, C)."""
    logits = scale * image @ text.t() + bias
    losses = F.logsigmoid(torch.where(right, logits, -logits))
    return -losses.where(counted, 0.0).sum(), logits
