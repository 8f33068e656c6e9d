"""How many times as fast as BERT-base is a small encoder, and what do low bits add?

    python benchmarks/latency_encoders.py [--quick] [--shapes TinyBERT-4 ...] [--systems dqbart-cpu ...] ...

Problem: articles give a small encoder's speed as a multiple of BERT-base's, in their own system, on their machine.
latency.py compares systems, one shape at a time; dividing the results of two such runs compares two moments of a busy
machine. Method: its children and its rounds, the other way round: one system at a time, all shapes take turns, and
BERT-base in transformers fp32 takes turns with them, so every row has two ratios, both taken round by round:

    vs_base     to --base in the same system: what the shape saves there
    vs_fp32     to --base in transformers fp32: shape, engine and bits together; comparable between systems

One forward pass of the bare model, with its pooler if it has one, up to the last hidden states. These, averaged over
tokens, must be those of transformers fp32, or for other dqbart engines of dqbart-torch, where that ran in the same
command. Rejected: all shapes in all systems in one round, some 70 processes that no common machine has the memory for.

A rerun measures what is missing: whole cases of a system, always with all shapes asked for. The last line is JSON; exit
code 1 if an fp32 peer's vectors differ in most rows.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import product
from pathlib import Path

from latency import EXACT_PEERS, Case, Team, check, shared_arguments, take_turns
from latency_figures import ORACLE, agreement, ratio
from latency_models import SHAPES, Models
from latency_tables import REFERENCE, Row, number, spread
from ledger import RESULTS, Ledger, device_name, markdown, resumable
from peers import System, systems

KEYS = ("device", "base", "shape", "system", "bits", "source", "batch", "threads")
BASE = "bert-base"
CLAIMS = {"MiniLM-L12-H384": 2.7, "MiniLM-L6-H384": 5.3, "TinyBERT-4": 9.4}  # arXiv 2002.10957 and 1909.10351
HEADLINE = [*CLAIMS, "TinyBERT-6", "distilbert-base", "albert-base"]
QUICK = dict(shapes=["MiniLM-L6-H384", "TinyBERT-4"], sources=[128], batches=[1], threads=[min(2, os.cpu_count() or 1)],
             rounds=3, systems=[REFERENCE, "ctranslate2-int8", "onnxruntime-int8", "dqbart-cpu"])  # fmt: skip
LEGEND = (
    "Each cell: median ms ± interquartile range · times as fast as {base} in the same system · as {base} in "
    "transformers fp32, in the same rounds. A star: vectors of some rows have a cosine of at most 0.999 to those of "
    "transformers fp32, for dqbart-cpu to those of dqbart-torch at the same bits."
)
Member = tuple[str, System]  # a shape in a system


def members(shapes: Iterable[str], base: str, system: System, reference: System) -> list[Member]:
    """Who takes turns: all shapes and the base in one system, and the base in the reference."""
    names = dict.fromkeys([base, *shapes])
    return list(dict.fromkeys([(base, reference), *((name, system) for name in names)]))


def measure(teams: dict[str, Team], wanted: list[Member], case: Case) -> tuple[dict[Member, Row], dict[Member, Row]]:
    """(rows, last answers) of all members that take turns; ratios where both sides answered in every round."""
    base, reference = wanted[0]
    for team in teams.values():
        team.write_inputs(case)
    args = teams[base].args
    times, answers, gaps = take_turns(wanted, lambda who, reset: teams[who[0]].ask(who[1], case, reset=reset), args)
    rows: dict[Member, Row] = {who: teams[who[0]].gap(reason) for who, reason in gaps.items()}
    for who, answer in answers.items():
        name, system = who
        rows[who] = teams[name].row(system, case, times[who], answer)
        for field, other in (("vs_base", (base, system)), ("vs_fp32", (base, reference))):
            if other in times:
                rows[who][field] = ratio(times[other], times[who])
    return rows, answers


def fill(ledger: Ledger, args: argparse.Namespace, chosen: list[System]) -> None:
    """Measure what is missing: threads in turn, then systems, references first, then cases from small to large."""
    start = time.monotonic()
    reference = next(system for system in systems([], {}) if system.name == REFERENCE)
    known: dict[tuple[str, Case], dict[System, Row]] = {}  # vectors to compare with
    cases = [Case("forward", source, batch, 0) for source, batch in product(args.sources, args.batches)]
    for threads, system in product(args.threads, sorted(chosen, key=lambda one: (not one.is_peer, one.name != ORACLE))):
        with ExitStack() as stack:
            teams = {}
            for name in dict.fromkeys([args.base, *args.shapes]):
                scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                models = Models(args.models, args.envs)
                teams[name] = Team(name, SHAPES[name].layers[0], threads, args, models, scratch)
                stack.callback(teams[name].close)
            wanted = members(args.shapes, args.base, system, reference)
            for case in cases:
                for line in fill_case(ledger, args, teams, wanted, case, known):
                    print(f"{time.monotonic() - start:6.0f} s  {line}", file=sys.stderr)


def fill_case(
    ledger: Ledger, args: argparse.Namespace, teams: dict[str, Team], wanted: list[Member], case: Case,
    known: dict[tuple[str, Case], dict[System, Row]],
) -> Iterable[str]:  # fmt: skip
    """Rows of one system in one case, if any is missing; yields a line for the reader."""
    system = wanted[-1][1]

    def key(name: str) -> Row:
        values = (device_name(args.device), args.base, name, system.name, system.bits, case.source, case.batch,
                  teams[name].threads)  # fmt: skip
        return dict(zip(KEYS, values, strict=True))

    found = [ledger.find(**key(name)) for name in teams]
    tried = [row for row in found if row and row["tried"]]
    settled = len(tried) == len(teams) and len({row["run"] for row in tried}) == 1
    if settled and not args.again:
        return
    reason = system.unusable(args.device, args.envs)
    if reason:
        rows = {} if any(tried) else {(name, system): dict(error=reason, tried=False, median_ms=None) for name in teams}
    else:
        rows, answers = measure(teams, wanted, case)
        for (name, who), answer in answers.items():
            known.setdefault((name, case), {})[who] = answer
        words = [f"{name} {_short(row)}" for (name, who), row in rows.items() if who == system]
        yield f"{system.name} {system.bits}, {teams[args.base].threads} threads, {case}: {'; '.join(words)}"
    for (name, who), row in rows.items():
        if who == system:
            agree = agreement(system, known[name, case]) if row["error"] is None else None
            more = dict(layers=teams[name].layers, tried=True, agree=agree)
            ledger.add(key(name) | more | row)


def _short(row: Row) -> str:
    return str(row["error"]) if row["error"] is not None else f"{number(row['median_ms'])} ms"


def multiply_adds(name: str, source: int) -> int:
    """Of the layers of an encoder's shape, for one text: four projections, two of the feed-forward block, attention."""
    config = SHAPES[name].config
    width, inner = config.get("hidden_size", 768), config.get("intermediate_size", 3072)
    return int(SHAPES[name].layers[0]) * source * (4 * width**2 + 2 * width * inner + 2 * source * width)


def table(rows: list[Row]) -> str:
    """Markdown, from rows alone: ratios over all cases beside the articles' claims, then every case."""
    parts = []
    for base, device in dict.fromkeys((row["base"], row["device"]) for row in rows):
        mine = [row for row in rows if (row["base"], row["device"]) == (base, device)]
        names = list(dict.fromkeys(row["shape"] for row in mine))
        parts += [
            f"Times as fast as {base} in the same system, {device}: smallest / median / largest over all cases.",
            _summary(mine, "vs_base", [name for name in names if name != base]),
            f"Times as fast as {base} in transformers fp32, {device}:",
            _summary(mine, "vs_fp32", names),
            LEGEND.format(base=base),
        ]
        for threads, source, batch in dict.fromkeys((row["threads"], row["source"], row["batch"]) for row in mine):
            case = [row for row in mine if (row["threads"], row["source"], row["batch"]) == (threads, source, batch)]
            title = f"{device}, {threads} threads, source {source}, batch {batch}"
            parts.append(f"<details><summary>{title}</summary>\n\n{_group(case, names)}\n\n</details>")
    return "\n\n".join(parts)


def _lines(rows: list[Row]) -> dict[tuple[str, str], dict[str, list[Row]]]:
    """Rows by system and bits, then by shape."""
    lines: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        lines.setdefault((row["system"], row["bits"]), {}).setdefault(row["shape"], []).append(row)
    return lines


def _summary(rows: list[Row], field: str, names: list[str]) -> str:
    cells: list[list[str | None]] = []
    if field == "vs_base":
        cells.append(["the articles", None, *(f"{CLAIMS[name]}" if name in CLAIMS else None for name in names)])
        sources = dict.fromkeys(row["source"] for row in rows)
        work = {name: [multiply_adds(rows[0]["base"], n) / multiply_adds(name, n) for n in sources] for name in names}
        cells.append(["multiply-adds", None, *(spread(work[name]) for name in names)])
    for (system, bits), found in _lines(rows).items():
        ratios = [[row[field] for row in found.get(name, []) if field in row] for name in names]
        cells.append([system, bits, *(spread(values) or "–" for values in ratios)])
    return markdown(["system", "bits", *names], cells)


def _group(rows: list[Row], names: list[str]) -> str:
    cells = []
    for (system, bits), found in _lines(rows).items():
        line = [system, bits, *(_cell(found[name][0]) if name in found else None for name in names)]
        if len(set(line[2:])) == 1 < len(names):
            line[3:] = ["–"] * (len(names) - 1)  # a reason is said once
        cells.append(line)
    return markdown(["system", "bits", *names], cells)


def _cell(row: Row) -> str:
    if row["error"] is not None:
        return str(row["error"])
    ratios = [f"{row[field]:.2f} x" if field in row else "?" for field in ("vs_base", "vs_fp32")]
    star = " *" if row["agree"] is not None and row["agree"] < row["batch"] else ""
    return " · ".join([f"{number(row['median_ms'])} ± {number(row['iqr_ms'])}", *ratios]) + star


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    encoders = [name for name, shape in SHAPES.items() if not shape.seq2seq]
    parser.add_argument("--quick", action="store_true", help="two shapes in one small case, and no file unless --out")
    parser.add_argument("--shapes", nargs="+", choices=encoders, default=HEADLINE, metavar="SHAPE",
                        help=", ".join(encoders))  # fmt: skip
    parser.add_argument("--base", choices=encoders, default=BASE, metavar="SHAPE", help=f"default {BASE}")
    for name, numbers, help in (("sources", [32, 128, 512], "tokens per text"), ("batches", [1, 8, 32], "texts")):
        parser.add_argument(f"--{name}", nargs="+", type=int, default=numbers, metavar="N",
                            help=f"{help}, default {' '.join(map(str, numbers))}")  # fmt: skip
    parser.add_argument("--out", type=Path, help="ledger to fill, default results/latency_encoders.json")
    shared_arguments(parser)
    parser.set_defaults(layers=None, tokens=1)  # what check() looks at, too
    if parser.parse_known_args(words)[0].quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args(words)


@resumable
def main(words: list[str] | None = None) -> int:
    args = parse_arguments(words)
    with tempfile.TemporaryDirectory() as scratch:
        chosen = check(args)
        ledger = Ledger(args.out or (Path(scratch) if args.quick else RESULTS) / "latency_encoders.json", KEYS)
        fill(ledger, args, chosen)
    print(table(ledger.rows))
    different = [name for name in EXACT_PEERS if _differs(ledger.rows, name)]
    for name in different:
        print(f"{name}: its vectors are those of {REFERENCE} in fewer than half of the rows", file=sys.stderr)
    gaps = sum(row["error"] is not None for row in ledger.rows)
    print(json.dumps({"rows": len(ledger.rows), "gaps": gaps, "different_vectors": different}))
    return int(bool(different))


def _differs(rows: list[Row], name: str) -> bool:
    found = [row for row in rows if row["system"] == name and row["agree"] is not None]
    return 2 * sum(row["agree"] for row in found) < sum(row["batch"] for row in found)


if __name__ == "__main__":
    sys.exit(main())
