"""Batches from samples."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmo.batch import FIELDS, IGNORE_INDEX, Field, empty_batch
from vlmo.datamodules.collate import Collator
from vlmo.datasets.base_dataset import Skipped
from vlmo.errors import VLMoError
from vlmo.registry import DATASETS, TASKS
from vlmo.tasks.base import num_samples


def text_sample(length, index=0):
    ids = list(range(1, length + 1))
    return {
        "text": "x",
        "text_ids": ids,
        "text_ids_mlm": ids[::-1],
        "text_labels_mlm": [-100] * (length - 1) + [7],
        "raw_index": index,
        "img_index": index,
        "cap_index": 0,
    }


@given(st.lists(st.integers(2, 20), min_size=1, max_size=5), st.sampled_from([1, 8]))
def test_text_is_padded_to_the_longest(lengths, multiple):
    batch = Collator(FIELDS, 20, multiple)([text_sample(length) for length in lengths])
    width = batch["text_ids"].shape[1]
    assert width == min(-(-max(lengths) // multiple) * multiple, 20)
    assert batch["text_masks"].sum(1).tolist() == lengths
    for row, length in enumerate(lengths):
        assert batch["text_ids"][row].tolist() == [*range(1, length + 1), *[0] * (width - length)]
        assert batch["text_ids_mlm"][row, length:].eq(0).all()
        assert batch["text_labels_mlm"][row].tolist() == [*[-100] * (length - 1), 7, *[-100] * (width - length)]
    for name in {*batch} - {"text", "skipped", "skipped_targets"}:
        assert batch[name].dtype == torch.int64, name


def test_skipped_samples_are_listed():
    collate = Collator(FIELDS, 20)
    batch = collate([text_sample(3, 0), Skipped("a: damaged", {"qid": 7}), text_sample(3, 2)])
    assert batch["raw_index"].tolist() == [0, 2]
    assert (batch["skipped"], batch["skipped_targets"]) == (["a: damaged"], [{"qid": 7}])
    assert collate([Skipped("a", {}), Skipped("b", {})]) == {"skipped": ["a", "b"], "skipped_targets": [{}, {}]}


def test_vqa_fields():
    samples = [
        {"vqa_labels": labels, "vqa_scores": scores, "qid": qid, "vqa_answer": answer, "answered": bool(answer)}
        for labels, scores, qid, answer in (([3, 9], [1.0, 0.3], 2**40, ["yes", "no"]), ([], [], 5, []))
    ]
    batch = Collator(FIELDS | DATASETS["vqa"].dataset.fields, 20)(samples)
    assert batch["vqa_labels"].tolist() == [[3, 9], [-1, -1]]
    assert torch.equal(batch["vqa_scores"], torch.tensor([[1.0, 0.3], [0.0, 0.0]]))
    assert batch["qid"].tolist() == [2**40, 5]
    assert batch["vqa_answer"] == [["yes", "no"], []]
    assert batch["answered"].tolist() == [True, False]
    unanswered = Collator(FIELDS | DATASETS["vqa"].dataset.fields, 20)(samples[1:])
    assert unanswered["vqa_labels"].shape == (1, 0)


def test_nlvr2_fields():
    images = {"image_0": torch.zeros(3, 2, 2), "image_1": torch.ones(3, 2, 2)}
    sample = images | {"answers": True, "table_name": "nlvr2_dev"}
    batch = Collator(FIELDS | DATASETS["nlvr2"].dataset.fields, 20)([sample, sample | {"answers": False}])
    assert batch["image_1"].shape == (2, 3, 2, 2)
    assert batch["answers"].tolist() == [True, False]
    assert batch["answers"].dtype == torch.bool
    assert batch["table_name"] == ["nlvr2_dev", "nlvr2_dev"]


def test_a_field_that_nobody_declares_is_one_clear_error():
    with pytest.raises(VLMoError, match="^depth: .*`fields`"):
        Collator(FIELDS, 20)([{"raw_index": 0, "depth": 1.5}])
    made_up = {"depth": Field((), torch.float32), "boxes": Field(("K", 4), torch.float32, padding=-1)}
    samples = [{"depth": 1, "boxes": [[1, 2, 3, 4]] * count} for count in (2, 1)]
    batch = Collator(made_up, 20)(samples)
    assert torch.equal(batch["depth"], torch.tensor([1.0, 1.0]))
    assert batch["boxes"][1].tolist() == [[1, 2, 3, 4], [-1] * 4]


def test_tasks_finish_the_batch():
    finish = [lambda batch: {"longest": batch["text_masks"].sum(1).max()}]
    collate = Collator(FIELDS, 20, finish=finish)
    assert collate([text_sample(3), text_sample(5)])["longest"] == 5
    assert "longest" not in collate([Skipped("a", {})])


SIZES = {"S": 32, "P": 4, "T": 8, "K": 2}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_task_has_a_batch_without_samples(name, dtype):
    task = TASKS[name]()
    batch = empty_batch(task.fields, SIZES, torch.zeros(1, dtype=dtype), [task.derive])
    assert set(task.fields) <= set(batch)
    assert num_samples(batch) == 0
    for field in task.fields:
        assert len(batch[field]) == 0, field
        declared = task.fields[field]
        if declared.dtype is not None:
            sizes = tuple(size if isinstance(size, int) else SIZES[size] for size in declared.shape)
            assert batch[field].shape == (0, *sizes), field
            assert batch[field].dtype == (dtype if declared.dtype.is_floating_point else declared.dtype), field


def test_a_made_up_field_without_samples():
    fields = {"boxes": Field(("K", 4, "Z"), torch.float32, padding=IGNORE_INDEX), "names": Field(("K",), None)}
    batch = empty_batch(fields, SIZES, torch.zeros(1, dtype=torch.float64))
    assert batch["boxes"].shape == (0, 2, 4, 1) and batch["boxes"].dtype == torch.float64
    assert batch["names"] == []
