"""Visual entailment as a downstream task, from outside the package: does the image entail the sentence?

SNLI-VE (arXiv 1901.06706): an image of Flickr30K and a sentence that it entails, contradicts, or neither.

    python -c "from examples.plugins.snli_ve import make_arrow; make_arrow('<ROOT>', '<ARROW_ROOT>')"
    python run.py with plugins='["examples.plugins.snli_ve"]' task_finetune_snli_ve_base data_root=<ARROW_ROOT>
        load_path=<CKPT> per_gpu_batchsize=16 num_gpus=1
    python run.py with ... load_path=<FINE-TUNED> test_only=True            # writes snli_ve_test_<FINE-TUNED>.csv
    python -m vlmo.predict entail --plugins examples.plugins.snli_ve --checkpoint <FINE-TUNED> --image a.jpg
        --sentence "two dogs run"

One file holds all of it: the data set, its converter, the task and its named config.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
from torch import Tensor, nn

from vlmo.batch import FIELDS, NUMBER, VALUES, Field
from vlmo.config import BASE, FINETUNE, losses, named
from vlmo.datasets.base_dataset import BaseDataset, DatasetSpec
from vlmo.files import atomic_write
from vlmo.modules.attention import first_positions
from vlmo.modules.heads import classifier
from vlmo.modules.model import Encode, Hidden
from vlmo.registry import DATASETS, TASKS
from vlmo.sources.arrow_tables import RowLocation
from vlmo.tasks.base import PredictionFiles, Step, Task, TaskOutput, Use, accuracy, mean, mean_cross_entropy

LABELS = ["entailment", "neutral", "contradiction"]

# --- data: the tables snli_ve_{train,dev,test}.arrow ------------------------------------------------------------------


class SNLIVEDataset(BaseDataset):
    """A sample is one sentence with its image."""

    text_column: ClassVar[str] = "sentences"
    columns: ClassVar[dict[str, str]] = {
        "image": "binary",
        "sentences": "a list of texts",
        "labels": "a list",
        "ids": "a list",
    }
    fields: ClassVar[Mapping[str, Field]] = {"entailment": NUMBER, "pair_id": VALUES}

    def targets(self, location: RowLocation) -> dict[str, Any]:
        return {"entailment": location.list_item("labels"), "pair_id": location.list_item("ids")}


DATASETS.register("snli_ve")(
    DatasetSpec(SNLIVEDataset, make_arrow="", train=("snli_ve_train",), val=("snli_ve_dev",), test=("snli_ve_test",))
)


def make_arrow(root: str, dataset_root: str) -> None:
    """Converts `root`/snli_ve_{train,dev,test}.jsonl, with the images in `root`/flickr30k-images, into tables.

    A line is {"pairID": ..., "Flickr30K_ID": ..., "gold_label": "entailment", "sentence2": ...}, as published.
    """
    schema = pa.schema(
        {
            "image": pa.binary(),
            "sentences": pa.list_(pa.string()),
            "labels": pa.list_(pa.int64()),
            "ids": pa.list_(pa.string()),
        }
    )
    for split in ("train", "dev", "test"):
        with pa.ipc.new_file(f"{dataset_root}/snli_ve_{split}.arrow", schema) as writer:
            for image, lines in _by_image(Path(root) / f"snli_ve_{split}.jsonl"):
                row = {
                    "image": [(Path(root) / "flickr30k-images" / f"{image}.jpg").read_bytes()],
                    "sentences": [[line["sentence2"] for line in lines]],
                    "labels": [[LABELS.index(line["gold_label"]) for line in lines]],
                    "ids": [[line["pairID"] for line in lines]],
                }
                writer.write_batch(pa.record_batch(row, schema=schema))


def _by_image(path: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    lines: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        lines.setdefault(str(record["Flickr30K_ID"]), []).append(record)
    yield from lines.items()


# --- the task ---------------------------------------------------------------------------------------------------------


def entail(predictor: Any, image: Any, sentence: Any) -> list[dict[str, float]]:
    """Gives the probability of each of the three labels, for an image and a sentence."""

    def logits(model: Any, batch: Any) -> Tensor:
        hidden = model.encode_pair(batch["text_ids"], batch["text_masks"], batch["image"])
        return model.snli_ve_classifier(model.pooler(hidden))

    scores = predictor.compute(logits, image=image, text=sentence).softmax(-1)
    return [dict(zip(LABELS, row, strict=True)) for row in scores.tolist()]


@TASKS.register("snli_ve")
class SNLIVE(Task):
    """Cross-entropy over the three labels."""

    name = "snli_ve"
    datasets = frozenset({"snli_ve"})
    paths = ("pair", "pooler")
    head_group = True
    writes_predictions = True
    required_heads = ("snli_ve_classifier",)
    fields = {**{name: FIELDS[name] for name in ("image", "text_ids", "text_masks")}, "entailment": NUMBER}
    uses = (Use("entail", entail, "snli_ve_classifier", "judging entailment", ("image", "sentence"), "labels"),)

    def heads(self, width: int) -> dict[str, nn.Module | nn.Parameter]:
        return {"snli_ve_classifier": classifier(width, 2 * width, len(LABELS))}

    def requests(self, step: Step) -> list[Encode]:
        ids = step.batch["text_ids"]
        return [Encode(step.batch["image"], ids, step.batch["text_masks"], first_positions(ids))]

    def loss(self, step: Step, encoded: Sequence[Hidden]) -> TaskOutput:
        logits = step.heads["snli_ve_classifier"](step.heads["pooler"](encoded[0][0]))
        labels = step.batch["entailment"]  # type: ignore[typeddict-item]
        loss = mean_cross_entropy(logits.float(), labels)
        measured = {"loss": mean(loss, len(labels)), "accuracy": accuracy(logits, labels)}
        return TaskOutput(loss, {"logits": logits, "labels": labels}, measured)

    def predictions(
        self, batch: Any, output: TaskOutput | None, label_names: Sequence[str] | None
    ) -> list[tuple[str, str]]:
        rows = [(targets["pair_id"], "") for targets in batch["skipped_targets"]]
        if output is not None:
            labels = [LABELS[number] for number in output.outputs["logits"].argmax(-1).tolist()]
            rows += zip(batch["pair_id"], labels, strict=True)
        return rows

    def write_predictions(self, rows: list[Any], folder: Path, checkpoint: str) -> PredictionFiles:
        path = folder / f"snli_ve_test_{checkpoint}.csv"
        with atomic_write(path) as file:
            file.write("".join(f"{pair},{label}\n" for pair, label in sorted(rows)).encode())
        return PredictionFiles([path])


named(
    "task_finetune_snli_ve_base",
    FINETUNE,
    BASE,
    datasets=["snli_ve"],
    loss_names=losses(snli_ve=1),
    learning_rate=3e-5,
    image_size=384,
)
