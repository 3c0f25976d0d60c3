"""SNLI-VE and GQA from their official layouts to the official files: converted, trained, tested."""

import json

import pytest

from tests import tiny
from vlmo.demo import downstream
from vlmo.predict import main as predict
from vlmo.training.runner import run
from vlmo.utils import write_gqa, write_snli_ve
from vlmo.utils.score_gqa import read_predictions, read_questions, score

LEARNING = {"max_steps": 20, "learning_rate": 1e-2, "lr_mult": 1}  # some answers are right then
SIZES = {"max_steps": 2, "warmup_steps": 1, "batch_size": 8, "per_gpu_batchsize": 8, "max_text_len": 16}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Few pictures of the demo's world, as tables of both sets, and a vocabulary."""
    root = tmp_path_factory.mktemp("downstream")
    downstream.write(root, 12, 3)
    for name, converter in (("snli_ve", write_snli_ve), ("gqa", write_gqa)):
        converter.make_arrow(str(root / name), str(root / "arrow"))
    return root


@pytest.fixture
def trained_and_tested(place, micro, tmp_path):
    """Trains for some steps and tests; the metrics of the test, and the checkpoint."""

    def made(named, **options):
        options |= {"data_root": str(place / "arrow"), "tokenizer": str(place / "vocab.txt"), "log_dir": str(tmp_path)}
        options = SIZES | options | {"vocab_size": 300, "model_arch": micro, "image_size": 32}
        run(tiny.config(named, **options))
        (checkpoint,) = tmp_path.glob("*/version_0/checkpoints/last.ckpt")
        return run(tiny.config(named, **options, load_path=str(checkpoint), test_only=True)), checkpoint

    return made


def test_snli_ve(place, trained_and_tested, tmp_path, capsys):
    metrics, checkpoint = trained_and_tested("task_finetune_snli_ve_base_image384")
    predicted = json.loads((tmp_path / "snli_ve_test_last.json").read_text())
    lines = [json.loads(line) for line in (place / "snli_ve/snli_ve_test.jsonl").read_text().splitlines()]
    assert set(predicted) == {line["pairID"] for line in lines}
    right = {
        label: [predicted[line["pairID"]] == label for line in lines if line["gold_label"] == label]
        for label in ("entailment", "neutral", "contradiction")
    }
    for label, of_label in right.items():
        assert metrics[f"snli_ve/test/{label}"] == pytest.approx(sum(of_label) / len(of_label))
    assert metrics["snli_ve/test/accuracy"] == pytest.approx(sum(map(sum, right.values())) / len(lines))

    capsys.readouterr()
    line = lines[0]
    image = str(place / f"snli_ve/flickr30k-images/{line['Flickr30K_ID']}.jpg")
    words = ["entail", "--checkpoint", str(checkpoint), "--image", image, "--hypothesis", line["sentence2"]]
    assert predict([*words, "--device", "cpu"]) == 0
    labels = json.loads(capsys.readouterr().out)["labels"]
    assert max(labels, key=labels.get) == predicted[line["pairID"]]


def test_gqa(place, trained_and_tested, tmp_path, capsys):
    metrics, checkpoint = trained_and_tested("task_finetune_gqa_base_image480", gqa_label_size=20, **LEARNING)
    questions = read_questions(place / "gqa/testdev_all_questions.json")
    predicted = read_predictions(tmp_path / "gqa_submit_last.json")
    assert set(predicted) == set(questions)
    balanced = [name for name, question in questions.items() if question.balanced]
    right = [predicted[name] == questions[name].answer for name in balanced]
    assert 0 < len(balanced) < len(questions)
    assert metrics["gqa/test/score"] == pytest.approx(sum(right) / len(right))
    # the official files give the same figures as the converter's
    figures = score(questions, predicted, place / "gqa/testdev_choices.json").figures
    logged = {name.removeprefix("gqa/test/"): 100 * value for name, value in metrics.items() if "gqa/test/" in name}
    assert figures == pytest.approx({name: logged[name] for name in figures})
    assert {"binary", "open", "validity", "plausibility", "distribution"} <= set(figures)

    capsys.readouterr()
    name, record = next(iter(json.loads((place / "gqa/testdev_balanced_questions.json").read_text()).items()))
    words = ["answer", "--checkpoint", str(checkpoint), "--image", str(place / f"gqa/images/{record['imageId']}.jpg")]
    assert predict([*words, "--question", record["question"], "--top-k", "1", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"][0]["text"] == predicted[name]
