"""Samples a second and core of the training loader, beside a loader that works as published ones do.

python -m benchmarks.load_data [--rounds 20] [--images 128] [--sizes 640x480 1600x1200] [--photos FOLDER]

All read the same generated JPEGs (of 640 x 480 about 100 KB each), or with --photos those of a folder, resized and
saved at quality 90, with captions, and make the same batches for stage 3: crops at 224 pixels with the same
distribution of augmentations, texts with masked words. One thread, no worker processes; a round is a batch of each in
turn, so that a busy machine is fair to all. Loaders: "published" as below; "vlmo"; "at scale", with decode_at_scale;
"webdataset", if that is installed: its own loader on a tar of the same samples, transformed and put together as by
"published". Images of "vlmo" and "at scale" are bytes, which become pixels on the device: what that takes on a CPU is
said below the table, and the ratio with it.

The published way: the table read as a whole, Pillow for decoding, crop and augmentations, ToTensor, Normalize, a dict a
sample with its text padded to max_text_len, images copied one by one into an empty batch.
"""

import argparse
import io
import random
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from transformers import BertTokenizer

from vlmo.config import resolve
from vlmo.datamodules.multitask_datamodule import MTDataModule
from vlmo.distributed.wire_format import with_pixels
from vlmo.text import vocabulary_of

SIZE, BATCH, TEXT_LEN = 224, 32, 40
CLOCK = time.process_time  # of this process alone: what else runs does not count
WORDS = [
    "a",
    "the",
    "red",
    "cat",
    "dog",
    "man",
    "sits",
    "runs",
    "plays",
    "##ing",
    "##s",
    "on",
    "under",
    "with",
    "table",
]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]


def write_data(root: Path, images: int, size: tuple[int, int], photos: Path | None) -> None:
    """A table of photo-like noise, or photos, and captions of 8 to 16 words, in COCO's files, and a vocabulary."""
    draw = np.random.default_rng(0)
    width, height = size
    files = [] if photos is None else sorted(path for path in photos.rglob("*") if path.suffix in (".jpg", ".png"))

    def noise(width: int, height: int) -> np.ndarray:
        pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC), np.float32)

    def picture(number: int) -> Image.Image:
        if files:
            return Image.open(files[number % len(files)]).convert("RGB").resize(size, Image.Resampling.LANCZOS)
        details = noise(width // 3, height // 3)
        pixels = 0.75 * noise(16, 12) + 0.25 * details + draw.normal(0, 4, (height, width, 3))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    def jpeg(number: int) -> bytes:
        file = io.BytesIO()
        picture(number).save(file, "JPEG", quality=90)
        return file.getvalue()

    def caption() -> str:
        return " ".join(draw.choice(WORDS, draw.integers(8, 17))).replace(" ##", "")

    columns = {"image": [jpeg(number) for number in range(images)], "caption": [[caption()] for _ in range(images)]}
    for split, rows in (("train", images), ("val", 1)):
        table = pa.table({name: values[:rows] for name, values in columns.items()})
        with pa.ipc.new_file(str(root / f"coco_caption_karpathy_{split}.arrow"), table.schema) as writer:
            writer.write_table(table)
    (root / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    with tarfile.open(root / "samples.tar", "w") as tar:
        for number, (image, (text,)) in enumerate(zip(*columns.values(), strict=True)):
            for ending, content in (("jpg", image), ("txt", text.encode())):
                member = tarfile.TarInfo(f"{number:06d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


# --- the published way ------------------------------------------------------------------------------------------------


def affine(*coefficients: float) -> Callable[[Image.Image, int], Image.Image]:
    """A warp by Pillow; `coefficients` are those of the identity plus these, times the sign."""

    def warp(image: Image.Image, sign: int) -> Image.Image:
        rows = [one + sign * more for one, more in zip((1, 0, 0, 0, 1, 0), coefficients, strict=True)]
        method, resample = Image.Transform.AFFINE, Image.Resampling.BILINEAR
        return image.transform(image.size, method, rows, resample, fillcolor=(128, 128, 128))

    return warp


AUGMENTATIONS: list[Callable[[Image.Image, int], Image.Image]] = [
    lambda image, sign: image,
    lambda image, sign: ImageOps.autocontrast(image),
    lambda image, sign: ImageOps.equalize(image),
    lambda image, sign: ImageEnhance.Brightness(image).enhance(1.36),
    lambda image, sign: ImageEnhance.Sharpness(image).enhance(1.36),
    lambda image, sign: image.rotate(21 * sign, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)),
    affine(0, 0.21, 0, 0, 0, 0),
    affine(0, 0, 0, 0.21, 0, 0),
    affine(0, 0, 7, 0, 0, 0),
    affine(0, 0, 0, 0, 0, 7),
]


def augment(image: Image.Image) -> Image.Image:
    """Two of the ten, each with probability 0.5."""
    for apply in random.choices(AUGMENTATIONS, k=2):
        if random.random() < 0.5:
            image = apply(image, random.choice((-1, 1)))
    return image


class PublishedDataset(Dataset):
    """Texts as a list, samples found by a dict."""

    def __init__(self, path: Path, tokenizer: Any):
        self.table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self.texts = self.table["caption"].to_pylist()
        pairs = [(row, item) for row, texts in enumerate(self.texts) for item in range(len(texts))]
        self.index = dict(enumerate(pairs))
        self.tokenizer = tokenizer
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(SIZE, (0.5, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(),
                augment,
                transforms.ToTensor(),
                transforms.Normalize([0.5] * 3, [0.5] * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row, item = self.index[number]
        return self.sample(self.table["image"][row].as_py(), self.texts[row][item], row, item, number)

    def sample(self, data: bytes, text: str, row: int, item: int, number: int) -> dict[str, Any]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        encoding = self.tokenizer(
            text, padding="max_length", truncation=True, max_length=TEXT_LEN, return_special_tokens_mask=True
        )
        return {
            "image": self.transform(image),
            "text": (text, encoding),
            "img_index": row,
            "cap_index": item,
            "raw_index": number,
        }

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {name: [sample[name] for sample in samples] for name in samples[0]}
        images = torch.zeros(len(samples), 3, SIZE, SIZE)
        for number, image in enumerate(batch["image"]):
            images[number, :, : image.shape[1], : image.shape[2]] = image
        encodings = [encoding for _, encoding in batch["text"]]
        ids, masks, special = (
            torch.tensor([encoding[name] for encoding in encodings])
            for name in ("input_ids", "attention_mask", "special_tokens_mask")
        )
        chosen = torch.rand(ids.shape).lt(0.15) & ~special.bool()  # (its whole words are left out: slow in Python)
        fate = torch.rand(ids.shape)
        masked = torch.where(chosen & (fate < 0.8), self.tokenizer.mask_token_id, ids)
        masked = torch.where(chosen & (fate >= 0.9), torch.randint_like(ids, len(self.tokenizer)), masked)
        words = {"text_ids": ids, "text_masks": masks, "text_labels": torch.full_like(ids, -100)}
        words |= {"text_ids_mlm": masked, "text_labels_mlm": torch.where(chosen, ids, -100)}
        return batch | words | {"image": images, "text": [text for text, _ in batch["text"]]}


# --- the measurement --------------------------------------------------------------------------------------------------


def endless(loader: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    while True:
        yield from loader


def webdataset_loader(tar: Path, published: PublishedDataset) -> Iterable[dict[str, Any]]:
    """webdataset's own way: a shuffled stream of a tar's samples."""
    import webdataset

    samples = webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False).shuffle(1000)
    made = samples.map(lambda each: published.sample(each["jpg"], each["txt"].decode(), 0, 0, 0))
    return webdataset.WebLoader(made.batched(BATCH, collation_fn=published.collate, partial=False), batch_size=None)


def make_loaders(root: Path) -> dict[str, Iterable[dict[str, Any]]]:
    options = {"data_root": str(root), "tokenizer": str(root / "vocab.txt"), "datasets": ["coco"], "num_gpus": 0}
    options |= {"per_gpu_batchsize": BATCH, "num_workers": 0, "max_text_len": TEXT_LEN, "image_size": SIZE}
    found: dict[str, Iterable[dict[str, Any]]] = {}
    for name, at_scale in (("vlmo", False), ("at scale", True)):
        module = MTDataModule(resolve("task_mlm_itm_itc_base", decode_at_scale=at_scale, **options))
        module.setup("fit")
        found[name] = module.train_dataloader()
    words = BertTokenizer(vocab={token: index for index, token in enumerate(vocabulary_of(module.tokenizer))})
    published = PublishedDataset(root / "coco_caption_karpathy_train.arrow", words)
    plain = DataLoader(published, BATCH, shuffle=True, collate_fn=published.collate, drop_last=True)
    found = {"published": plain} | found
    if find_spec("webdataset"):
        found["webdataset"] = webdataset_loader(root / "samples.tar", published)
    return found


def report(images: int, rounds: int, size: tuple[int, int], photos: Path | None) -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_data(root, images, size, photos)
        loaders = make_loaders(root)
        batches = {name: endless(loader) for name, loader in loaders.items()}
        seconds: dict[str, list[float]] = {name: [] for name in loaders}
        on_device: list[float] = []
        for number in range(rounds + 2):  # the first two warm up
            for name, source in batches.items():
                start = CLOCK()
                batch = next(source)
                if number >= 2:
                    seconds[name].append(CLOCK() - start)
                assert batch["image"].shape == (BATCH, 3, SIZE, SIZE)
                if name == "at scale":
                    start = CLOCK()
                    with_pixels(batch)
                    on_device.append(CLOCK() - start)
    print(f"{size[0]} x {size[1]} -> {SIZE} px, batches of {BATCH}, one core, median of {rounds} rounds, ", end="")
    print(f"Python {sys.version[:4]}")
    print(f"{'loader':<12}{'images/s':>10}{'ms/image':>10}{'times published':>18}")
    for name, times in seconds.items():
        middle = statistics.median(times) / BATCH
        ratio = statistics.median(old / new for old, new in zip(seconds["published"], times, strict=True))
        print(f"{name:<12}{1 / middle:>10.0f}{middle * 1e3:>10.2f}{ratio:>18.2f}")
    pixels = statistics.median(on_device)
    together = statistics.median(
        old / (new + pixels) for old, new in zip(seconds["published"], seconds["at scale"], strict=True)
    )
    print(f"pixels of bytes, on a CPU: {pixels / BATCH * 1e3:.2f} ms/image; at scale with them {together:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sizes", nargs="+", default=["640x480", "1600x1200"], metavar="WIDTHxHEIGHT")
    parser.add_argument("--photos", type=Path, help="a folder of .jpg and .png files; else pictures are generated")
    options = parser.parse_args()
    for text in options.sizes:
        width, height = map(int, text.split("x"))
        report(options.images, options.rounds, (width, height), options.photos)


if __name__ == "__main__":
    main()
