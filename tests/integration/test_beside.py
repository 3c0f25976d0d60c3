"""Stage 3 on pairs, images alone and texts alone at once: losses with data of their own."""

from collections import Counter

import numpy as np
import pytest
import torch

from tests import tables, tiny
from vlmo.datamodules.multitask_datamodule import MTDataModule
from vlmo.datasets.base_dataset import Beside
from vlmo.doctor import examine
from vlmo.errors import VLMoError
from vlmo.modules import VLMo
from vlmo.settings import Settings

STAGE3 = "task_mlm_itm_itc_base"
BESIDE = {"mim": ["images"], "textmlm": ["wikibk"]}
THREE_KINDS = {
    "datasets": ["coco"],
    "loss_names": {"mim": 1, "textmlm": 0.5},
    "beside": BESIDE,
    "image_size": 64,
    "log_every_n_steps": 1,
    "train_transform_keys": ["square_transform"],
}


@pytest.fixture(scope="module")
def three_kinds(data):
    tables.write_images(data)
    return THREE_KINDS


def losses(run):
    names = ("itc", "itm", "mlm", "mim", "textmlm")
    return {name: np.array(list(run.logged(f"{name}/train/loss").values())) for name in names}


@pytest.mark.parametrize("whole", [{}, {"contrast_cache": True}], ids=["passes", "contrast_cache"])
def test_every_loss_learns_from_its_own(go, three_kinds, whole):
    run = go(STAGE3, **three_kinds, **whole, batch_size=8, per_gpu_batchsize=4, max_steps=3)
    assert all(len(values) == 3 and np.isfinite(values).all() for values in losses(run).values())
    model = VLMo.from_pretrained(run.last)
    assert {"mim_score", "itm_score", "mlm_score"} <= set(dict(model.named_children()))


def test_layouts_agree_and_a_resumed_run_goes_on(go, three_kinds):
    options = three_kinds | {"layout_invariant": True, "batch_size": 8, "max_steps": 4, "drop_path_rate": 0.1}
    whole = go(STAGE3, **options, per_gpu_batchsize=8, checkpoint_every_n_steps=2, max_epoch=9)
    parts = go(STAGE3, **options, per_gpu_batchsize=3)
    for name, values in losses(whole).items():
        np.testing.assert_allclose(losses(parts)[name], values, rtol=2e-5, err_msg=name)
    middle = next(path for path in (whole.folder / "checkpoints").iterdir() if "step=2" in path.name)
    resumed = go(STAGE3, **options, per_gpu_batchsize=8, resume_from=str(middle))
    for name, values in losses(resumed).items():
        np.testing.assert_array_equal(values, losses(whole)[name][2:], err_msg=name)


def test_samples_are_those_of_the_sets_and_drawn_equally_often(three_kinds, data):
    files = {"data_root": str(data), "tokenizer": str(data / "vocab.txt")}
    module = MTDataModule(tiny.config(STAGE3, **three_kinds, **files))
    module.setup("fit")
    pairs = module.train_dataset
    assert isinstance(pairs, Beside)
    images, seed = pairs.others["mim"], 5
    drawn = Counter(int(pairs[number, seed]["mim.raw_index"]) for number in range(len(pairs)))
    counts = [drawn[number] for number in range(len(images))]
    assert max(counts) - min(counts) <= 1
    sample = pairs[3, seed]
    own = images[sample["mim.raw_index"], seed]
    assert torch.equal(sample["mim.image"], own["image"])
    assert (sample["mim.patch_mask"] == own["patch_mask"]).all()


def test_the_doctor_looks_at_their_data(three_kinds, data, micro, capsys, tmp_path):
    words = [STAGE3, *(f"{name}={value}" for name, value in (three_kinds | tiny.SMALL).items())]
    words += [f"model_arch={micro}", f"data_root={data}", f"tokenizer={data}/vocab.txt", f"log_dir={tmp_path}"]
    examine([*words, "image_size=64", "max_steps=2"])
    said = capsys.readouterr().out
    assert "images train" in said and "wikibk train" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss_names": {"mim": 1}}, "beside.mim"),
        ({"beside": {"mim": ["images"]}}, "loss_names.mim=1"),
        ({"loss_names": {"mim": 1}, "beside": {"mim": ["image"]}}, "did you mean images"),
        ({"loss_names": {"mim": 1}, "beside": {"mim": ["wikibk"]}}, "has no images"),
        ({"beside": {"itc": ["coco"]}}, "pairs of a batch"),
        ({"loss_names": {"mim": 1}, "beside": {"mim": []}}, "at least one"),
    ],
)
def test_what_cannot_work_is_said(options, said):
    with pytest.raises(VLMoError, match=said):
        Settings.from_config(tiny.config(STAGE3, datasets=["coco"], **options))
