"""How fast is `y = a wᵀ` at 8, 4, 2 and 1 bits, against the products that libraries have?

    python benchmarks/matmul.py [--quick] [--threads 1 2] [--kernels NAME ...] [--max-seconds 1]

Problem: a low-bit product that wins alone may win because its matrix sits in cache, or because it is wrong. Method:
every kernel (products.py) gets the same operands, is held to the exact product before it is timed, and takes turns with
the others; each call meets another copy of the matrix. On CPU there are as many copies as make one decode step of the
model, so what a narrow weight saves in cache here it saves there; on CUDA twice the L2 cache, timed by events around a
graph. Medians over rounds; the ratio to fp32 (on CUDA: bf16) is taken within each round. Beside it the shares of this
machine's own limits: bandwidth (best of copy, triad and sum over 256 MiB; above 100 % the weights came from cache) and
the rate of the fastest kernel of that arithmetic on large squares. Activations are handed over in the kernel's own
type: quantizing them and bias are outside. Rejected: one hot matrix, which is kindest to the widest weights.

Exit code 1 if a kernel is wrong. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ledger import RESULTS, Ledger, device_name, markdown, resumable
from products import KERNELS, SHAPES, Kernel, Shape, error_of, random_activations, random_codes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KEYS = ("device", "shape", "n", "k", "m", "kernel", "bits", "threads")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
QUICK_ROWS = (1, 4, 64, 512)
SHOWN_ROWS = (1, 4, 16, 64, 256, 1024, 4096)
SPAN = 0.02  # seconds that a kernel runs in one round, at least
ARRAY = 2**26  # fp32 numbers, for the bandwidth
SIDE = {"cpu": 1024, "cuda": 8192}  # of the squares, for the peak rate
MACHINE, MISSING = "machine", "missing"  # rows of the ledger that are no product
NO_SHAPE = Shape(0, 0, 0)


@dataclass
class Entry:
    """A kernel at one width, with its copies of one weight."""

    kernel: Kernel
    bits: int
    codes_NK: Tensor
    products: list[Callable[[Tensor], Tensor]]
    weight_bytes: int
    seconds_per_row: float = 0.0  # at the last M
    times: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def timer(products: list[Callable[[Tensor], Tensor]], a_MK: Tensor, seconds: float) -> Callable[[], float]:
    """Measures the seconds of one product, averaged over calls that each take the next copy of the weight."""
    import torch

    if a_MK.device.type == "cpu":
        turn, calls = itertools.cycle(products), max(1, math.ceil(SPAN / seconds))

        def loop() -> float:
            start = time.perf_counter()
            for product in itertools.islice(turn, calls):
                product(a_MK)
            return (time.perf_counter() - start) / calls

        return loop
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in products:
            product(a_MK)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replay(times: int) -> float:
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / times

    replay(1)
    times = max(1, math.ceil(SPAN / replay(1)))  # so that the launch of a graph, some microseconds, doesn't count
    return lambda: replay(times) / len(products)


def clock(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return max(time.perf_counter() - start, 1e-7)


def bandwidth(device: torch.device) -> dict[str, float]:
    """Bytes per second of a copy, a triad and a sum, best of five each."""
    import torch

    a, b, c = (torch.ones(ARRAY, device=device) for _ in range(3))
    calls: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
        "copy": (2, lambda x: b.copy_(x)),
        "triad": (3, lambda x: torch.add(x, b, alpha=3, out=c)),
        "sum": (1, lambda x: x.sum()),
    }
    found = {}
    for name, (arrays, call) in calls.items():
        call(a)
        measure = timer([call] * 4, a, SPAN)  # as products are: without the time a launch takes to get there
        found[name] = arrays * a.nbytes / min(measure() for _ in range(5))
    return found


def peak(kernel: Kernel, device: torch.device) -> float:
    """Operations per second on a large square, best of three."""
    import torch

    side = SIDE[device.type]
    product, _ = kernel.make(random_codes(side, side, kernel.bits[0]).to(device), kernel.bits[0])
    a = random_activations(side, side).to(device, getattr(torch, kernel.activations))
    product(a)
    return 2 * side**3 / min(clock(lambda: product(a), device) for _ in range(3))


class Bench:
    """One device and thread count: its limits, and the cases that the ledger lacks."""

    def __init__(self, ledger: Ledger, args: argparse.Namespace, device: torch.device, name: str, threads: int) -> None:
        self.ledger, self.device, self.name, self.threads = ledger, device, name, threads
        self.rounds, self.max_seconds, self.again = args.rounds, args.max_seconds, args.again
        self.wrong = 0
        self.usable: list[Kernel] = []
        for kernel in KERNELS:
            if reason := kernel.missing(device):
                self.add(MISSING, NO_SHAPE, 0, kernel.name, 0, reason=reason)
            else:
                self.usable.append(kernel)
        self.measured = [kernel for kernel in self.usable if not args.kernels or kernel.name in args.kernels]
        self.baseline = self.usable[0]

    def key(self, shape: str, of: Shape, m: int, kernel: str, bits: int) -> dict[str, Any]:
        return dict(zip(KEYS, (self.name, shape, of.n, of.k, m, kernel, bits, self.threads), strict=True))

    def add(self, shape: str, of: Shape, m: int, kernel: str, bits: int, **values: Any) -> None:
        self.ledger.add(self.key(shape, of, m, kernel, bits) | values)

    def measure_machine(self) -> None:
        """Bandwidth in bytes and peak rates in operations per second, into the ledger and `self`."""
        print(f"{self.name}, {self.threads} threads: bandwidth and peak rates", file=sys.stderr)
        found = bandwidth(self.device)
        self.bandwidth = max(found.values())
        how = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in found.items())
        self.add(MACHINE, NO_SHAPE, 0, "bandwidth", 0, rate=self.bandwidth, how=how)
        self.peaks: dict[str, float] = {}
        for kernel in (kernel for kernel in self.usable if not kernel.partial):
            rate = peak(kernel, self.device)
            if rate > self.peaks.get(kernel.arithmetic, 0):
                self.peaks[kernel.arithmetic] = rate
                self.add(MACHINE, NO_SHAPE, 0, f"peak {kernel.arithmetic}", 0, rate=rate, how=kernel.name)

    def is_due(self, shape: str, m: int, kernel: Kernel, bits: int) -> bool:
        """Whether there is no row yet, or one that was wrong, or skipped under a lower limit."""
        row = self.ledger.find(**self.key(shape, SHAPES[shape], m, kernel.name, bits))
        return self.again or row is None or "wrong" in row or row.get("predicted", math.inf) <= self.max_seconds

    def due(self, shape: str, rows: tuple[int, ...]) -> dict[int, set[tuple[str, int]]]:
        """Kernel and bits to measure, for each M that has any."""
        found = {
            m: {(kernel.name, bits) for kernel in self.measured for bits in kernel.bits
                if self.is_due(shape, m, kernel, bits)} for m in rows
        }  # fmt: skip
        return {m: entries for m, entries in found.items() if entries}

    def copies(self, of: Shape, weight_bytes: int) -> int:
        if self.device.type == "cpu":
            return max(1, round(of.step / (of.n * of.k)))
        import torch

        return math.ceil(2 * torch.cuda.get_device_properties(self.device).L2_cache_size / weight_bytes)

    def prepare(self, shape: str, due: dict[int, set[tuple[str, int]]]) -> list[Entry]:
        """The baseline, then what is due."""
        of, wanted = SHAPES[shape], set[tuple[str, int]]().union(*due.values())
        codes: dict[int, Tensor] = {}
        entries = []
        for kernel in self.usable:
            for bits in kernel.bits:
                if (kernel.name, bits) in wanted or kernel is self.baseline:
                    width = min(bits, 8)
                    if width not in codes:
                        codes[width] = random_codes(of.n, of.k, width)
                    there = codes[width].to(self.device)
                    with self.gaps(shape, kernel, bits, *due):
                        first, weight_bytes = kernel.make(there, bits)
                        more = [kernel.make(there, bits)[0] for _ in range(self.copies(of, weight_bytes) - 1)]
                        entries.append(Entry(kernel, bits, codes[width], [first, *more], weight_bytes))
        return entries

    @contextlib.contextmanager
    def gaps(self, shape: str, kernel: Kernel, bits: int, *rows: int) -> Iterator[None]:
        """What a partial kernel raises stands in its cells; on a GPU what any but the baseline does."""
        try:
            yield
        except Exception as error:
            if kernel is self.baseline or not (kernel.partial or self.device.type == "cuda"):
                raise
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
            for m in rows:
                self.add(shape, SHAPES[shape], m, kernel.name, bits, failed=words)
            print(f"{shape}: {kernel.name} at {bits} bits: {words}", file=sys.stderr)

    def run(self, shape: str, rows: tuple[int, ...]) -> None:
        """Every case of one shape that is due."""
        due = self.due(shape, rows)
        if due:
            entries = self.prepare(shape, due)
            for m, wanted in due.items():
                self.case(shape, m, entries, wanted)

    def case(self, shape: str, m: int, entries: list[Entry], wanted: set[tuple[str, int]]) -> None:
        """Check, then time in turns, then store."""
        import torch

        of, baseline = SHAPES[shape], entries[0]
        a_MK = random_activations(m, of.k)
        timers: list[tuple[Entry, Callable[[], float]]] = []
        for entry in entries:
            kernel, entry.times = entry.kernel, []
            is_wanted = (kernel.name, entry.bits) in wanted
            if not (is_wanted or entry is baseline):
                continue
            predicted = entry.seconds_per_row * m
            if predicted > self.max_seconds:
                if is_wanted:
                    self.add(shape, of, m, kernel.name, entry.bits, predicted=round(predicted, 3))
                continue
            a = a_MK.to(self.device, getattr(torch, kernel.activations))
            y_MN = None
            with self.gaps(shape, kernel, entry.bits, m):
                y_MN = entry.products[0](a)
            if y_MN is None:
                continue
            error = error_of(y_MN, a_MK, entry.codes_NK)
            if not error <= kernel.tolerance:  # NaN is wrong, too
                self.wrong += 1
                self.add(shape, of, m, kernel.name, entry.bits, wrong=str(error))
                print(f"{shape} M={m}: {kernel.name} at {entry.bits} bits is wrong by {error:.1e}", file=sys.stderr)
                continue
            moved = entry.weight_bytes + a.nbytes + y_MN.nbytes
            entry.facts = dict(bytes=moved, operations=2 * m * of.n * of.k, copies=len(entry.products), error=error)
            with self.gaps(shape, kernel, entry.bits, m):
                seconds = clock(lambda: entry.products[-1](a), self.device)  # noqa: B023
                timers.append((entry, timer(entry.products, a, seconds)))
        for turn in range(self.rounds):
            first = turn % max(1, len(timers))
            for entry, measure in timers[first:] + timers[:first]:
                entry.times.append(measure())
        for entry, _ in timers:
            entry.seconds_per_row = statistics.median(entry.times) / m
            if (entry.kernel.name, entry.bits) in wanted:
                self.add(shape, of, m, entry.kernel.name, entry.bits, **entry.facts, **self.summary(entry, baseline))
        shown = ", ".join(f"{e.kernel.name} {e.bits}b {statistics.median(e.times) * 1e3:.3g}" for e, _ in timers)
        print(f"{shape} M={m}, ms: {shown}", file=sys.stderr)

    def summary(self, entry: Entry, baseline: Entry) -> dict[str, Any]:
        median = statistics.median(entry.times)
        ratios = [b / s for b, s in zip(baseline.times, entry.times, strict=False)]  # none where it was skipped
        return dict(
            seconds=median, fastest=min(entry.times), slowest=max(entry.times), rounds=len(entry.times),
            ratio=statistics.median(ratios) if ratios else None,
            bandwidth_share=entry.facts["bytes"] / median / self.bandwidth,
            peak_share=entry.facts["operations"] / median / self.peaks[entry.kernel.arithmetic],
        )  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown per device and thread count: the baseline's milliseconds, ratios to it, share of the nearer limit."""
    parts = []
    for device, threads in dict.fromkeys((row["device"], row["threads"]) for row in rows):
        here = [row for row in rows if (row["device"], row["threads"]) == (device, threads)]
        limits = "; ".join(
            f"{r['kernel']} {r['rate'] / 1e9:.1f} {'GB' if r['kernel'] == 'bandwidth' else 'Gop'}/s ({r['how']})"
            for r in here if r["shape"] == MACHINE
        )  # fmt: skip
        cases: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
        for row in here:
            if row["shape"] not in (MACHINE, MISSING):
                cases.setdefault((row["shape"], -row["bits"], row["kernel"]), {})[row["m"]] = row
        shown = [m for m in SHOWN_ROWS if any(m in case for case in cases.values())] or sorted(
            {m for case in cases.values() for m in case}
        )
        lines = []
        measured = {row["kernel"] for row in here if "seconds" in row}
        baseline = next((kernel.name for kernel in KERNELS if kernel.name in measured), "")
        for (shape, bits, kernel), case in sorted(cases.items()):
            one, is_baseline = next(iter(case.values())), kernel == baseline
            cells = [_cell(case.get(m), is_baseline) for m in shown]
            lines.append([shape, f"{one['n']} x {one['k']}", kernel, -bits, *cells])
        title = f"{device}, {threads} thread{'s' * (threads != 1)}"
        parts.append(f"<details><summary>{title}</summary>\n\nLimits: {limits}.\n")
        parts.append(markdown(["matrix", "N x K", "kernel", "bits", *(f"M={m}" for m in shown)], lines) + "\n")
        gaps = [f"{r['kernel']}: {r['reason']}" for r in here if r["shape"] == MISSING and r["kernel"] not in measured]
        parts += [f"Not measured: {'; '.join(gaps)}.\n"] if gaps else []
        parts.append("</details>\n")
    return "\n".join(parts).rstrip()


def _cell(row: dict[str, Any] | None, is_baseline: bool) -> str | None:
    if row is None:
        return None
    if "wrong" in row:
        return "WRONG"
    if "failed" in row:
        return f"failed: {row['failed']}"
    if "predicted" in row:
        return f"skipped: {row['predicted']:.1f} s"
    share = f"{max(row['bandwidth_share'], row['peak_share']):.0%}"
    if is_baseline or row["ratio"] is None:
        return f"{row['seconds'] * 1e3:.3g} ms, {share}"
    return f"{row['ratio']:.2f} x, {share}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="bart-base, four M, three rounds; no file unless --out")
    parser.add_argument("--shapes", nargs="+", default=[""], metavar="TEXT", help="only matrices with this in the name")
    parser.add_argument("--rows", nargs="+", type=int, metavar="M", help="rows of activations")
    parser.add_argument("--kernels", nargs="+", default=[], metavar="NAME", help="only these, beside the baseline")
    parser.add_argument("--threads", nargs="+", type=int, help="CPU threads, default 1 and all cores")
    parser.add_argument("--rounds", type=int, help="default 7")
    parser.add_argument("--max-seconds", type=float, default=1.0, help="a product that would take longer is skipped")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--again", action="store_true", help="measure cases that are in the file, too")
    parser.add_argument("--out", type=Path, help="ledger to fill, default results/matmul.json")
    return parser.parse_args()


def measure_all(ledger: Ledger, args: argparse.Namespace) -> int:
    """Fill the ledger; the number of wrong products. Raises `ValueError` for arguments that don't fit."""
    import torch

    from dqbart.evaluation.environment import environment

    shapes = [s for s in SHAPES if any(part in s for part in args.shapes) and (not args.quick or "bart-base" in s)]
    rows = tuple(args.rows or (QUICK_ROWS if args.quick else ROWS))
    names = [kernel.name for kernel in KERNELS]
    machine = environment()
    cores = machine["cores"] or 1
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    threads = args.threads or ([cores] if args.quick else sorted({1, cores}))
    args.rounds = args.rounds or (3 if args.quick else 7)
    if not shapes:
        raise ValueError(f"shapes {args.shapes!r}: expected a part of one of {', '.join(SHAPES)}")
    if min(*rows, *threads, args.rounds, 1) < 1:
        raise ValueError(f"rows {rows!r}, threads {threads!r}, rounds {args.rounds!r}: expected numbers of at least 1")
    if unknown := set(args.kernels) - set(names):
        raise ValueError(f"kernel {min(unknown)!r}: expected one of {', '.join(map(repr, names))}")
    if device.type == "cuda" and machine["gpu"] is None:
        raise ValueError("device 'cuda': torch sees no GPU here; expected cpu, or a driver and torch built for CUDA")
    name = device_name(device.type)
    wrong = 0
    for count in [1] if device.type == "cuda" else threads:
        torch.set_num_threads(count)
        torch.manual_seed(0)
        bench = Bench(ledger, args, device, name, count)
        if any(bench.due(shape, rows) for shape in shapes):
            bench.measure_machine()
        for shape in shapes:
            bench.run(shape, rows)
        wrong += bench.wrong
    return wrong


@resumable
def main() -> int:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        ledger = Ledger(args.out or (Path(scratch) if args.quick else RESULTS) / "matmul.json", KEYS)
        wrong = measure_all(ledger, args)
    print(table(ledger.rows))
    print(json.dumps({"rows": len(ledger.rows), "wrong": wrong}))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
