"""What a checkpoint file is, and the same weights in another form.

python -m vlmo.checkpoint show FILE
python -m vlmo.checkpoint convert FILE OUT.pt        plain, under the original's names, as released files are
python -m vlmo.checkpoint convert FILE FOLDER        model.safetensors, config.json, vocab.txt

FILE may be Lightning's, a released one, BEiT's (show only), safetensors or a folder of the last form. A folder can be
given what a released file lacks, so that it needs nothing else: --answers vqav2_answers.json --tokenizer vocab.txt
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from vlmo.checkpoints.files import read
from vlmo.checkpoints.loading import vlmo_names
from vlmo.checkpoints.metadata import Metadata, incompatibilities, vocabulary_hash
from vlmo.checkpoints.pretrained import describe, write_folder
from vlmo.datasets.checks import read_answers_file
from vlmo.datasets.text import load_tokenizer, vocabulary_of
from vlmo.errors import VLMoError, print_error

KINDS = {
    "vlmo": "VLMo",
    "stage1": "VLMo after stage 1 (vision only: stage 2 starts from it)",
    "beit": "BEiT (vision only: stage 2 starts from it)",
}
FINE_TUNED = ("vqa", "nlvr2", "irtr")
NO_HEADS = {  # roots of names that every model has, or that go with a head
    "transformer",
    "text_embeddings",
    "token_type_embeddings",
    "relative_position_bias_table",
    "pooler",
    "logit_scale",
    "logit_vl_scale",
}


def show(path: str) -> str:
    """A short table: kind, architecture, stage, resolution, heads, and what travels with the weights.

    Raises:
        VLMoError: if it is no checkpoint of VLMo or BEiT.
    """
    file = read(path)
    metadata = describe(file)
    tensors, dropped = vlmo_names(file)
    heads = sorted({name.split(".")[0] for name in tensors} - NO_HEADS)
    count, size = sum(t.numel() for t in tensors.values()), sum(t.nbytes for t in tensors.values())
    dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}))
    lines = {
        "file": f"{path} ({file.container})",
        "kind": KINDS[file.kind],
        "architecture": metadata.model_arch,
        "stage": _stage(file.kind, tensors, metadata.objectives),
        "resolution": f"{metadata.image_size} px",
        "heads": ", ".join(heads) or "none",
        "weights": f"{count / 1e6:.1f} M in {len(tensors)} tensors, {dtypes}, {size / 1e6:,.0f} MB",
        "left out": f"{len(dropped)} tensors that no VLMo model takes" if dropped else "nothing",
    }
    if file.kind == "vlmo":
        lines["text"] = f"{metadata.max_text_len} tokens, {metadata.vocab_size} words"
    if metadata.vocabulary:
        lines["vocabulary"] = f"in the file, of {metadata.tokenizer}, SHA-256 {vocabulary_hash(metadata.vocabulary)}"
    if metadata.answers:
        lines["answers"] = f"{len(metadata.answers)} in the file: {', '.join(metadata.answers[:5])}, ..."
    elif "vqa_classifier" in heads:
        lines["answers"] = f"{metadata.vqav2_label_size}, whose texts are not in the file"
    return "\n".join(f"{name:<13} {text}" for name, text in lines.items())


def _stage(kind: str, names: Iterable[str], objectives: Sequence[str]) -> str:
    if kind != "vlmo":
        return "1 (vision)"
    tuned = [name for name in objectives if name in FINE_TUNED]
    if tuned:
        return f"fine-tuned for {', '.join(tuned)}"
    if not any("_vl." in name for name in names):
        return "2 (language added; no vision-language experts)"
    return f"3 (pairs: {', '.join(objectives) or 'no head'})"


def convert(path: str, out: str, answers: str | None = None, tokenizer: str | None = None) -> None:
    """Writes the weights of `path` as a plain file (`out` ends in .pt or .pth) or as a folder.

    Args:
        answers: JSON file with the VQA answers, for a folder.
        tokenizer: vocab.txt, folder or hub name, for a folder.

    Raises:
        VLMoError: if `path` is no VLMo checkpoint, `out` cannot be made from it, or answers or words do not fit it.
    """
    target = Path(out)
    file = read(path)
    metadata = describe(file)
    if file.kind == "beit":
        raise VLMoError(f"{path}: is a BEiT file, not a VLMo model; train stage 2 from it (load_path={path})")
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise VLMoError(f"{out}: exists; give a new name")
    tensors, _ = vlmo_names(file)
    if target.suffix in (".pt", ".pth"):
        if answers or tokenizer:
            raise VLMoError("--answers and --tokenizer: a plain file holds weights only; convert to a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(f"{out}.part")
        # clone: a tensor mapped from a file may be a view of all of it, which would be saved
        torch.save({name: tensor.clone() for name, tensor in tensors.items()}, unfinished)
        unfinished.replace(target)
        return
    if target.suffix in (".ckpt", ".safetensors"):
        raise VLMoError(f"{out}: give FILE.pt for a plain file, or the name of a folder for safetensors")
    write_folder(tensors, _completed(metadata, path, answers, tokenizer), target)


def _completed(metadata: Metadata, path: str, answers: str | None, tokenizer: str | None) -> Metadata:
    """With the answers and words that are given, which may not contradict those that the file has."""
    labels = read_answers_file(Path(answers)) if answers else None
    words = vocabulary_of(load_tokenizer(tokenizer)) if tokenizer else None
    problems = incompatibilities(metadata, labels, words, path)
    if labels and len(labels) > metadata.vqav2_label_size:
        problems.append(f"{answers}: has {len(labels)} answers, the model {metadata.vqav2_label_size}")
    if words and len(words) > metadata.vocab_size:
        problems.append(f"{tokenizer}: has {len(words)} words, the model {metadata.vocab_size}")
    if problems:
        raise VLMoError("\n".join(problems))
    return metadata.model_copy(
        update={
            "answers": labels or metadata.answers,
            "vocabulary": words or metadata.vocabulary,
            "tokenizer": tokenizer or metadata.tokenizer,
        }
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, or 2 after a mistake of the user."""
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="python -m vlmo.checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("show", help="print what a file is").add_argument("file", metavar="FILE")
    converter = commands.add_parser("convert", help="write the weights in another form")
    converter.add_argument("file", metavar="FILE")
    converter.add_argument("out", metavar="OUT", help="FILE.pt, or a folder")
    converter.add_argument("--answers", metavar="FILE", help="JSON list of the VQA answers, to go into the folder")
    converter.add_argument("--tokenizer", metavar="NAME", help="vocab.txt, folder or hub name, to go into the folder")
    options = parser.parse_args(arguments)
    try:
        if options.command == "convert":
            convert(options.file, options.out, options.answers, options.tokenizer)
        print(show(options.file if options.command == "show" else options.out))
    except VLMoError as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
