"""How fast is it, and in how much memory? The same weights through every engine that people use, side by side.

    python benchmarks/latency.py [--quick] [--shapes bart-base ...] [--systems dqbart-torch ...] ...

Problem: a time by itself says more about the machine and its neighbours than about the engine. Method: every system
runs in a child process that loads its model once (peers.py); the children take turns, one request each per round, so
that noise hits all alike. Ratios are taken round by round, then their median; none is taken across runs. Weights are
random (latency_models.py). Every system writes exactly --tokens tokens, end token forbidden, and what comes back is
counted. A student of fewer layers is compared with the float student of as many. Rejected: all in one process (memory
can't be told apart, versions conflict) and one system after the other (noise becomes a result).

    prefill     encoder and first token, through the call that generates
    load        from folder to model, in a process that has the library imported; the files are in the page cache
    loaded      resident memory of the whole process then, interpreter and libraries included; weights that are mapped
                from the file (transformers) count once they are touched, so compare systems by
    peak        the most it had while it answered

A system that is missing, fails or returns another number of tokens stays in the table, with the reason. Rerunning the
command measures what is missing: whole cases, always with all systems asked for. --peer adds any program that speaks
the protocol of peer_runner.py. The last line is JSON; exit code 1 if an fp32 peer's greedy ids are not those of
transformers in most rows.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TypeVar

from latency_figures import ORACLE, agreement, ratio
from latency_models import SHAPES, Models, inputs
from latency_tables import BEAMS, REFERENCE, Row, number, table
from ledger import RESULTS, Ledger, device_name, resumable
from peers import CACHE, ENVS, Child, PeerFailed, System, systems

KEYS = ("device", "shape", "layers", "system", "bits", "mode", "source", "batch", "threads")
MODES = ("prefill", "greedy", "beam4", "beam6")  # an encoder has "forward" alone
EXACT_PEERS = ("transformers-compiled", "ctranslate2-float32")
MIN_ROUNDS = 3
PAUSE_S = 0.25  # between turns: the last one's OpenMP threads may spin for 0.2 s
QUICK = dict(shapes=["bart-base"], layers=["6-6"], modes=["greedy", "beam4"], sources=[128], batches=[1], tokens=16,
             threads=[min(2, os.cpu_count() or 1)], rounds=3)  # fmt: skip
M = TypeVar("M", bound=Hashable)  # who takes turns


@dataclass(frozen=True)
class Case:
    mode: str
    source: int
    batch: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.mode}, source {self.source}, batch {self.batch}"

    def covers(self, other: "Case") -> bool:
        """Whether this is at least as much work in every respect."""
        sizes = [(case.source, case.batch, BEAMS[case.mode] * case.tokens) for case in (self, other)]
        return all(mine >= its for mine, its in zip(*sizes, strict=True))


@dataclass
class Team:
    """The children of one model and thread count, each started when first asked."""

    shape: str
    layers: str
    threads: int
    args: argparse.Namespace
    models: Models
    scratch: Path
    children: dict[System, Child] = field(default_factory=dict)
    start_s: dict[System, float] = field(default_factory=dict)
    broken: dict[System, str] = field(default_factory=dict)
    too_slow: dict[System, Case] = field(default_factory=dict)

    def ask(self, system: System, case: Case, *, reset: bool) -> Row:
        """One answer, its tokens counted. Raises `PeerFailed`."""
        slow = self.too_slow.get(system)
        if slow and case.covers(slow):
            raise PeerFailed(f"not tried: timed out at {slow}")
        child = self._child(system)
        request = dict(inputs=str(self.scratch / "inputs.json"), mode=case.mode, beams=BEAMS[case.mode],
                       tokens=case.tokens, reset=reset)  # fmt: skip
        try:
            answer = child.ask(request, self.args.timeout)
        except TimeoutError as error:
            self.too_slow[system] = case
            raise PeerFailed(str(error)) from None
        _require(answer, "ms", "lengths", "peak_mib", "vectors" if case.mode == "forward" else "ids")
        wanted = [case.source if case.mode == "forward" else case.tokens] * case.batch
        if answer["lengths"] != wanted:
            got = f"{len(answer['lengths'])} rows of {' or '.join(map(str, sorted(set(answer['lengths']))))} tokens"
            raise PeerFailed(f"refused: {got} came back, {case.batch} of {wanted[0]} were asked for")
        return answer

    def _child(self, system: System) -> Child:
        """The running child; one that died is started again, one that couldn't be loaded isn't."""
        if system in self.broken:
            raise PeerFailed(self.broken[system])
        if system not in self.children or self.children[system].dead:
            try:
                self._start(system)
            except (PeerFailed, ValueError, OSError) as error:
                self.broken[system] = f"not loaded: {error}"
                raise PeerFailed(self.broken[system]) from None
        return self.children[system]

    def _start(self, system: System) -> None:
        folder = self.models.of(system, self.shape, self.layers)
        print(f"         loading {system.name} {system.bits}", file=sys.stderr)
        count = str(self.threads)
        extra = dict(OMP_NUM_THREADS=count, MKL_NUM_THREADS=count, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
                     TORCHINDUCTOR_CACHE_DIR=str(self.models.root / "inductor"))  # fmt: skip
        command = system.call(folder, self.threads, self.args.device, self.args.envs)
        log = self.scratch / f"{system.name}-{system.bits}.log"
        start = time.monotonic()
        child = Child(command, log, self.args.timeout, extra)
        self.start_s[system] = time.monotonic() - start
        self.children[system] = child
        _require(child.ready, "load_s", "resident_mib", "version")

    def write_inputs(self, case: Case) -> None:
        """What all children are asked next."""
        (self.scratch / "inputs.json").write_text(json.dumps(inputs(self.shape, case.source, case.batch)))

    def row(self, system: System, case: Case, times: list[float], answer: Row) -> Row:
        """What one child came to in one case."""
        first, *ms = times
        ready = self.children[system].ready
        memory = {name: answer[name] for name in ("peak_mib", "device_peak_mib") if name in answer}
        load = dict(load_s=round(ready["load_s"], 3), start_s=round(self.start_s[system], 3),
                    loaded_mib=ready["resident_mib"], version=ready["version"])  # fmt: skip
        return figures(ms, case) | dict(first_ms=first) | memory | load

    def gap(self, reason: str) -> Row:
        """A row without figures; without this machine's folders too, since results are published."""
        for folder in (self.models.root, self.args.envs, self.scratch):
            reason = reason.replace(f"{folder}{os.sep}", "")
        return dict(error=reason, tried=True, median_ms=None)

    def close(self) -> None:
        for child in self.children.values():
            child.hang_up()  # all at once, then wait for each
        for child in self.children.values():
            child.close()


def _require(message: Row, *names: str) -> None:
    missing = [name for name in names if name not in message]
    if missing:
        raise PeerFailed(f"answered without {', '.join(missing)}: peer_runner.py says what an answer is")


def take_turns(
    wanted: Sequence[M], ask: Callable[[M, bool], Row], args: argparse.Namespace
) -> tuple[dict[M, list[float]], dict[M, Row], dict[M, str]]:
    """A warm-up each, then rounds until there are enough or the time for a case is spent.

    `ask(member, reset)` gives an answer or raises `PeerFailed`. Returns milliseconds, the warm-up's first, and the last
    answer of those that never failed, and the reason for each that did.
    """
    times: dict[M, list[float]] = {member: [] for member in wanted}
    answers: dict[M, Row] = {}
    gaps: dict[M, str] = {}

    def turn(number: int) -> None:
        first = number % len(wanted)
        for member in [*wanted[first:], *wanted[:first]]:  # none is always behind the same other
            if member not in gaps:
                time.sleep(PAUSE_S)
                try:
                    answers[member] = ask(member, number == 0)
                    times[member].append(round(answers[member]["ms"], 3))
                except PeerFailed as error:
                    gaps[member] = str(error)

    turn(0)
    start = time.monotonic()
    for done in range(args.rounds):
        if done < MIN_ROUNDS or time.monotonic() - start < args.case_seconds:
            turn(done + 1)
    complete = [member for member in wanted if member not in gaps]
    return {m: times[m] for m in complete}, {m: answers[m] for m in complete}, gaps


def measure(team: Team, wanted: list[System], case: Case) -> dict[System, Row]:
    """A row per system."""
    team.write_inputs(case)
    times, answers, gaps = take_turns(wanted, lambda system, reset: team.ask(system, case, reset=reset), team.args)
    rows = {system: team.gap(reason) for system, reason in gaps.items()}
    for system, answer in answers.items():
        rows[system] = team.row(system, case, times[system], answer) | dict(agree=agreement(system, answers))
        for peer in (other for other in answers if other.is_peer):
            rows[system][f"vs_{peer.name}"] = ratio(times[peer], times[system])
    return rows


def figures(ms: list[float], case: Case) -> Row:
    """What the times of all rounds come to."""
    middle = statistics.median(ms)
    low, _, high = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else (middle,) * 3
    many = case.mode not in ("prefill", "forward")
    return dict(error=None, median_ms=middle, min_ms=min(ms), iqr_ms=round(high - low, 3), rounds_ms=ms,
                tokens_per_s=round(1000 * case.batch * case.tokens / middle, 2) if many else None)  # fmt: skip


def fill(ledger: Ledger, args: argparse.Namespace, chosen: list[System]) -> None:
    """Measure what is missing: models in turn, then threads, then cases from small to large."""
    start = time.monotonic()
    for name in args.shapes:
        shape = SHAPES[name]
        grid = product(args.sources or shape.sources, args.batches or shape.batches,
                       args.modes if shape.seq2seq else ["forward"])  # fmt: skip
        tokens = {"prefill": 1, "forward": 0}
        cases = [Case(mode, source, batch, tokens.get(mode, args.tokens)) for source, batch, mode in grid]
        for layers, threads in product(args.layers or shape.layers, args.threads):
            with tempfile.TemporaryDirectory() as scratch:
                team = Team(name, layers, threads, args, Models(args.models, args.envs), Path(scratch))
                try:
                    for case in cases:
                        for line in fill_case(ledger, args, chosen, team, case):
                            print(f"{time.monotonic() - start:6.0f} s  {line}", file=sys.stderr)
                finally:
                    team.close()


def why_not(system: System, args: argparse.Namespace) -> str | None:
    """Why it isn't measured, or None."""
    if args.quick and not args.systems and system.name == "transformers-compiled":
        return f"left out, it compiles for a minute: python benchmarks/latency.py --quick --systems {system.name}"
    return system.unusable(args.device, args.envs)


def fill_case(ledger: Ledger, args: argparse.Namespace, chosen: list[System], team: Team, case: Case) -> Iterable[str]:
    """Rows of one case, if any is missing; yields a line for the reader."""

    def key(system: System) -> Row:
        values = (device_name(args.device), team.shape, team.layers, system.name, system.bits, case.mode, case.source,
                  case.batch, team.threads)  # fmt: skip
        return dict(zip(KEYS, values, strict=True))

    def settled(*some: System) -> bool:
        """Whether all were tried, and in one run: side by side."""
        rows = [row for system in some if (row := ledger.find(**key(system))) and row["tokens"] == case.tokens
                and (row["error"] is None or row["tried"])]  # fmt: skip
        return len(rows) == len(some) and len({row["run"] for row in rows}) <= 1

    missing = {system: reason for system in chosen if (reason := why_not(system, args))}
    usable = [system for system in chosen if system not in missing]
    rows = {} if settled(*usable) and not args.again else measure(team, usable, case)
    if rows:
        words = [f"{s.name} {s.bits} {row['error'] or number(row['median_ms']) + ' ms'}" for s, row in rows.items()]
        yield f"{team.shape} {team.layers}, {team.threads} threads, {case}: {'; '.join(words)}"
    for system, reason in missing.items():
        if not settled(system):  # what was measured before stays
            rows[system] = dict(error=reason, tried=False, median_ms=None)
    for system in chosen:
        if system in rows:
            ledger.add(key(system) | dict(tokens=case.tokens) | rows[system])


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small case, and no file unless --out")
    parser.add_argument(
        "--shapes", nargs="+", choices=list(SHAPES), default=["bart-base"], metavar="SHAPE", help=", ".join(SHAPES)
    )
    parser.add_argument("--layers", nargs="+", metavar="E-D", help="default: those of the shape, such as 6-6 6-3 3-1")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE", help=", ".join(MODES))
    parser.add_argument("--sources", nargs="+", type=int, metavar="N", help="source lengths, default 128 512 1024")
    parser.add_argument("--batches", nargs="+", type=int, metavar="N", help="default 1 8 32")
    parser.add_argument("--tokens", type=int, default=32, help="generated per row, default 32")
    parser.add_argument("--out", type=Path, help="ledger to fill, default results/latency.json")
    shared_arguments(parser)
    if parser.parse_known_args(words)[0].quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args(words)


def shared_arguments(parser: argparse.ArgumentParser) -> None:
    """What latency_encoders.py takes, too."""
    parser.add_argument("--systems", nargs="+", metavar="SYSTEM", help="default: all")
    parser.add_argument("--bits", nargs="+", default=["2-2-8", "8-8-8"], metavar="W-E-A", help="of dqbart's models")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], metavar="N")
    parser.add_argument("--rounds", type=int, default=7, help=f"default 7; {MIN_ROUNDS} of them at any cost in time")
    parser.add_argument("--case-seconds", type=float, default=120, help="no new round after this, default 120")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one answer, default 900")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND", help="a program of your own")
    parser.add_argument("--envs", type=Path, default=ENVS, help="peers' environments, as given to peers.py")
    parser.add_argument("--models", type=Path, default=CACHE / "latency-models", help="cache of model folders")
    parser.add_argument("--again", action="store_true", help="measure cases that are in the file, too")


def check(args: argparse.Namespace) -> list[System]:
    """The systems to run, and `args` completed. Raises `ValueError` for values that can't work."""
    import torch

    from dqbart.notation import Bits, Layers

    gpu = torch.cuda.is_available()
    args.device = args.device or ("cuda" if gpu else "cpu")
    if args.device == "cuda" and not gpu:
        raise ValueError("device 'cuda': torch sees none; give --device cpu")
    args.envs, args.models = args.envs.absolute(), args.models.absolute()
    cores = os.cpu_count() or 1
    for name in args.shapes:
        for text in args.layers or ():
            given, full = Layers(text), Layers(SHAPES[name].layers[0])
            if (given.decoder is None) != (full.decoder is None) or not (
                given.encoder <= full.encoder and (given.decoder or 0) <= (full.decoder or 0)
            ):
                raise ValueError(f"layers {text!r}: {name} has {full}; expected as many numbers, none larger")
        limit = SHAPES[name].positions
        for what, values, low, high in (("sources", args.sources, 3, limit), ("batches", args.batches, 1, 4096),
                                        ("threads", args.threads, 1, cores), ("tokens", [args.tokens], 1, limit - 2),
                                        ("rounds", [args.rounds], 1, 10_000)):  # fmt: skip
            wrong = [value for value in values or () if not low <= value <= high]
            if wrong:
                raise ValueError(f"{what} {wrong[0]}: expected {low} to {high} for {name} on this machine")
    commands = {}
    for text in args.peer:
        name, _, command = text.partition("=")
        if not name or not command or name.startswith(("dqbart-", "transformers-")):
            raise ValueError(f"peer {text!r}: expected NAME=COMMAND, with a name of its own")
        commands[name] = tuple(shlex.split(command))
    found = systems([str(Bits(bits)) for bits in args.bits], commands)
    names = list(dict.fromkeys(system.name for system in found))
    for name in args.systems or ():
        if name not in names:
            raise ValueError(f"system {name!r}: expected {', '.join(names)}")
    chosen = [system for system in found if not args.systems or system.name in args.systems]
    return [system for system in chosen if args.systems or system.devices != ("cuda",) or gpu]


@resumable
def main(words: list[str] | None = None) -> int:
    args = parse_arguments(words)
    with tempfile.TemporaryDirectory() as scratch:
        chosen = check(args)
        ledger = Ledger(args.out or (Path(scratch) if args.quick else RESULTS) / "latency.json", KEYS)
        fill(ledger, args, chosen)
    print(table(ledger.rows))
    here = [row for row in ledger.rows if row["device"] == device_name(args.device)]
    different = [name for name in EXACT_PEERS if _differs(here, name)]
    for name in different:
        print(f"{name}: its greedy ids are those of {REFERENCE} in fewer than half of the rows", file=sys.stderr)
    for row in here:
        if is_inexact(row):
            case = f"{row['layers']} {row['bits']} {row['mode']}, source {row['source']}, batch {row['batch']}"
            print(f"{row['system']}: its ids are not those of {ORACLE}: {row['shape']} {case}", file=sys.stderr)
            different.append(row["system"])
    gaps = sum(row["error"] is not None for row in ledger.rows)
    print(json.dumps({"rows": len(ledger.rows), "gaps": gaps, "different_ids": different}))
    return int(bool(different))


def is_inexact(row: Row) -> bool:
    """Whether a dqbart engine gave other ids than the torch engine: they are one arithmetic, so that none may."""
    ours = row["system"].startswith("dqbart-") and row["system"] != ORACLE
    return ours and row.get("agree") is not None and row["agree"] < row["batch"]


def _differs(rows: list[Row], name: str) -> bool:
    found = [row for row in rows if row["system"] == name and row["mode"] == "greedy" and row.get("agree") is not None]
    return 2 * sum(row["agree"] for row in found) < sum(row["batch"] for row in found)


if __name__ == "__main__":
    sys.exit(main())
