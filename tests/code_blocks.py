"""Code blocks of the documentation, and what can be said of one without running it.

A block is fenced, or indented by four blanks. An HTML comment just above it can say how it is tested:

    <!-- not run: reason -->      the block of a tutorial is not run; anywhere, one of unknown programs is not checked
    <!-- run with: options -->    `vlmo train with` and `vlmo doctor with` get these options too when it is run
"""

import argparse
import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from vlmo.__main__ import COMMANDS, main
from vlmo.doctor import resolve_leniently
from vlmo.errors import VLMoError
from vlmo.settings import Settings

REPOSITORY = Path(__file__).parents[1]
COMMENT = re.compile(r"<!-- (not run|run with): (.+?) -->\s*$")
LAUNCHERS = {"torchrun", "srun", "mpirun"}
OTHERS = {
    ".",
    ".venv/bin/pip",
    "cat",
    "cp",
    "eval",
    "git",
    "img2dataset",
    "mkdir",
    "mkdocs",
    "mypy",
    "pre-commit",
    "ruff",
}
PROGRAMS = {"python", "pip", "vlmo", ".venv/bin/python", *LAUNCHERS, *OTHERS}
MODULES = {module.removesuffix(".__main__"): name for name, (module, _) in COMMANDS.items()}


@dataclass(frozen=True)
class Block:
    """`mark` is "not run", "run with" or "", `said` what follows it."""

    file: str
    line: int
    kind: str  # "bash", "python", "json", ...; "" where nothing says it
    text: str
    mark: str = ""
    said: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def pages() -> list[Path]:
    top = [REPOSITORY / name for name in ("README.md", "DATA.md", "CONTRIBUTING.md")]
    return top + sorted((REPOSITORY / "docs").rglob("*.md"))


def blocks(page: Path) -> Iterator[Block]:
    """Yields the code blocks of a page in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    name = str(page.relative_to(REPOSITORY))
    mark: tuple[str, str] = ("", "")
    number, in_list = 0, False
    while number < len(lines):
        line, start = lines[number], number
        fence = re.match(r"( *)(`{3,})(\w*)", line)
        indent = 6 if in_list else 4
        if fence:
            end = next(i for i in range(number + 1, len(lines)) if lines[i].strip() == fence[2])
            text = textwrap.dedent("\n".join(lines[number + 1 : end]))
            yield Block(name, start + 1, fence[3] or "text", text, *mark)
            number = end
        elif line.startswith(" " * indent) and not (number and lines[number - 1].strip()):
            while number + 1 < len(lines) and (lines[number + 1].startswith(" " * 4) or not lines[number + 1].strip()):
                number += 1
            text = textwrap.dedent("\n".join(lines[start : number + 1])).strip("\n")
            yield Block(name, start + 1, "", text, *mark)
        elif line.strip() and not line.startswith(" "):
            in_list = bool(re.match(r"[-*] |\d+\. ", line))
        if lines[start].strip():
            comment = COMMENT.match(lines[start])
            mark = (comment[1], comment[2]) if comment else ("", "")
        number += 1


def is_run(block: Block) -> bool:
    """Whether `tests/integration/test_tutorials.py` runs it."""
    return block.file.startswith("docs/tutorials/") and block.kind in ("bash", "python") and block.mark != "not run"


# --- what is wrong with a block ---------------------------------------------------------------------------------------


def problems(block: Block) -> Iterator[str]:
    """Yields what is wrong with a block, one line each."""
    kind = block.kind or guess(block.text)
    if kind == "bash":
        for words in commands(block.text):
            for problem in wrong_command(words, block.mark == "not run"):
                yield f"{block}: {shlex.join(words)[:200]}: {problem}"
    elif kind == "python":
        for problem in wrong_python(block.text):
            yield f"{block}: {problem}"
    elif kind == "json":
        for line in block.text.splitlines():
            try:
                json.loads(line)
            except ValueError as error:
                yield f"{block}: {line}: {error}"
    elif kind == "text":
        for line in block.text.splitlines():
            for words in commands(line.removeprefix("$ ")) if line.startswith("$ ") else ():
                for problem in wrong_command(words, block.mark == "not run"):
                    yield f"{block}: {line}: {problem}"
    elif block.mark != "not run":
        yield f"{block}: is neither a command, Python nor JSON that a test can check: say what it is, or mark it"


def guess(text: str) -> str:
    """Says what an indented block is, by its lines."""
    if any(re.sub(r"^(\w+=\S+ )+", "", line).split(" ")[0] in PROGRAMS for line in text.splitlines()):
        return "bash"
    if text.startswith("{"):
        return "json"
    with contextlib.suppress(SyntaxError):
        ast.parse(text)
        return "python"
    return ""


def commands(text: str) -> Iterator[list[str]]:
    """Yields the commands of a shell script, with its variables put in; documents within it are left out."""
    text = re.sub(r"<<'?(\w+)'?\n.*?\n\1\n?", "\n", text, flags=re.DOTALL)
    text = re.sub(r" *\\\n *", " ", text)
    text = text.replace("[--", "[ --").replace("]", " ]") if "[--" in text else text
    text = re.sub(r"([\w.]+)(?:\|[\w.]+)+", r"\1", text)  # one of several
    text = re.sub(r"\$\([^()\n]*\)|<[^<>\n]*>", "PLACEHOLDER", text)
    variables: dict[str, str] = {}

    def assign(match: re.Match[str]) -> str:
        value = re.sub(r"\$(\w+)", lambda name: variables.get(name[1], name[0]), match[2])
        variables[match[1]] = value.replace("'", r"\'")  # (quotes of a value are no quotes of the command)
        return ""

    text = re.sub(r'^(\w+)="([^"]*)"$', assign, text, flags=re.MULTILINE)
    text = re.sub(r"\$(\w+)", lambda match: variables.get(match[1], "PLACEHOLDER"), text)
    for line in text.splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), ";"]:
            if set(word) <= set(";&|"):
                while words and re.match(r"\w+=", words[0]):
                    words.pop(0)
                if words:
                    yield words
                words = []
            elif word not in ("...", "[", "]"):
                words.append(word)


def wrong_command(words: list[str], may_be_unknown: bool) -> Iterator[str]:
    """Yields what is wrong with one command."""
    program, *rest = words
    if program in LAUNCHERS and "run.py" in rest:
        yield from wrong_run(rest[rest.index("run.py") + 1 :])
    elif program == "vlmo" and rest:
        yield from wrong_call(rest)
    elif program in ("python", "python3", ".venv/bin/python") and rest:
        if rest[0] == "run.py":
            yield from wrong_run(rest[1:])
        elif rest[0] == "-c":
            yield from wrong_python(rest[1])
        elif rest[0] == "-m":
            yield from wrong_module(*rest[1:])
        elif not (REPOSITORY / rest[0]).exists():
            yield f"there is no {rest[0]}"
    elif program in ("pip", ".venv/bin/pip"):
        for extra in re.findall(r"(?:vlmo|\.)\[([\w,]+)\]", " ".join(rest)):
            if missing := set(extra.split(",")) - extras():
                yield f"setup.py has no extra {', '.join(missing)}"
    elif program not in OTHERS and not may_be_unknown:
        yield "the test does not know this program: mark the block as not run, with the reason"


def wrong_module(module: str, *arguments: str) -> Iterator[str]:
    if module in MODULES:
        yield from wrong_call([MODULES[module], *arguments])
    elif module.startswith("benchmarks.") or module.startswith("vlmo.") or module == "vlmo":
        if importlib.util.find_spec(module) is None:
            yield f"there is no module {module}"
            return
        file = REPOSITORY / (module.replace(".", "/") + ".py")
        source = file.read_text() if file.exists() else ""
        shared = (REPOSITORY / "benchmarks/workload.py").read_text() if "workload" in source else ""
        flags = [word.split("=")[0] for word in arguments if word.startswith("--")]
        if module != "vlmo.evaluation.clip_benchmark":  # (its options are those of that package)
            yield from (f"{module} has no {flag}" for flag in flags if f'"{flag}"' not in source + shared)
        if module == "vlmo":
            yield from wrong_call(list(arguments))
    elif module == "pytest":
        paths = [word for word in arguments if word.startswith("tests/")]
        yield from (f"there is no {path}" for path in paths if not (REPOSITORY / path).exists())


def wrong_call(words: list[str]) -> Iterator[str]:
    """Yields what is wrong with what follows `vlmo`."""
    name, *rest = words
    if name in ("train", "doctor"):
        yield from wrong_run(rest)
    elif name in COMMANDS:
        numbered = ["1" if word in ("N", "K") else word for word in rest]
        if complaint := parsed(name, numbered):
            yield complaint
    elif name != "completion" and not name.startswith("-"):
        yield f"there is no command {name}"


class _Parsed(Exception):
    """The command line was taken."""


def parsed(name: str, arguments: list[str]) -> str:
    """Gives what the parser of a command says about the arguments; "" if it takes them."""
    parse = {name: getattr(argparse.ArgumentParser, name) for name in ("parse_args", "parse_intermixed_args")}
    if "--plugins" in arguments:  # they may bring commands
        return "" if plugin_file(arguments[arguments.index("--plugins") + 1]) else "there is no such plugin"

    def stop(name: str) -> Any:
        def parse_and_stop(parser: Any, *given: Any, **options: Any) -> Any:
            parse[name](parser, *given, **options)
            raise _Parsed

        return parse_and_stop

    told = io.StringIO()
    stops = {name: stop(name) for name in parse}
    with mock.patch.multiple(argparse.ArgumentParser, **stops), contextlib.redirect_stderr(told):
        try:
            main([name, *arguments])
        except _Parsed:
            return ""
        except SystemExit as end:
            return told.getvalue().strip().splitlines()[-1] if end.code else ""
    return told.getvalue()


def wrong_run(words: list[str]) -> Iterator[str]:
    """Yields what is wrong with what follows `run.py`."""
    if "with" not in words:
        return
    words = words[words.index("with") + 1 :]
    if any(word.endswith((".yaml", ".json")) for word in words):
        return  # (of a tutorial: it is run)
    own = ""
    for word in [word for word in words if word.startswith("plugins=")]:
        files = [(name, plugin_file(name)) for name in ast.literal_eval(word.partition("=")[2])]
        yield from (f"there is no plugin {name}" for name, file in files if not file)
        own += "".join(file.read_text() for _, file in files if file)
        words.remove(word)
    known = [word for word in words if f'"{word}"' not in own and word != "PLACEHOLDER"]
    if not any("=" not in word for word in known):
        known.insert(0, "task_mlm_itm_itc_base")
    try:
        config, unknown = resolve_leniently([filled_in(word) for word in known])
        _, wrong = Settings.examine(config)
    except VLMoError as error:
        yield str(error)
    else:
        yield from unknown + (wrong if not own else [])


def filled_in(word: str) -> str:
    """Gives an option of a type that fits where the page leaves its value open."""
    name, _, value = word.partition("=")
    number = isinstance(Settings.defaults().get(name), int | float)
    return f"{name}=1" if number and ("PLACEHOLDER" in value or not value.strip("N")) and value else word


def plugin_file(name: str) -> Path | None:
    path = REPOSITORY / (name.replace(".", "/") + ".py")
    return path if path.exists() else None


def wrong_python(text: str) -> Iterator[str]:
    """Yields syntax errors, and imports of this project that lead nowhere."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        yield f"line {error.lineno}: {error.msg}"
        return
    for node in ast.walk(tree):
        names = [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
        module = node.module if isinstance(node, ast.ImportFrom) else None
        for name in names:
            home = module or name
            if home.split(".")[0] not in ("vlmo", "examples"):
                continue
            try:
                found = importlib.import_module(home)
                ok = module is None or hasattr(found, name) or importlib.util.find_spec(f"{home}.{name}")
            except ImportError:
                ok = False
            if not ok:
                yield f"{home} has no {name}"


@functools.cache
def extras() -> set[str]:
    text = (REPOSITORY / "setup.py").read_text()
    return set(re.findall(r'^        "(\w+)": \[', text, re.MULTILINE))
