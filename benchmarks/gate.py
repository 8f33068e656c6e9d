"""Is a persistent megakernel worth building? What a phase costs as a barrier in one kernel, and as a node of a graph.

    python benchmarks/gate.py [--phases 40] [--again]

Problem: a decode step is about 40 phases that wait for each other, so what a phase costs by itself decides, and no
figures of others are for this GPU. Method: the same work, phase by phase, once in one kernel of a program per processor
with a barrier between phases, once as a captured graph of as many kernels, without and with programmatic dependent
launch. Empty phases time the waiting; phases with a reload read all that the last one wrote (4 rows of 768 numbers) and
write their part of the next, and end in a number that a program that read too early would have made smaller.

    verdict   build the megakernel only if barrier + reload takes less than 1.2 us a phase

The barrier: arrivals are counted up for good, so a replay needs no clean counter; the arrival says which round it is. A
launch is cooperative: one that is not resident as a whole fails instead of hanging. Exit code 1 if a chain ended in a
wrong number. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from ledger import RESULTS, Ledger, markdown, resumable
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

KEYS = ("device", "what", "reload", "phases")
LIMIT_US = 1.2
NUMBERS = 4 * 768  # that a phase hands to the next: four beams of bart-base
ROUNDS, REPLAYS = 9, 50
WAYS = GRAPH, GRAPH_PDL, BARRIER = "graph node", "graph node, dependent launch", "barrier"


@triton.jit
def _phase(from_ptr, to_ptr, NUMBERS: tl.constexpr, PART: tl.constexpr, BN: tl.constexpr):
    """One phase of a program: the smallest of all numbers, plus one, into its own part."""
    i = tl.arange(0, BN)
    # .cg: what other programs wrote is in L2, never in this processor's L1
    least = tl.min(tl.load(from_ptr + i, mask=i < NUMBERS, other=2147483647, cache_modifier=".cg"), 0)
    part = tl.program_id(0) * PART + tl.arange(0, PART)
    tl.store(to_ptr + part, tl.zeros((PART,), tl.int32) + least + 1, mask=part < NUMBERS)


@triton.jit
def _barriers(
    arrived_ptr,  # int32 [1]: arrivals so far, of all launches
    numbers_ptr,  # int32 [2, NUMBERS]: phase i reads half i % 2 and writes the other
    PHASES: tl.constexpr, PROGRAMS: tl.constexpr, NUMBERS: tl.constexpr, PART: tl.constexpr, BN: tl.constexpr,
    RELOAD: tl.constexpr,
):  # fmt: skip
    for i in range(0, PHASES):
        if RELOAD:
            _phase(numbers_ptr + i % 2 * NUMBERS, numbers_ptr + (1 - i % 2) * NUMBERS, NUMBERS, PART, BN)
        tl.debug_barrier()  # all of this program's writes before its arrival
        before = tl.atomic_add(arrived_ptr, 1, sem="release")
        target = (before // PROGRAMS + 1) * PROGRAMS
        while tl.atomic_add(arrived_ptr, 0, sem="acquire") < target:
            pass
        tl.debug_barrier()


@triton.jit
def _node(
    from_ptr, to_ptr,  # int32 [NUMBERS]
    NUMBERS: tl.constexpr, PART: tl.constexpr, BN: tl.constexpr, RELOAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if RELOAD:
        _phase(from_ptr, to_ptr, NUMBERS, PART, BN)


def sizes(programs: int) -> dict[str, int]:
    part = triton.next_power_of_2(triton.cdiv(NUMBERS, programs))
    return dict(NUMBERS=NUMBERS, PART=part, BN=triton.next_power_of_2(NUMBERS))


class Chain:
    """`phases` phases of `programs` programs on a device, in one of the three ways."""

    def __init__(self, what: str, reload: bool, phases: int, programs: int, device: torch.device) -> None:
        self.what, self.reload, self.phases, self.programs = what, reload, phases, programs
        self.numbers = torch.zeros((2, NUMBERS), dtype=torch.int32, device=device)
        self.arrived = torch.zeros(1, dtype=torch.int32, device=device)

    def launch(self) -> None:
        if self.what == BARRIER:
            cooperative = dict(launch_cooperative_grid=True) if self.arrived.is_cuda else {}
            _barriers[(self.programs,)](
                self.arrived, self.numbers, PHASES=self.phases, PROGRAMS=self.programs, RELOAD=self.reload,
                num_warps=4, **sizes(self.programs), **cooperative,
            )  # fmt: skip
            return
        pdl = self.what == GRAPH_PDL
        for i in range(self.phases):
            _node[(self.programs,)](
                self.numbers[i % 2], self.numbers[1 - i % 2], RELOAD=self.reload, PDL=pdl, num_warps=4,
                **sizes(self.programs), **(dict(launch_pdl=True) if pdl else {}),
            )  # fmt: skip

    def is_right(self, launches: int) -> bool:
        """After so many launches on zeros: every phase saw all that the last one wrote. Phases are even in number."""
        wanted = launches * self.phases if self.reload else 0
        return bool((self.numbers[0] == wanted).all())


def replay(launch: Callable[[], None]) -> Callable[[], None]:
    """`launch`, captured in a graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        launch()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph.replay


def microseconds(run: Callable[[], None], replays: int) -> float:
    """Of one run, averaged over replays one behind the other."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(replays):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / replays


def measure(ledger: Ledger, phases: int, programs: int, device: torch.device, name: str) -> int:
    """All ways side by side, in turns, into the ledger; how many chains were wrong."""
    chains = [Chain(what, reload, phases, programs, device)
              for what in WAYS for reload in (False, True)]  # fmt: skip
    runs, failed = {}, {}
    for i, chain in enumerate(chains):
        try:
            runs[i] = replay(chain.launch)
        except Exception as error:  # a way that this GPU or Triton hasn't is one row of the table
            failed[i] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    times: dict[int, list[float]] = {i: [] for i in runs}
    for _ in range(ROUNDS):
        for i, run in runs.items():
            times[i].append(microseconds(run, REPLAYS) / phases)
    wrong = 0
    for i, chain in enumerate(chains):
        row = dict(zip(KEYS, (name, chain.what, chain.reload, phases), strict=True)) | dict(programs=programs)
        found = times.get(i, [])
        if i in failed:
            row |= dict(error=failed[i])
        elif chain.is_right(1 + ROUNDS * REPLAYS):  # capturing launches nothing
            row |= dict(us=statistics.median(found), fastest=min(found), slowest=max(found), rounds=ROUNDS)
        else:
            wrong += 1
            row |= dict(wrong=True)
        ledger.add(row)
    return wrong


def verdict(rows: list[dict[str, Any]]) -> str:
    """By the rule, of one device's rows."""
    found = {(row["what"], row["reload"]): row.get("us") for row in rows}
    barrier, node = found.get((BARRIER, True)), found.get((GRAPH_PDL, True))
    if barrier is None:
        return "no verdict: the barrier was not measured, or let a program read too early"
    against = "" if node is None else f"; as a node with dependent launch it takes {node:.2f} us"
    said = f"barrier + reload takes {barrier:.2f} us a phase, the limit is {LIMIT_US}{against}"
    return f"{'build' if barrier < LIMIT_US else 'do not build'} the megakernel: {said}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown and verdict for each device."""
    parts = []
    for device, phases in dict.fromkeys((row["device"], row["phases"]) for row in rows):
        here = [row for row in rows if (row["device"], row["phases"]) == (device, phases)]
        lines = []
        for what in dict.fromkeys(row["what"] for row in here):
            cells = {row["reload"]: row.get("error") or ("WRONG" if "wrong" in row else f"{row['us']:.2f}")
                     for row in here if row["what"] == what}  # fmt: skip
            lines.append([what, cells.get(False), cells.get(True)])
        title = f"{device}: {phases} phases of {here[0]['programs']} programs, us a phase"
        parts.append(f"{title}\n\n{markdown(['phase', 'empty', 'reload'], lines)}\n\nVerdict: {verdict(here)}.\n")
    return "\n".join(parts)


@resumable
def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--phases", type=int, default=40, help="an even number, default 40")
    parser.add_argument("--again", action="store_true", help="measure what the file has, too")
    parser.add_argument("--out", type=Path, default=RESULTS / "gate.json", help="ledger to fill")
    args = parser.parse_args(words)
    if args.phases < 2 or args.phases % 2:
        print(f"phases {args.phases}: expected an even number from 2 on", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("gate.py measures on a GPU, and torch sees none here", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.cuda is None or properties.major < 9:
        print(
            f"gate.py needs an NVIDIA GPU with dependent launch (Hopper or later), not {properties.name}",
            file=sys.stderr,
        )
        return 2
    ledger = Ledger(args.out, KEYS)
    wrong = 0
    known = [row for row in ledger.rows if (row["device"], row["phases"]) == (properties.name, args.phases)]
    if args.again or not known:
        wrong = measure(ledger, args.phases, properties.multi_processor_count, device, properties.name)
    print(table(ledger.rows))
    here = [row for row in ledger.rows if (row["device"], row["phases"]) == (properties.name, args.phases)]
    print(json.dumps({"rows": len(ledger.rows), "wrong": wrong, "verdict": verdict(here)}))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
