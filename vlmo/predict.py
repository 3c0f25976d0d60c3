"""Use a checkpoint on pictures and texts.

python -m vlmo.predict answer    --checkpoint CKPT --image a.jpg --question "what colour is the cat?" [--top-k 5]
python -m vlmo.predict compare   --checkpoint CKPT --image-a a.jpg --image-b b.jpg --statement "both are red"
python -m vlmo.predict match     --checkpoint CKPT --image a.jpg --text "a red cat"
python -m vlmo.predict fill      --checkpoint CKPT --text "a [MASK] cat" [--image a.jpg] [--top-k 5]
python -m vlmo.predict attention --checkpoint CKPT --image a.jpg --text "a red cat" --output a.png [--layer 5]
python -m vlmo.predict embed     --checkpoint CKPT --image FOLDER --text "a cat" "a dog" --output features.npz
python -m vlmo.predict rank      --checkpoint CKPT --image FOLDER --text "a cat" "a dog" [--by image]

Many at once: --input FILE.jsonl, .csv or .tsv with columns of these names (image, question, ...), paths relative to
the file; or --input FOLDER of images. A value given as an option goes for every row that has none. Results go to
--output FILE.jsonl (FILE.npz for embed, a folder for attention), else to the standard output, a JSON object a row. An
image that cannot be read gives {"error": ...} in its place, and exit status 1 at the end.

CKPT: Lightning's file, a released one, a folder of save_pretrained or a name on the Hugging Face hub. Released files
hold neither answers nor words: add --answers vqav2_answers.json, --tokenizer vocab.txt.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlmo.errors import VLMoError, print_error
from vlmo.inference import AttentionMap, Predictor
from vlmo.inference.records import Row, image_files, predict_rows, read_rows, write_jsonl, write_npz

Options = argparse.Namespace


def _column(rows: list[Row], name: str) -> list[Any]:
    return [row[name] for row in rows]


def _guesses(guesses: Iterable[Any]) -> list[Row]:
    return [{"text": guess.text, "score": round(guess.score, 6)} for guess in guesses]


# --- the commands: rows to results ------------------------------------------------------------------------------------


def answer(predictor: Predictor, options: Options, rows: list[Row]) -> list[Row]:
    found = predictor.answer(_column(rows, "image"), _column(rows, "question"), options.top_k)
    return [{"answers": _guesses(guesses)} for guesses in found]


def compare(predictor: Predictor, options: Options, rows: list[Row]) -> list[Row]:
    columns = (_column(rows, name) for name in ("image_a", "image_b", "statement"))
    return [{"true": round(probability, 6)} for probability in predictor.compare(*columns)]


def match(predictor: Predictor, options: Options, rows: list[Row]) -> list[Row]:
    found = predictor.match(_column(rows, "image"), _column(rows, "text"))
    return [{"match": round(probability, 6)} for probability in found]


def fill(predictor: Predictor, options: Options, rows: list[Row]) -> list[Row]:
    images = [row.get("image") for row in rows]
    if None in images and any(images):  # a batch is of pairs or of texts
        return [result for row in rows for result in fill(predictor, options, [row])]
    found = predictor.fill_mask(_column(rows, "text"), images if images[0] else None, options.top_k)
    return [{"masks": [_guesses(guesses) for guesses in masks]} for masks in found]


def attention(predictor: Predictor, options: Options, rows: list[Row]) -> list[Row]:
    """Saves a picture (or, as .npz, the weights) of each row."""
    results = []
    for row in rows:
        shown = predictor.attention(row["image"], row["text"])
        output = Path(options.output)
        if not output.suffix:
            output.mkdir(parents=True, exist_ok=True)
            output = output / f"{row['number']:06d}_{Path(row['image']).stem}.png"
        _save_attention(shown, output, options)
        results.append({"picture": str(output)})
    return results


def _save_attention(shown: AttentionMap, path: Path, options: Options) -> None:
    if path.suffix == ".npz":
        np.savez(path, weights=shown.weights.numpy(), tokens=np.array(shown.tokens), layers=np.array(shown.layers))
    else:
        picture = shown.picture(options.token, options.layer)
        try:
            picture.save(path)
        except ValueError as error:  # Pillow does not know the suffix
            raise VLMoError(f"--output {path}: give a .png, .jpg or .npz file, or a folder") from error


def embed(predictor: Predictor, options: Options, rows: list[Row]) -> list[Row]:
    """The features of each row's image, text or both."""
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
    """For each text the best images, or with `by` "image" for each image the best texts; rows with errors first."""
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
    """What a command does with rows, the columns it needs, those it can use; `apart`: images and texts are no pairs."""

    predict: Callable[[Predictor, Options, list[Row]], list[Row]]
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    apart: bool = False


COMMANDS = {
    "answer": Command(answer, ("image", "question")),
    "compare": Command(compare, ("image_a", "image_b", "statement")),
    "match": Command(match, ("image", "text")),
    "embed": Command(embed, (), ("image", "text"), apart=True),
    "rank": Command(embed, (), ("image", "text"), apart=True),
    "fill": Command(fill, ("text",), ("image",)),
    "attention": Command(attention, ("image", "text")),
}

# --- the command line -------------------------------------------------------------------------------------------------


def positive_int(text: str) -> int:
    """Raises ValueError, which argparse turns into its message."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def _parser() -> argparse.ArgumentParser:
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="python -m vlmo.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, command in COMMANDS.items():
        one = commands.add_parser(name)
        one.add_argument("--checkpoint", required=True, metavar="CKPT", help="file, folder or name on the hub")
        for column in command.columns + command.optional:
            one.add_argument(f"--{column.replace('_', '-')}", nargs="+" if command.apart else None)
        one.add_argument("--input", metavar="FILE", help="rows: .jsonl, .csv, .tsv, or a folder of images")
        one.add_argument("--output", metavar="FILE", required=name == "attention", help="else the standard output")
        one.add_argument("--tokenizer", help="vocab.txt, folder or hub name, if the checkpoint has no vocabulary")
        one.add_argument("--answers", help="JSON list of the VQA answers, if the checkpoint has none")
        one.add_argument("--image-size", type=positive_int, help="pixels a side, other than the checkpoint's")
        one.add_argument("--batch-size", type=positive_int, default=16)
        one.add_argument("--device", help="cpu, cuda, cuda:1, ...; else the GPU if there is one")
        if name in ("answer", "fill", "rank"):
            one.add_argument("--top-k", type=positive_int, default=5)
        if command.apart:
            one.add_argument("--vl-branch", action="store_true", help="features of the VL-FFN branch")
        if name == "rank":
            one.add_argument("--by", choices=("text", "image"), default="text", help="what is looked for matches of")
        if name == "attention":
            one.add_argument("--layer", type=int, default=-1, help="from 0; -1 is the last")
            one.add_argument("--token", help="a word of the text; else the mean over all")
    return parser


def _rows(command: Command, options: Options) -> list[Row]:
    """What is to be worked off. Raises VLMoError if a row lacks something."""
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


def run(options: Options) -> int:
    """Works off what the command line asks for; returns the exit status: 1 if some rows could not be used.

    Raises:
        VLMoError: if nothing can be done.
    """
    command = COMMANDS[options.command]
    rows = _rows(command, options)
    if options.output and not Path(options.output).absolute().parent.is_dir():
        raise VLMoError(f"--output {options.output}: its folder does not exist")
    if options.command == "attention":
        if len(rows) > 1 and Path(options.output).suffix:
            raise VLMoError(f"--output {options.output}: many pictures need a folder")
        rows = [{"number": number} | row for number, row in enumerate(rows)]
    predictor = Predictor.from_pretrained(
        options.checkpoint,
        options.tokenizer,
        options.answers,
        options.device,
        options.batch_size,
        **({"image_size": options.image_size} if options.image_size else {}),
    )
    results: Iterable[Row] = predict_rows(rows, partial(command.predict, predictor, options), options.batch_size)
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
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        return run(_parser().parse_args(arguments))
    except VLMoError as error:
        return print_error(error)


if __name__ == "__main__":
    sys.exit(main())
