"""GQA's metrics, worked out by hand."""

import json

import pytest

from vlmo.errors import VLMoError
from vlmo.utils.score_gqa import Question, distribution, main, score


def ask(answer, structural="query", semantic="attr", group=None, entailed=(), balanced=True):
    return Question(answer, structural, semantic, group, entailed, balanced)


# Five balanced questions, of which a, c and e are answered right; a entails three others (and, as published, itself),
# b two, c and d none, e one that is not asked.
QUESTIONS = {
    "a": ask("red", group="color", entailed=("a", "x", "y", "z")),
    "b": ask("blue", group="color", entailed=("b", "x", "y")),
    "c": ask("red", group="color", entailed=("c",)),
    "d": ask("yes", "verify", "obj"),
    "e": ask("cat", "choose", "rel", group="animal", entailed=("e", "unknown")),
    "x": ask("yes", "verify", balanced=False),
    "y": ask("no", "verify", balanced=False),
    "z": ask("red", "choose", balanced=False),
}
PREDICTIONS = {"a": "red", "b": "red", "c": "red", "d": "no", "e": "cat", "x": "yes", "y": "no", "z": "blue"}


def test_accuracy_by_type():
    figures = score(QUESTIONS, PREDICTIONS).figures
    assert figures["accuracy"] == pytest.approx(60)
    assert figures["open"] == figures["structural_query"] == pytest.approx(200 / 3)  # a, c of a, b, c
    assert figures["binary"] == pytest.approx(50)  # e of d, e
    assert (figures["structural_verify"], figures["structural_choose"]) == (0, 100)
    assert figures["semantic_attr"] == pytest.approx(200 / 3)
    assert (figures["semantic_obj"], figures["semantic_rel"]) == (0, 100)


def test_consistency_is_over_what_right_answers_entail():
    # of those that are right, a alone entails something that is asked: x and y are right, z is wrong
    assert score(QUESTIONS, PREDICTIONS).figures["consistency"] == pytest.approx(200 / 3)
    # and with b right, whose two are: the mean of 2/3 and 1, not 4/5
    assert score(QUESTIONS, PREDICTIONS | {"b": "blue"}).figures["consistency"] == pytest.approx(100 * (2 / 3 + 1) / 2)


def test_without_the_entailed_questions_there_is_no_consistency():
    scores = score({name: q for name, q in QUESTIONS.items() if q.balanced}, PREDICTIONS)
    assert "consistency" not in scores.figures and "consistency" in scores.notes[0]
    missing = {name: answer for name, answer in PREDICTIONS.items() if name != "z"}
    assert "consistency" not in score(QUESTIONS, missing).figures


def test_distribution():
    # color: red twice and blue once are true, red three times is predicted: (3-2)^2/2 + (0-1)^2/1 = 1.5
    # animal: cat is true and predicted: 0. Weighted by 3 and 1 questions: 4.5 / 4; d has no group
    balanced = {name: q for name, q in QUESTIONS.items() if q.balanced}
    assert distribution(balanced, PREDICTIONS) == pytest.approx(4.5 / 4 / 100)
    # an answer that is right for no question of the group is counted by its absence alone: (1-2)^2/2 + (1-1)^2/1 = 0.5
    assert distribution(balanced, PREDICTIONS | {"a": "huge", "b": "blue"}) == pytest.approx(3 * 0.5 / 4 / 100)
    assert score(QUESTIONS, PREDICTIONS).figures["distribution"] == pytest.approx(4.5 / 4 / 100)


@pytest.fixture
def files(tmp_path):
    """The three files in their official layouts."""
    questions = {
        name: {
            "answer": q.answer,
            "types": {"structural": q.structural, "semantic": q.semantic, "detailed": ""},
            "groups": {"global": q.group, "local": None},
            "entailed": list(q.entailed),
            "isBalanced": q.balanced,
        }
        for name, q in QUESTIONS.items()
    }
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    rows = [{"questionId": name, "prediction": answer} for name, answer in PREDICTIONS.items()]
    (tmp_path / "predictions.json").write_text(json.dumps(rows))
    # b's red is valid and not plausible, d's no is neither; what is said of x, which is not balanced, does not count
    choices = {name: {"valid": [PREDICTIONS[name]], "plausible": [PREDICTIONS[name]]} for name in "abcde"}
    choices |= {"b": {"valid": ["red", "blue"], "plausible": ["blue"]}, "d": {"valid": [], "plausible": []}}
    (tmp_path / "choices.json").write_text(json.dumps(choices | {"x": {"valid": [], "plausible": []}}))
    return tmp_path


def test_validity_and_plausibility(files):
    figures = score(QUESTIONS, PREDICTIONS, files / "choices.json").figures
    assert figures["validity"] == pytest.approx(80) and figures["plausibility"] == pytest.approx(60)


def test_the_command(files, capsys):
    given = [str(files / "predictions.json"), "--questions", str(files / "questions.json")]
    assert main([*given, "--choices", str(files / "choices.json")]) == 0
    printed = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines())
    assert printed["accuracy"] == "60.00" and printed["consistency"] == "66.67" and printed["validity"] == "80.00"
    assert main(given) == 0
    shown = capsys.readouterr()
    assert "validity" not in shown.out and "validity" in shown.err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("predictions.json", [{"questionId": "a", "prediction": "red"}], "4 of 5 questions are missing, such as b"),
        ("predictions.json", [{"question_id": 1, "answer": "red"}], "predictions.json: must be a list of"),
        ("predictions.json", {"a": "red"}, "predictions.json:1: not the JSON expected"),
        ("questions.json", {"a": {"answer": "red"}}, "questions.json: 'a': is no question"),
        ("choices.json", {"a": {"valid": []}}, "choices.json: 'a': must have lists"),
        ("choices.json", {"a": {"valid": [], "plausible": []}}, "choices.json: 4 of 5 questions are missing"),
    ],
)
def test_mistakes(name, content, message, files, capsys):
    (files / name).write_text(json.dumps(content))
    given = [str(files / "predictions.json"), "--questions", str(files / "questions.json")]
    assert main([*given, "--choices", str(files / "choices.json")]) == 2
    assert message in capsys.readouterr().err


def test_nothing_is_asked():
    with pytest.raises(VLMoError):
        score(QUESTIONS, {})
