"""What compression costs in quality: a grid of recipes x tasks x seeds, every cell trained, packed and scored on test.

    python benchmarks/quality.py benchmarks/grids/first.yaml --teachers DIR --data DIR --work DIR [--jobs N]
        [--only TEXT] [--steps-scale X] [--keep] [--again] [--list]
    python benchmarks/quality.py benchmarks/grids/first.yaml --teachers DIR --data DIR --sensitivity [--only TEXT]
    python benchmarks/quality.py --quick

Problem: one lucky run proves nothing, and a grid takes days, on machines that stop. Method: a YAML file names the cells
(grids/first.yaml says how). Each is `dqbart.compress` in its own process, which goes on where it was stopped; dev
selects the student, test scores it, decoded as its teacher was. A finished cell is a row, a crashed one a row with its
error until the next run, and what a recipe refuses is listed as not defined. Retention is student / teacher, its
interval from resampling both together (quality_score.py): most of a score's own interval is which examples are in the
test set, and these are the same. `--sensitivity` trains nothing: each part of the teacher alone at the grid's bits, on
the dev set. Rejected: scores on dev (it chose the student) and one process for all (memory, threads, and one crash ends
all).
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ledger import RESULTS, Ledger, resumable
from quality_grid import FLOAT, KEYS, MAIN, SCORING, Cell, Row, has_checkpoint, read_grid
from quality_tables import sensitivity_table
from quality_tables import table as table  # where every benchmark has it

from dqbart.recipe import Recipe

HERE = Path(__file__).resolve().parent
PART_KEYS = ("task", "bits", "part")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def row_of(ledger: Ledger, cell: Cell) -> Row:
    return ledger.find(**cell.key) or {}


def state(ledger: Ledger, cell: Cell) -> str:
    """`done`, `missing`, `failed`, `not defined`, or `other settings` where the row was made with such."""
    row = row_of(ledger, cell)
    if cell.refused:
        return "not defined"
    if row.get("score") is None:
        return "failed" if row.get("error") else "missing"
    return "done" if not has_checkpoint(cell.teacher) or row["settings"] == cell.settings else "other settings"


def start(cell: Cell, cells: Sequence[Cell], ledger: Ledger, args: argparse.Namespace) -> "subprocess.Popen[bytes]":
    """The cell's process, in a group of its own, so that Ctrl-C reaches it once, from us."""
    folder = cell.folder(args.work)
    folder.mkdir(parents=True, exist_ok=True)
    teacher = None if cell.is_teacher else next(c for c in cells if c.is_teacher and c.key["task"] == cell.key["task"])
    orders = {
        "key": cell.key, "recipe": cell.recipe, "teacher": str(cell.teacher), "data": str(cell.data),
        "test_examples": cell.test_examples, "train_examples": cell.train_examples, "keep": args.keep,
        "teacher_folder": str(teacher.folder(args.work)) if teacher else None, "jobs": args.jobs, "run": ledger.own,
    }  # fmt: skip
    (folder / "cell.json").write_text(json.dumps(orders), encoding="utf-8")
    threads = str(args.threads or max(1, (os.cpu_count() or 1) // args.jobs))
    say(f"start {cell.slug}; log: {folder / 'log.txt'}")
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, str(HERE / "quality_cell.py"), str(folder)], stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, env=os.environ | {"OMP_NUM_THREADS": threads}, start_new_session=True,
        )  # fmt: skip


def collect(cell: Cell, code: int, ledger: Ledger, work: Path) -> bool:
    """Put what a process left into the ledger; true if that is a score. An error never replaces one."""
    folder = cell.folder(work)
    if code == 0:
        row = json.loads((folder / "row.json").read_text(encoding="utf-8"), parse_float=lambda x: round(float(x), 5))
        orders = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
        ledger.add(cell.key | row | {"settings": cell.settings}, orders.get("run"))  # of a run that died, perhaps
        minutes = f", {row['minutes']} minutes of training" if "minutes" in row else ""
        say(f"done  {cell.slug}: {row['metric']} {row['score']:.2f}, teacher's {row['teacher_score']:.2f}{minutes}")
        return True
    lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    last = next((line for line in reversed(lines) if line.strip()), "no message")
    words = f"exit code {code}: {last[:300]}"
    say(f"FAILED {cell.slug}: {words}")
    if row_of(ledger, cell).get("score") is None:
        ledger.add(cell.key | {"error": words})
    return False


def run_cells(cells: Sequence[Cell], everything: Sequence[Cell], ledger: Ledger, args: argparse.Namespace) -> int:
    """Run cells, `args.jobs` at a time; returns how many failed. An interrupt stops them, each with a checkpoint."""
    waiting, running, failed = list(cells), dict[Any, Cell](), 0
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                cell = waiting.pop(0)
                if (cell.folder(args.work) / "row.json").exists():  # finished when nobody was there to write it down
                    collect(cell, 0, ledger, args.work)
                else:
                    running[start(cell, everything, ledger, args)] = cell
            time.sleep(0.2)
            for process in [process for process in running if process.poll() is not None]:
                failed += not collect(running.pop(process), process.returncode, ledger, args.work)
    finally:
        stop(running)
    return failed


def stop(processes: Iterable["subprocess.Popen[bytes]"]) -> None:
    """End what still runs; a second interrupt does not wait for checkpoints."""
    left = [process for process in processes if process.poll() is None]
    try:
        for process in left:
            say(f"stopping process {process.pid}")
            os.killpg(process.pid, signal.SIGTERM)
        for process in left:
            process.wait()
    finally:
        for process in left:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def run_grid(cells: Sequence[Cell], ledger: Ledger, args: argparse.Namespace) -> int:
    """All that is selected and not done: teachers first, then students. Returns how many cells failed."""
    chosen = [cell for cell in cells if args.only in cell.slug and not cell.is_teacher]
    for cell in chosen:
        if cell.refused and not row_of(ledger, cell):
            ledger.add(cell.key | {"not_defined": cell.refused})
    again = ("other settings",) if args.again else ()
    students = [cell for cell in chosen if state(ledger, cell) in ("missing", "failed", *again)]
    tasks = {cell.key["task"] for cell in students}
    teachers = [cell for cell in cells if cell.is_teacher and cell.key["task"] in tasks]
    for cell in teachers:
        if not has_checkpoint(cell.teacher):
            raise FileNotFoundError(
                f"teacher {str(cell.teacher)!r}: no checkpoint there; train it with benchmarks/teachers.py, or leave "
                f"out task {cell.key['task']!r} with --only"
            )
    for cell in [cell for cell in (*teachers, *chosen) if state(ledger, cell) == "other settings" and not args.again]:
        raise ValueError(
            f"{cell.slug}: {ledger.path} has it with another recipe, length or teacher; --again replaces such rows, "
            "another --out keeps them"
        )
    untold = [c for c in teachers if state(ledger, c) != "done" or not (c.folder(args.work) / "row.json").exists()]
    failed = run_cells(untold, cells, ledger, args)
    lost = {cell.key["task"] for cell in teachers if state(ledger, cell) != "done"}
    failed += run_cells([cell for cell in students if cell.key["task"] not in lost], cells, ledger, args)
    join_seeds(cells, ledger, args.work)
    return failed


def join_seeds(cells: Sequence[Cell], ledger: Ledger, work: Path) -> None:
    """Give rows that differ in their seed alone the intervals of their mean, where all they wrote is still there."""
    from quality_score import intervals, test_set

    def written(cell: Cell) -> list[str] | None:
        file = cell.folder(work) / "outputs.jsonl"
        if not file.is_file():
            return None
        return [json.loads(line)["output"] for line in file.read_text(encoding="utf-8").splitlines()]

    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        if not cell.is_teacher and state(ledger, cell) == "done":
            groups.setdefault(tuple(cell.key[name] for name in KEYS if name != "seed"), []).append(cell)
    for seeds in groups.values():
        of = sorted(cell.key["seed"] for cell in seeds)
        rows = [row_of(ledger, cell) for cell in seeds]
        if len(seeds) == 1 or all(row.get("seeds") == of for row in rows):
            continue
        teacher = next(c for c in cells if c.is_teacher and c.key["task"] == seeds[0].key["task"])
        theirs, runs = written(teacher), [found for cell in seeds if (found := written(cell)) is not None]
        if theirs is None or len(runs) < len(seeds):
            say(f"no interval over seeds for {seeds[0].slug}: {work} hasn't all that was written")
            continue
        recipe = Recipe.from_dict(seeds[0].recipe)
        _, references = test_set(seeds[0].data, recipe, seeds[0].test_examples)
        score, kept = intervals(recipe, runs, theirs, references)
        made = {"seeds": of, "seeds_interval": score, "seeds_retention_interval": kept}
        for row in rows:
            ledger.add(row | made, ledger.runs[row["run"]])


def run_sensitivity(cells: Sequence[Cell], ledger: Ledger, only: str) -> None:
    """Rows for each task and width of the selected cells, with the first numerics that has it."""
    from dqbart.tasks.sensitivity import sensitivity

    for cell in cells:
        if cell.is_teacher or cell.refused or cell.key["bits"] == FLOAT or only not in cell.slug:
            continue
        of = {name: cell.key[name] for name in ("task", "bits")}
        known = [row for row in ledger.rows if row | of == row]
        read = (*SCORING, "preset", "bits", "numerics", "probability_bits", "dev_subset")  # of the recipe, here
        settings = replace(cell, recipe={name: cell.recipe[name] for name in read if name in cell.recipe}).settings
        if known and (known[0]["numerics"] != cell.key["numerics"] or known[0].get("settings") == settings):
            continue
        recipe = Recipe.from_dict(cell.recipe)
        say(f"{cell.key['task']}, {cell.key['bits']}, {cell.key['numerics']}: one part at a time")
        found = sensitivity(cell.teacher, cell.data, recipe, score_outputs=True, limit=recipe.dev_subset)
        for row in found:
            made_with = {"numerics": cell.key["numerics"], "settings": settings, "metric": MAIN[recipe.scored_by]}
            ledger.add({"task": cell.key["task"]} | made_with | row)


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("grid", nargs="?", type=Path, metavar="GRID.yaml", help="what to run, such as grids/first.yaml")
    parser.add_argument("--teachers", type=Path, metavar="DIR", help="folder of the teachers' folders")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the data sets' folders")
    parser.add_argument("--work", type=Path, metavar="DIR", help="checkpoints, logs, outputs and reports of the cells")
    parser.add_argument("--out", type=Path, metavar="FILE", help="ledger (results/quality.json or sensitivity.json)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cells with TEXT in their name, see --list")
    parser.add_argument("--jobs", type=int, metavar="N", help="cells at a time, on all cores or one GPU (1)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of a cell (cores / jobs)")
    parser.add_argument("--steps-scale", type=float, default=1.0, metavar="X", help="times the grid's max_steps (1)")
    parser.add_argument("--keep", action="store_true", help="keep packed folders, not only outputs and reports")
    parser.add_argument("--again", action="store_true", help="replace rows made with other settings or teachers")
    parser.add_argument("--list", action="store_true", help="print the cells and what is done, and stop")
    parser.add_argument("--sensitivity", action="store_true", help="quantize one part at a time, without training")
    parser.add_argument("--quick", action="store_true", help="a small grid, the shipped teacher, no file but --out")
    args = parser.parse_args(words)
    args.jobs = args.jobs or (2 if args.quick else 1)
    if args.jobs < 1 or (args.threads or 1) < 1 or not args.steps_scale > 0:
        parser.error("--jobs and --threads must be at least 1, --steps-scale above 0")
    return args


def quick_places(args: argparse.Namespace, scratch: Path) -> None:
    """Fill in what --quick brings: its grid, the shipped teacher, and docstrings of torch and the standard library."""
    import sysconfig
    from importlib.util import find_spec

    import dqbart
    from dqbart.data.docstrings import load_docstrings, write_docstrings

    args.grid = args.grid or HERE / "grids" / "quick.yaml"
    args.teachers = args.teachers or Path(dqbart.__file__).parent / "assets"
    args.work, args.out = args.work or scratch, args.out or scratch / "results.json"
    if args.data is None:
        args.data = args.work / "data"
        torch, library = find_spec("torch"), Path(sysconfig.get_paths()["stdlib"])
        assert torch is not None and torch.origin is not None
        write_docstrings(
            args.data / "docstrings", load_docstrings([library / "email"], [Path(torch.origin).parent / "nn"], 1)
        )


def run(args: argparse.Namespace) -> tuple[Ledger, int]:
    """What the arguments ask for; the ledger, and how many cells failed."""
    import torch

    needed = 1 if args.list else 3 if args.sensitivity else 4
    for name in ("grid", "teachers", "data", "work")[:needed]:
        if getattr(args, name) is None:
            raise ValueError(f"{'GRID.yaml' if name == 'grid' else '--' + name} is missing; --quick runs without")
    args.work = Path(os.path.abspath(args.work)) if args.work else None
    teachers, data = (Path(os.path.abspath(folder or "")) for folder in (args.teachers, args.data))
    cells = read_grid(args.grid, teachers, data, args.steps_scale, torch.cuda.is_available())
    if args.sensitivity:
        ledger = Ledger(args.out or RESULTS / "sensitivity.json", PART_KEYS)
        run_sensitivity(cells, ledger, args.only)
        return ledger, 0
    ledger = Ledger(args.out or RESULTS / "quality.json", KEYS)
    if args.list:
        for cell in cells:
            if args.only in cell.slug:
                print(f"{state(ledger, cell):15s} {cell.slug}{'  ' + cell.refused if cell.refused else ''}")
        return ledger, 0
    return ledger, run_grid(cells, ledger, args)


@resumable
def main(words: list[str] | None = None) -> int:
    args = parse_arguments(words)
    with tempfile.TemporaryDirectory() as scratch:
        if args.quick:
            quick_places(args, Path(scratch))
        ledger, failed = run(args)
    if not args.list:
        print(sensitivity_table(ledger.rows) if args.sensitivity else table(ledger.rows))
    print(json.dumps({"rows": len(ledger.rows), "failed": failed}))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
