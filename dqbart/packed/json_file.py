"""One way to read JSON that somebody else may have written."""

import json
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def read_json(file: Path, kind: type[T]) -> T:
    """A JSON file that holds a `kind`. Raises `ValueError` naming the file, `FileNotFoundError` if there is none."""
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    except RecursionError:
        raise ValueError(f"{file}: JSON is nested too deeply") from None
    if not isinstance(content, kind):
        raise ValueError(f"{file}: expected a JSON {kind.__name__}, found {type(content).__name__}")
    return content
