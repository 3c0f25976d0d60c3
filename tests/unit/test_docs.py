"""Every code block of the documentation is run or checked, or says why not; every extra is documented."""

import re

import pytest

from tests.code_blocks import REPOSITORY, Block, blocks, extras, is_run, pages, problems


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_and_code_are_what_there_is(page, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    wrong = [problem for block in blocks(page) if not is_run(block) for problem in problems(block)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "kind, text, told",
    [
        ("bash", "vlmo train with task_mlm_itm_itc_base batch_sze=3", "batch_sze"),
        ("", "python run.py with task_mlm_itm_itc_bse", "task_mlm_itm_itc_bse"),
        ("bash", "python run.py with ... data_root=<ARROW> \\\n    image_size=30", "image_size"),
        ("bash", "torchrun --nnodes 2 run.py with num_gpus=8 optin=1", "optin"),
        ("bash", "vlmo predict answr --checkpoint a.ckpt", "answr"),
        ("bash", "python -m vlmo.evaluate a.ckpt --sute x", "--sute"),
        ("bash", "python -m benchmarks.step --no-such", "--no-such"),
        ("bash", "python -m vlmo.nothing", "vlmo.nothing"),
        ("bash", "pip install 'vlmo[nothing]'", "nothing"),
        ("bash", "unheard-of --option", "unheard-of"),
        ("python", "from vlmo import Preditor", "Preditor"),
        ("python", "from vlmo import (", "line 1"),
        ("json", '{"image": }', "image"),
        ("", "what ( is this", "mark it"),
    ],
)
def test_what_is_wrong_is_found(kind, text, told, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    (problem,) = problems(Block("page.md", 1, kind, text))
    assert told in problem


def test_blocks_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.code_blocks.REPOSITORY", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "Words\n\n    vlmo --help\n\n- a list\n  goes on\n\n      vlmo demo\n\n"
        "<!-- not run: why -->\n```bash\nmake\n```\n"
        "\n<!-- run with: a=1 -->\n\n```python\nx = 1\n```\nend\n\n```\nplain\n```\n"
    )
    found = [(block.kind, block.text, block.mark, block.said) for block in blocks(page)]
    assert found == [
        ("", "vlmo --help", "", ""),
        ("", "vlmo demo", "", ""),
        ("bash", "make", "not run", "why"),
        ("python", "x = 1", "run with", "a=1"),
        ("text", "plain", "", ""),
    ]


def test_the_code_of_the_paper_is_there():
    for line in (REPOSITORY / "docs/paper.md").read_text().splitlines():
        for file, names in re.findall(r"\(\.\./(vlmo/[\w/]+\.py)\)((?:,? `[\w.]+`)*)", line):
            source = (REPOSITORY / file).read_text()
            for name in re.findall(r"`([\w.]+)`", names):
                last = name.split(".")[-1]
                assert re.search(rf"(def|class) {last}\b|^ *{last}\b.* = ", source, re.MULTILINE), f"{file}: {name}"


def test_every_extra_is_documented():
    page = (REPOSITORY / "docs/installation.md").read_text()
    assert not [extra for extra in extras() if f"| `{extra}` |" not in page]
