"""Models as files and back: `from_pretrained`, `save_pretrained`, and what Lightning's files hold besides weights."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor

from vlmo import __version__
from vlmo.checkpoints import files as checkpoint_file
from vlmo.checkpoints import loading as checkpoint
from vlmo.checkpoints.files import Checkpoint
from vlmo.checkpoints.metadata import Metadata, incompatibilities, options_of, vocabulary_hash
from vlmo.errors import VLMoError
from vlmo.modules.multiway_transformer import ARCHITECTURES
from vlmo.settings import PATCH_SIZE, Settings
from vlmo.tasks import get_objectives, objective_names

log = logging.getLogger(__name__)

MAX_SHARD_SIZE = "2GB"  # what no host and no file system refuses
# data sets that the settings let an objective run on, where those are not the default's
DATASETS = {"mim": ["images"], "textmlm": ["wikibk"], "vqa": ["vqa"], "nlvr2": ["nlvr2"]}

Model = TypeVar("Model", bound="PretrainedModule")


class PretrainedModule(pl.LightningModule):
    """VLMo's part that deals with files.

    Attributes:
        answers: of each label of the VQA head, "" where unknown; None without that head, or where nobody has said.
        vocabulary: the tokenizer's words in the order of their ids, None where nobody has said.
    """

    settings: Settings
    load_report: checkpoint.Report | None = None
    answers: list[str] | None = None
    vocabulary: list[str] | None = None

    @classmethod
    def from_pretrained(
        cls: type[Model], path_or_hub_id: str | Path, task: str | Iterable[str] | None = None, **options: Any
    ) -> Model:
        """The model of a file, in evaluation mode on the CPU.

        Args:
            path_or_hub_id: folder of `save_pretrained`, a checkpoint file (Lightning's, a released one, safetensors),
                or a name "owner/repository" on the Hugging Face hub.
            task: objectives to build, such as "vqa" or ("itc", "itm"); None: those whose heads the file has. A head
                that the file lacks starts new, with a warning.
            options: of the config, over what the file says, such as `image_size=384`.

        Raises:
            VLMoError: if there is no such file, it does not fit, or it has no head and `task` does not say one.
        """
        from vlmo.config import resolve  # here: it brings sacred, which nothing else in this package needs

        source = checkpoint_file.read(find(path_or_hub_id))
        metadata = describe(source)
        tasks = metadata.objectives if task is None else (task,) if isinstance(task, str) else tuple(task)
        unknown = [name for name in tasks if name not in objective_names()]
        if unknown or not tasks:
            what = f"task: {', '.join(unknown)} unknown" if unknown else f"{path_or_hub_id}: has no head; give a task"
            raise VLMoError(f"{what}; known: {', '.join(objective_names())}")
        weights = {name: float(name in tasks) for name in objective_names()}
        datasets = next((DATASETS[name] for name in tasks if name in DATASETS), None)
        fixed: dict[str, Any] = {"loss_names": weights} | ({"datasets": datasets} if datasets else {})
        model = cls(resolve() | metadata.options | fixed | options)
        report = model.load_weights(source)
        if report.new:
            log.warning(f"{path_or_hub_id}: some weights are not in it and start new\n{report}")
        return model.eval()

    def load_weights(self, source: str | Path | Checkpoint, required: Iterable[str] = ()) -> checkpoint.Report:
        """`checkpoint.load` into this model; the names of what it knows come along. Raises VLMoError as that does."""
        self.load_report = report = checkpoint.load(self, source, required)
        if report.metadata:
            self.vocabulary = report.metadata.vocabulary
            if any(name.startswith("vqa_classifier") for name in report.taken):
                self.answers = report.metadata.answers
        return report

    def save_pretrained(self, folder: str | Path, max_shard_size: int | str = MAX_SHARD_SIZE) -> None:
        """Writes model.safetensors (above `max_shard_size` in several parts with an index), config.json and vocab.txt.

        Names and shapes are those of the original's state dict.

        Raises:
            VLMoError: if `folder` is a file.
        """
        write_folder(self.state_dict(), self.metadata, folder, max_shard_size)

    @property
    def metadata(self) -> Metadata:
        """What travels with the weights."""
        return Metadata(**options_of(self.settings), answers=self.answers, vocabulary=self.vocabulary)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook: what travels with the weights, as plain values."""
        checkpoint[checkpoint_file.METADATA_KEY] = self.metadata.model_dump()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook on resuming: a run goes on with the names that it began with.

        Raises:
            VLMoError: if the data's answers or the tokenizer's words are others than the file's.
        """
        if checkpoint_file.METADATA_KEY not in checkpoint:
            return
        saved = Metadata.from_dict(checkpoint[checkpoint_file.METADATA_KEY], Path("the checkpoint to resume from"))
        problems = incompatibilities(saved, self.answers, self.vocabulary, "the checkpoint to resume from")
        if problems:
            raise VLMoError("\n".join(problems))
        self.answers = self.answers or saved.answers
        self.vocabulary = self.vocabulary or saved.vocabulary


# --- what a file is ---------------------------------------------------------------------------------------------------


def find(path_or_hub_id: str | Path) -> Path:
    """The file or folder; from the Hugging Face hub if there is none of that name and it reads as one there.

    Raises:
        VLMoError: if there is neither, or the hub cannot be reached.
    """
    path = Path(path_or_hub_id).expanduser()
    name = str(path_or_hub_id)
    local = path.suffix in (".pt", ".pth", ".ckpt", ".safetensors") or name.startswith((".", "/", "~"))
    if path.exists() or local or name.count("/") != 1:
        return path  # (what does not exist is said on reading)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "vocab.txt"]))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise VLMoError(f"{name}: no file or folder, and not on the Hugging Face hub") from error
    except Exception as error:  # what the hub's HTTP library raises has changed with every major version
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise VLMoError(
            f"{name}: no file or folder here, and the Hugging Face hub does not answer ({reason}); give a local path, "
            "or download it once where there is a network"
        ) from error


def describe(source: Checkpoint) -> Metadata:
    """What the file says of itself, or, for other people's, what its names and shapes tell.

    Raises:
        VLMoError: if it is of no VLMo model, or of a size not known here.
    """
    if source.metadata:
        return source.metadata
    tensors, _ = checkpoint.vlmo_names(source)
    from vlmo.config import resolve  # see above

    known = options_of(Settings.from_config(resolve()))
    rows = {"vocab_size": "text_embeddings.word_embeddings.weight"}
    rows |= {
        "max_text_len": "text_embeddings.position_embeddings.weight",
        "vqav2_label_size": "vqa_classifier.3.weight",
    }
    known |= {option: len(tensors[name]) for option, name in rows.items() if name in tensors and tensors[name].ndim}
    known |= {"model_arch": _architecture(source.path, tensors), "image_size": _image_size(source, tensors)}
    found = _objectives(tensors)
    known["loss_names"] = {name: float(name in found) for name in objective_names()}
    return Metadata(**known)


def _architecture(path: Path, tensors: Mapping[str, Tensor]) -> str:
    norm = tensors.get("transformer.blocks.0.norm1.weight", torch.empty(0))
    depth, width = checkpoint.num_blocks(tensors), norm.numel()
    for name, size in ARCHITECTURES.items():
        if (size["depth"], size["embed_dim"]) == (depth, width):
            return name
    if not depth:
        raise VLMoError(f"{path}: no name in it is VLMo's or BEiT's; give another checkpoint")
    raise VLMoError(f"{path}: {depth} blocks of width {width} are none of {', '.join(ARCHITECTURES)}")


def _image_size(source: Checkpoint, tensors: Mapping[str, Tensor]) -> int:
    """Pixels a side, from the table of relative positions or the absolute positions."""
    window = 0
    if checkpoint.TABLE in tensors and tensors[checkpoint.TABLE].ndim == 2:
        other = checkpoint.BEIT_OTHER_ROWS if source.kind == "beit" else checkpoint.VLMO_OTHER_ROWS
        window = checkpoint.window_of(len(tensors[checkpoint.TABLE]) - other)
    elif "transformer.pos_embed" in tensors and tensors["transformer.pos_embed"].ndim == 3:
        window = round(max(tensors["transformer.pos_embed"].shape[1] - 1, 0) ** 0.5)
    if not window:
        raise VLMoError(
            f"{source.path}: its image size cannot be told from its position tables; damaged, or not VLMo's"
        )
    return window * PATCH_SIZE


def _objectives(tensors: Mapping[str, Tensor]) -> list[str]:
    """Objectives all of whose heads are there; of those that share heads, the one that the file is of."""
    from vlmo.config import resolve  # see above

    roots = {name.split(".")[0] for name in tensors}
    vl_experts = any("_vl." in name for name in tensors)
    settings = Settings.from_config(resolve())
    with torch.device("meta"):  # only their names are of interest
        heads = {objective.name: set(objective.heads(1, settings)) for objective in get_objectives(objective_names())}
    heads.pop("textmlm" if vl_experts else "mlm")
    found = {name: own for name, own in heads.items() if own <= roots}
    return [name for name, own in found.items() if not any(own < other for other in found.values())]


def write_folder(
    tensors: Mapping[str, Tensor],
    metadata: Metadata,
    folder: str | Path,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Weights under VLMo's names and what they mean, as a folder that `from_pretrained` and `load_path` take.

    Raises:
        VLMoError: if `folder` is a file.
    """
    from huggingface_hub import save_torch_state_dict

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise VLMoError(f"{folder}: is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / checkpoint_file.CONFIG_FILE
    config.unlink(missing_ok=True)  # written last: without it, what lies here is unfinished
    save_torch_state_dict(dict(tensors), folder, max_shard_size=max_shard_size)
    content = {"vlmo_version": __version__} | metadata.model_dump(exclude={"vocabulary"})
    (folder / checkpoint_file.VOCABULARY_FILE).unlink(missing_ok=True)
    if metadata.vocabulary:
        text = "".join(f"{word}\n" for word in metadata.vocabulary)
        (folder / checkpoint_file.VOCABULARY_FILE).write_bytes(text.encode())
        content["vocabulary_sha256"] = vocabulary_hash(metadata.vocabulary)
    config.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
