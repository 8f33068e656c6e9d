"""Puts the tables into benchmarks/README.md, from benchmarks/results/*.json alone.

    python benchmarks/tables.py [--check]

Problem: numbers copied into prose by hand are wrong a month later. Method: between `<!-- NAME -->` and
`<!-- end NAME -->` stands what the script's own `table(rows)` makes of its results file, and nobody edits there;
`--check` (a test runs it) exits with 1 if the file would change. A results file that isn't there leaves the command
that makes it. Rejected: generating the whole page, which puts prose into code. The last line is JSON.
"""

import argparse
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from ledger import RESULTS, Ledger, markdown

README = Path(__file__).resolve().parent / "README.md"
GRID = "python benchmarks/quality.py benchmarks/grids/first.yaml --teachers DIR --data DIR"
SOURCES = {  # results file -> module, its function, the command that fills the file
    "size": ("size", "table", "python benchmarks/size.py"),
    "latency": ("latency", "table", "python benchmarks/latency.py"),
    "latency_encoders": ("latency_encoders", "table", "python benchmarks/latency_encoders.py"),
    "quality": ("quality", "table", f"{GRID} --work DIR"),
    "sentence_embeddings": (
        "sentence_embeddings",
        "table",
        "python benchmarks/sentence_embeddings.py MODEL --data DIR --work DIR",
    ),
    "sensitivity": ("quality", "sensitivity_table", f"{GRID} --sensitivity"),
    "encoder_methods": ("encoder_methods", "table", "python benchmarks/encoder_methods.py --data DATA --work WORK"),
    "subnetworks": ("subnetworks", "table", "python benchmarks/subnetworks.py TEACHER --data DIR --work WORK"),
    "matmul": ("matmul", "table", "python benchmarks/matmul.py"),
    "step": ("step", "table", "python benchmarks/step.py"),
    "gate": ("gate", "table", "python benchmarks/gate.py"),
}
MACHINES = "machines"
SHOWN_PACKAGES = ("torch", "transformers")


def blocks(results: Path) -> dict[str, str]:
    """Markdown by name: one for each source, and the machines. Raises `ValueError` for a damaged results file."""
    made: dict[str, str] = {}
    runs: list[tuple[str, dict[str, Any]]] = []
    for name, (module, function, command) in SOURCES.items():
        path = results / f"{name}.json"
        if path.exists():
            ledger = Ledger(path, [])
            made[name] = getattr(importlib.import_module(module), function)(ledger.rows).strip()
            runs += [(name, run) for run in ledger.runs]
        else:
            made[name] = f"Not measured yet: `{command}`"
    made[MACHINES] = machines(runs)
    return made


def machines(runs: list[tuple[str, dict[str, Any]]]) -> str:
    """Which machine, software and commits each results file comes from; runs that agree share a line."""
    lines: dict[tuple[str, str, str], tuple[set[str], set[str]]] = {}
    for name, run in runs:
        flags = " ".join(run["flags"]) or run["instructions"]
        machine = f"{run['processor']}, {run['cores']} cores, {flags}, {run['system']}"
        if run["gpu"]:
            machine += f"; {run['gpu']}"
        software = [f"Python {run['python']}", *(f"{p} {run['packages'].get(p)}" for p in SHOWN_PACKAGES)]
        commits, dates = lines.setdefault((name, machine, ", ".join(software)), (set(), set()))
        commits.add(str(run["commit"]))
        dates.add(run["date"])
    if not lines:
        return "No results yet."
    rows = [[*key, ", ".join(sorted(c)), ", ".join(sorted(d))] for key, (c, d) in lines.items()]
    return markdown(["results", "machine", "software", "commit (+ changed)", "date"], rows)


def fill(text: str, made: dict[str, str]) -> str:
    """`text` with what stands between markers replaced. Raises `ValueError` for a pair that isn't there once."""
    for name, block in made.items():
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        parts = re.split(f"({re.escape(begin)}\n|^{re.escape(end)}$)", text, flags=re.MULTILINE)
        if len(parts) != 5 or parts[1] != begin + "\n" or parts[3] != end:
            raise ValueError(f"{begin} and {end}: expected once each, in this order, on lines of their own")
        text = f"{parts[0]}{begin}\n{block}\n{end}{parts[4]}"
    return text


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if the tables are out of date")
    parser.add_argument("--readme", type=Path, default=README, help="file to fill, default benchmarks/README.md")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder, default benchmarks/results")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    try:
        made = blocks(args.results)
        old = args.readme.read_text(encoding="utf-8")
        new = fill(old, made)
        stale = [name for name in made if fill(old, {name: made[name]}) != old]
        if stale and not args.check:
            args.readme.write_text(new, encoding="utf-8")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if stale and args.check:
        print(f"{args.readme.name}: out of date: {', '.join(stale)}; run python benchmarks/tables.py", file=sys.stderr)
    print(json.dumps({"blocks": len(made), "out_of_date" if args.check else "changed": stale}))
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
