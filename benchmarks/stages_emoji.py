"""The emoji world of `stages.py`: 1,641 concepts in two drawing styles, with people's names and tags for them.

Made from three npm packages as `npm pack emoji-datasource-google emoji-datasource-twitter emojibase-data` fetches them
(pictures of Google's Noto, Apache 2.0, and of Twitter's Twemoji, CC-BY 4.0; texts of Emojibase, MIT). Training sees
nine tenths of the concepts, drawn by Google; the others are held out: drawn by Google for validation, and by Twitter,
a style that was never seen, for test.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmo.errors import VLMoError
from vlmo.utils import write_own_captions

PICTURES = "emoji-datasource-{style}"
TEXTS = "emojibase-data"
HELD_OUT = 10  # one concept of so many
MOST_CAPTIONS = 5
SIDE = 64  # pixels of the pictures that are taken


def make_arrow(packages: Path, raw: Path, arrow: Path) -> list[str]:
    """Writes pictures and `captions.jsonl` below `raw`, and COCO's tables of them; returns the training captions.

    Args:
        packages: folder of the three .tgz files.

    Raises:
        VLMoError: if one is not there.
    """
    with tarfile.open(_package(packages, TEXTS)) as tar:
        texts = {each["hexcode"]: each for each in json.load(_member(tar, "package/en/data.json"))}
    records = [each for style in ("google", "twitter") for each in _pictures(packages, style, texts, raw)]
    (raw / "captions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_own_captions.make_arrow(str(raw), str(arrow))
    return [text for record in records if record["split"] == "train" for text in record["caption"]]


def _pictures(packages: Path, style: str, texts: dict[str, Any], raw: Path) -> Iterator[dict[str, Any]]:
    """Writes the pictures of a style that are used; gives a record for each."""
    folder = raw / style
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(_package(packages, PICTURES.format(style=style))) as tar:
        listed = {each["image"]: each for each in json.load(_member(tar, "package/emoji.json"))}
        for member in tar:
            name = Path(member.name).name
            entry = listed.get(name)
            if entry is None or f"/{style}/{SIDE}/" not in member.name or entry["category"] == "Flags":
                continue
            code = entry["unified"]
            about = texts.get(code) or texts.get(code.replace("-FE0F", ""))
            is_held_out = int(hashlib.md5(code.encode(), usedforsecurity=False).hexdigest(), 16) % HELD_OUT == 0
            split = {"google": "val" if is_held_out else "train", "twitter": "test" if is_held_out else ""}[style]
            if about is None or not split:
                continue
            (folder / name).write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
            yield {"image": f"{style}/{name}", "caption": captions(about, entry["short_name"]), "split": split}


def captions(about: dict[str, Any], short_name: str) -> list[str]:
    """At most five texts, all of words that people chose: two names, the tags, and each half of the tags."""
    tags = about.get("tags", [])
    half = len(tags) // 2
    lists = [tags, tags[:half], tags[half:]] if half else [tags]
    texts = [
        about["label"],
        short_name.replace("_", " ").replace("-", " "),
        *(", ".join(each) for each in lists if each),
    ]
    return list(dict.fromkeys(texts))[:MOST_CAPTIONS]


def _package(packages: Path, name: str) -> Path:
    found = sorted(packages.glob(f"{name}-*.tgz"))
    if not found:
        raise VLMoError(f"{packages}: has no {name}-*.tgz; run `npm pack {name}` there")
    return found[-1]


def _member(tar: tarfile.TarFile, name: str) -> Any:
    try:
        return tar.extractfile(name)
    except KeyError:
        raise VLMoError(f"{tar.name}: has no {name}; fetch the package again with npm pack") from None
