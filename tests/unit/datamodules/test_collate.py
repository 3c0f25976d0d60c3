"""Batches from samples."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmo.datamodules.collate import Collator
from vlmo.datasets import Skipped


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


@given(st.lists(st.integers(2, 20), min_size=1, max_size=5))
def test_text_is_padded_to_the_longest(lengths):
    batch = Collator(pad_id=0, max_text_len=20)([text_sample(length) for length in lengths])
    width = batch["text_ids"].shape[1]
    assert width == min((max(lengths) + 7) // 8 * 8, 20)
    assert batch["text_masks"].sum(1).tolist() == lengths
    for row, length in enumerate(lengths):
        assert batch["text_ids"][row].tolist() == [*range(1, length + 1), *[0] * (width - length)]
        assert batch["text_ids_mlm"][row, length:].eq(0).all()
        assert batch["text_labels_mlm"][row].tolist() == [*[-100] * (length - 1), 7, *[-100] * (width - length)]
    assert batch["text_labels"].eq(-100).all()
    for name in ("text_ids", "text_masks", "text_labels", "text_ids_mlm", "text_labels_mlm", "raw_index", "img_index"):
        assert batch[name].dtype == torch.int64, name


def test_skipped_samples_are_listed():
    collate = Collator(pad_id=0, max_text_len=20)
    batch = collate([text_sample(3, 0), Skipped("a: damaged", {"qid": 7}), text_sample(3, 2)])
    assert batch["raw_index"].tolist() == [0, 2]
    assert (batch["skipped"], batch["skipped_targets"]) == (["a: damaged"], [{"qid": 7}])
    assert collate([Skipped("a", {}), Skipped("b", {})]) == {"skipped": ["a", "b"], "skipped_targets": [{}, {}]}


def test_vqa_fields():
    samples = [
        {"vqa_labels": labels, "vqa_scores": scores, "qid": qid, "vqa_answer": answer, "answered": bool(answer)}
        for labels, scores, qid, answer in (([3, 9], [1.0, 0.3], 2**40, ["yes", "no"]), ([], [], 5, []))
    ]
    batch = Collator(pad_id=0, max_text_len=20)(samples)
    assert batch["vqa_labels"].tolist() == [[3, 9], [-1, -1]]
    assert torch.equal(batch["vqa_scores"], torch.tensor([[1.0, 0.3], [0.0, 0.0]]))
    assert batch["qid"].tolist() == [2**40, 5]
    assert batch["vqa_answer"] == [["yes", "no"], []]
    assert batch["answered"].tolist() == [True, False]
    unanswered = Collator(pad_id=0, max_text_len=20)(samples[1:])
    assert unanswered["vqa_labels"].shape == (1, 0)


def test_nlvr2_fields():
    images = {"image_0": torch.zeros(3, 2, 2), "image_1": torch.ones(3, 2, 2)}
    sample = images | {"answers": True, "table_name": "nlvr2_dev"}
    batch = Collator(pad_id=0, max_text_len=20)([sample, sample | {"answers": False}])
    assert batch["image_1"].shape == (2, 3, 2, 2)
    assert batch["answers"].tolist() == [True, False]
    assert batch["answers"].dtype == torch.bool
    assert batch["table_name"] == ["nlvr2_dev", "nlvr2_dev"]
