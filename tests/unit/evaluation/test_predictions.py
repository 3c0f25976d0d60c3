"""Prediction files, read back as the official scripts read them."""

import json

import pytest

from vlmo.tasks.nlvr2 import Statement, consistency, nlvr2_csv
from vlmo.tasks.vqa import vqa_json


def statement(identifier, right=True, sentence=None, label=True):
    prediction = None if right is None else label == right
    return Statement("nlvr2_dev", identifier, sentence or f"sentence {identifier[-1]}", label, prediction)


def official(csv, examples):
    """What NLVR2's eval/metrics.py computes, in the words of its documentation: accuracy and consistency."""
    predictions = dict(line.split(",") for line in csv.splitlines())
    right = {identifier: predictions[identifier].lower() == label.lower() for identifier, label in examples.items()}
    sentences = {}
    for identifier, correct in right.items():
        split, number, _, sentence = identifier.split("-")
        sentences.setdefault((split, number, sentence), []).append(correct)
    return sum(right.values()) / len(right), sum(map(all, sentences.values())) / len(sentences)


def test_vqa():
    assert json.loads(vqa_json([(10, "yes"), (9, "two"), (2**40, "")])) == [
        {"question_id": 9, "answer": "two"},
        {"question_id": 10, "answer": "yes"},
        {"question_id": 2**40, "answer": ""},
    ]


def test_nlvr2_csv():
    statements = [statement("dev-10-0-0"), statement("dev-9-3-1", right=False), statement("dev-9-3-0", right=None)]
    assert nlvr2_csv(statements) == "dev-9-3-0,\ndev-9-3-1,false\ndev-10-0-0,true\n"
    assert nlvr2_csv([statement("dev-pair")]) == "dev-pair,true\n"


def test_consistency_is_the_official_one():
    statements = [
        statement(f"dev-{number}-{pair}-{sentence}", right=(number * pair + sentence) % 5 > 0, label=pair % 2 == 0)
        for number in range(6)
        for pair in range(3)
        for sentence in range(2)
    ]
    examples = {s.identifier: str(s.label) for s in statements}
    accuracy, expected = official(nlvr2_csv(statements), examples)
    assert 0 < expected < accuracy < 1
    assert consistency(statements) == pytest.approx(expected)


def test_consistency_goes_by_the_sentence_whatever_its_number():
    pairs = [statement("dev-1-0-0", sentence="a"), statement("dev-1-1-1", right=False, sentence="a")]
    assert consistency(pairs) == 0
    assert consistency([*pairs, statement("dev-2-0-0", sentence="a")]) == 0.5


def test_consistency_without_what_it_needs():
    assert consistency([]) is None
    assert consistency([statement("pair-7-0")]) is None  # no sets
    assert consistency([statement("dev-1-0-0", right=None)]) is None
    assert consistency([statement("dev-1-0-0", right=None), statement("dev-1-1-0")]) == 1
