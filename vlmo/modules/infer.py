"""The encoders under the original's names: methods of `VLMoModel` that return dictionaries with the original's keys."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlmo.distributed.wire_format import as_pixels


def infer(
    model: Any, batch: Mapping[str, Any], mask_text: bool = False, image_token_type_idx: int = 1
) -> dict[str, Any]:
    """Encodes pairs jointly.

    Args:
        batch: `text_ids` (or `text_ids_mlm`), `text_masks` (B, T) and `image` (B, 3, size, size); of samples with
            two images `image_0` and `image_1`, picked by the token type.
        mask_text: take the text with masked tokens.
        image_token_type_idx: 1 image, 2 second image of a sample.

    Returns:
        text_feats (B, T, D) and image_feats (B, I, D) after the last norm, cls_feats (B, D) pooled, raw_cls_feats
        (B, D) before the pooler, image_masks (B, I), text_masks, text_ids, text_labels.
    """
    ids = batch["text_ids_mlm" if mask_text else "text_ids"]
    image = _image(batch, image_token_type_idx)
    hidden = model.encode_pair(ids, batch["text_masks"], image, image_token_type_idx)
    text_feats, image_feats = hidden.tensor_split([ids.shape[1]], dim=1)
    return {
        "text_feats": text_feats,
        "image_feats": image_feats,
        "cls_feats": model.pooler(hidden),
        "raw_cls_feats": hidden[:, 0],
        "image_masks": _all_ones(image_feats),
        **_text_fields(batch, mask_text),
    }


def infer_text(model: Any, batch: Mapping[str, Any], mask_text: bool = False, vl_branch: bool = True) -> dict[str, Any]:
    """Encodes texts alone, through the language experts.

    Returns:
        text_feats (B, T, D) after the last norm; cls_feats (B, D) and cls_vlffn_feats (B, D), the contrastive
        features of the L-FFN and of the VL-FFN branch, unit length, None where the model lacks the head or
        `vl_branch` is off; raw_cls_feats (B, D), text_masks, text_ids, text_labels.
    """
    ids = batch["text_ids_mlm" if mask_text else "text_ids"]
    hidden, vl_hidden = model.encode_text(ids, batch["text_masks"], vl_branch)
    return {
        "text_feats": hidden,
        "image_feats": None,
        "cls_feats": model.project("text", hidden),
        "cls_vlffn_feats": model.project("vl_text", vl_hidden),
        "raw_cls_feats": hidden[:, 0],
        **_text_fields(batch, mask_text),
    }


def infer_image(
    model: Any, batch: Mapping[str, Any], image_token_type_idx: int = 1, vl_branch: bool = True
) -> dict[str, Any]:
    """Encodes images alone, through the vision experts.

    Returns:
        image_feats (B, I, D) after the last norm; cls_feats and cls_vlffn_feats as `infer_text`; raw_cls_feats.
    """
    image = _image(batch, image_token_type_idx)
    hidden, vl_hidden = model.encode_image(image, vl_branch, image_token_type_idx)
    return {
        "image_feats": hidden,
        "text_feats": None,
        "cls_feats": model.project("image", hidden),
        "cls_vlffn_feats": model.project("vl_image", vl_hidden),
        "raw_cls_feats": hidden[:, 0],
        "image_masks": _all_ones(hidden),
    }


def _all_ones(hidden: Tensor) -> Tensor:
    return torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)


def _image(batch: Mapping[str, Any], token_type: int) -> Tensor:
    """Picks the image of that token type: of two, `image_0` or `image_1`, else `image`."""
    name = f"image_{token_type - 1}"
    return as_pixels(batch[name] if name in batch else batch["image"])


def _text_fields(batch: Mapping[str, Any], mask_text: bool) -> dict[str, Any]:
    """Picks the parts of the batch that the published dictionaries hand through."""
    suffix = "_mlm" if mask_text else ""
    return {
        "text_masks": batch["text_masks"],
        "text_ids": batch[f"text_ids{suffix}"],
        "text_labels": batch.get(f"text_labels{suffix}"),
    }
