"""What is measured after a packed folder was made, put where its report reads it."""

import json
import os
from pathlib import Path
from typing import Any

REPORT = "report.json"


def read_report(folder: str | Path) -> dict[str, Any]:
    """Raises `FileNotFoundError` for a folder without one, `ValueError` for one that is no report."""
    file = Path(folder) / REPORT
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a folder that 'dqbart compress' wrote")
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(report, dict) or "recipe" not in report:
        raise ValueError(f"{file}: not a report; expected what 'dqbart compress' wrote")
    return report


def record(folder: str | Path, **measured: Any) -> dict[str, Any]:
    """Lay `measured` over a folder's report.json; returns the whole. Raises as `read_report` does."""
    report, file = read_report(folder) | measured, Path(folder) / REPORT
    aside = file.with_suffix(".partial")
    aside.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, file)
    return report
