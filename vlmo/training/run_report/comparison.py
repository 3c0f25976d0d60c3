"""Several runs beside each other: options that differ, results, curves on top of each other."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmo.pages import charts, page, table, write_page
from vlmo.training.run_report.commands import differences
from vlmo.training.run_report.history import History
from vlmo.training.run_report.page import results_table, shown
from vlmo.training.run_report.panels import charts_together

PLACES = ("log_dir", "resume_from", "resume_during_training")  # where a run is, not what it is


def write_comparison(
    histories: Sequence[History], path: Path, title: str = "Runs compared", more: Iterable[str] = ()
) -> None:
    """Writes the page.

    Args:
        more: parts of the page that come first, markup.
    """
    named = dict(zip(labels(histories), histories, strict=True))
    reports = [[label, str(each.folder), f"{each.steps:,}", each.status] for label, each in named.items()]
    options = differing({label: each.settings for label, each in named.items()})
    facts = differing({label: _facts(each.record) for label, each in named.items()})
    parts = [
        *more,
        table(["run", "folder", "steps", "ended"], reports, plain=True),
        "<h2>What differs</h2>",
        table(["option", *named], [[name, *map(shown, values)] for name, values in options.items()], plain=True)
        if options
        else "<p>no option</p>",
        table(
            ["made of", *named],
            [[name, *(value or "" for value in values)] for name, values in facts.items()],
            plain=True,
        )
        if facts
        else "",
        "<h2>Results</h2>",
        results_table(histories[0].settings, {label: each.latest for label, each in named.items()}),
        "<h2>Curves</h2>",
        charts(charts_together(named)),
    ]
    write_page(path, page(title, parts))


def labels(histories: Sequence[History]) -> list[str]:
    """Gives each run a short name that no other has."""
    names = [str(each.settings.get("exp_name") or each.folder.name) for each in histories]
    if len(set(names)) < len(names):
        names = [f"{name} {each.folder.name}" for name, each in zip(names, histories, strict=True)]
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, 1)]


def differing(columns: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Gives what is not the same in all columns, with the value in each; None where one has it not."""
    flat = {label: differences(values, {}) for label, values in columns.items()}
    for label, values in columns.items():
        for name, value in values.items():
            if isinstance(value, Mapping):
                flat[label].pop(name, None)
                flat[label] |= {f"{name}.{key}": own for key, own in value.items()}
    names = dict.fromkeys(name for values in flat.values() for name in values if name not in PLACES)
    found = {name: [values.get(name) for values in flat.values()] for name in names}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def _facts(record: Mapping[str, Any]) -> dict[str, str]:
    facts = {f"code: {name}": value for name, value in record.get("code", {}).items()} | record.get("environment", {})
    facts |= {
        f"{each['split']}: {Path(each['file']).name}": each.get("sha256_of_ends", "")[:16]
        for each in record.get("data", [])
    }
    if record.get("weights_at_start"):
        facts["weights at load_path"] = record["weights_at_start"]
    return facts
