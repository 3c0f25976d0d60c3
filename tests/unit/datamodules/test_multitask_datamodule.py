"""The loaders of whole runs, on tiny tables."""

import logging

import numpy as np
import pytest
import torch

from tests import tables
from vlmo.batch import FIELDS, Field
from vlmo.config import resolve
from vlmo.datamodules import multitask_datamodule
from vlmo.datamodules.collate import Collator
from vlmo.datamodules.multitask_datamodule import MTDataModule
from vlmo.datasets import base_dataset
from vlmo.datasets.base_dataset import BaseDataset, DatasetSpec
from vlmo.distributed.wire_format import from_bytes, with_pixels
from vlmo.errors import VLMoError
from vlmo.images import decode_image
from vlmo.registry import DATASETS
from vlmo.text import TokenMasker
from vlmo.transforms.square import CropAtScale, square_transform


@pytest.fixture
def make(tmp_path):
    """A data module for a named config; all tables lie in one folder."""
    for write in (tables.write_coco, tables.write_f30k, tables.write_wikibk, tables.write_vqa, tables.write_nlvr2):
        write(tmp_path)
    tables.write_captions(tmp_path, "vg", rows=2, texts=3, first=50)
    tokenizer = str(tables.write_vocabulary(tmp_path))

    def made(*named: str, **updates) -> MTDataModule:
        small = {"image_size": 32, "per_gpu_batchsize": 4, "batch_size": 4, "num_workers": 0, "num_gpus": 0}
        paths = {"data_root": str(tmp_path), "tokenizer": tokenizer}
        return MTDataModule(resolve(*named, **small | paths | updates))

    return made


def sizes(batches):
    return [len(batch["raw_index"]) for batch in batches]


def assert_same(one, other):
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            same = torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
            assert same, name


def test_pretraining_over_several_sets(make):
    module = make("task_mlm_itm_itc_base", datasets=["coco", "vg"])
    module.setup("fit")
    loader = module.train_dataloader()
    batches = list(loader)
    assert sizes(batches) == [4] * 5  # 22 samples: 16 of coco, 6 of vg; the rest of 2 is left out
    batch = batches[0]
    assert batch["image"].shape == (4, 3, 32, 32)
    assert batch["image"].dtype == torch.uint8 and batch["images_are_bytes"]
    longest = int(batch["text_masks"].sum(1).max())
    assert batch["text_ids"].shape == batch["text_labels_mlm"].shape == (4, longest)  # a CPU gains nothing from more
    assert batch["skipped"] == []
    everything = [batch for epoch in range(4) for batch in _epoch(loader, epoch)]
    rows, images = (torch.cat([batch[name] for batch in everything]).tolist() for name in ("raw_index", "img_index"))
    assert dict(zip(rows, images, strict=True)) == {row: row // 2 for row in range(16)} | {
        row: 8 + (row - 16) // 3 for row in range(16, 22)
    }
    val = list(module.val_dataloader())
    order = [index for batch in val for index in batch["raw_index"].tolist()]
    assert sorted(order) == list(range(8)) != order  # mixed
    assert_same(val, list(module.val_dataloader()))


def test_training_images_are_bytes_of_the_same_pixels(make, monkeypatch):
    module, other = (make("task_mlm_itm_itc_base", datasets=["coco"]) for _ in range(2))
    module.setup("fit")
    monkeypatch.setattr(multitask_datamodule, "leave_bytes", lambda transform: transform)
    other.setup("fit")
    pixels = list(other.train_dataloader())
    assert pixels[0]["image"].dtype == torch.float32 and "images_are_bytes" not in pixels[0]
    assert -1 <= pixels[0]["image"].min() <= pixels[0]["image"].max() <= 1
    batches = list(module.train_dataloader())
    assert all(batch.pop("images_are_bytes") for batch in batches)
    assert_same([with_pixels(batch) for batch in batches], pixels)


def test_bytes_and_pixels_in_one_batch_are_pixels(make):
    module = make("task_mlm_itm_itc_base", datasets=["coco", "vg"])
    module.setup("fit")
    module.train_dataset.datasets[1].transform = square_transform(32)
    samples = [module.train_dataset[number, 0] for number in (0, 20)]
    batch = module.train_dataloader().collate_fn(samples)
    assert "images_are_bytes" not in batch
    assert torch.equal(batch["image"], torch.stack([from_bytes(samples[0]["image"]), samples[1]["image"]]))


def test_images_of_a_field_of_ones_own_become_pixels_in_the_loader():
    collate = Collator(FIELDS | {"image_2": Field((3, "S", "S"), torch.float32)}, 8)
    image = torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2)
    batch = collate([{"image": image, "image_2": image}])
    assert batch["images_are_bytes"] and batch["image"].dtype == torch.uint8
    assert torch.equal(batch["image_2"][0], from_bytes(image))
    shares = Collator({"shares": Field(("K",), torch.float32, padding=0)}, 8)([{"shares": image[0, 0]}])
    assert shares["shares"].tolist() == [[0, 1]]  # bytes that are no image are what they are
    mixed = collate([{"image": image, "image_0": from_bytes(image)}])
    assert "images_are_bytes" not in mixed and torch.equal(mixed["image"], mixed["image_0"])


def _epoch(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_batches_do_not_depend_on_the_number_of_workers(make):
    runs = []
    for workers in (0, 1, 2):
        module = make("task_mlm_itm_itc_base", datasets=["coco", "vg"], num_workers=workers)
        module.setup("fit")
        loader = module.train_dataloader()
        torch.rand(workers)
        runs.append(_epoch(loader, 0) + _epoch(loader, 1) + list(module.val_dataloader()))
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_need_not_be_forked(make, method):
    module, here = (make("task_finetune_irtr_coco_base_image384", num_workers=number) for number in (1, 0))
    loaders = []
    for each in (module, here):
        each.setup("fit")
        loaders.append(each.train_dataloader() if method == "spawn" else each.retrieval_loaders("test")[0])
    loaders[0].multiprocessing_context = method
    assert_same(*map(list, loaders))


def test_loader_options(make, monkeypatch):
    module = make("task_finetune_irtr_coco_base_image384", num_workers=2, prefetch_factor=3)
    module.setup("fit")
    train, (images, texts) = module.train_dataloader(), module.retrieval_loaders("test")
    assert [loader.prefetch_factor for loader in (train, images, texts)] == [3, 3, 3]
    assert [loader.persistent_workers for loader in (train, images, texts)] == [True, False, False]
    assert not train.pin_memory and train.collate_fn.text_multiple == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not module.train_dataloader().pin_memory  # num_gpus=0
    on_gpu = make("task_finetune_irtr_coco_base_image384", num_gpus=1)
    on_gpu.setup("fit")
    assert on_gpu.train_dataloader().pin_memory and on_gpu.train_dataloader().collate_fn.text_multiple == 8


def test_processes_share_the_samples(make, monkeypatch):
    monkeypatch.setattr(multitask_datamodule, "world_size", lambda: 2)
    train, val = [], []
    for rank in (0, 1):
        monkeypatch.setattr(multitask_datamodule, "rank", lambda rank=rank: rank)
        options = {"per_gpu_batchsize": 3, "batch_size": 3, "get_recall_metric": False}
        module = make("task_finetune_irtr_coco_base_image384", **options)
        module.setup("fit")
        train.append([index for batch in module.train_dataloader() for index in batch["raw_index"].tolist()])
        val.append(
            [n for batch in module.val_dataloader() if "raw_index" in batch for n in batch["raw_index"].tolist()]
        )
    assert [len(share) for share in train] == [6, 6]  # of 8 a process: two full batches
    assert not set(train[0]) & set(train[1])
    assert sorted(val[0] + val[1]) == list(range(8)) and [len(share) for share in val] == [5, 3]


def test_a_process_without_samples_has_an_empty_batch(make, monkeypatch):
    monkeypatch.setattr(multitask_datamodule, "world_size", lambda: 3)
    monkeypatch.setattr(multitask_datamodule, "rank", lambda: 2)
    module = make("task_finetune_irtr_coco_base_image384", per_gpu_batchsize=8, batch_size=8)
    module.setup("test")
    for loader in (module.test_dataloader(), *module.retrieval_loaders("test")):
        assert list(loader) == [{"skipped": [], "skipped_targets": []}]


def test_fewer_samples_than_a_batch(make, caplog):
    module = make("task_finetune_nlvr2_base", per_gpu_batchsize=64, batch_size=64)
    module.setup("fit")
    with caplog.at_level(logging.WARNING):
        assert sizes(module.train_dataloader()) == [6]
    assert "only 6 training samples" in caplog.text


def test_text_only(make):
    module = make("task_textmlm_base", max_text_len=20)
    module.setup("fit")
    batches = list(module.train_dataloader())
    assert sizes(batches) == [4, 4]
    assert "image" not in batches[0]
    assert sizes(module.val_dataloader()) == [4, 1]


def test_texts_of_similar_length_together(make):
    module = make("task_textmlm_base", per_gpu_batchsize=2, batch_size=2, group_by_length=True)
    texts = [["a " * length] for length in (30, 2, 20, 3, 29, 21)]
    tables.write_table(module.root / "wikibk_train_0.arrow", {"caption": texts[:4]})
    tables.write_table(module.root / "wikibk_train_1.arrow", {"caption": texts[4:]})
    module.setup("fit")
    for epoch in range(3):
        lengths = [sorted(batch["text_masks"].sum(1).tolist()) for batch in _epoch(module.train_dataloader(), epoch)]
        assert sorted(lengths) == [[4, 5], [22, 23], [31, 32]]


def test_vqa(make):
    module = make("task_finetune_vqa_base_image480")
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert batch["vqa_labels"].shape == batch["vqa_scores"].shape == (4, 2)
    assert module.label_names() == ["answer 0", "answer 1", "answer 2"]
    (module.root / "vqav2_answers.json").unlink()
    assert module.label_names() == ["answer 0", "answer 1", "answer 2"]
    module = make("task_finetune_vqa_base_image480", test_only=True, load_path="x.ckpt")
    for path in module.root.glob("vqav2_*rain*.arrow"):
        path.unlink()
    module.setup("test")
    assert [batch["vqa_labels"].shape for batch in module.test_dataloader()] == [(4, 0), (4, 0)]
    (module.root / "vqav2_rest_val.arrow").unlink()
    assert module.label_names() is None
    assert make("task_finetune_nlvr2_base").label_names() is None


def test_nlvr2(make):
    module = make("task_finetune_nlvr2_base")
    module.setup("fit")
    names = [name for batch in module.val_dataloader() for name in batch["table_name"]]
    assert sorted(names) == ["nlvr2_dev"] * 6 + ["nlvr2_test1"] * 6


def test_nlvr2_tables_that_do_not_tell_the_numbers_of_sentences(make, caplog):
    with caplog.at_level(logging.WARNING):
        make("task_finetune_nlvr2_base").check("fit")
        assert "numbers of a pair's sentences" not in caplog.text
        make("task_finetune_nlvr2_base", test_only=True, load_path="x.ckpt").check("test")
    assert caplog.text.count("does not hold the numbers of a pair's sentences") == 2


def test_retrieval(make):
    module = make("task_finetune_irtr_coco_base_image384", datasets=["coco", "f30k", "vg"])
    module.setup("fit")
    images, texts = (list(loader) for loader in module.retrieval_loaders("test"))
    always = {"raw_index", "img_index", "skipped", "skipped_targets"}
    assert images[0].keys() == {"image"} | always
    assert texts[0].keys() == {"text_ids", "text_masks"} | always
    assert torch.cat([batch["img_index"] for batch in images]).tolist() == list(range(7))  # 4 of coco, 3 of f30k
    wanted = [image for image in range(4) for _ in range(2)] + [4 + image for image in range(3) for _ in range(5)]
    assert torch.cat([batch["img_index"] for batch in texts]).tolist() == wanted


def test_only_what_is_read_is_made(make, monkeypatch):
    masked = []
    monkeypatch.setattr(TokenMasker, "__call__", lambda self, ids, generator: masked.append(1) or (ids, ids))
    module = make("task_finetune_irtr_coco_base_image384")
    module.setup("fit")
    batches = list(module.train_dataloader())
    for loader in module.retrieval_loaders("test"):
        batches += list(loader)
    assert not masked and not any("mlm" in name or "masked" in name for batch in batches for name in batch)
    module = make("task_mlm_itm_itc_base", datasets=["coco"])
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert masked and {"masked_positions", "masked_kept"} <= batch.keys()
    assert not any("masked" in name for loader in module.retrieval_loaders("test") for name in next(iter(loader)))


def test_tasks_that_read_no_text_get_images_alone(make):
    module = make("task_mim_base", datasets=["coco", "nlvr2"], tokenizer="there is none")
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    image = {"image", "images_are_bytes", "patch_mask", "patch_positions", "patch_kept"}
    assert batch.keys() == image | {"raw_index", "img_index", "skipped", "skipped_targets"}
    assert batch["patch_mask"].shape == (4, 4)
    hidden = [row.nonzero()[:, 0].tolist() for row in batch["patch_mask"]]
    assert batch["patch_positions"].tolist() == hidden


class Ratings(BaseDataset):
    """A data set of somebody else's: a number beside each caption."""

    columns = BaseDataset.columns | {"rating": "a list"}
    fields = {"rating": Field((), torch.float32)}

    def targets(self, location):
        return {"rating": location.list_item("rating")}

    @classmethod
    def label_names(cls, root, paths):
        return ["bad", "good"]

    @classmethod
    def check_labels(cls, name, root, paths, settings):
        return [] if paths else [f"{name}: has no ratings"]


def test_a_data_set_of_ones_own(make, monkeypatch):
    monkeypatch.setattr(DATASETS, "_entries", dict(DATASETS))
    spec = DatasetSpec(Ratings, train=("ratings_*",), val=("ratings_*",))
    assert DATASETS.register("ratings")(spec) is spec
    module = make("task_mlm_itm_itc_base", datasets=["vg", "ratings"], per_gpu_batchsize=2, batch_size=2)
    with pytest.raises(VLMoError) as error:
        module.check("fit")
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == ["ratings", "ratings"]
    columns = {"image": [tables.png(0)], "caption": [["a cat", "a dog"]], "rating": [[0.5, 2]]}
    tables.write_table(module.root / "ratings_0.arrow", columns)
    module = make("task_mlm_itm_itc_base", datasets=["ratings"], per_gpu_batchsize=2, batch_size=2)
    module.setup("fit")
    (batch,) = module.val_dataloader()
    assert batch["rating"].tolist() == [0.5, 2.0]
    assert module.label_names() == ["bad", "good"]
    assert spec.provides == {"image", "text"}


@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("workers", [0, 1])
def test_chosen_pairs(make, monkeypatch, world, workers):
    module = make("task_finetune_irtr_coco_base_image384", datasets=["coco", "f30k"], num_workers=workers)
    module.setup("fit")
    images, texts = (
        {number: {name: value[row] for name, value in batch.items() if "skipped" not in name}
         for batch in loader for row, number in enumerate(batch["raw_index"].tolist())}
        for loader in module.retrieval_loaders("test")
    )  # fmt: skip
    chosen = np.array([0, 0, 0, 2, 2, 5, 5, 5, 5, 6]), np.array([0, 7, 22, 3, 4, 8, 0, 1, 2, 13])
    monkeypatch.setattr(multitask_datamodule, "world_size", lambda: world)
    found = []
    for rank in range(world):
        monkeypatch.setattr(multitask_datamodule, "rank", lambda rank=rank: rank)
        for batch in module.pair_loader("test", *chosen):
            for row, pair in enumerate(batch["raw_index"].tolist()):
                image, text = chosen[0][pair], texts[chosen[1][pair]]
                assert torch.equal(batch["image"][row], images[image]["image"])
                real = int(batch["text_masks"][row].sum())
                assert batch["text_ids"][row, :real].tolist() == text["text_ids"][: text["text_masks"].sum()].tolist()
                found.append(pair)
    assert found == list(range(10))  # each process has a run of them


@pytest.mark.parametrize("named", ["task_finetune_irtr_coco_base_image384", "task_mim_base"])
def test_image_decoding_reaches_the_images(make, monkeypatch, named):
    asked = set()
    monkeypatch.setattr(base_dataset, "decode_image", lambda *data: asked.add(data[1]) or decode_image(data[0]))
    module = make(named, datasets=["coco"], image_decoding="original")
    module.setup("fit")
    next(iter(module.train_dataloader()))
    assert asked == {"original"}


def test_an_image_is_decoded_once_for_its_pairs(make, monkeypatch):
    module = make("task_finetune_irtr_coco_base_image384", per_gpu_batchsize=2)
    module.setup("fit")
    read = []
    monkeypatch.setattr(base_dataset, "decode_image", lambda *data: read.append(1) or decode_image(*data))
    list(module.pair_loader("test", np.repeat([0, 3], 5), np.arange(8).repeat(2)[:10]))
    assert len(read) == 2


def test_sets_without_validation(make):
    module = make("task_mlm_itm_itc_base", datasets=["vg"])
    module.setup("fit")
    assert module.val_dataloader() == []
    with pytest.raises(VLMoError, match="none has texts for test"):
        module.check("test")


def test_undecodable_images_are_left_out_of_the_batch(make):
    module = make("task_mlm_itm_itc_base", datasets=["vg"], per_gpu_batchsize=3, batch_size=3)
    columns = {"image": [tables.png(0), b"damaged"], "caption": [["a", "b"], ["c"]]}
    tables.write_table(module.root / "vg.arrow", columns)
    module.setup("fit")
    (batch,) = module.train_dataloader()
    assert sorted(batch["text"]) == ["a", "b"]
    assert batch["image"].shape[0] == 2
    assert batch["skipped"][0].startswith("vg: image row 1")


def test_all_problems_at_once(make):
    module = make(
        "task_finetune_irtr_coco_base_image384",
        datasets=["coco", "vg"],
        tokenizer="absent/vocab.txt",
        train_transform_keys=["square_transform", "square_transform_randaug"],
    )
    (module.root / "vg.arrow").unlink()
    with pytest.raises(VLMoError) as error:
        module.setup("fit")
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert "vg.arrow is missing" in lines[0]
    assert "vlmo.utils.write_vg" in lines[1]
    assert "give one transform" in lines[2]
    assert "tokenizer='absent/vocab.txt'" in lines[3]


def test_vocabulary_must_fit(make):
    with pytest.raises(VLMoError, match=r"the tokenizer has (\d+) tokens: pass vocab_size=\1"):
        make("task_textmlm_base", vocab_size=20).check("fit")


def test_recall_needs_a_retrieval_set(make):
    module = make("task_mlm_itm_itc_base", datasets=["vg"], get_recall_metric=True)
    with pytest.raises(VLMoError, match="recall is measured on coco, f30k"):
        module.check("fit")


def test_unknown_names():
    with pytest.raises(VLMoError, match="did you mean coco"):
        MTDataModule(resolve(datasets=["cocoa"]))


def test_weights_of_data_sets(make):
    module = make("task_mlm_itm_itc_base", datasets=["coco", "vg"], dataset_weights={"vg": 3, "coco": 0.5})
    module.setup("fit")
    assert module.epoch_samples == 16 // 2 + 3 * 6
    batches = list(module.train_dataloader())
    numbers = torch.cat([batch["raw_index"] for batch in batches])
    assert len(numbers) == 24  # of 26: whole batches
    counts = np.bincount(numbers, minlength=22)
    assert counts[:16].max() == 1 and counts[16:].max() == 3
    assert_same(list(module.train_dataloader()), batches)
    images = torch.cat([batch["image"] for batch in batches])
    again = images[numbers == int(counts.argmax())]
    assert not torch.equal(again[0], again[1])  # augmented anew


def test_weights_of_1_draw_what_no_weights_do(make):
    module = make("task_mlm_itm_itc_base", datasets=["coco", "vg"], dataset_weights={"vg": 1})
    module.setup("fit")
    assert sorted(number for number, _ in module.train_dataloader().sampler) == list(range(22))


def test_a_weight_of_a_set_that_is_not_trained_on(make):
    with pytest.raises(VLMoError, match="dataset_weights: vg is not among"):
        make("task_mlm_itm_itc_base", datasets=["coco"], dataset_weights={"vg": 2})


def test_only_training_is_decoded_at_scale(make):
    exact, at_scale = (make("task_mlm_itm_itc_base", datasets=["coco"], decode_at_scale=on) for on in (False, True))
    for module in (exact, at_scale):
        module.setup("fit")
    assert_same(list(exact.val_dataloader()), list(at_scale.val_dataloader()))
    assert isinstance(at_scale.train_dataset.datasets[0].transform, CropAtScale)
    batch = next(iter(at_scale.train_dataloader()))
    assert batch["images_are_bytes"] and batch["image"].shape == (4, 3, 32, 32)
    with pytest.raises(VLMoError, match="decode_at_scale"):
        make("task_mlm_itm_itc_base", train_transform_keys=["square_transform"], decode_at_scale=True).check("fit")
