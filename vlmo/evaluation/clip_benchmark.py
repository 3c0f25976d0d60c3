"""VLMo for CLIP_benchmark (github.com/LAION-AI/CLIP_benchmark): it then runs a checkpoint as it runs CLIP.

    python -m vlmo.evaluation.clip_benchmark eval --model cosine --pretrained CKPT --dataset wds/cifar10 \\
        --dataset_root ROOT/wds-cifar10 --task zeroshot_classification --no_amp

`--model` is the branch: cosine (L/V-FFN) or cosine_vl (VL-FFN). All other options are its own.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vlmo.errors import VLMoError
from vlmo.evaluation.pair_scores import OF_FEATURES
from vlmo.modules.model import VLMoModel
from vlmo.text import load_tokenizer, tokenize, tokenizer_of
from vlmo.transforms import square_transform


class ContrastiveModel(nn.Module):
    """A model with CLIP's two methods.

    Args:
        branch: whose features: "cosine" (L/V-FFN) or "cosine_vl" (VL-FFN).
    """

    def __init__(self, model: VLMoModel, branch: str = "cosine", pad_id: int = 0) -> None:
        super().__init__()
        if branch not in OF_FEATURES:
            raise VLMoError(f"--model {branch}: must be {' or '.join(OF_FEATURES)}")
        self.model, self.vl_branch, self.pad_id = model.eval(), branch == "cosine_vl", pad_id

    def encode_image(self, images: Tensor) -> Tensor:
        """(N, 3, size, size) -> (N, D) of unit length"""
        return self.model.image_features(images, self.vl_branch)

    def encode_text(self, ids: Tensor) -> Tensor:
        """(N, T) ids, padded -> (N, D) of unit length"""
        return self.model.text_features(ids, (ids != self.pad_id).long(), self.vl_branch)


def load_vlmo(
    model_name: str = "cosine",
    pretrained: str = "",
    cache_dir: str | None = None,
    device: str | torch.device = "cpu",
    tokenizer: str = "bert-base-uncased",
) -> tuple[ContrastiveModel, Callable[[Any], Tensor], Callable[[str | Sequence[str]], Tensor]]:
    """Loads what CLIP_benchmark asks for: model, transform of images, tokenizer of texts.

    Args:
        model_name: the branch.
        pretrained: file, folder or hub name.
        cache_dir: not used.
        tokenizer: of a checkpoint without a vocabulary.
    """
    model = VLMoModel.from_pretrained(pretrained)
    words = tokenizer_of(model.vocabulary) if model.vocabulary else load_tokenizer(tokenizer)

    def tokenized(texts: str | Sequence[str]) -> Tensor:
        given = [texts] if isinstance(texts, str) else texts
        ids = [torch.tensor(tokenize(words, text, model.max_text_len)) for text in given]
        return pad_sequence(ids, True, words.pad_token_id)

    adapted = ContrastiveModel(model, model_name, words.pad_token_id).to(device)
    return adapted, square_transform(model.image_size), tokenized


def main() -> int:
    """Runs CLIP_benchmark's own command with `--model_type vlmo`."""
    try:
        from clip_benchmark import cli, models
    except ImportError as error:
        print(f"error: CLIP_benchmark is not installed ({error}): pip install clip-benchmark", file=sys.stderr)
        return 2
    models.TYPE2FUNC["vlmo"] = load_vlmo
    models.MODEL_TYPES.append("vlmo")
    sys.argv += ["--model_type", "vlmo"]
    cli.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
