"""Models as files and back: what `from_pretrained` and `save_pretrained` of `VLMoModel` do."""

import json
import logging
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmo import __version__
from vlmo.checkpoints import files, loading
from vlmo.checkpoints.card import file_sha256, write_card
from vlmo.checkpoints.files import Checkpoint
from vlmo.checkpoints.hub import push_folder, reason_of
from vlmo.checkpoints.lora import merge_adapters
from vlmo.checkpoints.metadata import Metadata, size_options, vocabulary_hash
from vlmo.checkpoints.resizing import BEIT_OTHER_ROWS, TABLE, VLMO_OTHER_ROWS, window_of
from vlmo.errors import VLMoError
from vlmo.modules.transformer import PATCH_SIZE
from vlmo.registry import ARCHITECTURES, TASKS

log = logging.getLogger(__name__)

MAX_SHARD_SIZE = "2GB"  # what no host and no file system refuses
TOKENIZER = "bert-base-uncased"  # of files that do not say
HASHES = "weights_sha256"  # of config.json: hashes by file
# what has transformers' AutoModel load a folder
AUTO_FILE = "modeling_vlmo.py"
AUTO_MODULE = """# For transformers.AutoModel.from_pretrained(FOLDER, trust_remote_code=True); needs the package vlmo.
from vlmo.inference.auto_model import VLMoAutoModel, VLMoConfig  # noqa: F401
"""
AUTO_CONFIG = {
    "model_type": "vlmo",
    "architectures": ["VLMoAutoModel"],
    "auto_map": {"AutoConfig": "modeling_vlmo.VLMoConfig", "AutoModel": "modeling_vlmo.VLMoAutoModel"},
}


def load_pretrained(
    cls: type, path_or_hub_id: str | Path, task: str | Iterable[str] | None, options: Mapping[str, Any]
) -> Any:
    """Builds and loads the model of a file (see `VLMoModel.from_pretrained`); `cls.build(tasks, options)` builds it."""
    source = files.read(resolve_path(path_or_hub_id))
    metadata = infer_metadata(source)
    tasks = metadata.tasks if task is None else (task,) if isinstance(task, str) else tuple(task)
    if not tasks:
        raise VLMoError(f"{path_or_hub_id}: has no head; give a task, one of {', '.join(TASKS)}")
    unknown = [name for name in tasks if name not in TASKS]
    if unknown:
        raise VLMoError(f"task: {TASKS.near(unknown[0])}. If it is a plugin's, load that with plugins")
    kept = {name: value for name, value in metadata.options.items() if name != "loss_names"}
    model = cls.build(tasks, kept | dict(options))  # type: ignore[attr-defined]
    report = loading.load_weights(model, source)
    if report.new:
        log.warning(f"{path_or_hub_id}: some weights are not in it and are initialised anew\n{report}")
    return model.eval()


def save_pretrained(model: Any, folder: str | Path, max_shard_size: int | str | None = None) -> None:
    """Writes the model as a folder (see `VLMoModel.save_pretrained`)."""
    write_folder(merge_adapters(model.state_dict()), metadata_of(model), folder, max_shard_size or MAX_SHARD_SIZE)


def push_to_hub(
    model: Any, repository: str, private: bool | None, results: Mapping[str, float] | None, licence: str | None
) -> str:
    """Uploads the model with a card (see `VLMoModel.push_to_hub`)."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        tensors = merge_adapters(model.state_dict())
        write_card(Path(folder), tensors, metadata_of(model), repository, {}, results or {}, licence)
        return push_folder(Path(folder), repository, private)


def metadata_of(model: Any) -> Metadata:
    """Gives what travels with the weights of a model."""
    weights = dict.fromkeys(TASKS, 0.0) | {task.name: 1.0 for task in model.tasks}
    given: dict[str, Any] = {"tokenizer": TOKENIZER, "loss_names": weights}
    sizes = {name: getattr(task.options, name) for task in model.tasks for name in task.sized_by.values()}
    return Metadata(given | sizes | model.options, model.answers, model.vocabulary)


# --- what a file is ---------------------------------------------------------------------------------------------------


def resolve_path(path_or_hub_id: str | Path) -> Path:
    """Gives the file or folder; from the Hugging Face hub if there is none of that name and it reads as one there.

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
        raise VLMoError(
            f"{name}: no file or folder here, and the Hugging Face hub does not answer ({reason_of(error)}); give a "
            "local path, or download it once where there is a network"
        ) from error


def infer_metadata(source: Checkpoint) -> Metadata:
    """Gives what the file says of itself, or, for other people's, what its names and shapes tell.

    Raises:
        VLMoError: if it is of no VLMo model, or of a size not known here.
    """
    if source.metadata:
        return source.metadata
    loading.refuse_foreign(source)
    tensors, _ = loading.vlmo_names(source)
    name, patch_size = _architecture(source.path, tensors)
    options: dict[str, Any] = {
        "model_arch": name,
        "image_size": _window(source, tensors) * patch_size,
        "max_text_len": _rows(tensors, "text_embeddings.position_embeddings.weight", 40),
        "max_text_len_of_initckpt": 196,
        "vocab_size": _rows(tensors, "text_embeddings.word_embeddings.weight", 30522),
        "shared_ffn": False,
        "tokenizer": TOKENIZER,
    }
    for task in TASKS.values():
        for beginning, option in task.sized_by.items():
            sized = [tensor for name, tensor in tensors.items() if name.startswith(beginning) and tensor.ndim]
            if sized and option not in options:
                options[option] = len(sized[0])
    found = _tasks_of(tensors)
    return Metadata(options | {"loss_names": {name: float(name in found) for name in TASKS}})


def _rows(tensors: Mapping[str, Tensor], name: str, default: int) -> int:
    return len(tensors[name]) if name in tensors and tensors[name].ndim else default


def _architecture(path: Path, tensors: Mapping[str, Tensor]) -> tuple[str, int]:
    """Name and patch size."""
    norm = tensors.get("transformer.blocks.0.norm1.weight", torch.empty(0))
    depth, width = loading.num_blocks(tensors), norm.numel()
    for name, size in ARCHITECTURES.items():
        if (size["depth"], size["embed_dim"]) == (depth, width):
            return name, size.get("patch_size", PATCH_SIZE)
    if not depth:
        raise VLMoError(f"{path}: no name in it is VLMo's or BEiT's; give another checkpoint")
    raise VLMoError(f"{path}: {depth} blocks of width {width} are none of {', '.join(ARCHITECTURES)}")


def _window(source: Checkpoint, tensors: Mapping[str, Tensor]) -> int:
    """Patches a side, from the table of relative positions or the absolute positions."""
    window = 0
    if TABLE in tensors and tensors[TABLE].ndim == 2:
        other = BEIT_OTHER_ROWS if source.kind == "beit" else VLMO_OTHER_ROWS
        window = window_of(len(tensors[TABLE]) - other)
    elif "transformer.pos_embed" in tensors and tensors["transformer.pos_embed"].ndim == 3:
        window = round(max(tensors["transformer.pos_embed"].shape[1] - 1, 0) ** 0.5)
    if not window:
        raise VLMoError(
            f"{source.path}: its image size does not follow from its position tables; damaged, or not VLMo's"
        )
    return window


def _tasks_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """Gives the tasks all of whose heads are there; of those that share heads, the one that the file is of."""
    roots = {name.split(".")[0] for name in tensors}
    vl_experts = any("_vl." in name for name in tensors)
    sizes = dict.fromkeys(size_options(), 1) | {"shared_ffn": False, "model_arch": next(iter(ARCHITECTURES))}
    with torch.device("meta"):  # only their names are of interest
        heads = {
            name: set(task(**sizes).heads(1))
            for name, task in TASKS.items()
            if vl_experts == ("vl" in task.experts) or not task.has_text
        }
    found = {name: own for name, own in heads.items() if own <= roots}
    return [name for name, own in found.items() if not any(own < other for other in found.values())]


def write_folder(
    tensors: Mapping[str, Tensor],
    metadata: Metadata,
    folder: str | Path,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Writes weights under VLMo's names and what they mean, as a folder that `from_pretrained` and `load_path` take.

    Raises:
        VLMoError: if `folder` is a file.
    """
    from huggingface_hub import save_torch_state_dict

    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise VLMoError(f"{folder}: is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / files.CONFIG_FILE
    config.unlink(missing_ok=True)  # written last: without it, what lies here is unfinished
    save_torch_state_dict(dict(tensors), folder, max_shard_size=max_shard_size)
    content = {"vlmo_version": __version__} | AUTO_CONFIG | metadata.to_dict()
    content[HASHES] = {path.name: file_sha256(path) for path in sorted(folder.glob("model*.safetensors"))}
    (folder / AUTO_FILE).write_text(AUTO_MODULE, encoding="utf-8")
    del content["vocabulary"]  # a file of its own
    (folder / files.VOCABULARY_FILE).unlink(missing_ok=True)
    if metadata.vocabulary:
        text = "".join(f"{word}\n" for word in metadata.vocabulary)
        (folder / files.VOCABULARY_FILE).write_bytes(text.encode())
        content["vocabulary_sha256"] = vocabulary_hash(metadata.vocabulary)
    config.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
