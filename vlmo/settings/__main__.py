"""Prints the reference page of all options, docs/options.md, from their fields.

python -m vlmo.settings > docs/options.md
"""

import json
import re
from typing import Any

from vlmo.registry import TASKS
from vlmo.settings import Settings
from vlmo.settings.option import NamesOf

HEAD = """# Options

`python run.py with option=value ...`; `python run.py print_config with ...` shows those of a run. A task's options are
there whether its loss is on or not. (This page is made by `python -m vlmo.settings`.)
"""


def page() -> str:
    """The page as Markdown: a table a group, then of each task that has options of its own."""
    lines = [HEAD]
    defaults = Settings.defaults()
    for group in Settings.groups():
        tasks = sorted(name for name, task in TASKS.items() if task.Options is group)
        whose = f" ({', '.join(f'`{name}`' for name in tasks)})" if tasks else ""
        lines += [f"## {(group.__doc__ or '').splitlines()[0]}{whose}", ""]
        lines += ["| option | values | default | meaning |", "|---|---|---|---|"]
        for name, schema in group.model_json_schema()["properties"].items():
            allowed = values(schema)
            for annotation in group.model_fields[name].metadata:
                if isinstance(annotation, NamesOf):
                    allowed = allowed.replace("text", f"{annotation.registry.what} name")
            meaning = re.sub(
                "}_|_{", lambda found: found[0].replace("_", r"\_"), schema["description"]
            )  # (no emphasis)
            cells = (f"`{name}`", allowed, f"`{shown(defaults[name])}`", meaning)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def shown(default: Any) -> str:
    """A default as it is typed; of weights those that are not 0."""
    if isinstance(default, dict):
        default = {key: value for key, value in default.items() if value}
    return repr(default)


def values(schema: dict[str, Any]) -> str:
    """What a JSON schema allows, in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(values(each) for each in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "any")
    if kind == "array":
        fixed = schema.get("prefixItems")
        return f"{len(fixed)} of: {values(fixed[0])}" if fixed else f"list of: {values(schema['items'])}"
    if kind == "object":
        return f"text to {values(schema['additionalProperties'])}"
    bounds = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    limits = [f"{sign} {schema[key]}" for key, sign in bounds.items() if key in schema]
    names = {"integer": "whole number", "number": "number", "boolean": "`True`, `False`", "null": "`None`"}
    return " ".join([names.get(kind, "text"), ", ".join(limits)]).strip()


if __name__ == "__main__":
    print(page(), end="")
