"""What frozen features of each stage know of labelled images, and what fine-tuning makes of them, on a tiny model.

python -m benchmarks.labelled --set digits                          1,797 digits of 8 x 8 pixels, of scikit-learn
python -m benchmarks.labelled --set /usr/share/datasets/fashion-mnist      IDX files, such as Fashion-MNIST's
                                                                    (Debian: apt-get install dataset-fashion-mnist)

The stages are those of `vlmo.demo`: coloured shapes of 32 x 32 pixels, which say little of digits and clothes. A stage
that is there is not trained again.
"""

import argparse
import gzip
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlmo.config import resolve
from vlmo.demo.prepare import prepare
from vlmo.demo.raw_layout import Sizes
from vlmo.demo.run_demo import COMMON, STAGES, _updates, newest_checkpoint
from vlmo.evaluate import evaluate
from vlmo.evaluation.suites.probes import logistic_regression, nearest_neighbours, standardise
from vlmo.modules import VLMo
from vlmo.training.runner import run
from vlmo.utils.write_labelled_images import make_arrow

TRAIN, TEST = 5000, 1000  # images at most
TUNING = {
    "learning_rate": 1e-3,
    "layer_decay": 0.75,
    "ema_decay": 0.99,
    "mixup": 0.0,
    "cutmix": 0.0,
    "train_transform_keys": ["square_transform"],
    "val_transform_keys": ["square_transform"],
    "max_steps": 400,
    "warmup_steps": 0.1,
    "val_check_interval": 1.0,
    "num_workers": 0,
    "keep_last": 1,
}


def labelled(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Gives images (N, H, W) uint8 and labels (N,) for training, and for testing."""
    if name != "digits":
        parts = [_idx(Path(name), f"{split}-{kind}") for split in ("train", "t10k") for kind in ("images", "labels")]
        return parts[0][:TRAIN], parts[1][:TRAIN], parts[2][:TEST], parts[3][:TEST]
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = (digits.images * 255 / 16).astype(np.uint8), digits.target
    return images[:1297], labels[:1297], images[1297:], labels[1297:]


def _idx(folder: Path, beginning: str) -> np.ndarray:
    (path,) = folder.glob(f"{beginning}-idx*")
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    shape = np.frombuffer(data, ">i4", data[3], 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def write(name: str, out: Path) -> Path:
    """Writes the images as folders of classes, and these as tables; gives the folder of the tables."""
    train, train_labels, test, test_labels = labelled(name)
    arrow = out / "data" / Path(name).name
    for split, images, labels in (("train", train, train_labels), ("val", test, test_labels)):
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = out / "raw" / split / str(label) / f"{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    make_arrow(str(out / "raw"), str(arrow))
    return arrow


def stages(out: Path) -> dict[str, Path]:
    """Trains the demo's three stages; gives their checkpoints, and one of the weights that stage 1 begins with."""
    world = prepare(out / "world", 1, Sizes())
    found: dict[str, Path] = {}
    for stage in STAGES[:3]:
        updates = _updates(stage, world, out, 1, False, found) | {"num_workers": 0}
        if not (out / f"{stage.name}.done").exists():
            run(resolve(stage.task, **updates))
            (out / f"{stage.name}.done").touch()
        found[stage.name] = newest_checkpoint(out, stage.name)
    torch.manual_seed(1)
    VLMo(resolve("task_mim_base", **COMMON)).save_pretrained(out / "none")
    return {"none": out / "none"} | found


def of_pixels(name: str) -> list[float]:
    """Gives the accuracy of both probes on the pixels themselves."""
    train, labels, test, truth = (torch.from_numpy(np.array(part)) for part in labelled(name))
    known, asked = standardise(train.flatten(1), test.flatten(1))
    probes = (nearest_neighbours, logistic_regression)
    return [float((p(known, labels.long(), asked, 10) == truth).double().mean()) for p in probes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="digits", help="digits, or a folder of IDX files")
    parser.add_argument("--out", type=Path, default=Path("result/labelled"))
    options = parser.parse_args()
    out = options.out / Path(options.set).name
    checkpoints = stages(options.out)
    data = write(options.set, out)
    rows: dict[str, list[Any]] = {"pixels": [*of_pixels(options.set), None]}
    for name, checkpoint in checkpoints.items():
        results = evaluate(checkpoint, ["knn", "linear_probe"], data.parent, batch_size=100, tokenizer=None)
        measures = [each for result in results.values() for each in result.measures]
        rows[name] = [each.value for each in measures if each.part.endswith("image expert")]
        rows[name].append(fine_tuned(name, checkpoint, data, out) if name != "stage2" else None)
    print("| features | k-NN | linear probe | fine-tuned |\n|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join("" if each is None else f"{each:.1%}" for each in row) + " |")


def fine_tuned(name: str, checkpoint: Path, data: Path, out: Path) -> float:
    """Trains the whole model on the labels; gives the accuracy on the test images."""
    began = time.monotonic()
    updates = COMMON | TUNING | {"exp_name": f"tuned_{name}", "log_dir": str(out), "data_root": str(data)}
    updates |= {"load_path": str(checkpoint), "num_classes": 10}
    metrics = run(resolve("task_finetune_imagenet_base", **updates))
    print(f"{name}: fine-tuned in {time.monotonic() - began:.0f} s", flush=True)
    return metrics["image_classification/val/accuracy"]


if __name__ == "__main__":
    main()
