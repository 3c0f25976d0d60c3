"""The house stays one to find one's way in: how many files a reader follows through a step and an evaluation."""

import pytest

from benchmarks import trace
from tests import tables


@pytest.fixture
def folder(tmp_path):
    tables.write_coco(tmp_path)
    tables.write_vocabulary(tmp_path)
    return tmp_path


def test_a_training_step_enters_few_files(folder):
    assert len(trace.trace_step(folder).files) <= 23


def test_an_evaluation_of_retrieval_enters_few_files_and_reads_everything_once(folder):
    found = trace.trace_recall(folder)
    assert len(found.files) <= 35
    assert (found.functions["decode_image"], found.functions["tokenize"]) == (4, 8)
