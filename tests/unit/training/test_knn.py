"""Nearest neighbours during training: how many images, and the same accuracy as the suite's."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from tests import tables, tiny
from vlmo.errors import VLMoError
from vlmo.evaluation.pair_scores import Scorer
from vlmo.evaluation.suites.base import Context
from vlmo.registry import SUITES
from vlmo.settings import Settings
from vlmo.training.callbacks import knn
from vlmo.training.callbacks.knn import NearestNeighbours, samples_between, spaced


@pytest.fixture
def labelled(tmp_path):
    (tmp_path / "set").mkdir()
    tables.write_labelled_images(tmp_path / "set", rows=12)
    return tmp_path / "set"


def settings(folder, *named, **updates):
    return Settings.from_config(tiny.config(*named, knn_data=str(folder), **updates))


def test_how_many_images(labelled):
    assert samples_between(settings(labelled, val_check_interval=0.5), 1000) == 500
    assert samples_between(settings(labelled, val_check_interval=30), 1000) == 120
    assert spaced(12, 3) == [0, 4, 8] and spaced(5, 5) == [0, 1, 2, 3, 4]
    everything = NearestNeighbours(settings(labelled), 2400)
    assert len(everything.pictures) == 24 and everything.first_test == 12
    with pytest.raises(VLMoError, match="1 % of the 2,300 samples between two validations are 23 images"):
        NearestNeighbours(settings(labelled), 2300)


@pytest.mark.parametrize("most", [24, 16])
@pytest.mark.parametrize("named", ["task_mim_base", "task_mlm_itm_itc_base"])
def test_the_suite_measures_the_same(labelled, named, most, monkeypatch):
    monkeypatch.setattr(knn, "MOST", most)
    monkeypatch.setattr(knn, "FEWEST", 1)
    model = tiny.model(named)
    callback, logged = NearestNeighbours(settings(labelled, named), 10000), {}
    assert len(callback.pictures) == most
    plain = SimpleNamespace(forward_context=contextlib.nullcontext)
    trainer = SimpleNamespace(precision_plugin=plain)
    monkeypatch.setattr(model, "log_dict", logged.update)
    before = torch.get_rng_state()
    callback.on_train_start(trainer, model)
    with torch.inference_mode():
        callback.on_validation_epoch_end(trainer, model)
    assert torch.equal(before, torch.get_rng_state())
    if most == 24:
        (measure,) = (
            each
            for each in SUITES["knn"].run(Context(Scorer(model, None), labelled.parent)).measures
            if each.part.endswith("image expert")
        )
        assert logged["knn/accuracy"] == pytest.approx(measure.value)
    assert 0 < logged["knn/share_of_time"] <= 1


def test_runs_that_it_is_not_for(labelled):
    with pytest.raises(VLMoError, match="no loss that is on learns from images"):
        settings(labelled, "task_textmlm_base")
    with pytest.raises(VLMoError, match="measured at validations"):
        NearestNeighbours(settings(labelled), 10000, validates=False)
    with pytest.raises(VLMoError, match="is measured in training"):
        settings(labelled, test_only=True, load_path="some.ckpt")
