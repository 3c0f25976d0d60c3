"""The file that names the classes of a model: a JSON list of strings, in the order of the labels."""

import json
from pathlib import Path

from vlmo.errors import VLMoError


def read_label_names(path: Path) -> list[str]:
    """Reads the names of the labels. Raises VLMoError if the file is not a list of strings in JSON."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VLMoError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise VLMoError(f"{path}: must be a list of answers (the names of the labels), in the order of their labels")
    return names
