"""Tables of quality.py, from ledger rows alone: nothing is loaded, so anybody can make them again.

Problem: a hundred rows are not an answer. Method: first what is kept of the teacher's score, a line per width and a
column per depth, the ablations below the grid; every other figure folded away under it. Several seeds show their
standard deviation, and all show a 95 % interval: the first is about training, the second about examples, and neither
stands for the other. What is missing says why. Rejected: leaving out cells that failed or are not defined.
"""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from ledger import markdown
from quality_grid import DISTILLED, FLOAT, TEACHER, Row

NOTE = (
    "± is the standard deviation over n seeds; brackets hold the 95 % interval over test examples, of the seeds' mean; "
    "– was not run."
)
FIGURES = ("kept", "file, MiB", "fp32 / file", "steps", "minutes")
MIB = 2**20


def table(rows: list[Row]) -> str:
    """Markdown, for each task: what is kept of the teacher's score by bits and depth, then every figure."""
    parts = []
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        teacher = next((row for row in mine if row["distillation"] == TEACHER), {})
        students = sorted((row for row in mine if row["distillation"] != TEACHER), key=_order)
        parts.append(f"**{task}**: {_teacher_line(teacher)}")
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in students:
            groups.setdefault(tuple(row[name] for name in ("distillation", "numerics", "bits", "layers")), []).append(
                row
            )
        depths = sorted(dict.fromkeys(row["layers"] for row in students), key=_numbers, reverse=True)
        lines = [
            [*_shown(variant), *(_kept(groups.get((*variant, depth), [])) for depth in depths)]
            for variant in dict.fromkeys(group[:3] for group in groups)
        ]
        header = ["training", "numerics", "bits", *(f"{depth} layers" for depth in depths)]
        parts.append(f"Kept of the teacher's score:\n\n{markdown(header, lines)}")
        lines = [[*_shown(group), *_figures(found)] for group, found in groups.items() if _scored(found)]
        name = _name(teacher or next(iter(_scored(students)), {}))
        header = ["training", "numerics", "bits", "layers", name, *FIGURES]
        summary = f"<details><summary>All figures of {task}</summary>"
        parts.append(f"{summary}\n\n{markdown(header, lines)}\n\n</details>")
        devices = dict.fromkeys(row["device"] for row in _scored(students))
        if devices:
            parts.append(f"Trained on: {'; '.join(devices)}.")
    return "\n\n".join([*parts, NOTE]) if parts else "No rows."


def sensitivity_table(rows: list[Row]) -> str:
    """Markdown, for each task and width: parts, the worst first."""
    parts = []
    for task, bits in dict.fromkeys((row["task"], row["bits"]) for row in rows):
        mine = sorted((r for r in rows if (r["task"], r["bits"]) == (task, bits)), key=lambda r: -r["kl"])
        lines = [
            [
                r["part"],
                f"{r['kl']:.4f}",
                f"{r['loss'] - r['loss_float']:+.4f}",
                f"{r['drop']:.2f}",
                f"{r['score']:.2f}",
            ]
            for r in mine
        ]
        header = ["part", "KL, nats a token", "loss gained", f"{_name(mine[0])} lost", _name(mine[0])]
        parts.append(f"**{task}**, {bits}, one part at a time, not trained:\n\n{markdown(header, lines)}")
    return "\n\n".join(parts) or "No rows."


def _shown(group: tuple[str, ...]) -> tuple[str | None, ...]:
    """Training, numerics, bits and maybe layers; floats have no numerics."""
    return (group[0], None, *group[2:]) if group[2] == FLOAT else group


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split("-")]


def _order(row: Row) -> tuple[Any, ...]:
    """The grid first, ablations below; wide before narrow, deep before shallow."""
    ablation = row["distillation"] != DISTILLED or row["bits"] == FLOAT
    sizes = [-number for name in ("bits", "layers") for number in _numbers(row[name])]
    return ablation, row["distillation"], row["numerics"], sizes, row["seed"]


def _scored(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.get("score") is not None]


def _name(row: Row) -> str:
    return {"rougeL": "ROUGE-L", "bleu": "BLEU"}.get(row.get("metric", ""), "score")


def _teacher_line(row: Row) -> str:
    if row.get("score") is None:
        return f"teacher not scored{': ' + row['error'] if row.get('error') else ''}"
    settings = row["generation"]
    beams = f"beam {settings['num_beams']}" if settings["num_beams"] > 1 else "greedy"
    model = f"teacher with {row['layers']} layers, {row['file_bytes'] / MIB:.1f} MiB in fp32"
    figure = f"{_name(row)} {row['score']:.2f} {_interval(row['interval'])}"
    return f"{model}, {figure}, {row['examples']:,} test examples, {beams}; `{row['definition']}`"


def _interval(found: Sequence[float] | None, factor: float = 1.0, digits: int = 2) -> str:
    return "[{:.{d}f}, {:.{d}f}]".format(*(factor * x for x in found), d=digits) if found else ""


def interval_of(rows: Sequence[Row], name: str) -> list[float] | None:
    """`interval` or `retention_interval` of the only row, or of the mean of these seeds; None where nobody made it."""
    if len(rows) == 1:
        return rows[0].get(name)
    known = all(row.get("seeds") == sorted(row["seed"] for row in rows) for row in rows)
    return rows[0].get(f"seeds_{name}") if known else None


def _spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f} (n {len(values)})" if len(values) > 1 else mean


def _kept(rows: list[Row]) -> str | None:
    """`98.7 ± 0.3 (n 3) %`, or with the interval of the only run, or why there is none."""
    kept = [row for row in _scored(rows) if row["retention"] is not None]
    if kept:
        interval = _interval(interval_of(kept, "retention_interval"), 100, 1)
        return f"{_spread([100 * row['retention'] for row in kept], 1)} % {interval}".strip()
    if rows and rows[0].get("not_defined"):
        return "not defined"
    return "failed: " + rows[0]["error"].replace("|", "/") if rows and rows[0].get("error") else "–"


def _figures(rows: list[Row]) -> list[str | None]:
    rows = _scored(rows)
    score = _spread([row["score"] for row in rows], 2)
    size, ratio = rows[0]["file_bytes"] / MIB, rows[0]["ratio_to_fp32"]
    interval = _interval(interval_of(rows, "interval"))
    minutes = statistics.mean(row["minutes"] for row in rows)
    return [
        f"{score} {interval}".strip(),
        _kept(rows),
        f"{size:.2f}",
        f"{ratio:.1f}",
        f"{rows[0]['steps']:,}",
        f"{minutes:.1f}",
    ]
