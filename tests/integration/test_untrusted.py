"""Whatever lies in a file or a config, the worst that comes of it is an error for people; nothing is written elsewhere.

Each kind of input is tried in a process of its own, so that a crash of a library is seen; what it tried last is left.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from tests import tables
from vlmo.batch import FIELDS
from vlmo.checkpoints import loading as checkpoint
from vlmo.config import resolve
from vlmo.datamodules.collate import Collator
from vlmo.datasets.base_dataset import Skipped
from vlmo.datasets.checks import check_tables
from vlmo.errors import VLMoError
from vlmo.images import UndecodableImage, decode_image
from vlmo.label_names import read_label_names
from vlmo.registry import DATASETS
from vlmo.settings import Settings
from vlmo.text import TokenMasker, load_tokenizer
from vlmo.training.checkpointing.files import newest_intact
from vlmo.transforms import keys_to_transforms
from vlmo.utils import write_own_captions, write_own_vqa

SECONDS = 20  # of computing, for one input: far more than any takes

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
LISTS = st.lists(SCALARS, max_size=3)
VALUES = st.recursive(SCALARS, lambda each: LISTS | st.dictionaries(st.text(), each, max_size=3))


@st.composite
def damaged(draw, content):
    """Some bytes of a file: cut off, changed, exchanged, put in or left out."""
    content = bytearray(content)
    near = st.integers(0, len(content)) | st.integers(0, 300) | st.integers(max(len(content) - 2000, 0), len(content))
    for _ in range(draw(st.integers(1, 4))):
        at = min(draw(near), len(content))
        match draw(st.integers(0, 4)):
            case 0:
                del content[at:]
            case 1:
                content[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case 2:
                number = draw(st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), 1000]))
                content[at : at + 8] = number.to_bytes(8, "little", signed=True)
            case 3:
                content[at:at] = draw(st.binary(max_size=20))
            case 4:
                del content[at : at + draw(st.integers(1, 50))]
    return bytes(content)


# --- one input of each kind -------------------------------------------------------------------------------------------


TASKS = ["task_mlm_itm_itc_base", "task_textmlm_base", "task_finetune_nlvr2_base"]


def config(data, folder):
    base = resolve(data.draw(st.sampled_from(TASKS)))
    changed = data.draw(st.dictionaries(st.sampled_from(sorted(base)) | st.text(max_size=5), VALUES, max_size=6))
    found = Settings.from_config(base | changed)
    assert found.accumulation >= 1 and found.active


def image(data, folder):
    form = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"]))
    content = data.draw(damaged(tables.encoded(tables.picture(0), form)) | st.binary(max_size=100))
    assert decode_image(content).mode == "RGB"


def table(data, folder):
    name = data.draw(st.sampled_from(["coco", "vqa", "nlvr2", "wikibk"]))
    paths = sorted(folder.glob(f"good/{DATASETS[name].files('train')[0].replace('*', '0')}.arrow"))
    (folder / "root").mkdir(exist_ok=True)
    tried = folder / "root" / paths[0].name
    tried.write_bytes(data.draw(damaged(paths[0].read_bytes())))
    spec = DATASETS[name]
    findings = check_tables(
        str(folder / "root"), {name: spec}, ("train",), [("train",)], SimpleNamespace(vqav2_label_size=3)
    )
    if any(tried.name in problem for problem in findings.problems):
        raise VLMoError("refused")
    tokenizer = load_tokenizer(str(folder / "good" / "vocab.txt"))
    (transform,) = keys_to_transforms(["square_transform_randaug"], 32, "correct")
    dataset = spec.dataset([tried], tokenizer, 16, TokenMasker(tokenizer, 0.15, True), transform, FIELDS)
    samples = [dataset[number, 7] for number in range(min(len(dataset), 8))]
    kept = Collator(FIELDS | spec.dataset.fields, 16)(samples)
    assert len(kept["skipped"]) == sum(isinstance(sample, Skipped) for sample in samples)


COLUMNS = ["image", "caption", "question", "answers", "split", "image_id", "question_id"]
PATHS = ["a.png", "b.png", "../../out.png", "/etc/passwd", "train", "\0"]
RECORDS = st.dictionaries(
    st.sampled_from(COLUMNS) | st.text(max_size=3), SCALARS | st.sampled_from(PATHS) | LISTS, max_size=6
)


def annotations(data, folder):
    good = {"image": "a.png", "caption": "a cat", "question": "what ?", "answers": ["cat"], "split": "train"}
    records = [good | data.draw(RECORDS) if data.draw(st.booleans()) else data.draw(RECORDS) for _ in range(3)]
    text = "".join(json.dumps(record) + "\n" for record in [good, *records]).encode()
    (folder / "list.jsonl").write_bytes(data.draw(st.just(text) | damaged(text)))
    make = data.draw(st.sampled_from([write_own_captions.make_arrow, write_own_vqa.make_arrow]))
    make(str(folder / "pictures"), str(folder / "out"), annotations=str(folder / "list.jsonl"))


def answers(data, folder):
    text = json.dumps(data.draw(VALUES | st.lists(st.text(max_size=3), max_size=3))).encode()
    (folder / "vqav2_answers.json").write_bytes(data.draw(st.just(text) | damaged(text)))
    assert all(isinstance(answer, str) for answer in read_label_names(folder / "vqav2_answers.json"))


def resumed(data, folder):
    """The newest checkpoint of a run is damaged: it is refused, or as it was."""
    good = (folder / "good.ckpt").read_bytes()
    name = Path("log", "vlmo_seed1_from_", "version_0", "checkpoints", "last.ckpt")
    (folder / name).write_bytes(data.draw(damaged(good)))
    found = newest_intact(Settings.from_config(resolve(log_dir=str(folder / "log"))), "")
    if found is None:
        raise VLMoError("passed over")
    assert torch.equal(checkpoint.read(found).tensors["transformer.blocks.0.mlp_text.weight"], torch.arange(1000.0))


KINDS = [config, image, table, annotations, answers, resumed]


# --- trying them ------------------------------------------------------------------------------------------------------


def prepare(folder):
    for part in ("good", "pictures", "log/vlmo_seed1_from_/version_0/checkpoints", "work"):
        (folder / part).mkdir(parents=True)
    for write in (tables.write_coco, tables.write_vqa, tables.write_nlvr2, tables.write_wikibk):
        write(folder / "good")
    tables.write_vocabulary(folder / "good")
    for name in ("a.png", "b.png"):
        (folder / "pictures" / name).write_bytes(tables.png(0))
    state = {"transformer.blocks.0.mlp_text.weight": torch.arange(1000.0)}
    torch.save({"state_dict": state, "vlmo_resume": {"epoch": 0}}, folder / "good.ckpt")
    os.chdir(folder / "work")


def watch_writing(folder):
    """Ends the process if anything outside of `folder` is opened for writing, made, renamed or removed."""
    allowed = (str(folder), "/dev/", "/proc/self")
    flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def hook(event, arguments):
        written = []
        if event == "open" and isinstance(arguments[0], str | bytes) and (arguments[2] or 0) & flags:
            written = [arguments[0]]
        elif event in ("os.rename", "os.link", "os.symlink"):
            written = list(arguments[:2])
        elif event in ("os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree"):
            written = [arguments[0]]
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
            written = [f"a process: {arguments[0]}"]
        for path in written:
            place = os.path.abspath(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else None
            if place is not None and not place.startswith(allowed):
                os.write(1, f"{event}: {path}\n".encode())
                os._exit(3)

    sys.addaudithook(hook)


def try_many(kind, folder, number):
    with (folder / "report.txt").open("w") as report:
        os.dup2(report.fileno(), 1)
        os.dup2(report.fileno(), 2)
    prepare(folder)
    set_hypothesis_home_dir(folder / "hypothesis")
    taken = {True: 0, False: 0}
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

    @settings(max_examples=number, derandomize=True, database=None, suppress_health_check=checks)
    @given(st.data())
    def trials(data):
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # which ends the process
        shutil.rmtree(folder / "out", ignore_errors=True)
        try:
            kind(data, folder)
            taken[True] += 1
        except (VLMoError, UndecodableImage):
            taken[False] += 1

    resolve()  # sacred reads its own files first
    watch_writing(folder)
    trials()
    signal.setitimer(signal.ITIMER_PROF, 0)
    os.write(1, json.dumps(taken).encode())


def survives(kind, folder, number):
    process = multiprocessing.get_context("fork").Process(target=try_many, args=(kind, folder, number))
    process.start()
    process.join()
    report = (folder / "report.txt").read_text()
    assert process.exitcode == 0, f"exit code {process.exitcode} (input in {folder})\n{report[-6000:]}"
    return json.loads(report.splitlines()[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_some(kind, tmp_path):
    counts = survives(kind, tmp_path, 30)
    assert counts["false"], "nothing was refused"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand(kind, tmp_path):
    survives(kind, tmp_path, 10_000 // len(KINDS) + 1)
