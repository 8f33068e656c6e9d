"""Which cut of a product is fastest on this GPU? Measures candidates and writes the table that the engine reads.

    python benchmarks/tune.py [--shapes bart-base ...] [--rows 4 16 ...] [--bits 2 8 ...] [--seconds 540] [--again]

Problem: what is best depends on the GPU, the size and the bits, and a rule is right only on average. Method: for each
case every candidate is held to the exact product first, then timed in a CUDA graph whose launches meet another copy of
the weight each, twice the L2 cache in all (but at most 1024 copies, so of the smallest matrices less); the best few are
timed again, in turns with the rule's own choice. Cases are in order of use (4 rows: one text, beam 4), each is written
when it is done, and a rerun goes on with the next. Kernels are compiled in --workers processes ahead of their case.
Rejected: tuning by estimate, and tuning when a request comes.

The table is kernels/dqbart_kernels/gpu/configs/<GPU>.json (tuned.py says what is in it), and holds the measured times
beside the launches. Exit code 1 if a candidate is wrong. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ledger import describe_run
from matmul import timer
from products import SHAPES

if TYPE_CHECKING:
    import torch
    from dqbart_kernels.gpu.products import Tiles, Weight
    from torch import Tensor

KERNEL = "int8_matmul"
ROWS = (4, 16, 1, 64, 256, 1024, 4096)  # of tuned.BUCKETS, the most used first
SHARED = 227 * 1024  # bytes that a program may have on sm_90
BEST, ROUNDS = 4, 7  # how many are timed again, how often
CHECKS = 50  # more of the fastest
MOST_COPIES = (
    1024  # of the smallest matrices half of the cache: a graph of more launches takes longer to make than to time
)


@dataclass(frozen=True)
class Case:
    n: int
    k: int
    bits: int
    m: int

    @property
    def w(self) -> int:
        """Bytes of a packed row."""
        return -(-self.k * self.bits // 256) * 32

    @property
    def key(self) -> str:
        from dqbart_kernels.gpu import tuned

        return tuned.key(self.n, self.k, self.bits, self.m)


def sizes(parts: list[str]) -> list[tuple[int, int]]:
    """[n, k] of the matrices whose name holds one of `parts`; q, k and v are also multiplied as one, and k and v."""
    found: dict[tuple[int, int], None] = {}
    for name, shape in SHAPES.items():
        if any(part in name for part in parts):
            joined = (1, 3, 2) if name.endswith("q/k/v/out") else (1,)
            found |= dict.fromkeys((times * shape.n, shape.k) for times in joined)
    return list(found)


def cases(parts: list[str], rows: list[int], bits: list[int]) -> list[Case]:
    """In the order in which they are worth having."""
    return [Case(n, k, b, m) for m, b, (n, k) in product(rows, bits, sizes(parts))]


def candidates(case: Case, processors: int) -> list[Tiles]:
    """Cuts to try, the rule's first: those that fill the chip, not many times over, and fit into shared memory."""
    from dqbart_kernels.gpu.products import Tiles, choose_tiles

    m, n, w = case.m, case.n, case.w
    high = max(16, 1 << (m - 1).bit_length())  # of a tile that holds all rows
    if m <= 16:
        grid = product((16,), (16, 32, 64), (64, 128, 256), (1, 2, 4, 8), (False,), (2, 4), (4,))
        more = [*product((16,), (64,), (64, 128), (1, 2, 4), (True,), (4,), (4,))]
    elif m <= 128:
        grid = product((high // 2, high), (32, 64), (64, 128), (1, 2), (False,), (4,), (4,))
        more = [*product((high // 2, high), (64, 128), (32, 64, 128), (1, 2, 4), (True,), (4,), (3,))]
    else:
        grid = product((64, 128, 256), (64, 128, 256), (32, 64, 128), (1,), (True,), (4, 8), (3, 4))
        halved = product((64,), (64, 128), (32, 64, 128), (2, 4), (True,), (4,), (4,))  # K, where programs are few
        more = [*product((128,), (128,), (32, 64, 128), (1,), (False,), (8,), (3, 4)), *halved]
    found = {choose_tiles(m, n, w, case.bits, processors): None}
    for bm, bn, bw, splits, swap, warps, stages in (*grid, *more):
        programs, steps = math.ceil(m / bm) * math.ceil(n / bn), math.ceil(w / bw)
        tiles = Tiles(bm, bn, bw, splits, swap, warps, stages)
        fits = stages * tiles.stage_bytes(case.bits) <= SHARED and (
            m <= 128 or 64 * 64 <= bm * bn // (warps // 4) <= 128 * 128
        )
        fills = splits == 1 or (programs * splits <= 4 * processors and splits <= steps)
        if fits and fills and bw < 2 * w and bm <= 2 * high and bn < 2 * n:
            found[tiles] = None
    return list(found)


@dataclass
class Operands:
    """Of one case: as many copies of the weight as overflow the cache."""

    a_MK: Tensor
    scale_M: Tensor
    weights: list[Weight]
    wanted_MN: Tensor

    @classmethod
    def of(cls, case: Case, device: torch.device) -> Operands:
        import torch
        from dqbart_kernels.gpu.products import Weight, int8_matmul_reference

        cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1
        copies = min(MOST_COPIES, math.ceil(2 * cache / (case.n * case.w)))
        packed = torch.randint(0, 256, (copies, case.n, case.w), dtype=torch.uint8, device=device)
        scale_N, scale_M = (torch.rand(length, device=device) * 0.02 + 0.001 for length in (case.n, case.m))
        weights = [Weight(one, scale_N, case.bits, case.k) for one in packed]
        a_MK = torch.randint(-127, 128, (case.m, case.k), dtype=torch.int8, device=device)
        return cls(a_MK, scale_M, weights, int8_matmul_reference(a_MK, scale_M, weights[0]))

    def products(self, tiles: Tiles) -> list[Callable[[Tensor], Tensor]]:
        from dqbart_kernels.gpu.products import int8_matmul

        return [lambda a, w=w: int8_matmul(a, self.scale_M, w, tiles=tiles) for w in self.weights]  # type: ignore[misc]

    def is_right(self, tiles: Tiles) -> bool:
        import torch
        from dqbart_kernels.gpu.products import int8_matmul

        # the last rows of a bucket may be missing
        few = self.a_MK[: max(1, len(self.a_MK) - 3)], self.scale_M[: max(1, len(self.a_MK) - 3)]
        return torch.equal(int8_matmul(self.a_MK, self.scale_M, self.weights[0], tiles=tiles), self.wanted_MN) and (
            torch.equal(int8_matmul(*few, self.weights[0], tiles=tiles), self.wanted_MN[: len(few[0])])
        )

    def timer(self, tiles: Tiles) -> Callable[[], float]:
        return timer(self.products(tiles), self.a_MK, 1e-3)


def tune(
    case: Case, tried: list[Tiles], operands: Operands, known_wrong: Sequence[Tiles] = ()
) -> tuple[Tiles, dict[str, Any], list[Tiles]]:
    """The fastest, what was measured, and candidates that were wrong. The first of `tried` is the rule's."""
    timers: dict[Tiles, Callable[[], float]] = {}
    first: dict[Tiles, float] = {}
    wrong, failed = [*known_wrong], 0
    for tiles in tried:
        try:
            if not operands.is_right(tiles):
                wrong.append(tiles)
                continue
            measure = operands.timer(tiles)
            first[tiles] = min(measure(), measure())
            timers[tiles] = measure
        except Exception as error:  # a cut that this GPU has no room for
            failed += 1
            print(f"{case.key}: {tiles}: {type(error).__name__}: {str(error).splitlines()[0][:100]}", file=sys.stderr)
        for slow in sorted(timers, key=lambda t: first[t])[BEST:]:  # graphs hold memory
            if slow != tried[0]:
                del timers[slow]
    if not timers:
        raise ValueError(f"{case.key}: none of {len(tried)} candidates runs and is right")
    times: dict[Tiles, list[float]] = {tiles: [] for tiles in timers}
    for _ in range(ROUNDS):
        for tiles, measure in timers.items():
            times[tiles].append(measure())
    middle = {tiles: statistics.median(found) for tiles, found in times.items()}
    best = min(middle, key=lambda tiles: middle[tiles])
    if not all(operands.is_right(best) for _ in range(CHECKS)):  # what threads leave to chance shows now and then
        return tune(case, [tiles for tiles in tried if tiles != best], operands, [*wrong, best])
    rule = middle.get(tried[0])
    facts = dict(
        us=round(middle[best] * 1e6, 3), rule_us=round(rule * 1e6, 3) if rule else None, tried=len(tried),
        failed=failed, copies=len(operands.weights),
    )  # fmt: skip
    return best, facts, wrong


class Table:
    """The file, complete after every case. Raises `ValueError` where it is damaged."""

    def __init__(self, path: Path, gpu: str) -> None:
        from dqbart_kernels.gpu import tuned
        from dqbart_kernels.gpu.products import Tiles

        self.path, self.entries = path, {k: asdict(v) for k, v in tuned.read(path, KERNEL, Tiles).items()}
        old = json.loads(path.read_text()) if path.exists() else {}
        self.measured: dict[str, Any] = old.get("measured", {})
        run = describe_run()
        self.head = dict(
            format=tuned.FORMAT, gpu=gpu, run={k: run[k] for k in ("command", "commit", "date", "packages")}
        )

    def add(self, case: Case, tiles: Tiles, facts: dict[str, Any]) -> None:
        from dqbart_kernels.gpu import tuned

        self.entries[case.key], self.measured[case.key] = asdict(tiles), facts

        def lines(items: dict[str, Any]) -> str:
            return ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in items.items())

        head = "".join(f' "{key}": {json.dumps(value)},\n' for key, value in self.head.items())
        text = (
            f'{{\n{head} "kernels": {{"{KERNEL}": {{\n{lines(self.entries)}\n }}}},\n'
            f' "measured": {{\n{lines(self.measured)}\n }}\n}}\n'
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.path)
        tuned.read.cache_clear()


def _compile(job: tuple[Case, Tiles]) -> None:
    """In a process of its own: leaves the kernel in Triton's cache on disk. What fails, fails again where it shows."""
    case, tiles = job
    import torch
    from dqbart_kernels.gpu.products import Weight, int8_matmul

    device = torch.device("cuda")
    n = 256 if case.n % 16 == 0 else 250  # Triton compiles anew for what 16 divides
    weight = Weight(torch.zeros((n, case.w), dtype=torch.uint8, device=device), torch.ones(n, device=device), case.bits,
                    case.k)  # fmt: skip
    for m in {case.m, max(1, case.m - 3)}:
        a = torch.zeros((m, case.k), dtype=torch.int8, device=device)
        try:
            int8_matmul(a, torch.ones(m, device=device), weight, tiles=tiles)
        except Exception:
            return


def in_groups(due: list[Case]) -> Iterator[list[Case]]:
    """Neighbours that share their kernels: of one number of rows and bits."""
    while due:
        group = [case for case in due if (case.m, case.bits) == (due[0].m, due[0].bits)]
        yield group
        due = [case for case in due if case not in group]


def run(args: argparse.Namespace, device: torch.device, gpu: str, processors: int) -> tuple[int, int, int]:
    """Tune what the table lacks: how many cases were done, are left, and how many candidates were wrong."""
    from dqbart_kernels.gpu import tuned

    table = Table(args.out or tuned.path_of(gpu), gpu)
    due = [c for c in cases(args.shapes, args.rows, args.bits) if args.again or c.key not in table.entries]
    start, done, mistakes = time.monotonic(), 0, 0
    for group in in_groups(due):
        tried = {case: candidates(case, processors) for case in group}
        if args.workers and time.monotonic() - start < args.seconds:
            jobs = {(case.n % 16 == 0, tiles): (case, tiles) for case in group for tiles in tried[case]}
            with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
                pool.map(_compile, jobs.values(), chunksize=1)
        for case in group:
            if time.monotonic() - start > args.seconds:
                return done, len(due) - done, mistakes
            best, facts, wrong = tune(case, tried[case], Operands.of(case, device))
            for tiles in wrong:
                print(f"{case.key}: {tiles} is WRONG", file=sys.stderr)
            mistakes += len(wrong)
            table.add(case, best, facts)
            done += 1
            print(f"{time.monotonic() - start:5.0f} s  {case.key}: {facts['us']} us, by the rule {facts['rule_us']} "
                  f"({facts['tried']} tried, {facts['failed']} failed): {best}", file=sys.stderr)  # fmt: skip
    return done, len(due) - done, mistakes


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=[""], metavar="TEXT", help="only matrices with this in the name")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), choices=ROWS, metavar="M",
                        help=f"of {' '.join(map(str, ROWS))}")  # fmt: skip
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 8, 4, 1], choices=(8, 4, 2, 1), metavar="BITS")
    parser.add_argument("--seconds", type=float, default=540, help="start no case after so long, default 540")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1), help="that compile, 0: none")
    parser.add_argument("--again", action="store_true", help="measure what the table has, too")
    parser.add_argument("--out", type=Path, help="table to fill, default the engine's own")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    args = parse_arguments(words)
    import torch

    if not torch.cuda.is_available():
        print("tune.py measures on a GPU, and torch sees none here", file=sys.stderr)
        return 2
    if not sizes(args.shapes):
        print(f"shapes {args.shapes!r}: expected a part of one of {', '.join(SHAPES)}", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    torch.manual_seed(0)
    try:
        done, left, wrong = run(args, device, properties.name, properties.multi_processor_count)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps({"gpu": properties.name, "cases": done, "left": left, "wrong": wrong}))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
