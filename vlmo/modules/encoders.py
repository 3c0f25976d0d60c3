"""The encoders: texts, images and pairs to hidden states and contrastive features, in training and use alike."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlmo.checkpoints.pretrained import PretrainedModule
from vlmo.errors import VLMoError
from vlmo.modules.attention import first_positions
from vlmo.modules.embeddings import TextEmbeddings
from vlmo.modules.heads import ITCHead, Pooler
from vlmo.modules.masks import AttentionMasks
from vlmo.modules.multiway_transformer import MultiWayTransformer

Batch = Mapping[str, Any]
Features = dict[str, Any]


class Encoders(PretrainedModule):
    """VLMo's part that encodes; `VLMo` makes the modules that it runs through."""

    transformer: MultiWayTransformer
    # absent in stage 1, which knows no text
    text_embeddings: TextEmbeddings
    token_type_embeddings: nn.Embedding  # 0 text, 1 image, 2 second image of NLVR2
    pooler: Pooler
    relative_position_bias_table: nn.Parameter | None
    attention_masks: AttentionMasks
    # present as the objectives that are on declare them
    mim_mask_token: nn.Parameter
    itc_text_proj: ITCHead
    itc_image_proj: ITCHead
    itc_vl_text_proj: ITCHead
    itc_vl_image_proj: ITCHead

    def embed_text(self, ids: Tensor) -> Tensor:
        """(B, T) token ids -> (B, T, D), before any block. Raises VLMoError if T is more than `max_text_len`."""
        if ids.shape[1] > self.settings.max_text_len:
            raise VLMoError(f"texts of {ids.shape[1]} tokens, but max_text_len={self.settings.max_text_len}")
        return self.text_embeddings(ids) + self.token_type_embeddings.weight[0]

    def embed_image(self, image: Tensor, token_type: int) -> Tensor:
        """(B, 3, size, size) -> (B, I, D), before any block; token_type: 1 image, 2 second image of NLVR2."""
        return self.transformer.embed_image(image) + self.token_type_embeddings.weight[token_type]

    def encode_pairs(self, text: Tensor, image: Tensor, text_masks: Tensor, read: Tensor | None = None) -> Tensor:
        """Embeddings (B, T, D), (B, I, D) and the mask (B, T) -> hidden states (B, T + I, D) after the last norm.

        With positions to `read` (B, R), those alone: (B, R, D), and the last block computes no others.
        """
        biases, padding = self.attention_masks(self.relative_position_bias_table, "vl", text_masks)
        x, text_len = torch.cat([text, image], dim=1), text.shape[1]
        return self.transformer.encode(x, biases, "vl", text_len, padding=padding, read=read)[0]

    def encode_text(
        self, ids: Tensor, text_masks: Tensor, vl_branch: bool, read: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T) both -> hidden states (B, T, D) of the L-FFN branch and of the VL-FFN branch or None."""
        biases, padding = self.attention_masks(self.relative_position_bias_table, "text", text_masks)
        return self.transformer.encode(self.embed_text(ids), biases, "text", 0, vl_branch, padding, read)

    def encode_image(
        self, image: Tensor, vl_branch: bool, token_type: int = 1, read: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, 3, size, size) -> hidden states (B, I, D), as `encode_text`; token_type and `read` as above."""
        biases, _ = self.attention_masks(self.relative_position_bias_table, "image")
        return self.transformer.encode(self.embed_image(image, token_type), biases, "image", 0, vl_branch, read=read)

    def encode_masked_image(self, image: Tensor, patch_mask: Tensor) -> Tensor:
        """(B, 3, size, size), and (B, P) bool, True for hidden patches -> (B, P, D) of the patches after the norm."""
        x = self.transformer.embed_image(image, patch_mask, self.mim_mask_token)
        biases, _ = self.attention_masks(self.relative_position_bias_table, "image")
        return self.transformer.encode(x, biases, "image")[0][:, 1:]

    def encode_apart(self, batch: Batch, vl_branch: bool) -> dict[str, Tensor]:
        """Contrastive features (B, D), unit length: "image", "text"; of the VL-FFN branch "vl_image", "vl_text"."""
        read = first_positions(batch["text_ids"])
        image, vl_image = self.encode_image(batch["image"], vl_branch, read=read)
        text, vl_text = self.encode_text(batch["text_ids"], batch["text_masks"], vl_branch, read)
        features = {"image": self.itc_image_proj(image[:, 0]), "text": self.itc_text_proj(text[:, 0])}
        if vl_image is not None and vl_text is not None:
            features |= {
                "vl_image": self.itc_vl_image_proj(vl_image[:, 0]),
                "vl_text": self.itc_vl_text_proj(vl_text[:, 0]),
            }
        return features

    def infer(self, batch: Batch, mask_text: bool = False, image_token_type_idx: int = 1) -> Features:
        """Encodes pairs jointly.

        Args:
            batch: `text_ids` (or `text_ids_mlm`), `text_masks` (B, T) and `image` (B, 3, size, size); with NLVR2's two
                images `image_0` and `image_1`, picked by the token type.
            mask_text: take the text with masked words.
            image_token_type_idx: 1 image, 2 second image of NLVR2.

        Returns:
            text_feats (B, T, D) and image_feats (B, I, D) after the last norm, cls_feats (B, D) pooled, raw_cls_feats
            (B, D) before the pooler, image_masks (B, I), text_masks, text_ids, text_labels.
        """
        text = self.embed_text(batch["text_ids_mlm" if mask_text else "text_ids"])
        image = self.embed_image(_image(batch, image_token_type_idx), image_token_type_idx)
        text_len = text.shape[1]
        hidden = self.encode_pairs(text, image, batch["text_masks"])
        return {
            "text_feats": hidden[:, :text_len],
            "image_feats": hidden[:, text_len:],
            "cls_feats": self.pooler(hidden),
            "raw_cls_feats": hidden[:, 0],
            "image_masks": torch.ones(image.shape[:2], dtype=torch.long, device=image.device),
            **_text_fields(batch, mask_text),
        }

    def infer_text(self, batch: Batch, mask_text: bool = False, vl_branch: bool = True) -> Features:
        """Encodes texts alone, through the language experts.

        Returns:
            text_feats (B, T, D) after the last norm; cls_feats (B, D) and cls_vlffn_feats (B, D), the contrastive
            features of the L-FFN and of the VL-FFN branch, unit length, None where the model lacks the head or
            `vl_branch` is off; raw_cls_feats (B, D), text_masks, text_ids, text_labels.
        """
        ids = batch["text_ids_mlm" if mask_text else "text_ids"]
        hidden, vl_hidden = self.encode_text(ids, batch["text_masks"], vl_branch)
        return {
            "text_feats": hidden,
            "image_feats": None,
            "cls_feats": self._project("itc_text_proj", hidden),
            "cls_vlffn_feats": self._project("itc_vl_text_proj", vl_hidden),
            "raw_cls_feats": hidden[:, 0],
            **_text_fields(batch, mask_text),
        }

    def infer_image(self, batch: Batch, image_token_type_idx: int = 1, vl_branch: bool = True) -> Features:
        """Encodes images alone, through the vision experts.

        Returns:
            image_feats (B, I, D) after the last norm; cls_feats and cls_vlffn_feats as `infer_text`; raw_cls_feats.
        """
        image = _image(batch, image_token_type_idx)
        hidden, vl_hidden = self.encode_image(image, vl_branch, image_token_type_idx)
        return {
            "image_feats": hidden,
            "text_feats": None,
            "cls_feats": self._project("itc_image_proj", hidden),
            "cls_vlffn_feats": self._project("itc_vl_image_proj", vl_hidden),
            "raw_cls_feats": hidden[:, 0],
            "image_masks": torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device),
        }

    def _project(self, head: str, hidden: Tensor | None) -> Tensor | None:
        return getattr(self, head)(hidden[:, 0]) if hidden is not None and hasattr(self, head) else None


def _image(batch: Batch, token_type: int) -> Tensor:
    """The image of that token type: NLVR2's `image_0` and `image_1`, else `image`."""
    name = f"image_{token_type - 1}"
    return batch[name] if name in batch else batch["image"]


def _text_fields(batch: Batch, mask_text: bool) -> Features:
    """The parts of the batch that the published dictionaries hand through."""
    suffix = "_mlm" if mask_text else ""
    return {
        "text_masks": batch["text_masks"],
        "text_ids": batch[f"text_ids{suffix}"],
        "text_labels": batch.get(f"text_labels{suffix}"),
    }
