"""Use a checkpoint on images and texts.

python -m vlmo.predict match     --checkpoint CKPT --image a.jpg --text "a red cat"
python -m vlmo.predict attention --checkpoint CKPT --image a.jpg --text "a red cat" --output a.png [--layer 5]
python -m vlmo.predict embed     --checkpoint CKPT --image FOLDER --text "a cat" "a dog" --output features.npz
python -m vlmo.predict rank      --checkpoint CKPT --image FOLDER --text "a cat" "a dog" [--by image]
python -m vlmo.predict COMMAND --help                what another command takes

Many at once: --input FILE.jsonl, .csv or .tsv with columns of these names (image, text, ...), paths relative to the
file; or --input FOLDER of images. A value given as an option goes for every row that has none. Results go to --output
FILE.jsonl (FILE.npz for embed, a folder for attention), else to the standard output, a JSON object a row. An image that
cannot be read gives {"error": ...} in its place, and exit status 1 at the end.

CKPT: Lightning's file, a released one, a folder of save_pretrained or a name on the Hugging Face hub. Released files
hold neither answers nor vocabulary: add --answers FILE, the JSON list of answers beside the tables, and --tokenizer
vocab.txt. A checkpoint of a plugin's task needs --plugins MODULE, which may bring further commands.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from vlmo import plugins
from vlmo.errors import VLMoError, called_as, command_parser, print_anything, print_error
from vlmo.inference import AttentionMap, Predictor
from vlmo.inference.io import Row, check_output, image_files, plain, predict_rows, read_rows, write_jsonl, write_npz
from vlmo.inference.uses import find_use, registered_uses
from vlmo.utils.ray_workers import ENGINES, RayWorkers

Options = argparse.Namespace


# --- the commands: rows to results ------------------------------------------------------------------------------------


def use(name: str, predictor: Predictor, options: Options, rows: list[Row]) -> list[Row]:
    """Does what a task offers under that name."""
    known = find_use(predictor.model, name)
    assert known  # (the command line lists those that there are)
    given = [tuple(column for column in known.optional if column in row) for row in rows]
    if len(set(given)) > 1:  # all rows of a batch have the same columns
        return [result for row in rows for result in use(name, predictor, options, [row])]
    columns = {column: [row[column] for row in rows] for column in known.columns + given[0]}
    results = getattr(predictor, name)(**columns, **{option: getattr(options, option) for option in known.options})
    return [{known.result: plain(result)} for result in results]


def attention(predictor: Predictor, options: Options, rows: list[Row]) -> list[Row]:
    """Saves a drawing (or, as .npz, the weights) of each row."""
    results = []
    for row in rows:
        shown = predictor.attention(row["image"], row["text"])
        output = Path(options.output)
        if output.is_dir() or not output.suffix:
            output.mkdir(parents=True, exist_ok=True)
            output = output / f"{row['number']:06d}_{Path(row['image']).stem}.png"
        _save_attention(shown, output, options)
        results.append({"picture": str(output)})
    return results


def _save_attention(shown: AttentionMap, path: Path, options: Options) -> None:
    if path.suffix == ".npz":
        np.savez(path, weights=shown.weights.numpy(), tokens=np.array(shown.tokens), layers=np.array(shown.layers))
    else:
        shown.picture(options.token, options.layer).save(path)


def embed(predictor: Predictor, options: Options, rows: list[Row]) -> list[Row]:
    """Computes the features of each row's image, text or both."""
    results: list[Row] = [{} for _ in rows]
    sides: tuple[tuple[str, Callable[..., Any], str], ...] = (
        ("image", predictor.embed_images, "v"),
        ("text", predictor.embed_texts, "l"),
    )
    for column, encode, branch in sides:
        numbers = [number for number, row in enumerate(rows) if column in row]
        features = encode([rows[number][column] for number in numbers], "vl" if options.vl_branch else branch)
        for number, feature in zip(numbers, features.numpy(), strict=True):
            results[number][f"{column}_embedding"] = feature
    return results


def ranking(rows: Iterable[Row], by: str, top_k: int) -> Iterable[Row]:
    """Finds for each text the best images (`by` "image": for each image the best texts); rows with errors first."""
    features: dict[str, dict[str, Any]] = {"image": {}, "text": {}}
    for row in rows:
        if "error" in row:
            yield row
        for side, found in features.items():
            if f"{side}_embedding" in row:
                found[row[side]] = row[f"{side}_embedding"]
    other = "text" if by == "image" else "image"
    names = list(features[other])
    for query, feature in features[by].items():
        scores = np.array([feature @ features[other][name] for name in names])
        best = [{other: names[i], "score": round(float(scores[i]), 6)} for i in np.argsort(-scores)[:top_k]]
        yield {by: query, f"{other}s": best}


class Command(NamedTuple):
    """What a command does with rows, and what it takes.

    Attributes:
        meaning: what the user gets.
        columns: what each row needs; `optional`: what it can also have.
        options: further options, each with its default.
        apart: images and texts are no pairs.
    """

    predict: Callable[[Predictor, Options, list[Row]], list[Row]]
    meaning: str
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    options: Mapping[str, Any] = {}
    apart: bool = False


def all_commands() -> dict[str, Command]:
    """Gives the commands by name: what the registered tasks offer, and those below."""
    commands = {}
    for name, offered in registered_uses().items():
        meaning = (offered.run.__doc__ or "").split("\n")[0]
        commands[offered.command or name.replace("_", "-")] = Command(
            partial(use, name), meaning, offered.columns, offered.optional, offered.options
        )
    sides = ("image", "text")
    return commands | {
        "embed": Command(embed, "Gives contrastive features of images and texts.", (), sides, apart=True),
        "rank": Command(embed, "Finds the best images for each text.", (), sides, {"top_k": 5}, apart=True),
        "attention": Command(attention, "Draws where a text looks in an image.", sides),
    }


# --- the command line -------------------------------------------------------------------------------------------------


def positive_int(text: str) -> int:
    """Raises ValueError, which argparse turns into its message."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def _parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    parser = command_parser("vlmo.predict", __doc__)
    _add_plugins(parser)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in commands.items():
        one = subparsers.add_parser(name, help=command.meaning, description=command.meaning)
        one.add_argument("--checkpoint", required=True, metavar="CKPT", help="file, folder or name on the hub")
        for column in command.columns + command.optional:
            one.add_argument(f"--{column.replace('_', '-')}", nargs="+" if command.apart else None)
        one.add_argument("--input", metavar="FILE", help="rows: .jsonl, .csv, .tsv, or a folder of images")
        one.add_argument(
            "--output",
            metavar="FILE",
            type=os.path.expanduser,
            required=name == "attention",
            help="else the standard output",
        )
        one.add_argument("--tokenizer", help="vocab.txt, folder or hub name, if the checkpoint has no vocabulary")
        one.add_argument("--answers", help="JSON list of the answers, if the checkpoint has none")
        one.add_argument("--image-size", type=positive_int, help="pixels a side, other than the checkpoint's")
        one.add_argument(
            "--image-decoding", choices=("correct", "original"), default="correct", help="for released files"
        )
        one.add_argument("--batch-size", type=positive_int, default=16)
        one.add_argument("--device", help="cpu, cuda, cuda:1, ...; else the GPU if there is one")
        _add_plugins(one)
        for option, default in command.options.items():
            kind: dict[str, Any] = {"type": positive_int if isinstance(default, int) else type(default)}
            if isinstance(default, bool):
                kind = {"action": argparse.BooleanOptionalAction}
            one.add_argument(f"--{option.replace('_', '-')}", default=default, help=f"default: {default}", **kind)
        if command.apart:
            one.add_argument("--vl-branch", action="store_true", help="features of the VL-FFN branch")
        if name == "embed":
            one.add_argument(
                "--engine", choices=list(ENGINES), default="processes", help="ray: --num-workers processes"
            )
            one.add_argument("--num-workers", type=positive_int, default=2, help="of --engine ray (2)")
        if name == "rank":
            one.add_argument("--by", choices=("text", "image"), default="text", help="what is looked for matches of")
        if name == "attention":
            one.add_argument("--layer", type=int, default=-1, help="from 0; -1 is the last")
            one.add_argument("--token", help="a token of the text; else the mean over all")
    return parser


def _add_plugins(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plugins", action="append", default=[], metavar="MODULE", help="can be given several times")


def _plugins(arguments: Sequence[str] | None) -> list[str]:
    """Finds the plugins among the arguments: they are loaded before it is known what commands there are."""
    parser = argparse.ArgumentParser(called_as("vlmo.predict"), add_help=False, allow_abbrev=False)
    _add_plugins(parser)
    return parser.parse_known_args(arguments)[0].plugins


def _rows(command: Command, options: Options) -> list[Row]:
    """Gives what is to be worked off. Raises VLMoError if a row lacks something."""
    columns = command.columns + command.optional
    given = {name: getattr(options, name) for name in columns if getattr(options, name) is not None}
    image_columns = [name for name in columns if name.startswith("image")]
    rows = read_rows(options.input, image_columns) if options.input else []
    if command.apart:
        rows += [{"image": file} for path in given.get("image", ()) for file in image_files(path)]
        rows += [{"text": text} for text in given.get("text", ())]
    elif options.input:
        rows = [given | row for row in rows]
    else:
        rows = [given | {"image": file} for file in image_files(given["image"])] if "image" in given else [given]
    if not rows:
        raise VLMoError("nothing to do: give --image, --text or --input")
    for number, row in enumerate(rows):
        missing = [name for name in command.columns if name not in row]
        if missing or (command.apart and not set(columns) & set(row)):
            names = " and ".join(f"--{name.replace('_', '-')}" for name in missing) or "--image or --text"
            raise VLMoError(f"row {number + 1} has no value: give {names}, or the columns in --input FILE")
    return rows


def _check_output(path: Path, command: str, rows: int) -> None:
    """Raises VLMoError if the results cannot be written there: before the model is loaded, not after hours."""
    if command == "attention" and (path.is_dir() or not path.suffix):
        folder = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
        if not folder.is_dir():
            raise VLMoError(f"--output {path}: {folder} is not a folder")
        check_output(folder / "a.png", "--output")
        return
    if command == "attention":
        kinds = [ending for ending, kind in Image.registered_extensions().items() if kind in Image.SAVE]
        if path.suffix.lower() not in [*kinds, ".npz"]:
            raise VLMoError(f"--output {path}: give a .png, .jpg or .npz file, or a folder")
        if rows > 1:
            raise VLMoError(f"--output {path}: many images need a folder")
    check_output(path, "--output")
    endings = (".jsonl", ".npz") if command == "embed" else (".jsonl",)
    no_file = path.exists() and not path.is_file()  # /dev/stdout and pipes have no ending
    if command != "attention" and path.suffix not in endings and not no_file:
        raise VLMoError(f"--output {path}: results are objects, one a line; give FILE{' or FILE'.join(endings)}")


def _predictor(options: Options) -> Predictor:
    return Predictor.from_pretrained(
        options.checkpoint,
        options.tokenizer,
        options.answers,
        options.device,
        options.batch_size,
        image_decoding=options.image_decoding,
        **({"image_size": options.image_size} if options.image_size else {}),
    )


def _embed_on_ray(rows: list[Row], options: Options) -> Iterator[Row]:
    """Yields each row with its features, or an error; batches are those of a single process, and so are the bits."""
    workers = RayWorkers(options.num_workers)
    threads, words = torch.get_num_threads(), json.dumps(vars(options), sort_keys=True)
    batches = [rows[start : start + options.batch_size] for start in range(0, len(rows), options.batch_size)]
    try:
        yield from chain.from_iterable(workers.map(_embed_batch, ((words, threads, batch) for batch in batches)))
    finally:
        workers.close()


def _embed_batch(words: str, threads: int, rows: list[Row]) -> list[Row]:
    """In a worker: a batch's rows with their features."""
    torch.set_num_threads(threads)  # the bits of a sum depend on how it is divided
    options, predictor = _loaded(words)
    return list(predict_rows(rows, partial(embed, predictor, options), options.batch_size, quiet=True))


@cache
def _loaded(words: str) -> tuple[Options, Predictor]:
    options = Options(**json.loads(words))
    plugins.load(options.plugins)
    return options, _predictor(options)


def run(command: Command, options: Options) -> int:
    """Works off what the command line asks for; returns the exit status: 1 if some rows could not be used.

    Raises:
        VLMoError: if nothing can be done.
    """
    rows = _rows(command, options)
    if options.output:
        options.output = str(Path(options.output).expanduser())
        _check_output(Path(options.output), options.command, len(rows))
    if options.command == "attention":
        rows = [{"number": number} | row for number, row in enumerate(rows)]
    results: Iterable[Row]
    if getattr(options, "engine", "processes") == "ray":
        results = _embed_on_ray(rows, options)
    else:
        predict = partial(command.predict, _predictor(options), options)
        results = predict_rows(rows, predict, options.batch_size)
    if len(rows) == 1:
        results = list(results)
        if "error" in results[0]:
            raise VLMoError(results[0]["error"])
    if options.command == "rank":
        results = ranking(results, options.by, options.top_k)
    if options.command == "embed" and str(options.output).endswith(".npz"):
        errors = write_npz(results, options.output)
    else:
        errors = write_jsonl(results, None if options.command == "attention" else options.output)
    if errors:
        print(f"{errors} of {len(rows)} rows could not be used", file=sys.stderr)
    return 1 if errors else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 1 if some rows could not be used, 2 after a mistake."""
    print_anything()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        plugins.load(_plugins(arguments))
        commands = all_commands()
        options = _parser(commands).parse_args(arguments)
        return run(commands[options.command], options)
    except VLMoError as error:
        return print_error(error)


if __name__ == "__main__":
    sys.exit(main())
