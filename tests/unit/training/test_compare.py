"""A run's curves beside those that are expected of it."""

import csv
import json
from pathlib import Path

import pytest

from vlmo import doctor
from vlmo.errors import VLMoError
from vlmo.training.learning import compare

RECORDED = Path(__file__).parent / "recorded_curves"
OPTIONS = {"loss_names": {"itc": 1, "mlm": 0}, "batch_size": 64, "datasets": ["coco"]}


@pytest.fixture
def expected(tmp_path):
    folder = tmp_path / "expected"
    folder.mkdir()
    lines = [f"itc/train/loss,{step},{4 - step / 100},{3.8 - step / 100},{4.2 - step / 100}" for step in (10, 60, 110)]
    (folder / "coco.csv").write_text("\n".join(["metric,step,mean,low,high", *lines]) + "\n")
    (folder / "coco.json").write_text(json.dumps({"recipe": "coco", "seeds": [1, 2], "options": OPTIONS}))
    return folder


def write_run(folder, loss, **options):
    """A run whose loss is `loss(step)` at steps 5, 10, ... 200."""
    folder.mkdir()
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "itc/train/loss", "itc/train/loss_chance", "itc/val/loss"])
        writer.writeheader()
        for step in range(5, 205, 5):
            writer.writerow({"step": step - 1, "itc/train/loss": loss(step), "itc/train/loss_chance": 4.2})
        writer.writerow({"step": 204, "itc/val/loss": 1.0})
    settings = OPTIONS | {"load_path": ""} | options
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


def test_a_healthy_run_stays_within(tmp_path, expected):
    run = write_run(tmp_path / "run", lambda step: 4.1 - step / 100)
    chosen, (judged,), other = compare.compare(run, expected / "coco.csv")
    assert (chosen.name, judged.metric, judged.left, other) == ("coco", "itc/train/loss", None, [])
    assert (judged.steps[0], judged.steps[-1]) == (10, 110)


def test_it_is_said_from_which_step_a_curve_leaves(tmp_path, expected):
    run = write_run(tmp_path / "run", lambda step: 4 - min(step, 40) / 100)
    (judged,) = compare.compare(run, expected / "coco.csv")[1]
    assert judged.left == 65 and "above" in str(judged)


def test_one_point_outside_is_an_accident(tmp_path, expected):
    run = write_run(tmp_path / "run", lambda step: 9.0 if step == 50 else 4 - step / 100)
    assert compare.compare(run, expected / "coco.csv")[1][0].left is None


def test_what_is_no_number_leaves(tmp_path, expected):
    run = write_run(tmp_path / "run", lambda step: float("nan") if step > 50 else 4 - step / 100)
    assert compare.compare(run, expected / "coco.csv")[1][0].left == 55


def test_the_recipe_is_chosen_by_the_losses_and_differences_are_listed(tmp_path, expected, monkeypatch):
    settings = OPTIONS | {"batch_size": 32}
    chosen = compare.choose(settings, expected)
    assert chosen.name == "coco" and compare.differences(settings, chosen) == ["batch_size=32 (expected 64)"]
    with pytest.raises(VLMoError, match="--expected"):
        compare.choose({"loss_names": {"mlm": 1}}, expected)


def test_command(tmp_path, expected, capsys):
    run = write_run(tmp_path / "run", lambda step: 4.1 - step / 100)
    assert doctor.main(["compare", str(run), "--expected", str(expected / "coco.csv")]) == 0
    assert (run / "compared.png").stat().st_size > 1000
    bad = write_run(tmp_path / "bad", lambda step: 4.16)
    assert doctor.main(["compare", str(bad), "--expected", str(expected / "coco.csv")]) == 1
    assert "LEAVES" in capsys.readouterr().out
    assert doctor.main(["compare", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize(
    "name, left",
    [("healthy", {}), ("shuffled", {"itc/train/loss": 30, "train/loss": 30, "itc/train/t2i_accuracy": 40})],
)
def test_recorded_runs_beside_the_curves_of_the_repository(name, left):
    """Seed 9 of the recipe `coco`, as it should be, and with the captions shuffled among the images."""
    chosen, judged, _ = compare.compare(RECORDED / f"{name}.csv", compare.EXPECTED / "coco.csv")
    assert len(judged) == len(chosen.bands)
    found = {each.metric: each.left for each in judged if each.left is not None}
    assert left.items() <= found.items() and bool(found) == bool(left)


def test_the_expected_curves_of_the_repository_can_be_read():
    names = {path.stem for path in compare.EXPECTED.glob("*.csv")}
    assert {"coco", "demo_stage3"} <= names
    for name in names:
        assert "train/loss" in compare.Expected.read(compare.EXPECTED / f"{name}.csv").bands


def test_a_run_of_the_recipe_has_its_bands_in_the_report():
    options = json.loads((compare.EXPECTED / "coco.json").read_text())["options"]
    settings = options | {"load_path": "", "datasets": list(options["datasets"])}
    bands = compare.bands_of(settings)
    assert {"itc/train/loss", "train/loss"} <= set(bands)
    assert all(low <= high for _, low, high in bands["itc/train/loss"])
    assert compare.bands_of(settings | {"batch_size": 7}) == {}
