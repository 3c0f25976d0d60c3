"""The VQA challenge's rules for answers."""

import json
from pathlib import Path

import pytest

from vlmo.utils import vqa_answers
from vlmo.utils.vqa_answers import build_vocabulary, label_answers, normalise_answer

RULES = json.loads((Path(__file__).parents[2] / "goldens" / "vqa_normalisation.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("answer", "normal"), RULES["examples"].items())
def test_normal_form(answer, normal):
    assert normalise_answer(answer) == normal


def test_tables():
    assert RULES["contractions"] == vqa_answers.CONTRACTIONS
    assert RULES["number_words"] == vqa_answers.NUMBER_WORDS
    assert set(RULES["articles"]) == vqa_answers.ARTICLES
    assert RULES["punctuation"] == list(vqa_answers.PUNCTUATION)
    assert RULES["period_strip_regex"] == vqa_answers.PERIOD.pattern
    assert RULES["comma_strip_regex"] == vqa_answers.COMMA_IN_NUMBER.pattern


def test_vocabulary_is_in_order_of_first_appearance():
    assert build_vocabulary(["b", "a", "c", "a", "b"], 2) == ["b", "a"]
    assert build_vocabulary([], 1) == []


def test_scores_of_ten_people():
    answers = ["a"] * 4 + ["b"] * 3 + ["c"] * 2 + ["d"]
    known = label_answers(answers, {"d": 0, "c": 1, "b": 2, "a": 3})
    assert known == (["a", "b", "c", "d"], [3, 2, 1, 0], [1.0, 0.9, 0.6, 0.3])
    assert label_answers(answers, {"c": 7}) == (["c"], [7], [0.6])
    assert label_answers(["a"] * 10, {"a": 0})[2] == [1.0]


def test_fewer_people_are_scaled_to_ten():
    assert label_answers(["a"], {"a": 0}) == (["a"], [0], [1.0])
    assert label_answers(["a", "b"], {"a": 0, "b": 1})[2] == [1.0, 1.0]
    assert label_answers(["a", "a", "b", "c", "d"], {"a": 0, "b": 1})[2] == [1.0, 0.6]
    assert label_answers([], {"a": 0}) == ([], [], [])
