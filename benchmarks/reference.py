"""The published way to compute a step, for comparison: the same weights, losses and gradients, without the savings.

Written from the paper and the design's description of the original: attention in plain operations with float32 scores,
texts padded to `max_text_len`, the relative position bias gathered anew in every pass, the masked-word head on every
position, each pair of a step in a pass of its own, loops over samples, the optimizer parameter by parameter.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor
from torch.optim import Optimizer

from vlmo.modules import VLMo
from vlmo.modules import positions as relpos
from vlmo.modules.attention import Attention
from vlmo.modules.block import Block
from vlmo.training import optimizer as optim

Batch = Mapping[str, Any]
Pooled = tuple[Tensor, Tensor | None]  # of the branch of the own modality, of the vision-language branch
IGNORE_INDEX = -100
STAGE3_MLM_WEIGHT = 0.25


class Reference:
    """The losses of `model`'s tasks, the published way.

    Args:
        model: shares its weights; its mode decides on dropout.
        hardest: take the most similar other pair as the negative instead of drawing one, to compare two ways.
    """

    def __init__(self, model: VLMo, hardest: bool = False) -> None:
        self.model, self.hardest = model, hardest
        s, window = model.settings, model.transformer.window
        image = relpos.image_relative_position_index(window)
        text = relpos.text_relative_position_index(s.max_text_len, window, s.max_text_len_of_initckpt)
        joint = relpos.joint_relative_position_index(text, image, window)
        indices = {"image": image, "text": text, "vl": joint}
        self.index = {modality: index.to(model.device) for modality, index in indices.items()}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """By task, weighted by `loss_names`."""
        batch = self.padded(batch)
        ways = {
            "mlm": self._mlm,
            "textmlm": self._textmlm,
            "itc": self._itc,
            "irtr": self._irtr,
            "vqa": self._vqa,
            "nlvr2": self._nlvr2,
        }
        active = self.model.settings.active
        found = {name: ways[name](batch) for name in active if name in ways}
        if "itm" in active:
            found["itm"] = self._itm(batch)
        return {name: loss * self.model.settings.loss_names[name] for name, loss in found.items()}

    def padded(self, batch: Batch) -> dict[str, Any]:
        """The batch with its texts as long as the longest that there can be."""
        longest = self.model.settings.max_text_len
        padded = dict(batch)
        for name in {"text_ids", "text_ids_mlm", "text_masks", "text_labels_mlm"} & set(batch):
            missing = longest - batch[name].shape[1]
            padded[name] = F.pad(batch[name], (0, missing), value=IGNORE_INDEX if "labels" in name else 0)
        return padded

    # --- encoders ----------------------------------------------------------------------------------------------------

    def _biases(self, modality: str) -> list[Tensor | None]:
        """Per block (H, S, S)."""
        table, depth = self.model.relative_position_bias_table, self.model.transformer.depth
        if table is None:
            return [None] * depth
        return list(F.embedding(self.index[modality], table).permute(2, 0, 1).chunk(depth))

    def _encode(self, x: Tensor, mask: Tensor, modality: str, text_len: int, first: int = 0) -> list[Tensor]:
        """Hidden states (B, S, D) before each block from the first on, and after the last."""
        hidden = [x]
        blocks = list(zip(self.model.transformer.blocks, self._biases(modality), strict=True))
        for block, bias in blocks[first:]:
            hidden.append(run_block(block, hidden[-1], mask, bias, modality, text_len))  # type: ignore[arg-type]
        return hidden

    def _alone(self, x: Tensor, mask: Tensor, modality: str, vl_branch: bool) -> tuple[Tensor, Tensor | None]:
        """The last hidden states of a text or an image, and of its vision-language branch."""
        transformer = self.model.transformer
        hidden = self._encode(x, mask, modality, 0)
        if not vl_branch:
            return transformer.norm(hidden[-1]), None
        start, biases = transformer.vl_start, self._biases(modality)
        branch = hidden[start]
        for block, bias in list(zip(transformer.blocks, biases, strict=True))[start:]:
            branch = run_block(block, branch, mask, bias, "vl", 0)  # type: ignore[arg-type]
        return transformer.norm(hidden[-1]), transformer.norm(branch)

    def text(self, ids: Tensor, mask: Tensor, vl_branch: bool) -> tuple[Tensor, Tensor | None]:
        """(B, T) both -> the last hidden states (B, T, D) of the L-FFN branch, and of the VL-FFN branch or None."""
        return self._alone(self.model.embed_text(ids), mask.bool(), "text", vl_branch)

    def image(self, image: Tensor, vl_branch: bool) -> tuple[Tensor, Tensor | None]:
        """(B, 3, size, size) -> (B, I, D), as `text`."""
        x = self.model.embed_image(image, 1)
        return self._alone(x, x.new_ones(x.shape[:2], dtype=torch.bool), "image", vl_branch)

    def _pair(self, ids: Tensor, text_mask: Tensor, image: Tensor, token_type: int = 1) -> Tensor:
        """(B, T + I, D) after the last norm."""
        text, patches = self.model.embed_text(ids), self.model.embed_image(image, token_type)
        mask = torch.cat([text_mask.bool(), patches.new_ones(patches.shape[:2], dtype=torch.bool)], dim=1)
        hidden = self._encode(torch.cat([text, patches], dim=1), mask, "vl", text.shape[1])
        return self.model.transformer.norm(hidden[-1])

    # --- losses ------------------------------------------------------------------------------------------------------

    def _masked_words(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self.model.mlm_score(hidden)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)

    def _textmlm(self, batch: Batch) -> Tensor:
        hidden, _ = self.text(batch["text_ids_mlm"], batch["text_masks"], vl_branch=False)
        return self._masked_words(hidden, batch["text_labels_mlm"])

    def _mlm(self, batch: Batch) -> Tensor:
        hidden = self._pair(batch["text_ids_mlm"], batch["text_masks"], batch["image"])
        words = hidden[:, : batch["text_ids"].shape[1]]
        return STAGE3_MLM_WEIGHT * self._masked_words(words, batch["text_labels_mlm"])

    def _contrast(self, batch: Batch, vl_branch: bool) -> list[tuple[Tensor, Tensor]]:
        """Loss and image-to-text logits, of the L/V-FFN branch and of the VL-FFN branch."""
        model = self.model
        images = self.image(batch["image"], vl_branch)
        texts = self.text(batch["text_ids"], batch["text_masks"], vl_branch)
        found = []
        for image, text, kind in zip(images, texts, ("", "_vl"), strict=True):
            if image is None or text is None:
                continue
            image = getattr(model, f"itc{kind}_image_proj")(image[:, 0]).float()
            text = getattr(model, f"itc{kind}_text_proj")(text[:, 0]).float()
            logits = getattr(model, f"logit{kind}_scale").exp() * (image @ text.t()).float()
            own = torch.arange(len(logits), device=logits.device)
            found.append(((F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2, logits))
        return found

    def _itc(self, batch: Batch) -> Tensor:
        (loss, self.similarities), (vl_loss, _) = self._contrast(batch, vl_branch=True)
        return (loss + vl_loss) / 2

    def _irtr(self, batch: Batch) -> Tensor:
        return self._contrast(batch, vl_branch=False)[0][0]

    def _itm(self, batch: Batch) -> Tensor:
        ids, masks, images = batch["text_ids"], batch["text_masks"], batch["image"]
        i2t = self.similarities.detach()
        other_text, other_image = [], []
        for row in range(len(images)):
            other_text.append(self._negative(i2t[row], row))
            other_image.append(self._negative(i2t[:, row], row))
        pairs = (
            (ids, masks, images),
            (ids, masks, torch.stack([images[row] for row in other_image])),
            (torch.stack([ids[row] for row in other_text]), torch.stack([masks[row] for row in other_text]), images),
        )
        logits = torch.cat([self.model.itm_score(self.model.pooler(self._pair(*pair))) for pair in pairs])
        labels = torch.cat([torch.ones(len(images)), torch.zeros(2 * len(images))]).long().to(logits.device)
        return F.cross_entropy(logits.float(), labels)

    def _negative(self, similarities: Tensor, own: int) -> int:
        weights = similarities.softmax(0)
        weights[own] = 0
        drawn = weights.argmax() if self.hardest else torch.multinomial(weights, 1)
        return int(drawn.item())

    def _vqa(self, batch: Batch) -> Tensor:
        hidden = self._pair(batch["text_ids"], batch["text_masks"], batch["image"])
        logits = self.model.vqa_classifier(self.model.pooler(hidden))
        targets = torch.zeros(logits.shape, device=logits.device)
        for row, (labels, scores) in enumerate(
            zip(batch["vqa_labels"].tolist(), batch["vqa_scores"].tolist(), strict=True)
        ):
            for label, score in zip(labels, scores, strict=True):
                if label >= 0:
                    targets[row, label] = score
        return F.binary_cross_entropy_with_logits(logits.float(), targets) * logits.shape[1]

    def _nlvr2(self, batch: Batch) -> Tensor:
        pooled = [
            self.model.pooler(self._pair(batch["text_ids"], batch["text_masks"], batch[f"image_{i}"], i + 1))
            for i in (0, 1)
        ]
        logits = self.model.nlvr2_classifier(torch.cat(pooled, dim=1))
        return F.cross_entropy(logits.float(), batch["answers"].long())


def run_block(block: Block, x: Tensor, mask: Tensor, bias: Tensor | None, modality: str, text_len: int) -> Tensor:
    """x: (B, S, D); mask: (B, S), False on padding; bias: (H, S, S)."""
    drop_path = DropPath(block.drop_path.drop_prob).train(block.training)
    x = x + drop_path(block.gamma_1 * attend(block.attn, block.norm1(x), mask, bias))
    if modality == "vl" and block.experts["vl"] != "vl":
        text, image = x[:, :text_len], x[:, text_len:]
        text = text + drop_path(block.gamma_2 * block.mlp_text(block.norm2_text(text)))
        image = image + drop_path(block.gamma_2 * block.mlp_imag(block.norm2_imag(image)))
        return torch.cat([text, image], dim=1)
    expert = {"vl": "vl", "text": "text", "image": "imag"}[modality]
    norm, mlp = getattr(block, f"norm2_{expert}"), getattr(block, f"mlp_{expert}")
    return x + drop_path(block.gamma_2 * mlp(norm(x)))


def attend(attention: Attention, x: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """Plain attention, the scores in float32."""
    size, length, dim = x.shape
    heads = attention.num_heads
    zero = torch.zeros_like(attention.v_bias)
    qkv = F.linear(x, attention.qkv.weight, torch.cat([attention.q_bias, zero, attention.v_bias]))
    q, k, v = qkv.reshape(size, length, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    q = q * (dim // heads) ** -0.5
    with torch.autocast(x.device.type, enabled=False):
        scores = q.float() @ k.float().transpose(-2, -1)
        if bias is not None:
            scores = scores + bias.unsqueeze(0)
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
        weights = scores.softmax(dim=-1).type_as(v)
    return attention.proj((weights @ v).transpose(1, 2).reshape(size, length, dim))


@torch.no_grad()
def adamw_step(optimizer: Optimizer, updates: int) -> None:
    """The published AdamW over `optimizer`'s groups and state, one parameter after another.

    Args:
        updates: number of this update, from 1.
    """
    beta1, beta2 = optim.BETAS
    for group in optimizer.param_groups:
        size = group["lr"] * math.sqrt(1 - beta2**updates) / (1 - beta1**updates)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = optimizer.state[parameter]
            if not state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            mean, square = state["exp_avg"], state["exp_avg_sq"]
            mean.mul_(beta1).add_(parameter.grad, alpha=1 - beta1)
            square.mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
            parameter.addcdiv_(mean, square.sqrt().add_(optim.EPS), value=-size)
            if group["weight_decay"] > 0:
                parameter.add_(parameter, alpha=-group["lr"] * group["weight_decay"])
