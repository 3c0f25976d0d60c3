"""What a checkpoint file is, and the same weights in another form.

python -m vlmo.checkpoint show FILE
python -m vlmo.checkpoint convert FILE OUT.pt        plain, under the original's names, as released files are
python -m vlmo.checkpoint convert FILE FOLDER        model.safetensors, config.json, vocab.txt
python -m vlmo.checkpoint convert FILE OUT.pt --trained-weights    of a run with ema_decay: not the averages
python -m vlmo.checkpoint convert FOLDER OUT.ckpt    of a sharded run: all of it in one file, optimizer included
python -m vlmo.checkpoint average OUT FILE FILE ...  the mean of the weights, in a file (.pt) or folder: a model soup
python -m vlmo.checkpoint verify FILE                hashes, names, shapes, finite weights; status 1 if not whole
python -m vlmo.checkpoint save-pretrained FILE FOLDER    as convert, with a model card; transformers' AutoModel loads it
python -m vlmo.checkpoint push FILE OWNER/NAME       the same, to the Hugging Face hub

Adapters (LoRA) are merged wherever weights are written. FILE may be Lightning's, a released one, BEiT's (show only),
safetensors, a folder of that form or of a sharded run. A folder of safetensors can be given what a released file lacks,
so that it needs nothing else: --answers FILE, the JSON list of answers beside the tables, and --tokenizer vocab.txt. A
card takes --license NAME and --results FILE, a JSON object of figures by name. --plugins MODULE loads the tasks of a
plugin first.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vlmo import plugins
from vlmo.checkpoints import sharded
from vlmo.checkpoints.card import heads_of, run_of, stage_of, write_card
from vlmo.checkpoints.files import read, read_json
from vlmo.checkpoints.hub import push_folder
from vlmo.checkpoints.loading import vlmo_names
from vlmo.checkpoints.metadata import Metadata, incompatibilities, vocabulary_hash
from vlmo.checkpoints.pretrained import infer_metadata, write_folder
from vlmo.checkpoints.verification import verify
from vlmo.errors import VLMoError, command_parser, print_anything, print_error
from vlmo.files import atomic_write
from vlmo.inference.io import check_output
from vlmo.label_names import read_label_names
from vlmo.text import load_tokenizer, vocabulary_of

KINDS = {
    "vlmo": "VLMo",
    "stage1": "VLMo's vision part alone (stage 2 starts from it)",
    "beit": "BEiT (vision only: stage 2 starts from it)",
}


def show(path: str) -> str:
    """Gives a short table: kind, architecture, stage, resolution, heads, and what travels with the weights.

    Raises:
        VLMoError: if it is no checkpoint of VLMo or BEiT.
    """
    file = read(path)
    metadata = infer_metadata(file)
    tensors, dropped = vlmo_names(file)
    heads = heads_of(tensors)
    count, size = sum(t.numel() for t in tensors.values()), sum(t.nbytes for t in tensors.values())
    dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}))
    lines = {
        "file": f"{path} ({file.container})",
        "kind": KINDS[file.kind],
        "architecture": metadata.options["model_arch"],
        "stage": stage_of(file.kind, tensors, metadata.tasks, heads),
        "resolution": f"{metadata.options['image_size']} px",
        "heads": ", ".join(heads) or "none",
        "weights": f"{count / 1e6:.1f} M in {len(tensors)} tensors, {dtypes}, {size / 1e6:,.0f} MB",
        "left out": f"{len(dropped)} tensors that no VLMo model takes" if dropped else "nothing",
    }
    if file.kind == "vlmo":
        lines["text"] = f"{metadata.options['max_text_len']} tokens, a vocabulary of {metadata.options['vocab_size']}"
    if metadata.vocabulary:
        lines["vocabulary"] = (
            f"in the file, of {metadata.options['tokenizer']}, SHA-256 {vocabulary_hash(metadata.vocabulary)}"
        )
    if metadata.answers:
        lines["answers"] = f"{len(metadata.answers)} in the file: {', '.join(metadata.answers[:5])}, ..."
    elif number := metadata.num_answers:
        lines["answers"] = f"{number}, whose texts are not in the file"
    return "\n".join(f"{name:<13} {text}" for name, text in lines.items())


def convert(
    path: str, out: str, answers: str | None = None, tokenizer: str | None = None, trained_weights: bool = False
) -> None:
    """Writes the weights of `path` as a plain file (`out` ends in .pt or .pth) or as a folder; or all that a sharded
    run saved as a file (.ckpt).

    Args:
        answers: JSON file with the names of the answers, for a folder.
        tokenizer: vocab.txt, folder or hub name, for a folder.
        trained_weights: of a run that averages its weights, those that the optimizer goes on from.

    Raises:
        VLMoError: if `path` is no VLMo checkpoint, `out` cannot be made from it, or answers or words do not fit it.
    """
    target = _new(out)
    if target.suffix in (".ckpt", ".pt", ".pth") and (answers or tokenizer):
        raise VLMoError("--answers and --tokenizer: a plain file holds weights only; convert to a folder")
    source = Path(path).expanduser()
    if target.suffix == ".ckpt" and sharded.is_sharded(source):
        _save(sharded.put_together(sharded.read_rest(source), sharded.read_whole(source)), target)
        return
    if target.suffix == ".ckpt":
        raise VLMoError(f"{out}: give FILE.pt for a plain file, or the name of a folder for safetensors")
    tensors, metadata = _read_model(path, trained_weights)
    if target.suffix in (".pt", ".pth"):
        # clone: a tensor mapped from a file may be a view of all of it, which would be saved
        _save({name: tensor.clone() for name, tensor in tensors.items()}, target)
        return
    write_folder(tensors, _completed(metadata, path, answers, tokenizer), target)


def average(out: str, paths: Sequence[str]) -> None:
    """Writes the mean of the weights of several files (a uniform model soup, arXiv 2203.05482) as `convert` does.

    Raises:
        VLMoError: if there are fewer than two, they are of different models, or mean other answers or tokens.
    """
    target = _new(out)
    if target.suffix == ".ckpt":
        raise VLMoError(f"{out}: give FILE.pt, or the name of a folder; a mean of weights cannot be resumed")
    if len(paths) < 2:
        raise VLMoError("average: a mean needs two files or more")
    models = [_read_model(path) for path in paths]
    tensors, metadata = models[0]
    for path, (others, other) in zip(paths[1:], models[1:], strict=True):
        different = [name for name in tensors | others if _shape(tensors.get(name)) != _shape(others.get(name))]
        if different:
            raise VLMoError(
                f"{path}: is of another model than {paths[0]}: {different[0]} is {_shape(others.get(different[0]))}, "
                f"there {_shape(tensors.get(different[0]))}; average checkpoints of one model and task"
            )
        if problems := incompatibilities(metadata, other.answers, other.vocabulary, paths[0]):
            raise VLMoError("\n".join(problems))
    # in float64, so that the mean of equal weights are these weights
    means = {
        name: torch.stack([each[name].double() for each, _ in models]).mean(0).to(tensor.dtype)
        for name, tensor in tensors.items()
    }
    if target.suffix in (".pt", ".pth"):
        _save(means, target)
    else:
        write_folder(means, metadata, target)


def _new(out: str) -> Path:
    """The path of a file or folder to write. Raises VLMoError if it is there or cannot be."""
    target = Path(out).expanduser()
    folder = next(each for each in target.absolute().parents if each.exists())
    check_output(folder / f"{target.name}.part", "OUT")
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise VLMoError(f"{out}: exists; give a new name")
    if target.suffix == ".safetensors":
        raise VLMoError(f"{out}: give FILE.pt for a plain file, or the name of a folder for safetensors")
    return target


def _read_model(path: str, trained_weights: bool = False) -> tuple[dict[str, torch.Tensor], Metadata]:
    """The weights of a VLMo model under its names, and what is known of them."""
    file = read(path, trained_weights)
    metadata = infer_metadata(file)
    if file.kind == "beit":
        raise VLMoError(f"{path}: is a BEiT file, not a VLMo model; train stage 2 from it (load_path={path})")
    return vlmo_names(file)[0], metadata


def _shape(tensor: torch.Tensor | None) -> str:
    return "not there" if tensor is None else str(list(tensor.shape))


def _save(content: dict[str, Any], target: Path) -> None:
    with atomic_write(target) as file:
        torch.save(content, file)


def _completed(metadata: Metadata, path: str, answers: str | None, tokenizer: str | None) -> Metadata:
    """Adds the answers and words that are given, which may not contradict those that the file has."""
    labels = read_label_names(Path(answers).expanduser()) if answers else None
    words = vocabulary_of(load_tokenizer(tokenizer)) if tokenizer else None
    problems = incompatibilities(metadata, labels, words, path)
    if labels and not metadata.num_answers:
        problems.append(f"--answers: {path} is of no task with answers; leave it out")
    if words and len(words) > metadata.options["vocab_size"]:
        problems.append(f"{tokenizer}: has {len(words)} tokens, the model {metadata.options['vocab_size']}")
    if problems:
        raise VLMoError("\n".join(problems))
    return metadata.replace(
        answers=labels or metadata.answers,
        vocabulary=words or metadata.vocabulary,
        tokenizer=tokenizer or metadata.options["tokenizer"],
    )


def save(path: str, folder: Path, name: str, options: argparse.Namespace) -> None:
    """Writes a folder with a model card in which the model is called `name`.

    Raises:
        VLMoError: as `convert`, and if the results are no JSON object.
    """
    results = read_json(Path(options.results).expanduser()) if options.results else {}
    convert(path, str(folder), options.answers, options.tokenizer)
    written = read(folder)
    assert written.metadata
    run = run_of(Path(path).expanduser())
    write_card(folder, written.tensors, written.metadata, name, run, results, options.license)


def check(path: str, sha256: str | None) -> int:
    """Prints what `verify` finds; returns the exit status."""
    right, wrong = verify(path, sha256)
    for line in right:
        print(f"ok     {line}")
    for line in wrong:
        print(f"WRONG  {line}")
    return 1 if wrong else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, or 2 after a mistake of the user."""
    print_anything()
    parser = command_parser("vlmo.checkpoint", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("show", help="print what a file is").add_argument("file", metavar="FILE")
    verifier = commands.add_parser("verify", help="look whether it is whole")
    verifier.add_argument("file", metavar="FILE")
    verifier.add_argument("--sha256", metavar="HASH", help="what the file's must be")
    converter = commands.add_parser("convert", help="write the weights in another form")
    converter.add_argument("--trained-weights", action="store_true", help="of a run with ema_decay: not the averages")
    averager = commands.add_parser("average", help="write the mean of the weights of several files")
    averager.add_argument("out", metavar="OUT", help="FILE.pt, or a folder")
    averager.add_argument("files", metavar="FILE", nargs="+")
    saver = commands.add_parser("save-pretrained", help="write a folder with a model card")
    pusher = commands.add_parser("push", help="upload it to the Hugging Face hub, with a model card")
    for command, out in ((converter, "FILE.pt, or a folder"), (saver, "a new folder"), (pusher, "OWNER/NAME")):
        command.add_argument("file", metavar="FILE")
        command.add_argument("out", metavar="OUT", help=out)
        command.add_argument("--answers", metavar="FILE", help="JSON list of the answers, to go into the folder")
        command.add_argument("--tokenizer", metavar="NAME", help="vocab.txt, folder or hub name, to go into the folder")
    for command in (saver, pusher):
        command.add_argument("--license", metavar="NAME", help="as the hub spells it, such as mit")
        command.add_argument("--results", metavar="FILE", help="JSON object of figures by name, for the card")
    pusher.add_argument("--private", action="store_true", help="for oneself alone")
    for command in commands.choices.values():
        command.add_argument(
            "--plugins", action="append", default=[], metavar="MODULE", help="can be given several times"
        )
    options = parser.parse_args(arguments)
    try:
        plugins.load(options.plugins)
        if options.command == "convert":
            convert(options.file, options.out, options.answers, options.tokenizer, options.trained_weights)
        elif options.command == "average":
            average(options.out, options.files)
        elif options.command == "verify":
            return check(options.file, options.sha256)
        elif options.command == "save-pretrained":
            save(options.file, Path(options.out).expanduser(), Path(options.out).name, options)
        elif options.command == "push":
            with tempfile.TemporaryDirectory() as folder:
                save(options.file, Path(folder, "model"), options.out, options)
                print(push_folder(Path(folder, "model"), options.out, options.private or None))
            return 0
        print(show(options.file if options.command == "show" else options.out))
    except VLMoError as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
