"""The table at the end of a run."""

import re

from vlmo.config import resolve
from vlmo.settings import Settings
from vlmo.training.summary import published, results


def settings_of(*named, **updates):
    return Settings.from_config(resolve(*named, **updates))


def lines_of(text):
    """Tag -> its line."""
    return {match[0]: line for line in text.splitlines() if (match := re.search(r"\S+/\S+", line))}


def test_what_is_shown():
    measured = {"vqa/val/score": 0.70126, "vqa/val/score_epoch": 0.7, "vqa/val/loss": 3.25, "vqa/train/loss": 9.0}
    text = results(settings_of("task_finetune_vqa_large_image480"), measured | {"lr-AdamW/pg1": 1.0, "x": 1.0})
    lines = lines_of(text)
    assert list(lines) == ["vqa/test-dev/score", "vqa/val/loss", "vqa/val/score", "arXiv"][:3] or set(lines) >= {
        "vqa/val/loss",
        "vqa/val/score",
    }
    assert lines["vqa/val/score"].split() == ["val", "vqa", "score", "vqa/val/score", "70.13", "%"]
    assert lines["vqa/val/loss"].endswith("3.2500")
    assert lines["vqa/test-dev/score"].split()[-3:] == ["(server)", "79.9", "%"]


def test_recalls_stand_in_order_beside_those_of_the_paper():
    tags = [f"{side}_r{k}" for side in ("ir", "tr") for k in (10, 5, 1)]
    measured = {
        f"recalls/{split}{again}{tag}": 0.5 for split in ("val_", "") for again in ("rerank_", "") for tag in tags
    }
    text = results(settings_of("task_finetune_irtr_coco_base_image384"), measured | {"recalls/val_avg": 0.5})
    lines = lines_of(text)
    order = [f"{side}_r{k}" for side in ("tr", "ir") for k in (1, 5, 10)]
    expected = [f"recalls/{again}{tag}" for again in ("", "rerank_") for tag in order]
    expected += [f"recalls/val_{again}{tag}" for again in ("", "rerank_") for tag in order]
    assert list(lines)[:25] == [*expected, "recalls/val_avg"]
    assert lines["recalls/tr_r1"].split()[-4:] == ["50.00", "%", "74.8", "%"]
    assert lines["recalls/ir_r1"].split()[-2:] == ["57.2", "%"]
    assert sum("74.8" in line for line in lines.values()) == 1
    assert "fine-tuned on coco at 384 px" in text


def test_published_numbers():
    expected = {
        "task_finetune_vqa_base_image480": [76.6],
        "task_finetune_vqa_base_plus_image480": [78.5],
        "task_finetune_vqa_large_image480": [79.9],
        "task_finetune_nlvr2_base_image384": [83.3],
        "task_finetune_nlvr2_base_plus_image384": [85.1],
        "task_finetune_nlvr2_large_image384": [86.9],
        "task_finetune_irtr_coco_base_image384": [74.8, 57.2],
        "task_finetune_irtr_coco_base_plus_image384": [76.3, 58.6],
        "task_finetune_irtr_coco_large_image384": [78.2, 60.6],
        "task_finetune_irtr_f30k_base_image384": [92.3, 79.3],
        "task_finetune_irtr_f30k_base_plus_image384": [93.2, 81.8],
        "task_finetune_irtr_f30k_large_image384": [95.3, 84.5],
    }
    for name, numbers in expected.items():
        assert list(published(settings_of(name)).values()) == numbers, name


def test_what_cannot_be_compared_has_no_published_number():
    name = "task_finetune_irtr_coco_base_image384"
    assert not published(settings_of("task_mlm_itm_itc_base", get_recall_metric=True))  # not fine-tuned
    assert not published(settings_of("task_finetune_irtr_f30k_base"))  # at 224 px
    assert not published(settings_of(name, datasets=["coco", "f30k"]))  # among the pictures of both
    assert not published(settings_of(name, model_arch="vlmo_tiny_patch16"))
    assert "published:" not in results(settings_of("task_finetune_nlvr2_base"), {})
