"""Write what a checkpoint can be used for as graphs for other runtimes.

python -m vlmo.export CKPT OUT --format onnx|openvino|torch
python -m vlmo.export CKPT OUT --format openvino --int8 --calibrate ROWS.jsonl

OUT becomes a folder that needs nothing else: a graph for each use that the checkpoint has the head for (retrieval
features of images and texts; what its tasks offer, such as answer, match, compare), vocab.txt, and export.json with the
preprocessing, the answers and the graphs' inputs. Each graph takes any number of samples and any text length; the
command compares it with the model on random inputs, and fails where they differ by more than 1e-4.

    python -m vlmo.serve OUT                 or, from Python, vlmo.inference.exported.ExportedPredictor(OUT)

--int8 quantises weights and activations (ONNX: weights, and activations as they come). ROWS are a .jsonl, .csv or .tsv
file with the columns of the uses (image, text, question, ...; `label` where the right result is known) or a folder of
images. Every second row calibrates (the first 300); with the others the loss of recall and accuracy is measured.
"""

import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmo import __version__, plugins
from vlmo.checkpoints.files import VOCABULARY_FILE
from vlmo.checkpoints.pretrained import metadata_of
from vlmo.errors import VLMoError, command_parser, print_anything, print_error
from vlmo.export.formats import QUANTIZERS, WRITERS, require_packages
from vlmo.export.forward_passes import ForwardPass, asked_of, columns_of, forward_passes
from vlmo.export.loss_of_int8 import losses
from vlmo.inference.exported import ENDINGS, EXPORT_FILE, ExportedPredictor, Graph
from vlmo.inference.io import Row, read_rows
from vlmo.inference.predictor import Predictor

TOLERANCE = 1e-4
CHECKED = ((1, 3), (3, 8))  # samples and tokens of the random inputs that a graph is compared on
CALIBRATION_ROWS = 300


def export(
    predictor: Predictor, out: str | Path, kind: str, int8: bool = False, rows: Sequence[Row] = (), source: str = ""
) -> list[str]:
    """Writes the folder `out`; returns what there is to say of it, a line each.

    Args:
        kind: "onnx", "openvino" or "torch".
        rows: to calibrate INT8 with and to measure its loss on, see above.
        source: name of the checkpoint, to be noted.

    Raises:
        VLMoError: if a package is missing, `out` has something in it, or a graph is not equal to the model.
    """
    require_packages(kind, int8)
    out = Path(out).expanduser()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise VLMoError(f"{out}: exists; give a new name")
    found, lines = forward_passes(predictor)
    columns = columns_of(predictor)
    graphs: dict[str, dict[str, Any]] = {}
    out.mkdir(parents=True, exist_ok=True)
    for each in found:
        path = out / f"{each.name}{ENDINGS[kind]}"
        WRITERS[kind](each.graph(), each.inputs, predictor.model.image_size, path)
        apart = difference(each, Graph(path, kind, each.inputs))
        if apart > TOLERANCE:
            raise VLMoError(
                f"{path}: differs from the model by {apart:.1e} on random inputs, more than {TOLERANCE:.0e}"
            )
        lines.append(f"{each.name}: {path.name}, differs from the model by {apart:.1e} at most")
        graphs[each.name] = {"file": path.name, "inputs": each.inputs, "difference": apart, "int8": False}
        if int8:
            batches = calibration(predictor, each, columns[each.name], rows[::2])
            if batches or kind == "onnx":
                QUANTIZERS[kind](path, batches)
                graphs[each.name]["int8"] = True
            else:
                lines.append(f"{each.name}: stays float32, no row has {' and '.join(columns[each.name])}")
    describe(predictor, out, kind, graphs, source)
    if int8:
        again = ExportedPredictor(out, image_decoding=predictor.image_decoding)
        lines += [
            f"INT8: {line}" for line in losses(predictor, again, {name: columns[name] for name in graphs}, rows[1::2])
        ]
    return lines


def difference(each: ForwardPass, graph: Graph) -> float:
    """Gives the largest difference between the model and its graph on random inputs, relative where above 1."""
    worst, longest = 0.0, each.model.max_text_len
    for samples, tokens in CHECKED:
        inputs = each.example(samples, min(tokens, longest))  # type: ignore[type-var, arg-type]
        with torch.inference_mode():
            expected = each(*inputs)
        apart = (graph(dict(zip(each.inputs, inputs, strict=True))) - expected).abs().max()
        worst = max(worst, float(apart / expected.abs().max().clamp(min=1)))
    return worst


def calibration(
    predictor: Predictor, each: ForwardPass, columns: Sequence[str], rows: Sequence[Row]
) -> list[list[Tensor]]:
    """Makes a forward pass's inputs of the rows that have its columns, a sample at a time."""
    own = [row for row in rows if all(column in row for column in columns)][:CALIBRATION_ROWS]
    if not own:
        return []
    _, computed = asked_of(predictor, each.name, {column: [row[column] for row in own] for column in columns})
    batches = predictor.batches(computed)
    return [
        [batch[name][i : i + 1] for name in each.inputs] for batch in batches for i in range(len(batch[each.inputs[0]]))
    ]


def describe(predictor: Predictor, out: Path, kind: str, graphs: dict[str, Any], source: str) -> None:
    """Writes what a user of the graphs needs to know: export.json and vocab.txt."""
    model, words = predictor.model, predictor.vocabulary
    metadata = metadata_of(model).replace(answers=predictor.answers, vocabulary=None).to_dict()
    del metadata["vocabulary"]
    tokenizer = predictor.tokenizer
    content = {
        "vlmo_version": __version__,
        "format": kind,
        "source": source,
        "graphs": graphs,
        "image": {
            "size": model.image_size,
            "resize": "bicubic, the whole image to a square",
            "channels": "RGB",
            "range": [0, 1],
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
        },
        "text": {
            "tokenizer": "BERT WordPiece",
            "vocabulary": VOCABULARY_FILE,
            "lower_case": True,
            "max_tokens": model.max_text_len,
            "ids": {"[CLS]": tokenizer.cls_token_id, "[SEP]": tokenizer.sep_token_id, "[PAD]": tokenizer.pad_token_id},
        },
        # single numbers beside the graphs, such as the temperature of the contrast
        "parameters": {name: each.item() for name, each in model.named_parameters() if not each.ndim},
        "model": metadata,
    }
    (out / VOCABULARY_FILE).write_bytes("".join(f"{word}\n" for word in words).encode())
    (out / EXPORT_FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, or 2 after a mistake of the user."""
    print_anything()
    parser = command_parser("vlmo.export", __doc__)
    parser.add_argument("checkpoint", metavar="CKPT", help="file, folder or name on the hub")
    parser.add_argument("out", metavar="OUT", help="a new folder")
    parser.add_argument("--format", choices=list(WRITERS), required=True)
    parser.add_argument("--int8", action="store_true", help="quantise")
    parser.add_argument("--calibrate", metavar="ROWS", help="file of rows or folder of images, for --int8")
    parser.add_argument("--tokenizer", help="vocab.txt, folder or hub name, if the checkpoint has no vocabulary")
    parser.add_argument("--answers", help="JSON list of the answers, if the checkpoint has none")
    parser.add_argument("--image-size", type=int, help="pixels a side, other than the checkpoint's")
    parser.add_argument("--plugins", action="append", default=[], metavar="MODULE", help="can be given several times")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="torch|onnxscript|nncf|openvino")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        require_packages(options.format, options.int8)
        plugins.load(options.plugins)
        if options.calibrate and not options.int8:
            raise VLMoError("--calibrate: is for --int8")
        if options.int8 and options.format == "openvino" and not options.calibrate:
            raise VLMoError("--int8: needs images and texts to calibrate with: give --calibrate ROWS")
        sizes = {"image_size": options.image_size} if options.image_size else {}
        predictor = Predictor.from_pretrained(
            options.checkpoint, options.tokenizer, options.answers, device="cpu", **sizes
        )
        names = {column for columns in columns_of(predictor).values() for column in columns}
        images = [name for name in names if name.startswith("image")]
        rows = read_rows(options.calibrate, images) if options.calibrate else []
        for line in export(predictor, options.out, options.format, options.int8, rows, options.checkpoint):
            print(line)
    except VLMoError as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
