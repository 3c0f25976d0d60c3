"""Images of Flickr30K with sentences that they entail, contradict, or neither."""

from collections.abc import Mapping
from typing import Any, ClassVar

from vlmo.batch import NUMBER, VALUES, Field
from vlmo.datasets.base_dataset import BaseDataset, DatasetSpec
from vlmo.errors import VLMoError
from vlmo.registry import DATASETS, TASKS
from vlmo.sources.arrow_tables import RowLocation


class SNLIVEDataset(BaseDataset):
    """A sample is one sentence (the hypothesis) with its image (the premise)."""

    text_column: ClassVar[str] = "hypotheses"
    columns: ClassVar[dict[str, str]] = {
        "image": "binary",
        "hypotheses": "a list of texts",
        "labels": "a list of texts",
        "pair_ids": "a list of texts",
    }
    fields: ClassVar[Mapping[str, Field]] = {"entailment": NUMBER, "pair_id": VALUES}

    def targets(self, location: RowLocation) -> dict[str, Any]:
        known = TASKS["snli_ve"].labels
        label, pair = location.list_item("labels"), location.list_item("pair_ids")
        if label not in known:
            raise VLMoError(f"{location.path}: the label of {pair} is {label!r}; labels are {', '.join(known)}")
        return {"entailment": known.index(label), "pair_id": pair}


DATASETS.register("snli_ve")(
    DatasetSpec(
        SNLIVEDataset, make_arrow="snli_ve", train=("snli_ve_train",), val=("snli_ve_dev",), test=("snli_ve_test",)
    )
)
