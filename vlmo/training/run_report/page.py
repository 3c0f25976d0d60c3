"""The report of one run: what was run, what came of it, and how to go on, on a page that needs nothing else."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlmo.errors import VLMoError
from vlmo.pages import Html, charts, markup, page, table, write_page
from vlmo.settings import Settings
from vlmo.training.run_report.commands import differences, nearest_config, next_steps, report_command
from vlmo.training.run_report.history import History
from vlmo.training.run_report.panels import charts_of
from vlmo.training.summary import result_rows

REPORT = "report.html"
SHOWN_LINES = 10  # of a list of what was skipped


def write_report(history: History, path: Path) -> None:
    """Writes the report of a run."""
    parts = [
        _state(history),
        "<h2>What was run</h2>",
        *_options(history.settings),
        *_made_of(history.record),
        "<h2>Results</h2>",
        results_table(history.settings, {"here": history.latest}),
        *_findings(history),
        "<h2>Curves</h2>",
        charts(charts_of(history)) if history.curves else "<p>No numbers were logged to metrics.csv.</p>",
        *_speed(history),
        *_samples(history),
        "<h2>What to do with it</h2>",
        *(f"<p>{markup(what)}</p><pre>{markup(line)}</pre>" for what, line in _commands(history).items()),
    ]
    write_page(path, page(history.name, parts))


def _state(history: History) -> str:
    record = history.record
    steps = f"{history.steps:,} steps done" if "ended" in record else f"last step known: {history.steps:,}"
    lines = [f"<b>{markup(history.status)}</b>", steps]
    if record.get("started"):
        lines.append(f"{record['started']} to {history.last_sign}")
    if len(history.parts) > 1:
        lines += [f"{markup(name)}: {markup(ended)}" for name, ended in history.ended_parts]
    if record.get("resumed_from"):
        gone = "" if len(history.parts) > 1 else "; its log is gone"
        lines.append(f"went on from {markup(record['resumed_from'])}, step {record['resumed_at']:,}{gone}")
    return f"<p>{'<br>'.join(lines)}</p>"


def _options(settings: Mapping[str, Any]) -> Iterable[str]:
    named, config = nearest_config(settings)
    yield f"<p>Nearest named config: <code>{markup(named)}</code>; options that differ from it:</p>"
    rows = []
    for name, value in differences(settings, config).items():
        option, _, key = name.partition(".")
        other = config.get(option)
        rows.append([name, shown(value), shown(other.get(key, 0) if key and isinstance(other, Mapping) else other)])
    yield table(["option", "here", named], rows, plain=True) if rows else "<p>none</p>"
    others = differences(settings, Settings.defaults())
    whole = json.dumps(others, indent=1, ensure_ascii=False)
    yield f"<details><summary>all options that differ from the defaults</summary><pre>{markup(whole)}</pre></details>"


def shown(value: Any) -> str:
    """Gives an option's value as it is typed."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _made_of(record: Mapping[str, Any]) -> Iterable[str]:
    facts = {f"code: {name}": value for name, value in record.get("code", {}).items()}
    facts |= record.get("environment", {})
    if parameters := record.get("parameters"):
        facts["parameters"] = f"{parameters['all']:,}, of which trained {parameters['trained']:,}"
    if record.get("weights_at_start"):
        facts["fingerprint of the weights at load_path"] = record["weights_at_start"]
    if facts:
        yield table(["made of", ""], facts.items(), plain=True)
    if data := record.get("data"):
        header = ["split", "file", "bytes", "SHA-256 of size and ends"]
        rows = [
            [each["split"], each["file"], f"{each.get('bytes', 0):,}", each.get("sha256_of_ends", "")[:16]]
            for each in data
        ]
        count = f"{len(rows)} data file{'s' * (len(rows) > 1)}"
        yield f"<details><summary>{count}</summary>{table(header, rows, plain=True)}</details>"


def results_table(settings: Mapping[str, Any], columns: Mapping[str, Mapping[str, float]]) -> str:
    """Gives results by log tag, a column each, beside what was published for such settings."""
    tags = {tag for metrics in columns.values() for tag in metrics}
    try:
        rows, published = result_rows(Settings.from_config(settings), tags)
    except VLMoError:  # an option or a task of a plugin that is not here
        rows, published = result_rows(None, tags)
    if not rows:
        return "<p>Nothing was measured on val or test.</p>"
    lines = []
    for row in rows:
        cells = [_number(metrics[row.tag], row.share) if row.tag in metrics else "" for metrics in columns.values()]
        paper = [f"{published[row.tag]:.1f} %" if row.tag in published else ""] if published else []
        lines.append([row.split, row.what, *cells, *paper, Html(f"<small>{markup(row.tag)}</small>")])
    return table(["split", "", *columns, *(["published"] if published else []), "log tag"], lines)


def _number(value: float, share: bool) -> str:
    return f"{100 * value:.2f} %" if share else f"{value:.4f}"


def _findings(history: History) -> Iterable[str]:
    """What the run was told while it trained, and what it warned of."""
    if history.findings:
        yield "<h2>How it learned</h2>"
        rows = [[each.get("step", ""), each.get("code", ""), each.get("sentence", "")] for each in history.findings]
        yield table(["step", "what", ""], rows, plain=True)
    warnings = history.record.get("warnings", {})
    yield "<h2>Warnings</h2>"
    if warnings:
        rows = [[line, f"{count:,} times" if count > 1 else ""] for line, count in warnings.items()]
        yield table(["warning", ""], rows, plain=True)
    for name, lines in history.lists.items():
        more = f"\n... and {len(lines) - SHOWN_LINES:,} more" if len(lines) > SHOWN_LINES else ""
        text = "\n".join(lines[:SHOWN_LINES]) + more
        yield f"<p>{markup(name)}: {len(lines):,} lines</p><pre>{markup(text)}</pre>"
    if not warnings and not history.lists:
        yield "<p>none</p>"


def _speed(history: History) -> Iterable[str]:
    record, curve = history.record, history.curves.get("train/samples_per_sec", [])
    rows = []
    if curve:
        values = sorted(value for _, value in curve)
        rows.append(["samples a second, median", f"{values[len(values) // 2]:,.1f}"])
        rows.append(["samples a second, last", f"{curve[-1][1]:,.1f}"])
    if record.get("seconds"):
        rows.append(["duration of this part", f"{record['seconds'] / 60:,.1f} minutes"])
    names = {"process": "memory of the process, peak", "gpu": "memory of the GPU, peak"}
    rows += [[names[kind], f"{size / 2**30:.2f} GiB"] for kind, size in record.get("memory", {}).items()]
    if rows:
        yield "<h2>Throughput and memory</h2>"
        yield table(["", ""], rows, plain=True)


def _samples(history: History) -> Iterable[str]:
    """Gives the samples, or why there are none and what makes them."""
    if samples := history.record.get("samples"):
        yield from sample_pictures(samples)
        return
    yield "<h2>Samples</h2>"
    if samples is not None:
        yield "<p>None: this model says nothing of a single sample that could be shown.</p>"
        return
    yield f"<p>None: {markup(history.record.get('no_samples', 'they are made when a run ends well'))}.</p>"
    if history.checkpoint:
        made_by = report_command(history.folder, "--samples")
        yield f"<p>To have them made with {markup(history.checkpoint.name)}:</p><pre>{markup(made_by)}</pre>"


def sample_pictures(samples: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """Gives samples with their images and what the model said of them."""
    figures = []
    for sample in samples:
        images = "".join(f'<img alt="" src="{markup(uri)}">' for uri in sample["images"])
        lines = [f"<b>{markup(sample['text'])}</b>", *(f"<small>{markup(each)}</small>" for each in sample["truth"])]
        for answer in sample["answers"]:
            lines.append(f"<small>{markup(answer['what'])}</small>")
            for text, score in answer["bars"]:
                bar = f'<div class=score style="width:{100 * min(max(float(score), 0), 1):.1f}%"></div>'
                lines.append(f"{markup(text)} <small>{score:.3f}</small>{bar}")
        told = "".join(f"<div>{line}</div>" for line in lines)
        figures.append(f"<figure>{images}<figcaption>{told}</figcaption></figure>")
    if figures:
        yield f"<h2>Samples</h2><div class=examples>{''.join(figures)}</div>"


def _commands(history: History) -> dict[str, str]:
    return next_steps(history.settings, history.folder)
