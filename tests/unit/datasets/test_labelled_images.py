"""Folders of classes as tables, and what a sample of them holds."""

import json

import pyarrow as pa
import pytest
import torch

from tests import tables, tiny
from vlmo.datamodules.multitask_datamodule import MTDataModule
from vlmo.errors import VLMoError
from vlmo.settings import Settings
from vlmo.tasks.image_classification import mixed
from vlmo.transforms import keys_to_transforms
from vlmo.utils import convert

BASE = "task_finetune_imagenet_base"


def write_folders(root, val=("ant", "bee")):
    for split, names in (("train", ("bee", "ant")), ("val", val)):
        for number, name in enumerate(names):
            folder = root / split / name
            folder.mkdir(parents=True)
            for each in range(3):
                (folder / f"{each}.png").write_bytes(tables.png(10 * number + each))
    (root / "train" / "ant" / "broken.jpg").write_bytes(b"no image")


def test_folders_become_tables_with_labels(tmp_path):
    write_folders(tmp_path / "raw")
    assert convert.main(["labelled_images", str(tmp_path / "raw"), str(tmp_path)]) == 0
    rows = pa.ipc.open_file(tmp_path / "labelled_images_train_0.arrow").read_all().to_pylist()
    assert [(row["label"], row["image_id"]) for row in rows[:4]] == [
        (0, "train/ant/0.png"),
        (0, "train/ant/1.png"),
        (0, "train/ant/2.png"),
        (1, "train/bee/0.png"),
    ]
    assert json.loads((tmp_path / "labelled_images_classes.json").read_text()) == ["ant", "bee"]
    assert pa.ipc.open_file(tmp_path / "labelled_images_val_0.arrow").read_all().num_rows == 6


@pytest.mark.parametrize("val, words", [(("wasp",), "the class 'wasp', which train lacks"), ((), "no folders")])
def test_folders_that_do_not_fit(tmp_path, val, words, capsys):
    write_folders(tmp_path / "raw", val)
    (tmp_path / "raw" / "val").mkdir(exist_ok=True)
    assert convert.main(["labelled_images", str(tmp_path / "raw"), str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
    assert convert.main(["labelled_images", str(tmp_path / "nothing"), str(tmp_path)]) == 2
    assert "Expected in" in capsys.readouterr().err


def data_module(root, *named, **updates):
    tables.write_labelled_images(root)
    options = {"data_root": str(root), "image_size": 32, "num_classes": 3}
    module = MTDataModule(tiny.config(*(named or (BASE,)), **(options | updates)))
    module.setup("fit")
    return module


def test_the_number_of_classes_is_checked(tmp_path):
    with pytest.raises(VLMoError, match="has 3 classes, not 7: pass num_classes=3"):
        data_module(tmp_path, num_classes=7)
    (tmp_path / "labelled_images_classes.json").write_text('["a", "b"]')
    assert "labels from 0 to 2" in problem_of(tmp_path, 2)


def problem_of(root, classes):
    with pytest.raises(VLMoError) as error:
        MTDataModule(tiny.config(BASE, data_root=str(root), num_classes=classes)).check("fit")
    return str(error.value)


def test_stage_1_learns_from_them_whatever_their_classes(tmp_path):
    batch = next(
        iter(data_module(tmp_path, "task_mim_base", datasets=["labelled_images"], num_classes=9).train_dataloader())
    )
    assert "patch_mask" in batch and "sample_key" not in batch


@pytest.mark.parametrize("option", [{"layout_invariant": True}, {"per_gpu_batchsize": 1}])
def test_runs_that_cannot_mix(option):
    with pytest.raises(VLMoError, match="mixup and cutmix mix the samples of a pass"):
        Settings.from_config(tiny.config(BASE, **option))
    Settings.from_config(tiny.config(BASE, **option, mixup=0, cutmix=0))


def batches(loader):
    return [{name: batch[name] for name in ("image", "label", "raw_index")} | batch for batch in loader]


def test_what_is_mixed_follows_from_the_samples_alone(tmp_path):
    def made(**updates):
        return batches(data_module(tmp_path, **updates).train_dataloader())

    state = torch.get_rng_state()
    first, again, workers = made(), made(), made(num_workers=1)
    assert torch.equal(state, torch.get_rng_state())
    for one, two, three in zip(first, again, workers, strict=True):
        assert all(torch.equal(one[name], each[name]) for each in (two, three) for name in ("image", "targets"))
    assert not torch.equal(first[0]["targets"], made(seed=5)[0]["targets"])
    plain = made(mixup=0, cutmix=0)[0]
    assert "targets" not in plain and not torch.equal(plain["image"], first[0]["image"])


def test_evaluation_mixes_nothing(tmp_path):
    batch = next(iter(data_module(tmp_path).val_dataloader()))
    assert "targets" not in batch and batch["image_id"] == [f"val/{n % 3}/{n}.png" for n in batch["raw_index"].tolist()]


@pytest.mark.parametrize("number", [1, 2, 5])
def test_mixup_by_hand(number):
    options = Settings.from_config(tiny.config(BASE, cutmix=0, label_smoothing=0.3, num_classes=3))
    image = torch.arange(number).float().view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    label, keys = torch.arange(number) % 3, torch.arange(number) + 40
    before = image.clone()
    found, targets = mixed(image, label, keys, options)
    assert torch.equal(image, before) and targets.shape == (number, 3)
    even = number // 2 * 2
    hot = torch.eye(3)[label] * 0.7 + 0.1
    assert torch.allclose(targets[even:], hot[even:]) and torch.equal(found[even:], image[even:])
    if even:
        # the share of the partner, told from the first image, whose partner is the last of the even ones
        share = (found[0] - image[0]).flatten()[0] / (image[even - 1] - image[0]).flatten()[0]
        assert torch.allclose(targets[:even], (1 - share) * hot[:even] + share * hot[:even].flip(0), atol=1e-6)
        assert torch.allclose(found[:even], (1 - share) * image[:even] + share * image[:even].flip(0), atol=1e-6)


@pytest.mark.parametrize("key", ["classification_randaug", "classification"])
def test_the_transforms_draw_from_torch_alone(key):
    (transform,) = keys_to_transforms([key], 32)
    import random

    import numpy as np

    torch.manual_seed(3)
    random.seed(1)
    np.random.seed(1)
    state = random.getstate()
    one = transform(tables.picture(0))
    assert random.getstate() == state
    random.seed(2)
    np.random.seed(2)
    torch.manual_seed(3)
    assert torch.equal(transform(tables.picture(0)), one)
    assert one.shape == (3, 32, 32)
