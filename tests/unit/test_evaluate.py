"""The command: any number of processes and batch sizes, what is wrong said at once, and what it writes."""

import json
from functools import partial

import pytest

from tests import suites, tables
from tests.processes import in_processes
from vlmo.errors import VLMoError
from vlmo.evaluate import evaluate, main
from vlmo.evaluation import pair_scores, pictures
from vlmo.registry import SUITES

FEW = ["caption_pairs", "winoground", "coco_1k", "flickr30k", "vqa", "nlvr2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return suites.checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    suites.write_caption_pairs(root)
    suites.write_winoground(root)
    suites.write_retrieval(root)
    tables.write_vqa(root)
    tables.write_nlvr2(root)
    return root


def figures(results):
    return {
        (suite, each.part, each.metric, each.score): each[3:6]
        for suite, result in results.items()
        for each in result.measures
    }


@pytest.fixture(scope="module")
def expected(checkpoint, data):
    return figures(evaluate(checkpoint, FEW, data, rerank=3))


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batch_sizes(checkpoint, data, expected, batch_size):
    assert figures(evaluate(checkpoint, FEW, data, batch_size=batch_size, rerank=3)) == expected


def _few_at_a_time(checkpoint, data, rank):
    pair_scores.IMAGES_AT_ONCE, pair_scores.TEXTS_AT_ONCE = 2, 3
    return figures(evaluate(checkpoint, FEW, data, rerank=3))


@pytest.mark.parametrize("world", [2, 3])
def test_processes(checkpoint, data, expected, tmp_path, world):
    assert in_processes(partial(_few_at_a_time, checkpoint, data), tmp_path, world) == [expected] * world


def test_images_are_decoded_once(checkpoint, data, monkeypatch):
    """Whatever suites have them in common, and however candidates are ordered anew; also where nothing is kept."""
    names, decode = [], pictures.decode_image
    monkeypatch.setattr(pictures, "decode_image", lambda *given: names.append(1) or decode(*given))
    found = figures(evaluate(checkpoint, ["coco_5k", "coco_1k"], data, rerank=2, rerank_by=["itm", "mlm"]))
    assert len(names) == 7
    ways = {f"{name}{by}" for name in pair_scores.OF_FEATURES for by in ("", "+itm", "+mlm")}
    assert {score for suite, *_, score in found if suite == "coco_5k"} == ways


def test_tables_of_ones_own(checkpoint, data, expected, tmp_path):
    (tmp_path / "caption_retrieval").mkdir()
    (tmp_path / "caption_retrieval/mine.arrow").symlink_to(data / "f30k_caption_karpathy_test.arrow")
    found = figures(evaluate(checkpoint, "caption_retrieval", tmp_path))
    for (suite, part, metric, score), value in expected.items():
        if suite == "flickr30k" and "+" not in score:
            assert found["caption_retrieval", f"mine {part}", metric, score] == value


def test_scores_and_suites(expected):
    scores = {score for suite, *_, score in expected if suite == "winoground"}
    assert scores == set(pair_scores.HEADS)
    assert {score for suite, *_, score in expected if suite == "coco_1k"} == {
        "cosine",
        "cosine_vl",
        "cosine+itm",
        "cosine_vl+itm",
    }


def test_the_command(checkpoint, data, tmp_path, capsys):
    arguments = [
        str(checkpoint),
        "--suite",
        "winoground",
        "caption_pairs",
        "--data",
        str(data),
        "--out",
        str(tmp_path),
        "--report",
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "winoground" in printed and "chance" in printed
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["settings"]["suites"] == ["winoground", "caption_pairs"]
    assert all(len(each) == 64 for each in written["checkpoint_sha256"].values())
    assert len(written["suites"]["caption_pairs"]["files_sha256"]) == 2
    assert len(written["suites"]["winoground"]["measures"]) == 4 * 3 * 4
    page = (tmp_path / "report.html").read_text()
    assert "data:image/" in page and "http" not in page
    assert main(arguments) == 0  # from what was kept
    assert json.loads((tmp_path / "results.json").read_text())["suites"] == written["suites"]


def test_unknown_suites_list_the_known_ones(checkpoint, data):
    with pytest.raises(VLMoError, match=r"did you mean winoground\?.*sugarcrepe"):
        evaluate(checkpoint, ["winogrond"], data)


@pytest.mark.parametrize("name", sorted(SUITES))
def test_missing_data_says_what_to_get(name, checkpoint, tmp_path):
    with pytest.raises(VLMoError, match=f"suite {name}: {tmp_path}"):
        evaluate(checkpoint, name, tmp_path)


def test_missing_images(checkpoint, tmp_path):
    suites.write_caption_pairs(tmp_path)
    (tmp_path / "caption_pairs/images/3.png").unlink()
    with pytest.raises(VLMoError, match=r"1 of 5 images are missing, such as .*3\.png"):
        evaluate(checkpoint, "caption_pairs", tmp_path)


def test_suites_are_listed(capsys):
    assert main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name}: " in printed for name in SUITES)


@pytest.mark.slow
def test_processes_that_it_starts(checkpoint, data, expected):
    assert figures(evaluate(checkpoint, FEW, data, devices=2, rerank=3)) == expected
