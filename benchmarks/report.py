"""The benchmarks on one page: what benchmarks/results/*.json hold, as plots and tables.

    python benchmarks/report.py [--results DIR] [--out report.html]

The same page as `dqbart report` makes of packed folders (dqbart/evaluation/report.py), from the ledgers: every number
with the run that measured it, and what was not run listed with its command. Needs matplotlib, but neither torch nor any
model. Rejected: notebooks, whose pictures and numbers part ways. The last line is JSON.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ledger import RESULTS, Ledger
from quality_grid import DISTILLED, KEYS, TEACHER
from quality_tables import interval_of
from tables import SOURCES

from dqbart.evaluation import page, sections
from dqbart.evaluation.card import NAMES
from dqbart.evaluation.page import Block, Page, Section, Table
from dqbart.evaluation.plots import MIB, Point, grouped, layer_order, require_matplotlib
from dqbart.evaluation.report import machine_text, versions_text
from dqbart.evaluation.sections import mib

Row = dict[str, Any]
FILES = ("size", "quality", "latency", "sensitivity")
HOW = {name: f"Not measured yet: `{SOURCES[name][2]}`." for name in FILES}
PROMISE = "2-2-8"  # the width that stands for a model's size where no quality was measured


@dataclass
class Results:
    """One ledger: its rows, and the runs they point to."""

    rows: list[Row] = field(default_factory=list)
    runs: list[Row] = field(default_factory=list)

    @property
    def machines(self) -> str:
        """The machines of the rows, with the commits that ran there."""
        used = [self.runs[i] for i in sorted({row["run"] for row in self.rows if "run" in row})]
        found = grouped(used, machine_text).items()
        commits = {machine: ", ".join(dict.fromkeys(str(run["commit"]) for run in runs)) for machine, runs in found}
        return "; ".join(f"{machine}, at commit {shown}" for machine, shown in commits.items())


def read_results(folder: Path) -> dict[str, Results]:
    """The ledgers this page knows; empty ones for files that are not there.

    Raises `FileNotFoundError` if there is none, `ValueError` naming the file if it is no ledger.
    """
    found = {name: folder / f"{name}.json" for name in FILES}
    if not any(file.is_file() for file in found.values()):
        what = "none of them there" if folder.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"{folder}: {what}; expected a folder with one of {', '.join(f'{n}.json' for n in FILES)}"
        )
    ledgers = {name: Ledger(file, ()) for name, file in found.items()}
    return {name: Results(ledger.rows, ledger.runs) for name, ledger in ledgers.items()}


def quality_points(rows: Sequence[Row]) -> list[Point]:
    """A point for each recipe and task, the mean over its seeds; failed rows and the teacher's own are no points."""
    teachers = {row["task"]: row for row in rows if row["distillation"] == TEACHER and row.get("score") is not None}
    scored = [row for row in rows if row["distillation"] != TEACHER and row.get("score") is not None]
    points = []
    for (task, bits, layers, how), seeds in grouped(
        scored, lambda r: (r["task"], r["bits"], r["layers"], _variant(r))
    ).items():
        scores, first, teacher = [row["score"] for row in seeds], seeds[0], teachers.get(task, {})
        name = str(first["metric"])
        points.append(
            Point(
                task=task,
                bits=bits,
                layers=layers,
                variant=how,
                metric=NAMES.get(name, name),
                score=sum(scores) / len(scores),
                seeds=len(seeds),
                file_bytes=first["file_bytes"],
                teacher_score=sum(row["teacher_score"] for row in seeds) / len(seeds),
                teacher_bytes=teacher.get("file_bytes"),
                teacher_interval=teacher.get("interval"),
                interval=interval_of(seeds, "interval"),
                retention_interval=interval_of(seeds, "retention_interval"),
            )  # fmt: skip
        )
    return points


def _variant(row: Row) -> str:
    """What is not as usual about a row, in words."""
    words = [] if row["numerics"] == "integer" else [f"{row['numerics']} numerics"]
    if row["distillation"] != DISTILLED:
        words.append("no training" if row["distillation"] == "none" else str(row["distillation"]))
    return ", ".join(words)


def size_section(rows: Sequence[Row]) -> Section:
    """A table a model: every file, against the fp32 file of the same model at full depth."""
    title = "File sizes"
    if not rows:
        return Section(title, missing=HOW["size"])
    blocks: list[Block] = [
        "The model's files on disk. Peers' files too, where they were made; float files are computed."
    ]
    for model, members in grouped(rows, lambda r: r["model"]).items():
        full = _fp32(members)
        members = sorted(members, key=lambda r: ([-n for n in layer_order(r["layers"])], -r["bytes"]))
        cells = [
            [
                r["layers"],
                r["bits"],
                r["format"],
                f"{r['bytes'] / MIB:.1f}",
                f"{full / r['bytes']:.1f} ×" if full else None,
            ]
            for r in members
        ]
        header = ["layers", "bits", "format", "MiB", "fp32, all layers / file"]
        least = min(row["bytes"] for row in members)
        summary = f"{model}: {mib(full)} in fp32, " if full else f"{model}: "
        blocks.append(Table(header, cells, summary=f"{summary}{mib(least)} the smallest of {len(members)} files"))
    return Section(title, blocks)


def _fp32(rows: Sequence[Row]) -> int | None:
    """Bytes of the fp32 file at full depth."""
    floats = [row for row in rows if row["format"] == "transformers fp32"]
    return max((row["bytes"] for row in floats), default=None)


def size_fact(rows: Sequence[Row], best: Point | None) -> page.Fact:
    """Of the model that the quality number speaks of; without one, of the first model at two bits and full depth."""
    if best is not None and best.teacher_bytes:
        return sections.size_fact(best.file_bytes, best.teacher_bytes, f"{best.task}, {best.label}.")
    for model, members in grouped(rows, lambda r: r["model"]).items():
        full = _fp32(members)
        packed = [r for r in members if r["bits"] == PROMISE and r["format"] in ("planar32", "trits")]
        if full and packed:
            row = max(packed, key=lambda r: (layer_order(r["layers"]), r["format"] == "planar32"))
            what = f"{model}, {PROMISE} bits, {row['layers']} layers, {row['format']}."
            return sections.size_fact(row["bytes"], full, what)
    return page.Fact("", "smaller than the teacher", HOW["size"])


def runs_section(results: dict[str, Results]) -> Section:
    """Command, commit, machine and versions of every run that left rows, and what the scores are."""
    rows = [
        [f"{name}.json", run["command"], run["commit"], run["date"], machine_text(run), versions_text(run)]
        for name, found in results.items()
        for run in found.runs
    ]
    header = ["results", "command", "commit", "date", "machine", "versions"]
    blocks: list[Block] = ["A commit with + had changed files.", Table(header, rows)]
    for row in results["quality"].rows:
        if row.get("definition"):
            settings = ", ".join(f"{name} {value}" for name, value in (row.get("generation") or {}).items())
            pairs = [["metric", row["definition"]], ["test examples", row.get("examples")], ["generation", settings]]
            blocks.append(Table(["", str(row["task"])], pairs, summary=f"Scores of {row['task']}", wrap=True))
    failed = [
        [", ".join(str(row[key]) for key in KEYS), row.get("error") or row.get("not_defined")]
        for row in results["quality"].rows
        if row.get("score") is None
    ]
    if failed:
        blocks.append(Table(["quality.json", "why"], failed, summary=f"{len(failed)} cells without a score", wrap=True))
    return Section("How it was measured", blocks)


def build(results: dict[str, Results]) -> Page:
    points = quality_points(results["quality"].rows)
    best = sections.best_point(points)
    latency, sensitivity = results["latency"], results["sensitivity"].rows
    metric = " / ".join(dict.fromkeys(p.metric for p in points)) or "score"
    return Page(
        title="dqbart: benchmarks",
        lead=f"Size and score are those of the smallest model that keeps {100 * sections.GOOD:.0f} % of its teacher's "
        "score, or of the one that keeps most. Every number is a row of `benchmarks/results/`.",
        facts=[
            size_fact(results["size"].rows, best),
            sections.quality_fact(best, HOW["quality"], f"{best.label}." if best else ""),
            sections.speed_fact(latency.rows, latency.machines, HOW["latency"]),
        ],
        sections=[
            sections.size_quality_section(points, HOW["quality"]),
            sections.latency_section(latency.rows, latency.machines, HOW["latency"]),
            sections.grid_section(points, HOW["quality"]),
            sections.sensitivity_section(sensitivity, metric, HOW["sensitivity"]),
            Section("Outputs beside the teacher's", missing="`dqbart report DIR` shows those of a packed folder."),
            size_section(results["size"].rows),
            runs_section(results),
        ],
        foot="Written by `python benchmarks/report.py`. Encoder methods, sentence vectors, sub-networks and products "
        "have their tables in benchmarks/README.md.",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the ledgers (benchmarks/results)")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="page to write (report.html)")
    args = parser.parse_args()
    try:
        require_matplotlib()
        built = build(read_results(args.results))
        plots = page.write(built, args.out)
    except (ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    missing = [section.title for section in built.sections if not section.blocks]
    print(json.dumps({"out": str(args.out), "plots": [str(file) for file in plots], "missing": missing}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
