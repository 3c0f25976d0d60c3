"""What the page shows, without a page: abilities, limits, the search of a folder, attention, the data browser."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tables, tiny
from tests.tables import VOCABULARY, picture
from vlmo.app.__main__ import main
from vlmo.app.attention import choices, layer_pictures, token_of
from vlmo.app.browser import Browser
from vlmo.app.data_tabs import negatives_table, tokens_line
from vlmo.app.examples import painted
from vlmo.app.image_folder import ImageFolder
from vlmo.app.limits import Requests, checked_image, checked_text
from vlmo.app.models import ABILITIES, LoadedModel, Models, key_of, short_name
from vlmo.errors import InputError, VLMoError
from vlmo.inference import Predictor
from vlmo.settings import Settings

TASKS = {
    "pairs": "task_mlm_itm_itc_base",
    "vqa": "task_finetune_vqa_base_image480",
    "nlvr2": "task_finetune_nlvr2_base",
}


def predictor(name):
    torch.manual_seed(0)
    model = tiny.model(TASKS[name])
    model.vocabulary, model.answers = list(dict.fromkeys(VOCABULARY)), ["yes", "no", "red"]
    return Predictor(model, device="cpu")


@pytest.fixture(scope="module")
def models():
    return Models(LoadedModel(name, predictor(name), name) for name in TASKS)


def test_what_each_checkpoint_can_do(models):
    assert {ability: models.able(ability) for ability in ABILITIES} == {
        "answer": ["vqa"],
        "match": ["pairs"],
        "search": ["pairs"],
        "compare": ["nlvr2"],
        "fill_mask": ["pairs"],
        "attention": ["pairs", "vqa", "nlvr2"],
        "classify": ["pairs"],
    }
    assert models.get(None, "answer") is models.by_name["vqa"].predictor
    for name, ability in (("pairs", "answer"), ("gone", "match")):
        with pytest.raises(InputError, match="needs a checkpoint with"):
            models.get(name, ability)
    assert models.why_not("compare").count("cannot do this") == 2
    unnamed = predictor("vqa")
    unnamed.answers = None
    assert "--answers" in LoadedModel("x", unnamed, "").cannot("answer")


def test_names_and_keys(tmp_path):
    file = tmp_path / "log" / "run" / "version_3" / "checkpoints" / "last.ckpt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"one")
    assert short_name(file) == "run/version_3"
    before = key_of(file)
    file.write_bytes(b"two")
    assert key_of(file) != before and len(before) == 64


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no image"),
        (b"some text", "no image"),
        (tables.png(0)[:-40], "damaged"),
        (tables.encoded(Image.new("1", (10_000, 10_000))), "100 megapixels"),
    ],
)
def test_images_that_are_refused(content, message, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        checked_image(str(path))


def test_other_limits(tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    path.write_bytes(tables.png(0))
    assert checked_image(str(path)).size == (40, 30) and checked_text(" a \n") == "a"
    monkeypatch.setattr("vlmo.app.limits.MOST_BYTES", 10)
    for wrong in (lambda: checked_image(str(path)), lambda: checked_image(None), lambda: checked_text(" ")):
        with pytest.raises(InputError):
            wrong()
    with pytest.raises(InputError, match="1,001 characters"):
        checked_text("a" * 1001)


def test_requests_of_a_minute():
    now = [0.0]
    requests = Requests(2, lambda: now[0])
    for visitor in ("a", "a", "b"):
        requests.count(visitor)
    with pytest.raises(InputError, match="wait 60 seconds"):
        requests.count("a")
    requests.count("b")
    now[0] = 61
    requests.count("a")


def embedded(folder):
    """How many images a refresh embeds, or finds to be none."""
    return max((total for _, total in folder.refresh()), default=0)


def test_features_of_a_folder_are_computed_once(tmp_path):
    folder, cache = tmp_path / "images", tmp_path / "cache"
    (folder / "more").mkdir(parents=True)
    for seed, name in enumerate(("a.png", "b.png", "more/c.png")):
        picture(seed).save(folder / name)
    (folder / "bad.png").write_text("no image")
    model = predictor("pairs")
    searched = ImageFolder(folder, model, "key", cache)
    assert embedded(searched) == 4 and list(searched.unreadable) == [str(folder / "bad.png")]
    query = model.embed_images([str(folder / "b.png")])[0]
    best, *_ = found = searched.search(query, 2)
    assert len(found) == 2 and best == (str(folder / "b.png"), pytest.approx(1, abs=1e-5))

    again = ImageFolder(folder, model, "key", cache)
    assert embedded(again) == 1  # the one that is no image
    assert again.search(query, 3) == [
        (path, pytest.approx(score, abs=1e-6)) for path, score in searched.search(query, 3)
    ]
    picture(9).save(folder / "b.png")
    os.utime(folder / "b.png", (1, 1))
    (folder / "a.png").unlink()
    assert embedded(again) == 1 and len(again.files) == 2
    assert again.search(model.embed_images([picture(9)])[0], 1)[0][1] == pytest.approx(1, abs=1e-5)
    assert embedded(ImageFolder(folder, model, "another checkpoint", cache)) == 3
    picture(3).save(folder / "bad.png")
    assert embedded(again) == 1 and embedded(again) == 0 and len(again.files) == 3
    again.cache.write_bytes(b"damaged")
    assert embedded(ImageFolder(folder, model, "key", cache)) == 3


def test_a_refresh_that_is_stopped_keeps_what_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmo.app.image_folder.BATCH", 2)
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(5):
        picture(seed).save(folder / f"{seed}.png")
    model = predictor("pairs")
    stopped = ImageFolder(folder, model, "key", tmp_path).refresh()
    assert [next(stopped), next(stopped)] == [(0, 5), (2, 5)]
    stopped.close()
    one, other = (ImageFolder(folder, model, "key", tmp_path), ImageFolder(folder, model, "key", tmp_path))
    first, second = one.refresh(), one.refresh()
    assert next(first) == next(second) == (0, 3)
    assert [*first] == [*second] == [(2, 3)] and len(one.files) == 5  # each in turn, nothing twice
    assert embedded(other) == 0


def test_attention_is_drawn_layer_by_layer(models):
    shown = models.get("pairs", "attention").attention(picture(0), "the red cat")
    names = choices(shown)
    assert names[0] == "all words" and names[3] == "2: red" and token_of(names[3]) == 2 and token_of(names[0]) is None
    for choice, tokens in ((names[3], [2]), (names[0], [1, 2, 3])):
        drawn = layer_pictures(shown, choice)
        assert len(drawn) == len(shown.layers)
        share = float(shown.weights[1].mean(0)[tokens].mean(0).sum())
        assert drawn[1][1] == f"layer 2: {share:.0%} on the image"
    fields = np.asarray(shown.picture("red", 0, longer_side=64))
    assert len(np.unique(fields[0, :, 0].astype(int) - np.asarray(shown.image.resize((64, 48)))[0, :, 0])) > 1


def test_examples_are_painted(tmp_path):
    paths = painted(tmp_path)
    assert len(paths) == 3 and Image.open(paths[0]).size == (320, 320)


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    tables.write_coco(root)
    tables.write_images(root)
    tables.write_vocabulary(root)
    images = [tables.png(0), b"no image", tables.encoded(picture(2, (64, 64)))]
    columns = {
        "image": images,
        "caption": [["a red cat"], ["a dog"], ["a blue cat " * 20]],
        "image_id": ["a", "b", "c"],
    }
    tables.write_table(root / "sbu_0.arrow", columns | {"split": ["train"] * 3})
    return root


def browser(root, task, **options):
    options = {"data_root": str(root), "tokenizer": str(root / "vocab.txt")} | options
    return Browser(Settings.from_config(tiny.config(task, **options)))


def test_a_sample_as_the_model_sees_it(root):
    seen = browser(root, TASKS["pairs"], datasets=["coco", "sbu"])
    assert seen.names == ["coco, train", "sbu, train", "coco, val"] and seen.size("sbu, train") == 3
    one = seen.sample("coco, train", 0)
    dataset = seen.sets["coco, train"]
    item = dataset[0, 0]
    assert one.before[0].size == (40, 30) and one.after[0].size == (32, 32) and one.text == item["text"]
    assert np.array_equal(np.asarray(one.after[0]), item["image"].permute(1, 2, 0))
    kinds = [kind for _, kind in one.tokens]
    assert sum(bool(kind) for kind in kinds) == sum(label != -100 for label in item["text_labels_mlm"])
    assert tokens_line(one.tokens).count("</span>") == len(kinds) + len(set(kinds) - {""})
    assert one.tokens[0] == ("[CLS]", "") and one.facts["image, pixels"] == "40 x 30"
    assert seen.sample("coco, train", 0, seed=1).after[0].tobytes() != one.after[0].tobytes()
    bad = seen.sample("sbu, train", 1)
    assert bad.problem and not bad.after and bad.text == "a dog"
    with pytest.raises(InputError, match="no number 99"):
        seen.sample("coco, train", 99)


def test_search_and_filters(root):
    seen = browser(root, TASKS["pairs"], datasets=["sbu"])
    assert seen.find("sbu, train", "cat A") == ([0, 2], 3)
    assert seen.find("sbu, train", "cat", start=1) == ([2], 3)
    assert seen.find("sbu, train", kept="cannot be read") == ([1], 3)
    assert seen.find("sbu, train", kept="text is cut") == ([2], 3)
    assert seen.find("sbu, train", kept="image is smaller than the model's") == ([0], 3)


def test_hidden_patches(root):
    seen = browser(root, "task_mim_base", datasets=["images"], mim_mask_ratio=0.25)
    one = seen.sample("images, train", 0)
    pixels = np.asarray(one.after[0]).reshape(2, 16, 2, 16, 3)
    grey = [(pixels[row, :, column] == 128).all() for row in (0, 1) for column in (0, 1)]
    assert sum(grey) == 1 and one.facts["hidden patches"] == "1 of 4"


def test_hard_negatives_of_a_batch(root, models):
    seen = browser(root, TASKS["pairs"], datasets=["coco"])
    rows = seen.negatives("coco, train", 0, 6, models.get("pairs", "search"))
    assert len(rows) == 6
    for row in rows:
        assert row["other image"] is not row["image"] and 0 < row["chance of text"] <= 1
    page = negatives_table(rows)
    assert page.count("<img") == 12 and f"({rows[3]['chance of text']:.0%})" in page
    for without in (None, models.by_name["vqa"].predictor):
        with pytest.raises(InputError, match="contrast"):
            seen.negatives("coco, train", 0, 6, without)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give --checkpoint"),
        (["--data", "x"], "--config"),
        (["--checkpoint", "x", "--config", "task_mim_base"], "--data ROOT"),
        (["--checkpoint", "x", "--images", "no such folder"], "is no folder"),
    ],
)
def test_mistakes_of_the_command_line(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_page_needs_an_extra(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["--checkpoint", "x"]) == 2 and "vlmo[app]" in capsys.readouterr().err


def test_a_config_that_does_not_exist(capsys):
    pytest.importorskip("gradio")
    assert main(["--data", "x", "--config", "task_mlm_itm_itc_bas"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_without_a_checkpoint():
    with pytest.raises(VLMoError, match="--checkpoint"):
        Models([]).get(None, "answer")
