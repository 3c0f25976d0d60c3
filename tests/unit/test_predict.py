"""python -m vlmo.predict: one input or many, from files to files."""

import csv
import errno
import importlib
import json
import runpy
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny
from tests.tables import VOCABULARY, picture
from vlmo.inference import Predictor
from vlmo.modules import VLMoModel
from vlmo.predict import all_commands, main
from vlmo.registry import TASKS

WORDS = list(dict.fromkeys(VOCABULARY))
CHECKPOINTS = {
    "pairs": "task_mlm_itm_itc_base",
    "vqa": "task_finetune_vqa_base_image480",
    "nlvr2": "task_finetune_nlvr2_base",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints `pairs`, `vqa` and `nlvr2`, and pictures in `images`."""
    folder = tmp_path_factory.mktemp("predict")
    for name, task in CHECKPOINTS.items():
        torch.manual_seed(0)
        model = tiny.model(task)
        model.vocabulary, model.answers = WORDS, ["yes", "no", "red"]
        model.save_pretrained(folder / name)
    (folder / "images" / "more").mkdir(parents=True)
    for seed, name in enumerate(["a.png", "b.png", "more/c.jpg"]):
        picture(seed).save(folder / "images" / name)
    return folder


@pytest.fixture
def run(folder, capsys):
    """Runs a command on a checkpoint: the exit status, rows of the standard output, the standard error."""

    def call(command, checkpoint, *arguments):
        given = [str(argument) for argument in arguments]
        status = main([command, "--checkpoint", str(folder / checkpoint), "--device", "cpu", *given])
        printed = capsys.readouterr()
        return status, [json.loads(line) for line in printed.out.splitlines()], printed.err

    return call


def images(folder):
    return [str(folder / "images" / name) for name in ("a.png", "b.png", "more/c.jpg")]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- one input --------------------------------------------------------------------------------------------------------


def test_one_of_each(folder, run):
    a, b, _ = images(folder)
    predictor = Predictor.from_pretrained(folder / "vqa", device="cpu")
    status, (row,), _ = run("answer", "vqa", "--image", a, "--question", "what is left ?", "--top-k", 2)
    expected = predictor.answer(a, "what is left ?", top_k=2)
    assert status == 0 and row["image"] == a and row["question"] == "what is left ?"
    assert [guess["text"] for guess in row["answers"]] == [guess.text for guess in expected]
    assert row["answers"][0]["score"] == pytest.approx(expected[0].score, abs=1e-5)

    predictor = Predictor.from_pretrained(folder / "nlvr2", device="cpu")
    _, (row,), _ = run("compare", "nlvr2", "--image-a", a, "--image-b", b, "--statement", "a cat")
    assert row["true"] == pytest.approx(predictor.compare(a, b, "a cat"), abs=1e-5)

    predictor = Predictor.from_pretrained(folder / "pairs", device="cpu")
    _, (row,), _ = run("match", "pairs", "--image", a, "--text", "a cat")
    assert row["match"] == pytest.approx(predictor.match(a, "a cat"), abs=1e-5)
    _, (row,), _ = run("fill", "pairs", "--text", "a [MASK] cat", "--image", a, "--top-k", 3)
    assert [guess["text"] for guess in row["masks"][0]] == [
        g.text for g in predictor.fill_mask("a [MASK] cat", a, 3)[0]
    ]
    _, (row,), _ = run("embed", "pairs", "--text", "a cat")
    np.testing.assert_allclose(row["text_embedding"], predictor.embed_texts(["a cat"])[0], atol=1e-6)


def test_attention_as_picture_and_as_weights(folder, run, tmp_path):
    given = ("--image", images(folder)[0], "--text", "the red cat")
    status, (row,), _ = run(
        "attention", "pairs", *given, "--output", tmp_path / "a.png", "--token", "red", "--layer", 1
    )
    shown = Predictor.from_pretrained(folder / "pairs", device="cpu").attention(*given[1::2])
    assert status == 0 and row["picture"] == str(tmp_path / "a.png")
    assert Image.open(row["picture"]).tobytes() == shown.picture("red", 1).tobytes()
    run("attention", "pairs", *given, "--output", tmp_path / "a.npz")
    weights = np.load(tmp_path / "a.npz")
    np.testing.assert_allclose(weights["weights"], shown.weights, atol=1e-6)
    assert weights["tokens"].tolist() == shown.tokens


def test_imports_what_it_needs_alone(folder):
    """No framework of training, no data sets, nothing of transformers: they would take as long as the rest."""
    heavy = {"pytorch_lightning", "sacred", "transformers", "huggingface_hub", "torchmetrics", "timm", "torchvision"}
    heavy |= {"pyarrow", "pandas", "scipy", "matplotlib", "torch._dynamo", "torch._inductor", "sympy"}
    arguments = ["answer", "--checkpoint", str(folder / "vqa"), "--image", images(folder)[0], "--question", "is it red"]
    code = f"import sys; from vlmo.predict import main; main({arguments}); print(*sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    answer, modules = printed.splitlines()
    assert "answers" in json.loads(answer)
    assert not heavy & set(modules.split())


# --- many -------------------------------------------------------------------------------------------------------------


def test_rows_of_a_file_keep_their_columns_and_order(folder, run, tmp_path):
    rows = [{"id": n, "image": f"images/{name}"} for n, name in enumerate(["b.png", "a.png", "more/c.jpg"])]
    rows[1]["question"] = "what is left ?"
    source = write_jsonl(folder / "rows.jsonl", rows)
    given = ("--question", "is it red ?", "--batch-size", 2)
    status, found, _ = run("answer", "vqa", "--input", source, *given)
    assert status == 0 and [row["id"] for row in found] == [0, 1, 2]
    assert [row["question"] for row in found] == ["is it red ?", "what is left ?", "is it red ?"]
    assert found[0]["image"] == images(folder)[1]
    assert found[0]["answers"] == run("answer", "vqa", "--image", images(folder)[1], *given)[1][0]["answers"]
    status, out, _ = run("answer", "vqa", "--input", source, *given, "--output", tmp_path / "out.jsonl")
    assert (status, out) == (0, [])
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == found


def test_csv_and_folders(folder, run):
    with open(folder / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", "text"], ["images/a.png", "a cat"], ["images/b.png", ""]])
    _, rows, _ = run("match", "pairs", "--input", folder / "rows.csv", "--text", "a dog")
    assert [row["text"] for row in rows] == ["a cat", "a dog"] and all(0 < row["match"] < 1 for row in rows)
    for given in ("--image", "--input"):
        _, rows, _ = run("match", "pairs", given, folder / "images", "--text", "a dog")
        assert [row["image"] for row in rows] == images(folder)


def test_masks_with_and_without_images(folder, run):
    source = write_jsonl(folder / "masks.jsonl", [{"text": "a [MASK]"}, {"text": "a [MASK]", "image": "images/a.png"}])
    _, (alone, illustrated), _ = run("fill", "pairs", "--input", source)
    assert alone["masks"] == run("fill", "pairs", "--text", "a [MASK]")[1][0]["masks"] != illustrated["masks"]


def test_embeddings_as_arrays(folder, run, tmp_path):
    predictor = Predictor.from_pretrained(folder / "pairs", device="cpu")
    for branch, given in (("v", ()), ("vl", ("--vl-branch",))):
        output = tmp_path / "features.npz"
        run("embed", "pairs", "--image", folder / "images", "--text", "a cat", "a dog", *given, "--output", output)
        arrays = np.load(output)
        assert arrays["image"].tolist() == images(folder) and arrays["text"].tolist() == ["a cat", "a dog"]
        np.testing.assert_allclose(
            arrays["image_embedding"], predictor.embed_images(images(folder), branch), rtol=0, atol=1e-6
        )
        assert len(arrays["text_embedding"]) == 2


def test_rank(folder, run):
    texts = ["a cat", "the dog runs"]
    scores = Predictor.from_pretrained(folder / "pairs", device="cpu").rank(images(folder), texts).scores
    _, rows, _ = run("rank", "pairs", "--image", folder / "images", "--text", *texts, "--top-k", 2)
    for column, row in enumerate(rows):
        best = scores[:, column].topk(2)
        assert row["text"] == texts[column]
        assert [hit["image"] for hit in row["images"]] == [images(folder)[i] for i in best.indices]
        assert [hit["score"] for hit in row["images"]] == pytest.approx(best.values.tolist(), abs=1e-5)
    _, rows, _ = run("rank", "pairs", "--image", folder / "images", "--text", *texts, "--by", "image")
    assert [row["texts"][0]["text"] for row in rows] == [texts[i] for i in scores.argmax(1)]


def test_attention_of_many_goes_to_a_folder(folder, run, tmp_path):
    given = ("--image", folder / "images", "--text", "a cat")
    status, rows, _ = run("attention", "pairs", *given, "--output", tmp_path / "pictures")
    names = ["000000_a.png", "000001_b.png", "000002_c.png"]
    assert status == 0 and sorted(path.name for path in (tmp_path / "pictures").iterdir()) == names
    status, _, err = run("attention", "pairs", *given, "--output", tmp_path / "one.png")
    assert status == 2 and "need a folder" in err


PLUGIN = """
import torch
from vlmo.registry import TASKS
from vlmo.tasks.base import Task, Use


def colour_of(predictor, image, top_k=1, exact=False):
    \"\"\"Gives the colours of an image.\"\"\"
    logits = predictor.compute(lambda model, batch: model.colour(batch["image"].mean((2, 3))), image=image)
    return [predictor.best(row, ["red", "green"], top_k) if not exact else row.tolist() for row in logits]


@TASKS.register("colour")
class Colour(Task):
    name = "colour"
    options = {"top_k": 2, "exact": False}
    uses = (Use("colour_of", colour_of, "colour", "telling colours", ("image",), "colours", options=options),)

    def heads(self, width):
        return {"colour": torch.nn.Linear(3, 2)}
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The name of a module with a task that offers something; it is unknown again after the test."""
    (tmp_path / "plugin_of_a_test.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "plugin_of_a_test"
    sys.modules.pop("plugin_of_a_test", None)
    TASKS.pop("colour", None)


def test_a_task_from_outside_brings_its_command(folder, run, plugin, capsys):
    given = ("--image", images(folder)[0])
    with pytest.raises(SystemExit):
        run("colour-of", "colour", *given)
    assert "invalid choice: 'colour-of'" in capsys.readouterr().err
    importlib.import_module(plugin)
    model = VLMoModel("vlmo_tiny_patch16", ("colour",), image_size=32, vocab_size=64, max_text_len=24)
    model.vocabulary = WORDS
    model.save_pretrained(folder / "colour")
    del TASKS["colour"], sys.modules[plugin]

    status, _, err = run("match", "colour", *given, "--text", "a cat")
    assert status == 2 and "'colour' is unknown" in err and "plugin" in err
    status, (row,), _ = run("colour-of", "colour", *given, "--plugins", plugin)
    found = Predictor.from_pretrained(folder / "colour", device="cpu").colour_of(images(folder)[0], 2)
    assert status == 0 and row["image"] == images(folder)[0]
    expected = [{"text": each.text, "score": pytest.approx(each.score, abs=1e-5)} for each in found]
    assert row["colours"] == expected and len(expected) == 2
    _, (row,), _ = run("colour-of", "colour", *given, "--plugins", plugin, "--exact")
    assert sorted(row["colours"], reverse=True) == [each["score"] for each in expected]
    with pytest.raises(SystemExit):
        main(["--plugins", plugin, "--help"])
    assert "Gives the colours of an image." in capsys.readouterr().out
    del TASKS["colour"], sys.modules[plugin]
    assert Predictor.from_pretrained(folder / "colour", device="cpu", plugins=[plugin]).colour_of(images(folder)[0])
    status, _, err = run("match", "pairs", *given, "--text", "a cat", "--plugins", "no.such.module")
    assert status == 2 and "no.such.module" in err and err.count("\n") == 1


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_an_unreadable_image_costs_only_its_row(folder, run, tmp_path):
    (tmp_path / "bad.png").write_text("text")
    rows = [{"image": images(folder)[0]}, {"image": str(tmp_path / "bad.png")}, {"image": images(folder)[1]}]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    status, (first, bad, last), err = run("match", "pairs", "--input", source, "--text", "a cat")
    assert status == 1 and "match" in first and "match" in last
    assert "no image that can be decoded" in bad["error"] and "match" not in bad
    assert err.splitlines()[-1] == "1 of 3 rows could not be used"
    status, _, err = run("match", "pairs", "--image", tmp_path / "bad.png", "--text", "a cat")
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
    status, rows, _ = run("rank", "pairs", "--input", source, "--text", "a cat")
    assert status == 1 and "error" in rows[0] and len(rows[1]["images"]) == 2
    status, _, err = run("embed", "pairs", "--input", source, "--output", tmp_path / "f.npz")
    assert status == 1 and "bad.png" in err and len(np.load(tmp_path / "f.npz")["image"]) == 2


@pytest.mark.parametrize(
    "command, output, message",
    [
        ("match", "folder", "is a folder"),
        ("match", "folder.jsonl", "is a folder"),
        ("match", "results", ".jsonl"),
        ("match", "results.csv", ".jsonl"),
        ("match", "features.npz", ".jsonl"),
        ("embed", "features.npy", ".jsonl or FILE.npz"),
        ("embed", "folder.npz", "is a folder"),
        ("rank", "no/results.jsonl", "does not exist"),
        ("match", "file/results.jsonl", "does not exist"),
        ("attention", "a.xyz", ".png"),
        ("attention", "file", "not a folder"),
        ("attention", "file/pictures", "not a folder"),
    ],
)
def test_the_output_is_looked_at_before_the_model_is_loaded(folder, run, tmp_path, command, output, message):
    for name in ("folder", "folder.npz", "folder.jsonl"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("of the user's")
    given = ("--image", images(folder)[0], "--text", "a cat", "--output", tmp_path / output)
    status, out, err = run(command, "no such checkpoint", *given)
    assert status == 2 and not out and message in err and "--output" in err and err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "of the user's"


def test_an_output_on_a_disk_that_takes_nothing(folder, run, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    given = ("--image", images(folder)[0], "--text", "a cat", "--output", tmp_path / "a.jsonl")
    status, _, err = run("match", "no such checkpoint", *given)
    assert status == 2 and "Permission denied" in err


def test_outputs_that_are_taken(folder, run, tmp_path, monkeypatch):
    given = ("--image", images(folder)[0], "--text", "a cat", "--output")
    assert run("match", "pairs", *given, "/dev/null")[0] == 0
    monkeypatch.setenv("HOME", str(tmp_path))
    for _ in range(2):  # an older file is written over
        assert run("match", "pairs", *given, "~/a.jsonl")[0] == 0
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 1
    (tmp_path / "pictures.d").mkdir()
    assert run("attention", "pairs", *given, tmp_path / "pictures.d")[0] == 0
    assert len(list((tmp_path / "pictures.d").iterdir())) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ("answer", "pairs", "--image", "{images}/a.png", "--question", "what"),
            "answering needs a checkpoint with vqa",
        ),
        (("answer", "vqa", "--question", "what"), "row 1 has no value: give --image"),
        (("compare", "nlvr2", "--image-a", "a.png"), "give --image-b and --statement"),
        (("embed", "pairs"), "nothing to do"),
        (("match", "pairs", "--image", "{images}/absent.png", "--text", "a"), "absent.png: cannot be read"),
        (("match", "absent.pt", "--image", "{images}/a.png", "--text", "a"), "no such file"),
        (("match", "pairs", "--image", "{root}/empty", "--text", "a"), "has no images"),
        (("match", "pairs", "--input", "{root}/rows.xml", "--text", "a"), "unknown kind of annotation file"),
        (("match", "pairs", "--input", "{root}/none.jsonl", "--text", "a"), "has no rows"),
        (("match", "pairs", "--input", "{root}/odd.jsonl", "--text", "a"), "odd.jsonl:1: 'image' must be a path"),
        (("embed", "pairs", "--text", "a", "--output", "{root}/no/f.npz"), "its folder does not exist"),
        (("embed", "pairs", "--text", "a", "--device", "nonsense"), "device=nonsense"),
        (("embed", "pairs", "--text", "a", "--image-size", "33"), "image_size=33: must be a multiple"),
        (("embed", "pairs", "--text", "a", "--tokenizer", "{root}/none.jsonl"), "is not a BERT WordPiece"),
        (("fill", "pairs", "--text", "a cat"), "has no [MASK]"),
        (
            ("attention", "pairs", "--image", "{images}/a.png", "--text", "a", "--output", "{root}/a.xyz"),
            "give a .png, .jpg or .npz file",
        ),
    ],
)
def test_refusals_are_one_line(folder, run, arguments, message):
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "none.jsonl").write_text("\n")
    write_jsonl(folder / "odd.jsonl", [{"image": 3}])
    status, out, err = run(*(argument.format(root=folder, images=folder / "images") for argument in arguments))
    assert status == 2 and not out and message in err and err.startswith("error: ") and err.count("\n") == 1


def test_the_options_of_every_command_have_help(capsys):
    for command in all_commands():
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0 and "--checkpoint" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["answer", "--checkpoint", "c", "--top-k", "0"])
    assert stopped.value.code == 2


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_as_a_command(folder, capsys, monkeypatch):
    given = ["--checkpoint", folder / "pairs", "--image", folder / "images", "--text", "a cat", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["vlmo.predict", "match", *map(str, given)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("vlmo.predict", run_name="__main__")
    assert stopped.value.code == 0 and len(capsys.readouterr().out.splitlines()) == 3
