"""A model card: what a model is and can do, what it was trained on, how good it is, and the hashes of its files."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmo.checkpoints.files import WEIGHTS_FILE, read_content
from vlmo.checkpoints.metadata import Metadata
from vlmo.registry import TASKS

CARD_FILE = "README.md"
NO_HEADS = {  # roots of names that every model has, or that go with a head
    "transformer",
    "text_embeddings",
    "token_type_embeddings",
    "relative_position_bias_table",
    "pooler",
    "logit_scale",
    "logit_vl_scale",
    "logit_bias",
    "logit_vl_bias",
}
RUN_OPTIONS = ("exp_name", "datasets", "max_steps", "batch_size", "learning_rate", "seed")


def heads_of(names: Iterable[str]) -> list[str]:
    """Gives the heads among the names of a state dict."""
    return sorted({name.split(".")[0] for name in names} - NO_HEADS)


def stage_of(kind: str, names: Iterable[str], tasks: Sequence[str], heads: Sequence[str]) -> str:
    """Says in words how far a model was trained; `kind` is that of `Checkpoint`."""
    if kind == "beit":
        return "1 (vision)"
    unknown = [f"{name} (a task that is not known here: give --plugins)" for name in tasks if name not in TASKS]
    tuned = [name for name in tasks if name in TASKS and TASKS[name].stage is None]
    pretrained = sorted(name for name in tasks if name in TASKS and TASKS[name].stage is not None)
    if tuned or (unknown and not pretrained):
        return f"fine-tuned for {', '.join(tuned + unknown)}"
    if kind == "stage1":
        return "1 (vision)"
    if heads and not tasks:
        return "unknown from the heads: no task that is known here has them (give --plugins)"
    if not any("_vl." in name for name in names):
        return "2 (language added; no vision-language experts)"
    return f"3 (pairs: {', '.join(pretrained + unknown) or 'no head'})"


def file_sha256(path: Path) -> str:
    """Gives the SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def run_of(path: Path) -> dict[str, Any]:
    """Gives what a file of a run says of the run; nothing where it is another file."""
    if path.suffix != ".ckpt" or not path.is_file():
        return {}
    content, _ = read_content(path)
    options = content.get("hyper_parameters") or {}
    found = {name: options[name] for name in RUN_OPTIONS if options.get(name) is not None}
    return found | ({"steps done": content["global_step"]} if "global_step" in content else {})


def write_card(
    folder: Path,
    tensors: Mapping[str, Tensor],
    metadata: Metadata,
    name: str,
    run: Mapping[str, Any],
    results: Mapping[str, float],
    licence: str | None,
) -> None:
    """Writes README.md into a folder of `write_folder`.

    Args:
        name: of the model, as its users will load it.
        run: of `run_of`. results: figures by name.
        licence: as the hub spells it, such as "mit"; None: not stated.
    """
    options, heads = metadata.options, heads_of(tensors)
    size = sum(tensor.numel() for tensor in tensors.values()) / 1e6
    front = ["---", "library_name: vlmo", *([f"license: {licence}"] if licence else []), "tags:", "- vlmo"]
    front += ["- vision-language", "---"]
    uses = {use.name: use for task in TASKS.values() for use in task.uses if use.head in heads}
    can = [f"| `model.{use.name}({', '.join(use.columns)})` | {_first_line(use.run)} |" for use in uses.values()]
    if "itc_image_proj" in heads:
        can += ["| `model.rank(images, texts)` | Scores every image with every text. |"]
        can += ["| `model.classify(images, class_names)` | Classifies images without training. |"]
    figures = [f"| {key} | {value} |" for key, value in results.items()]
    lines = [
        *front,
        f"\n# {name}\n",
        f"A VLMo model ([arXiv 2111.02358](https://arxiv.org/abs/2111.02358)): {options['model_arch']}, {size:.1f} M "
        f"parameters, images of {options['image_size']} px, texts of {options['max_text_len']} tokens.",
        f"Training stage: {stage_of('vlmo', tensors, metadata.tasks, heads)}.",
        "\n## What it can do\n",
        *(["| | |", "|---|---|", *can] if can else ["It has no head to be used with: it is a start for fine-tuning."]),
        "\n## Use\n",
        "```python",
        "from vlmo import Predictor  # or transformers: AutoModel.from_pretrained(..., trust_remote_code=True)\n",
        f'model = Predictor.from_pretrained("{name}")',
        "```",
        "\n## Training\n",
        *([f"- {key}: {value}" for key, value in run.items()] or ["The file does not say what it was trained on."]),
        "\n## Results\n",
        *(["| | |", "|---|---|", *figures] if figures else ["None are stated."]),
        "\n## Licence\n",
        f"{licence or 'Not stated'}. The data that it was trained on have terms of their own.",
        "\n## Files\n",
        "| file | SHA-256 |",
        "|---|---|",
        *(f"| {path.name} | `{file_sha256(path)}` |" for path in sorted(folder.glob("model*.safetensors"))),
        f"\n`vlmo checkpoint verify FOLDER` compares them; `{WEIGHTS_FILE}` has the names of the published code.",
    ]  # fmt: skip
    (folder / CARD_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _first_line(function: Any) -> str:
    return (function.__doc__ or "").split("\n")[0]
