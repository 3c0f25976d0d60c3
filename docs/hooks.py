"""What the documentation site has beyond the files in docs/: pages made from files elsewhere, and from the commands.

README.md, DATA.md and others of the top level become pages, so does every file or folder of the repository that a page
links to (links that work on GitHub work in the site), and `reference/commands.md` is written from the parsers.
"""

import argparse
import contextlib
import io
import json
import os
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "DATA.md": "data.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)")
WIDTH = {"COLUMNS": "110", "NO_COLOR": "1"}
LANGUAGES = {".py": "python", ".sh": "bash", ".yml": "yaml", ".cff": "yaml", ".toml": "toml", ".json": "json"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    written = {origin: (REPOSITORY / origin).read_text(encoding="utf-8") for origin in PAGES}
    for origin, text in written.items():
        files.append(File.generated(config, PAGES[origin], content=text))
    files.append(File.generated(config, "reference/commands.md", content=commands()))
    texts = {file.src_uri: file.content_string for file in files.documentation_pages()}
    linked = {path for uri, text in texts.items() for link in LINK.findall(text) if (path := elsewhere(link, uri))}
    for path in sorted(linked):
        files.append(File.generated(config, source_page(path), content=shown(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Turns links to files outside of docs/ into links to their pages."""
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown  # (somebody else's links stay as they are written)
    if here == "index.md":
        page.meta["hide"] = ["navigation"]  # a list of one
    start = posixpath.dirname(here)

    def rewrite(match: re.Match[str]) -> str:
        path = resolved(match[1], here)
        if path in PAGES:
            target = PAGES[path]
        elif elsewhere(match[1], here):
            target = source_page(path)
        elif path.startswith("docs/"):
            target = path.removeprefix("docs/")
        else:
            return match[1]  # (mkdocs says that it leads nowhere)
        return posixpath.relpath(target, start or ".")

    return LINK.sub(rewrite, markdown)


def resolved(link: str, page: str) -> str:
    """Gives the path below the repository that a link on a page leads to."""
    origin = {made: name for name, made in PAGES.items()}.get(page, f"docs/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))


def elsewhere(link: str, page: str) -> str | None:
    """Gives the path of a folder, or of a file outside of docs/, that has no page of its own; None for other links."""
    path = resolved(link, page)
    if path in PAGES or path.startswith("../") or page.startswith("source/"):
        return None
    place = REPOSITORY / path
    return path if place.is_dir() or (place.exists() and not path.startswith("docs/")) else None


def source_page(path: str) -> str:
    return f"source/{path}.md"


def shown(path: str) -> str:
    """Gives a page with the content of a file, or of the files of a folder."""
    place = REPOSITORY / path
    if place.is_dir():
        files = sorted(each for each in place.iterdir() if each.is_file() and each.stem != "__init__")
        parts = (_fenced(file) if file.suffix in LANGUAGES else "(Not shown here.)\n" for file in files)
        bodies = (f"\n## `{file.name}`\n\n{part}" for file, part in zip(files, parts, strict=True))
        return f"# `{path}/`\n" + "".join(bodies)
    if place.suffix == ".ipynb":
        cells = json.loads(place.read_text(encoding="utf-8"))["cells"]
        texts = ("".join(cell["source"]) for cell in cells)
        kinds = (cell["cell_type"] == "code" for cell in cells)
        body = (f"```python\n{text}\n```" if code else text for text, code in zip(texts, kinds, strict=True))
        return "\n\n".join([*body, f"(From `{path}`.)"])
    return f"# `{path}`\n\n{_fenced(place)}"


def _fenced(file: Path) -> str:
    return f"````{LANGUAGES.get(file.suffix, 'text')}\n{file.read_text(encoding='utf-8')}\n````\n"


# --- the commands -----------------------------------------------------------------------------------------------------


def commands() -> str:
    """Writes the page of all commands from what `--help` prints."""
    sys.path.insert(0, str(REPOSITORY))
    from vlmo.__main__ import COMMANDS, main

    lines = ["# Commands", "", "What `--help` says. `vlmo COMMAND` is the same as the module named with it.", ""]
    lines += ["```text", printed(main, []), "```", ""]
    for name, (module, summary) in COMMANDS.items():
        lines += [f"## vlmo {name}", "", f"`{module.removesuffix('.__main__')}`: {summary}", ""]
        for title, text in helps(main, name):
            lines += ([f"### {title}", ""] if title != f"vlmo {name}" else []) + ["```text", text, "```", ""]
    return "\n".join(lines)


def helps(main, name: str) -> Iterator[tuple[str, str]]:
    """Yields the title and help of a command and of each of its sub-commands."""
    asked: list[argparse.ArgumentParser] = []
    print_help = argparse.ArgumentParser.print_help

    def remember(parser: argparse.ArgumentParser, file=None) -> None:
        asked.append(parser)
        print_help(parser, file)

    with mock.patch.object(argparse.ArgumentParser, "print_help", remember):
        yield f"vlmo {name}", printed(main, [name, "--help"])
    for parser in asked[:1]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for sub in [choice.dest for choice in action._choices_actions]:
                    with mock.patch.dict(os.environ, WIDTH):
                        yield f"vlmo {name} {sub}", action.choices[sub].format_help().rstrip()


def printed(main, arguments: list[str]) -> str:
    """Calls the command line in this process and gives what it prints."""
    out = io.StringIO()
    patches = mock.patch.dict(os.environ, WIDTH), mock.patch.object(sys, "argv", ["vlmo", *arguments])
    with patches[0], patches[1], contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(arguments)
    return out.getvalue().rstrip()
