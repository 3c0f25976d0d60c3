"""The model of the paper as a plain module: images, texts and pairs in, hidden states and contrastive features out.

    model = VLMoModel("vlmo_base_patch16", tasks=("itc", "itm"))         # or VLMoModel.from_pretrained(FILE)
    image = model.encode_image(pixels)[0]                                # (B, 3, 224, 224) -> (B, 197, 768)
    pair = model.encode_pair(text_ids, text_masks, pixels)               # (B, T) twice -> (B, T + 197, 768)
    logits = model.itm_score(model.pooler(pair))                         # (B, 2)

It knows no trainer and no configuration: `VLMo` (vlmo_module.py) is this model with a training step.

Shapes: B batch, T text tokens, I image tokens (1 + patches), S sequence, R query positions, D width.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo.errors import VLMoError
from vlmo.modules.attention import AttentionMasks, first_positions
from vlmo.modules.infer import infer, infer_image, infer_text
from vlmo.modules.positions import MAX_TEXT_LEN, num_table_rows
from vlmo.modules.transformer import PATCH_SIZE, Pooler, TextEmbeddings, build_transformer
from vlmo.registry import ARCHITECTURES, TASKS

Hidden = tuple[Tensor, Tensor | None]  # hidden states after the last norm; those of the VL-FFN branch, or None


@dataclass
class Encode:
    """One sequence to encode: an image, a text, or (with both) a pair.

    Attributes:
        image: (B, 3, size, size).
        text_ids, text_masks: (B, T).
        positions: (B, R) query positions, whose hidden states alone are wanted; None: all.
        vl_branch: of one modality, also the features of the vision-language experts.
        token_type: of the image: 1, or 2 for the second image of a sample.
        patch_mask: (B, I - 1) bool, True for patches that are hidden: `mask_token` (1, 1, D) stands in their place, and
            the image has no token type, as in BEiT.
        keys: (B,) int64, what dropout and stochastic depth follow from (`vlmo/modules/random.py`); None: the global
            generator.
    """

    image: Tensor | None = None
    text_ids: Tensor | None = None
    text_masks: Tensor | None = None
    positions: Tensor | None = None
    vl_branch: bool = False
    token_type: int = 1
    patch_mask: Tensor | None = None
    mask_token: Tensor | None = None
    keys: Tensor | None = None


class VLMoModel(nn.Module):
    """Transformer, embeddings, and the heads of some tasks.

    Heads are attributes under the names of released files: `pooler`, `itm_score`, `mlm_score`, ...

    Args:
        model_arch: name of the architecture.
        tasks: whose heads the model has and whose experts it needs, by name (or built tasks); none: no heads.
        image_size: pixels a side, a multiple of the patch size.
        max_text_len: longest text in tokens.
        max_text_len_of_initckpt: text length that the relative position table has room for.
        vocab_size: rows of the word embedding.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0; and dropout of the text embedding.
        shared_ffn: one feed-forward part for all modalities instead of experts, to compare with.
        activation_checkpointing: see `MultiWayTransformer`.
        task_options: options of the tasks by name, such as the number of classes, their defaults otherwise; and what
            else shall be saved with the weights, such as the tokenizer's name.

    Raises:
        VLMoError: for a name that is not known, and for an image size that is no multiple of the patch size.
    """

    infer, infer_text, infer_image = infer, infer_text, infer_image

    def __init__(
        self,
        model_arch: str = "vlmo_base_patch16",
        tasks: Iterable[Any] = (),
        *,
        image_size: int = 224,
        max_text_len: int = 40,
        max_text_len_of_initckpt: int = MAX_TEXT_LEN,
        vocab_size: int = 30522,
        drop_path_rate: float = 0.0,
        shared_ffn: bool = False,
        activation_checkpointing: bool | Literal["offload"] = False,
        **task_options: Any,
    ) -> None:
        super().__init__()
        tasks = list(tasks)
        ARCHITECTURES.require([model_arch], "model_arch")
        TASKS.require((name for name in tasks if isinstance(name, str)), "tasks")
        _require_known(task_options)
        _check_image_size(model_arch, image_size)
        self.options: dict[str, Any] = dict(
            model_arch=model_arch,
            image_size=image_size,
            max_text_len=max_text_len,
            max_text_len_of_initckpt=max_text_len_of_initckpt,
            vocab_size=vocab_size,
            shared_ffn=shared_ffn,
            **task_options,
        )
        # (those that build upon another after it, as in a step)
        built = [TASKS[task](**self.options) if isinstance(task, str) else task for task in tasks]
        self.tasks = sorted(built, key=lambda task: bool(task.requires))
        self.image_size, self.max_text_len, self.vocab_size = image_size, max_text_len, vocab_size
        self.answers: list[str] | None = None  # names of the classes of a task whose data say them
        self.vocabulary: list[str] | None = None  # the tokenizer's tokens in the order of their ids
        self.load_report: Any = None  # what became of a loaded file's tensors

        experts = {expert for task in self.tasks for expert in task.experts} if tasks else {"text", "vl"}
        self.transformer = build_transformer(
            model_arch,
            experts=() if shared_ffn else tuple(sorted(experts)),
            img_size=image_size,
            drop_path_rate=drop_path_rate,
            activation_checkpointing=activation_checkpointing,
        )
        width, relative = self.transformer.embed_dim, self.transformer.relative_positions
        # (without text, as in stage 1, files hold what BEiT's hold)
        if not self.tasks or any(task.has_text for task in self.tasks):
            self._add_text_and_pairs(TextEmbeddings(vocab_size, width, max_text_len, not relative, drop_path_rate))
        rows = num_table_rows(self.transformer.window, max_text_len_of_initckpt)
        columns = self.transformer.depth * self.transformer.num_heads  # block by block
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, columns)) if relative else None
        self.attention_masks = AttentionMasks(
            self.transformer.window, max_text_len, max_text_len_of_initckpt, self.transformer.depth, relative
        )
        for task in self.tasks:
            self.add_heads(task)

    def _add_text_and_pairs(self, text_embeddings: TextEmbeddings) -> None:
        self.text_embeddings = text_embeddings
        types = max([2, *(task.token_types for task in self.tasks)])  # text, image, second image
        self.token_type_embeddings = nn.Embedding(types, self.transformer.embed_dim)
        self.pooler = Pooler(self.transformer.embed_dim)
        for part in (self.text_embeddings, self.token_type_embeddings, self.pooler):
            init_head(part)

    def add_heads(self, task: Any) -> None:
        """Adds the heads of a task that are not there yet: tasks share heads by name."""
        for name, head in task.heads(self.transformer.embed_dim).items():
            if not hasattr(self, name):
                if isinstance(head, nn.Module):
                    init_head(head)
                setattr(self, name, head)

    @property
    def heads(self) -> dict[str, Any]:
        """Everything at the root by name: heads, the pooler and single parameters."""
        return {**self._modules, **self._parameters}

    # --- embedding and encoding --------------------------------------------------------------------------------------

    def embed_text(self, ids: Tensor, keys: Tensor | None = None) -> Tensor:
        """Embeds texts: (B, T) token ids -> (B, T, D). Raises VLMoError if T is more than `max_text_len`."""
        if ids.shape[1] > self.max_text_len:
            raise VLMoError(f"texts of {ids.shape[1]} tokens, but max_text_len={self.max_text_len}")
        return self.text_embeddings(ids, keys) + self.token_type_embeddings.weight[0]

    def embed_image(self, image: Tensor, token_type: int = 1) -> Tensor:
        """Embeds images: (B, 3, size, size) -> (B, I, D); token_type: 1 image, 2 second image of a sample."""
        return self.transformer.embed_image(image) + self.token_type_embeddings.weight[token_type]

    def encode_image(
        self,
        image: Tensor,
        vl_branch: bool = False,
        token_type: int = 1,
        positions: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Hidden:
        """Encodes images through the vision experts: (B, 3, size, size) -> hidden states (B, I, D) or (B, R, D).

        Args:
            vl_branch: also give those of the vision-language experts (as the published code contrasts them).
            token_type, positions, keys: as of `Encode`.
        """
        return self._encode_embedded_image(self.embed_image(image, token_type), vl_branch, positions, keys)

    def _encode_embedded_image(
        self, x: Tensor, vl_branch: bool, positions: Tensor | None, keys: Tensor | None
    ) -> Hidden:
        biases, _ = self.attention_masks(self.relative_position_bias_table, "image")
        return self.transformer.encode(x, biases, "image", 0, vl_branch, positions=positions, keys=keys)

    def encode_text(
        self,
        ids: Tensor,
        text_masks: Tensor,
        vl_branch: bool = False,
        positions: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Hidden:
        """Encodes texts through the language experts: (B, T) twice -> hidden states (B, T, D), as `encode_image`."""
        x = self.embed_text(ids, keys)  # (first, as it says what is too long)
        biases, padding = self.attention_masks(self.relative_position_bias_table, "text", text_masks)
        return self.transformer.encode(x, biases, "text", 0, vl_branch, padding, positions, keys)

    def encode_pair(self, ids: Tensor, text_masks: Tensor, image: Tensor, token_type: int = 1) -> Tensor:
        """Encodes pairs jointly: (B, T) twice, (B, 3, size, size) -> (B, T + I, D) after the last norm, text first."""
        return self._encode_joint(self.embed_text(ids), self.embed_image(image, token_type), text_masks)

    def _encode_joint(
        self,
        text: Tensor,
        image: Tensor,
        text_masks: Tensor,
        positions: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        biases, padding = self.attention_masks(self.relative_position_bias_table, "vl", text_masks)
        x = torch.cat([text, image], dim=1)
        return self.transformer.encode(x, biases, "vl", text.shape[1], False, padding, positions, keys)[0]

    def encode(self, requests: Sequence[Encode]) -> list[Hidden]:
        """Encodes each request; all pairs go through the blocks together, so that small batches still fill a GPU.

        Pairs must say their query positions, all those of a request as many.
        """
        pairs = [request for request in requests if request.image is not None and request.text_ids is not None]
        joint = iter(self._encode_pairs(pairs) if pairs else ())
        encoded: list[Hidden] = []
        for request in requests:
            image, ids, masks = request.image, request.text_ids, request.text_masks
            if image is not None and ids is not None:
                encoded.append((next(joint), None))
            elif ids is not None and masks is not None:
                encoded.append(self.encode_text(ids, masks, request.vl_branch, request.positions, request.keys))
            elif image is not None and request.patch_mask is not None:
                x = self.transformer.embed_image(image, request.patch_mask, request.mask_token)
                encoded.append(self._encode_embedded_image(x, request.vl_branch, request.positions, request.keys))
            elif image is not None:
                options = (request.vl_branch, request.token_type, request.positions, request.keys)
                encoded.append(self.encode_image(image, *options))
        return encoded

    def _encode_pairs(self, pairs: Sequence[Encode]) -> list[Tensor]:
        """Gives (B, R, D) for each; an image tensor that several requests have is embedded once."""
        images: dict[tuple[int, int], Tensor] = {}
        for pair in pairs:
            key = (id(pair.image), pair.token_type)
            if key not in images:
                assert pair.image is not None
                images[key] = self.embed_image(pair.image, pair.token_type)
        keys = [pair.keys for pair in pairs if pair.keys is not None]
        all_keys = torch.cat(keys) if keys else None
        hidden = self._encode_joint(
            self.embed_text(_together([pair.text_ids for pair in pairs]), all_keys),
            torch.cat([images[id(pair.image), pair.token_type] for pair in pairs]),
            _together([pair.text_masks for pair in pairs]),
            _together([pair.positions for pair in pairs]),
            all_keys,
        )
        parts = hidden.split([len(pair.positions) for pair in pairs])  # type: ignore[arg-type]
        return [part[:, : pair.positions.shape[1]] for part, pair in zip(parts, pairs, strict=True)]  # type: ignore

    # --- contrastive features ----------------------------------------------------------------------------------------

    def image_features(self, image: Tensor, vl_branch: bool = False) -> Tensor:
        """Gives contrastive features (B, D) of unit length: of the V-FFN branch, or of the VL-FFN branch."""
        hidden, vl_hidden = self.encode_image(image, vl_branch, positions=first_positions(image))
        return self._features("vl_image" if vl_branch else "image", vl_hidden if vl_branch else hidden)

    def text_features(self, text_ids: Tensor, text_masks: Tensor, vl_branch: bool = False) -> Tensor:
        """Gives contrastive features (B, D) of unit length: of the L-FFN branch, or of the VL-FFN branch."""
        hidden, vl_hidden = self.encode_text(text_ids, text_masks, vl_branch, first_positions(text_ids))
        return self._features("vl_text" if vl_branch else "text", vl_hidden if vl_branch else hidden)

    def _features(self, side: str, hidden: Tensor | None) -> Tensor:
        features = self.project(side, hidden)
        if features is None:
            raise VLMoError(f"contrastive features need the head itc_{side}_proj, which this model lacks")
        return features

    def project(self, side: str, hidden: Tensor | None) -> Tensor | None:
        """Projects position 0 into the contrastive space; None where the model lacks the head.

        Args:
            side: "text", "image", "vl_text" or "vl_image".
        """
        head = getattr(self, f"itc_{side}_proj", None)
        return None if head is None or hidden is None else head(hidden[:, 0])

    # --- files -------------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, tasks: Sequence[str], options: Mapping[str, Any]) -> "VLMoModel":
        """Builds the model of some options, those of a file's metadata among them."""
        return cls(tasks=tasks, **options)

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | Path, task: str | Iterable[str] | None = None, **options: Any
    ) -> "VLMoModel":
        """Loads the model of a file, in evaluation mode on the CPU.

        Args:
            path_or_hub_id: folder of `save_pretrained`, a checkpoint file (Lightning's, a released one, safetensors),
                or a name "owner/repository" on the Hugging Face hub.
            task: whose heads to build, such as "itc" or ("itc", "itm"); None: of all whose heads the file has. A head
                that the file lacks starts new, with a warning.
            options: of the model, over what the file says, such as `image_size=384`.

        Raises:
            VLMoError: if there is no such file, it does not fit, or it has no head and `task` does not say one.
        """
        from vlmo.checkpoints.pretrained import load_pretrained

        return load_pretrained(cls, path_or_hub_id, task, options)

    def save_pretrained(self, folder: str | Path, max_shard_size: int | str | None = None) -> None:
        """Writes model.safetensors (above 2 GB in several parts with an index), config.json and vocab.txt.

        Names and shapes are those of the original's state dict. Raises VLMoError if `folder` is a file.
        """
        from vlmo.checkpoints.pretrained import save_pretrained

        save_pretrained(self, folder, max_shard_size)

    def push_to_hub(
        self,
        repository: str,
        private: bool | None = None,
        results: Mapping[str, float] | None = None,
        licence: str | None = None,
    ) -> str:
        """Uploads the folder of `save_pretrained` with a model card to the Hugging Face hub; returns its address.

        Args:
            repository: "owner/name", made where it is not there.
            results: figures for the card, by name.
            licence: as the hub spells it, such as "mit".

        Raises:
            VLMoError: if one may not write there, or the hub does not answer.
        """
        from vlmo.checkpoints.pretrained import push_to_hub

        return push_to_hub(self, repository, private, results, licence)


def _check_image_size(model_arch: str, image_size: int) -> None:
    patch = ARCHITECTURES[model_arch].get("patch_size", PATCH_SIZE)
    if image_size % patch or image_size <= 0:
        near = max(round(image_size / patch), 1) * patch
        raise VLMoError(f"image_size={image_size}: must be a multiple of the patch size {patch}; the nearest is {near}")


def _require_known(task_options: Iterable[str]) -> None:
    """Raises VLMoError for an option that neither a task has nor files hold."""
    known = {"tokenizer", "loss_names"} | {name for task in TASKS.values() for name in task.sized_by.values()}
    known |= {name for task in TASKS.values() if task.Options for name in task.Options.model_fields}
    for name in task_options:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *VLMoModel.__init__.__annotations__], 1)
            raise VLMoError(f"{name}: there is no such option" + (f"; did you mean {near[0]}?" if near else ""))


def init_head(module: nn.Module) -> None:
    """Draws normal weights of deviation 0.02; biases 0, norms 1; embeddings likewise."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


def _together(rows: Sequence[Tensor | None]) -> Tensor:
    """Concatenates (B, T) tensors, shorter rows filled up with 0: [PAD], its mask, or position 0."""
    longest = max(each.shape[1] for each in rows if each is not None)
    return torch.cat([F.pad(each, (0, longest - each.shape[1])) for each in rows if each is not None])
