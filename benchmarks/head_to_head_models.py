"""The models of `head_to_head.py`: VLMo, changes of it, open_clip's dual encoder and Hugging Face's ViLT.

All are `Contestant`s, trained by one loop on the same batches. The width of those that differ in structure is chosen so
that a training step costs as many operations as VLMo's, by torch's FlopCounterMode.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call

from vlmo.batch import IGNORE_INDEX
from vlmo.modules import VLMo
from vlmo.modules.attention import Attention, attend, rows_at
from vlmo.modules.heads import classifier
from vlmo.modules.transformer import build_transformer
from vlmo.planning.compute import counter
from vlmo.registry import ARCHITECTURES
from vlmo.tasks.vqa import answer_loss, dense_targets

Batch = Mapping[str, Any]
SIZES = {"tiny": "vlmo_tiny_patch16", "small": "head_to_head_small"}
SMALL = dict(embed_dim=384, depth=12, num_heads=6, vl_start=10)  # the width of ViT-S, as deep as base


class Contestant(nn.Module):
    """What the loop and the measures ask of a model; each of them has what its task needs.

    Attributes:
        heads: beginnings of the names of what is trained at `lr_mult` times the learning rate in fine-tuning.
    """

    heads: tuple[str, ...] = ()

    def loss(self, batch: Batch) -> Tensor:
        """Gives what is minimised, a scalar."""
        raise NotImplementedError

    def image_features(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, F) of unit length"""
        raise NotImplementedError

    def text_features(self, ids: Tensor, masks: Tensor) -> Tensor:
        """(B, T) twice -> (B, F) of unit length"""
        raise NotImplementedError

    def logits(self, batch: Batch) -> Tensor:
        """Gives the scores of the answers (B, A), or of false and true (B, 2)."""
        raise NotImplementedError


# --- VLMo and what is changed of it -----------------------------------------------------------------------------------


class OfVLMo(Contestant):
    """The project's model with its own losses.

    Args:
        config: of a run, resolved.
        separate: whether each modality has attention of its own, instead of one for all.
    """

    def __init__(self, config: Mapping[str, Any], separate: bool = False) -> None:
        super().__init__()
        self.model = VLMo(config)
        if separate:
            separate_attention(self.model)
        self.heads = tuple(f"model.{name}" for name in self.model.downstream_heads)

    def loss(self, batch: Batch) -> Tensor:
        return torch.stack([output.loss for output in self.model(batch).values()]).sum()

    def image_features(self, image: Tensor) -> Tensor:
        return self.model.image_features(image)

    def text_features(self, ids: Tensor, masks: Tensor) -> Tensor:
        return self.model.text_features(ids, masks)

    def logits(self, batch: Batch) -> Tensor:
        (output,) = self.model(batch).values()
        return output.outputs["logits"]


class SeparateAttention(nn.Module):
    """Attention over the whole sequence, to which text and image come through projections of their own.

    So each modality has all weights for itself below the vision-language experts, and pairs still see each other
    (the paper's figure 2 with the attention not shared).
    """

    def __init__(self, dim: int, num_heads: int, text_len: list[int]) -> None:
        super().__init__()
        self.text, self.image = Attention(dim, num_heads), Attention(dim, num_heads)
        self.text_len = text_len  # of the sequences that are on their way through the blocks

    def forward(
        self, x: Tensor, bias: Tensor | None, padding: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """As `Attention`; the query positions of a pair are of its text."""
        first = self.text_len[0]
        parts = [(self.text, x[:, :first]), (self.image, x[:, first:])]
        parts = [(owner, part) for owner, part in parts if part.shape[1]]
        dim = x.shape[-1]
        keys_values = [
            F.linear(part, own.qkv.weight[dim:], torch.cat([torch.zeros_like(own.v_bias), own.v_bias]))
            for own, part in parts
        ]
        k, v = torch.cat(keys_values, dim=1).chunk(2, dim=-1)
        if positions is not None:
            parts = [(parts[0][0], rows_at(x, positions))]
            bias = None if bias is None else bias[0][:, positions].transpose(0, 1)
        q = torch.cat([F.linear(part, own.qkv.weight[:dim], own.q_bias) for own, part in parts], dim=1)
        q, k, v = (rearrange(each, "b s (h d) -> b h s d", h=self.text.num_heads) for each in (q, k, v))
        attended = rearrange(attend(q, k, v, bias, padding), "b h s d -> b s (h d)")
        outputs = attended.split([part.shape[1] for _, part in parts], dim=1)
        return torch.cat([own.proj(output) for (own, _), output in zip(parts, outputs, strict=True)], dim=1)


def separate_attention(model: VLMo) -> None:
    """Gives each modality attention of its own; both begin with the same weights, those that the model has."""
    text_len = [0]
    for block in model.transformer.blocks:
        shared = block.attn
        block.attn = SeparateAttention(model.transformer.embed_dim, shared.num_heads, text_len)
        for part in (block.attn.text, block.attn.image):
            part.load_state_dict(shared.state_dict())
    encode = model.transformer.encode

    def encode_noting(x: Tensor, biases: Any, modality: str, pair_text_len: int = 0, *rest: Any, **options: Any) -> Any:
        text_len[0] = {"text": x.shape[1], "image": 0, "vl": pair_text_len}[modality]
        return encode(x, biases, modality, pair_text_len, *rest, **options)

    model.transformer.encode = encode_noting  # type: ignore[method-assign]


# --- others -----------------------------------------------------------------------------------------------------------


class OfOpenCLIP(Contestant):
    """open_clip's dual encoder with its own loss: a ViT and a causal text transformer, nothing in common.

    Args:
        config: of VLMo's run; depth, patches, texts and vocabulary are its.
        width: of both encoders and of the features.
        separator: id of the token that ends a text, where its feature is read.
    """

    def __init__(self, config: Mapping[str, Any], width: int, separator: int) -> None:
        super().__init__()
        from open_clip import ClipLoss
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

        reference = build_transformer(config["model_arch"])
        layers, heads, patch = reference.depth, reference.num_heads, reference.patch_size
        vision = CLIPVisionCfg(layers, width, width // heads, patch_size=patch, image_size=config["image_size"])
        text = CLIPTextCfg(
            context_length=config["max_text_len"],
            vocab_size=config["vocab_size"],
            width=width,
            heads=heads,
            layers=layers,
            eos_id=separator,
            pool_type="eos",
        )
        self.clip, self.contrast = CLIP(width, vision, text), ClipLoss()

    def loss(self, batch: Batch) -> Tensor:
        image, text = self.image_features(batch["image"]), self.text_features(batch["text_ids"], batch["text_masks"])
        return self.contrast(image, text, self.clip.logit_scale.exp())

    def image_features(self, image: Tensor) -> Tensor:
        return self.clip.encode_image(image, normalize=True)

    def text_features(self, ids: Tensor, masks: Tensor) -> Tensor:
        # (causal: what follows the end has no say; cut to the batch's longest text, else padding would be paid for)
        length = ids.shape[1]
        tensors = {"positional_embedding": self.clip.positional_embedding[:length]}
        tensors["attn_mask"] = self.clip.attn_mask[:length, :length]
        return functional_call(self.clip, tensors, (None, ids))[1]


class OfViLT(Contestant):
    """Hugging Face's ViLT: one encoder of pairs, pre-trained by matching and masked words, fine-tuned as published.

    Args:
        config: of VLMo's run, whose depth, patches, texts, vocabulary and start of the weights it has.
        width: of the encoder.
        kind: "retrieval" for pre-training, "vqa" or "nlvr2".
    """

    def __init__(self, config: Mapping[str, Any], width: int, kind: str) -> None:
        super().__init__()
        from transformers import ViltConfig, ViltForMaskedLM

        sizes = ARCHITECTURES[config["model_arch"]]
        reference = build_transformer(config["model_arch"])
        vilt = ViltConfig(
            vocab_size=config["vocab_size"],
            modality_type_vocab_size=3,  # text, image, second image
            max_position_embeddings=config["max_text_len"],
            hidden_size=width,
            num_hidden_layers=reference.depth,
            num_attention_heads=reference.num_heads,
            intermediate_size=4 * width,
            image_size=config["image_size"],
            patch_size=reference.patch_size,
            initializer_range=sizes.get("init_std", 0.02),
            pad_token_id=0,
        )
        whole = ViltForMaskedLM(vilt)
        self.kind, self.vilt = kind, whole.vilt
        if kind == "retrieval":
            self.words, self.match = whole.mlm_score, nn.Linear(width, 2)
        else:
            images = 2 if kind == "nlvr2" else 1
            answers = 2 if kind == "nlvr2" else config["vqav2_label_size"]
            self.head = classifier(images * width, 2 * width, answers)
            self.heads = ("head",)

    def loss(self, batch: Batch) -> Tensor:
        if self.kind != "retrieval":
            logits = self.logits(batch)
        if self.kind == "vqa":
            return answer_loss(
                logits, dense_targets(batch["vqa_labels"], batch["vqa_scores"], logits.shape[1], logits.device)
            )
        if self.kind == "nlvr2":
            return F.cross_entropy(logits, torch.as_tensor(batch["answers"], device=logits.device).long())
        masked = self._encode(batch["text_ids_mlm"], batch["text_masks"], batch["image"]).last_hidden_state
        labels = batch["text_labels_mlm"]
        hidden = masked[:, : labels.shape[1]][labels != IGNORE_INDEX]
        words = F.cross_entropy(self.words(hidden), labels[labels != IGNORE_INDEX])
        # every other image is another one's of the batch
        fits = torch.rand(len(labels), device=labels.device) < 0.5
        shown = torch.where(fits[:, None, None, None], batch["image"], batch["image"].roll(1, 0))
        pooled = self._encode(batch["text_ids"], batch["text_masks"], shown).pooler_output
        return words + F.cross_entropy(self.match(pooled), fits.long())

    def logits(self, batch: Batch) -> Tensor:
        images = ("image_0", "image_1") if self.kind == "nlvr2" else ("image",)
        pooled = [
            self._encode(batch["text_ids"], batch["text_masks"], batch[name], number).pooler_output
            for number, name in enumerate(images, 1)
        ]
        return self.head(torch.cat(pooled, dim=1))

    def _encode(self, ids: Tensor, masks: Tensor, image: Tensor, number: int = 1) -> Any:
        # embedded here: the model's own way picks each image's patches one by one, for images of many sizes
        embed = self.vilt.embeddings
        patches = embed.patch_embeddings(image).flatten(2).transpose(1, 2)
        tokens = torch.cat([embed.cls_token.expand(len(image), -1, -1), patches], dim=1) + embed.position_embeddings
        seen = torch.ones(tokens.shape[:2], dtype=torch.long, device=image.device)
        return self.vilt(
            input_ids=ids,
            attention_mask=masks,
            image_embeds=embed.dropout(tokens),
            pixel_mask=seen,
            image_token_type_idx=number,
        )


# --- equal operations -------------------------------------------------------------------------------------------------


def step_flops(contestant: Contestant, batches: list[Batch]) -> float:
    """Operations of forward and backward pass, mean over the batches; the model's state is left as it is."""
    state = torch.get_rng_state()
    with counter() as counted:
        for batch in batches:
            contestant.loss(batch).backward()
    contestant.zero_grad(set_to_none=True)
    torch.set_rng_state(state)
    return counted.get_total_flops() / len(batches)


def matched_width(make: Callable[[int], Contestant], flops: float, batches: list[Batch], step: int) -> int:
    """The width with which a training step costs nearest to `flops`.

    Args:
        make: builds a contestant of a width.
        step: what widths are multiples of.
    """
    low, high = 1, 2
    while step_flops(make(high * step), batches) < flops:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if step_flops(make(middle * step), batches) < flops else (low, middle)
    return min((low * step, high * step), key=lambda width: abs(step_flops(make(width), batches) - flops))


def makers(config: Mapping[str, Any], kind: str, separator: int) -> dict[str, Callable[..., Contestant]]:
    """What builds each row's model; those that are given a width need it.

    Args:
        config: of VLMo's run, resolved.
        kind: "retrieval", "vqa" or "nlvr2".
        separator: id of [SEP].
    """

    def wide(width: int, **changes: Any) -> Contestant:
        name = f"{config['model_arch']}_{width}"
        ARCHITECTURES[name] = ARCHITECTURES[config["model_arch"]] | {"embed_dim": width}
        return OfVLMo({**config, "model_arch": name, **changes})

    contrast_alone = {name: float(name == "itc") for name in config["loss_names"]}

    return {
        "vlmo": lambda: OfVLMo(config),
        "mask": lambda: OfVLMo({**config, "same_image": "mask"}),
        "positive": lambda: OfVLMo({**config, "same_image": "positive"}),
        "separate": lambda: OfVLMo(config, separate=True),
        "shared": lambda width: wide(width, shared_ffn=True),
        "itc": lambda width: wide(width, loss_names=contrast_alone),
        "open_clip": lambda width: OfOpenCLIP(config, width, separator),
        "vilt": lambda width: OfViLT(config, width, kind),
    }
