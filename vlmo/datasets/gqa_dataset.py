"""Questions of GQA: as those of VQA, each with one answer and an id that is a text (it may begin with 0)."""

from collections.abc import Mapping
from typing import ClassVar

from vlmo.batch import VALUES, Field
from vlmo.datasets.base_dataset import DatasetSpec
from vlmo.datasets.vqa_dataset import VQADataset
from vlmo.registry import DATASETS


class GQADataset(VQADataset):
    """A sample is one question with its image."""

    answers_file: ClassVar[str] = "gqa_answers.json"
    label_size: ClassVar[str] = "gqa_label_size"
    columns: ClassVar[dict[str, str]] = VQADataset.columns | {"question_id": "a list of texts"}
    fields: ClassVar[Mapping[str, Field]] = {**VQADataset.fields, "qid": VALUES}


DATASETS.register("gqa")(
    DatasetSpec(
        GQADataset,
        make_arrow="gqa",
        train=("gqa_train",),
        val=("gqa_val",),
        test=("gqa_testdev", "gqa_test"),  # of the second the answers are not known
        optional=frozenset({"gqa_test"}),
    )
)
