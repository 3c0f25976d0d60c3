"""Binary classification of an image with its text as a downstream task, from outside the package: is the meme hateful?

Hateful Memes (arXiv 2005.04790): images with the words that are written on them, labelled 0 or 1.

    python -c "from examples.plugins.memes import make_arrow; make_arrow('<ROOT>', '<ARROW_ROOT>')"
    python run.py with plugins='["examples.plugins.memes"]' task_finetune_memes_base data_root=<ARROW_ROOT>
        load_path=<CKPT> per_gpu_batchsize=16 num_gpus=1
    python run.py with ... load_path=<FINE-TUNED> test_only=True            # AUROC, and memes_test_<FINE-TUNED>.csv
    python -m vlmo.predict hateful --plugins examples.plugins.memes --checkpoint <FINE-TUNED> --image a.jpg
        --text "the words on it"

One file holds all of it: the data set, its converter, the task with a metric of its own, and its named config.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa
from torch import Tensor, nn

from vlmo.batch import FIELDS, NUMBER, Field
from vlmo.config import BASE, FINETUNE, losses, named
from vlmo.datasets.base_dataset import BaseDataset, DatasetSpec
from vlmo.files import atomic_write
from vlmo.modules.attention import first_positions
from vlmo.modules.heads import classifier
from vlmo.modules.model import Encode, Hidden
from vlmo.registry import DATASETS, TASKS
from vlmo.sources.arrow_tables import RowLocation
from vlmo.tasks.base import PredictionFiles, Step, Task, TaskOutput, Use, accuracy, mean, mean_cross_entropy

# --- data: the tables memes_{train,dev,test}.arrow --------------------------------------------------------------------


class MemesDataset(BaseDataset):
    """A sample is one meme: a row has a list of one text."""

    text_column: ClassVar[str] = "text"
    columns: ClassVar[dict[str, str]] = {"image": "binary", "text": "a list of texts", "label": "anything"}
    fields: ClassVar[Mapping[str, Field]] = {"hateful": NUMBER, "meme": NUMBER}

    def targets(self, location: RowLocation) -> dict[str, Any]:
        return {"hateful": location.scalar("label").as_py(), "meme": location.scalar("id").as_py()}


DATASETS.register("memes")(
    DatasetSpec(MemesDataset, make_arrow="", train=("memes_train",), val=("memes_dev",), test=("memes_test",))
)


def make_arrow(root: str, dataset_root: str) -> None:
    """Converts `root`/{train,dev_seen,test_seen}.jsonl, with the images in `root`/img, into tables.

    A line is {"id": 42953, "img": "img/42953.png", "label": 0, "text": "its a character not a date"}, as published.
    """
    schema = pa.schema({"image": pa.binary(), "text": pa.list_(pa.string()), "label": pa.int64(), "id": pa.int64()})
    for split, name in (("train", "train"), ("dev", "dev_seen"), ("test", "test_seen")):
        with pa.ipc.new_file(f"{dataset_root}/memes_{split}.arrow", schema) as writer:
            for line in (Path(root) / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
                meme = json.loads(line)
                columns = {
                    "image": [(Path(root) / meme["img"]).read_bytes()],
                    "text": [[meme["text"]]],
                    "label": [meme["label"]],
                    "id": [meme["id"]],
                }
                writer.write_batch(pa.record_batch(columns, schema=schema))


# --- the task ---------------------------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """What was predicted of one meme; the probability is None where the image cannot be decoded."""

    meme: int
    probability: float | None
    label: int


def auroc(rows: Sequence[Scored]) -> float | None:
    """Gives the share of pairs of a hateful and another meme of which the hateful one scores higher; half for ties."""
    hateful, others = ([row.probability for row in rows if row.label == label] for label in (1, 0))
    wins = [(h > o) + (h == o) / 2 for h in hateful for o in others if h is not None and o is not None]
    return sum(wins) / len(wins) if wins else None


def hateful(predictor: Any, image: Any, text: Any) -> list[float]:
    """Gives the probability that an image with these words is hateful."""

    def logits(model: Any, batch: Any) -> Tensor:
        hidden = model.encode_pair(batch["text_ids"], batch["text_masks"], batch["image"])
        return model.memes_classifier(model.pooler(hidden))

    return predictor.compute(logits, image=image, text=text).softmax(-1)[:, 1].tolist()


@TASKS.register("memes")
class Memes(Task):
    """Cross-entropy over the two labels."""

    name = "memes"
    datasets = frozenset({"memes"})
    paths = ("pair", "pooler")
    head_group = True
    writes_predictions = True
    required_heads = ("memes_classifier",)
    fields = {**{name: FIELDS[name] for name in ("image", "text_ids", "text_masks")}, "hateful": NUMBER}
    uses = (Use("hateful", hateful, "memes_classifier", "judging memes", ("image", "text"), "hateful"),)

    def heads(self, width: int) -> dict[str, nn.Module | nn.Parameter]:
        return {"memes_classifier": classifier(width, 2 * width, 2)}

    def requests(self, step: Step) -> list[Encode]:
        ids = step.batch["text_ids"]
        return [Encode(step.batch["image"], ids, step.batch["text_masks"], first_positions(ids))]

    def loss(self, step: Step, encoded: Sequence[Hidden]) -> TaskOutput:
        logits = step.heads["memes_classifier"](step.heads["pooler"](encoded[0][0]))
        labels = step.batch["hateful"]  # type: ignore[typeddict-item]
        loss = mean_cross_entropy(logits.float(), labels)
        measured = {"loss": mean(loss, len(labels)), "accuracy": accuracy(logits, labels)}
        return TaskOutput(loss, {"logits": logits, "labels": labels}, measured)

    def predictions(self, batch: Any, output: TaskOutput | None, label_names: Sequence[str] | None) -> list[Scored]:
        rows = [Scored(targets["meme"], None, targets["hateful"]) for targets in batch["skipped_targets"]]
        if output is not None:
            scores = output.outputs["logits"].float().softmax(-1)[:, 1].tolist()
            columns = batch["meme"].tolist(), scores, output.outputs["labels"].tolist()
            rows += [Scored(*row) for row in zip(*columns, strict=True)]
        return rows

    def write_predictions(self, rows: list[Scored], folder: Path, checkpoint: str) -> PredictionFiles:
        """Writes `memes_test_{checkpoint}.csv` in the challenge's form, and measures `memes/test/auroc`."""
        path = folder / f"memes_test_{checkpoint}.csv"
        lines = ["id,proba,label\n"]
        for meme, probability, _ in sorted(rows):
            score = 0.5 if probability is None else probability
            lines.append(f"{meme},{score:.6f},{int(score > 0.5)}\n")
        with atomic_write(path) as file:
            file.write("".join(lines).encode())
        area = auroc(rows)
        return PredictionFiles([path], {} if area is None else {"memes/test/auroc": area})


named(
    "task_finetune_memes_base",
    FINETUNE,
    BASE,
    datasets=["memes"],
    loss_names=losses(memes=1),
    learning_rate=3e-5,
    image_size=384,
)
