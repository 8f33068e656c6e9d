"""What does one decode step take on the GPU, where does it go, and how many tokens a second does that give?

    python benchmarks/step.py [--shapes bart-base ...] [--bits 8-8-8 2-2-8] [--batches 1 8 64] [--what step generate]
    python benchmarks/step.py --count [...]          # launches, bytes and floors: needs no GPU

Problem: the time of a whole `generate` says nothing about which of 90 launches to mend. Method: `step`: the captured
step replayed over a whole generation, by events, per step; beside it the bytes and operations that can't be avoided, at
this GPU's own measured limits (step_counts.py). `prefill`: the same of the encoder with cross-attention's keys and
values. Every phase of both, a kernel and its weight over all layers, is then launched alone, with the operands of the
real step, in a graph of its own; so alone it finds its weights in cache more often, and the sum may be below the whole.
`generate`: tokens per second through `generate`, in turns with transformers in bf16, eager and compiled with a static
cache, on the same random weights (latency_models.py); ratios are taken within each round.

Rerunning a command measures what is missing. Exit code 2 without a GPU, but for --count. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from latency_models import SHAPES, Models, inputs
from latency_tables import number
from ledger import RESULTS, Ledger, markdown, resumable
from peers import CACHE, ENVS, System

KEYS = ("device", "shape", "layers", "bits", "batch", "beams", "source", "tokens", "what", "phase")
WHOLE, FLOAT = "all", "16-16-16"
EAGER, COMPILED, OURS = "transformers bf16", "transformers bf16 compiled", "dqbart triton"
WHAT = ("step", "prefill", "generate")
Row = dict[str, Any]


def microseconds(run: Callable[[], Any], times: int, device: Any) -> float:
    """Of one run, averaged over runs one behind the other."""
    from peer_runner import clocked

    def many() -> None:
        for _ in range(times):
            run()

    return float(clocked(many, device.type)[0]) * 1e3 / times


class Bench:
    """One GPU: its limits, its ledger, and the sizes of a call."""

    def __init__(self, ledger: Ledger, args: argparse.Namespace, device: Any, name: str) -> None:
        self.ledger, self.args, self.device, self.name = ledger, args, device, name
        self.models = Models(args.models, ENVS)
        self._limits: tuple[float, float] | None = None

    @property
    def limits(self) -> tuple[float, float]:
        """Bytes and int8 operations a second, measured when first asked."""
        if self._limits is None:
            from matmul import bandwidth, peak
            from products import KERNELS

            of_torch = next(kernel for kernel in KERNELS if kernel.name == "torch _int_mm")
            self._limits = max(bandwidth(self.device).values()), peak(of_torch, self.device)
        return self._limits

    def key(self, case: tuple[Any, ...], bits: str, what: str, phase: str) -> Row:
        shape, layers, batch, source = case
        values = self.name, shape, layers, bits, batch, self.args.beams, source, self.args.tokens, what, phase
        return dict(zip(KEYS, values, strict=True))

    def is_due(self, case: tuple[Any, ...], bits: str, what: str, phase: str) -> bool:
        return self.args.again or self.ledger.find(**self.key(case, bits, what, phase)) is None

    def packed(self, shape: str, layers: str, bits: str) -> Any:
        import dqbart

        folder = self.models.of(System("dqbart-triton", bits, "dqbart", "triton"), shape, layers)
        return dqbart.load(folder, engine="triton", device=self.device)

    def steps(self, case: tuple[Any, ...], bits: str) -> None:
        """The captured step and prefill of one size, and their phases."""
        from dqbart_kernels.gpu.graphs import Recorded
        from step_counts import Session, Work, recorded, work_of_prefill, work_of_step

        wanted = [w for w in ("step", "prefill") if w in self.args.what and self.is_due(case, bits, w, WHOLE)]
        if not wanted:
            return
        shape, layers, batch, source = case
        args, model = self.args, self.packed(shape, layers, bits).runner.model
        bandwidth, rate = self.limits
        with model._alone():
            session = Session.of(model, batch, args.beams, source, args.tokens)
            for what in wanted:
                run = session.step if what == "step" else session.prefill
                session.restart()
                graph = Recorded(run, model.device, model._pool)
                times = []
                for _ in range(args.rounds):
                    session.restart()
                    times.append(microseconds(graph, args.tokens, model.device))
                session.restart()
                session.loop.state.step.fill_(args.tokens // 2)
                with recorded(model, execute=True) as found:
                    run()
                work: Work = work_of_prefill(model, batch, source)
                if what == "step":
                    work = work_of_step(model, batch, args.beams, source, (args.tokens - 1) / 2)
                middle, floor = statistics.median(times), work.floor_us(bandwidth, rate)
                self.ledger.add(self.key(case, bits, what, WHOLE) | dict(
                    us=middle, fastest=min(times), slowest=max(times), rounds=args.rounds, nodes=found.nodes,
                    torch_operators=found.others, bytes=work.bytes, operations=work.operations, floor_us=floor,
                    share=floor / middle, bandwidth=bandwidth, rate=rate,
                ))  # fmt: skip
                print(f"{' '.join(map(str, case))} {bits} {what}: {middle:.0f} us, {found.nodes} nodes, "
                      f"{floor / middle:.0%} of the floor", file=sys.stderr)  # fmt: skip
                for phase, launches in found.phases().items():
                    us = self.phase(session, launches)
                    self.ledger.add(self.key(case, bits, what, phase) | dict(us=us, launches=len(launches)))

    def phase(self, session: Any, launches: list[Any]) -> float:
        """Microseconds of a phase's launches, in a graph of their own, the clock moved back where they move it on."""
        from dqbart_kernels.gpu.graphs import Recorded

        model, step = session.model, session.loop.state.step
        at = self.args.tokens // 2
        moves = launches[0].kernel.fn.__name__.startswith("_advance")
        repeats = max(1, 64 // len(launches)) if model.device.type == "cuda" else 1

        def run(them: list[Any]) -> Callable[[], None]:
            def all_of_them() -> None:
                for _ in range(repeats):
                    for launch in them:
                        launch()
                    if moves:
                        step.fill_(at)

            return all_of_them

        def seconds(them: list[Any]) -> float:
            graph = Recorded(run(them), model.device, model._pool)
            times = 16 if model.device.type == "cuda" else 1  # the launch of a graph should not count
            return min(microseconds(graph, times, model.device) for _ in range(self.args.rounds)) / repeats

        step.fill_(at)
        return seconds(launches) - (seconds([]) if moves else 0)

    def generations(self, case: tuple[Any, ...], bits: list[str]) -> None:
        """All systems in turns, through `generate`."""
        systems = {(name, FLOAT): name for name in (EAGER, COMPILED)} | {(f"{OURS} {b}", b): b for b in bits}
        systems = {key: of for key, of in systems.items() if not self.args.systems or any(
            word in key[0] for word in self.args.systems)}  # fmt: skip
        if not any(self.is_due(case, b, "generate", name) for name, b in systems):
            return
        shape, layers, batch, source = case
        rows, tokens = inputs(shape, source, batch), self.args.tokens
        calls: dict[tuple[str, str], Callable[[], Any]] = {}
        for key, of in systems.items():
            try:
                calls[key] = self.generator(shape, layers, of, rows)
                calls[key]()
            except Exception as error:  # whatever a library raises is its result
                calls.pop(key, None)
                words = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
                self.ledger.add(self.key(case, key[1], "generate", key[0]) | dict(error=words))
        times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
        for turn in range(self.args.rounds):
            first = turn % max(1, len(calls))
            for key in [*calls][first:] + [*calls][:first]:
                times[key].append(microseconds(calls[key], 1, self.device))
        eager = times.get((EAGER, FLOAT))
        for key, found in times.items():
            ratio = statistics.median(b / a for a, b in zip(found, eager, strict=True)) if eager else None
            middle = statistics.median(found)
            self.ledger.add(self.key(case, key[1], "generate", key[0]) | dict(
                us=middle, fastest=min(found), slowest=max(found), rounds=len(found),
                tokens_per_s=batch * tokens / middle * 1e6, ratio=ratio,
            ))  # fmt: skip
            print(f"{' '.join(map(str, case))} {key[0]}: {batch * tokens / middle * 1e6:.0f} tokens/s", file=sys.stderr)

    def generator(self, shape: str, layers: str, of: str, rows: list[list[int]]) -> Callable[[], Any]:
        """A call that writes exactly --tokens tokens for each row. `of`: EAGER, COMPILED, or bits of ours."""
        import torch
        from peer_runner import TorchRunner, compiled, model_class

        options: dict[str, Any] = {}
        if of in (EAGER, COMPILED):
            folder = self.models.float(shape, layers)
            model = model_class(folder).from_pretrained(folder, dtype=torch.bfloat16).to(self.device).eval()
            options = compiled(model) if of == COMPILED else {}
        else:
            model = self.packed(shape, layers, of)
        call = TorchRunner(model, self.device, **options).prepare(rows, "beam", self.args.beams, self.args.tokens)

        def checked() -> Any:
            ids = call()
            assert ids.shape == (len(rows), self.args.tokens + 1), f"{list(ids.shape)}: not {self.args.tokens} tokens"
            return ids

        return checked


def cases(args: argparse.Namespace) -> Iterator[tuple[str, str, int, int]]:
    """Shape, layers, batch, source length."""
    for name in args.shapes:
        layers = args.layers or SHAPES[name].layers[:1]
        yield from product([name], layers, args.batches, args.sources or SHAPES[name].sources[:1])


def count(args: argparse.Namespace) -> list[Row]:
    """What is known without running anything."""
    from step_counts import Session, recorded, shapes_only, work_of_prefill, work_of_step

    rows = []
    for (name, layers, batch, source), bits in product(cases(args), args.bits):
        model = shapes_only(SHAPES[name], layers, bits)
        session = Session.of(model, batch, args.beams, source, args.tokens)
        for what in (what for what in ("step", "prefill") if what in args.what):
            with recorded(model, execute=False) as found:
                (session.step if what == "step" else session.prefill)()
            work = work_of_prefill(model, batch, source)
            if what == "step":
                work = work_of_step(model, batch, args.beams, source, (args.tokens - 1) / 2)
            phases = {phase: len(launches) for phase, launches in found.phases().items()}
            rows.append(dict(
                shape=name, layers=layers, bits=bits, batch=batch, beams=args.beams, source=source, tokens=args.tokens,
                what=what, nodes=found.nodes, phases=phases, bytes=work.bytes, operations=work.operations,
                floor_us=round(work.floor_us(), 2),
            ))  # fmt: skip
    return rows


def counted_table(rows: list[Row]) -> str:
    names = ("shape", "layers", "bits", "batch", "beams", "source", "tokens", "what", "nodes")
    lines = [[*(row[n] for n in names), f"{row['bytes'] / 1e6:.1f}", f"{row['operations'] / 1e9:.1f}",
              number(row["floor_us"])] for row in rows]  # fmt: skip
    return markdown([*names, "MB", "Gop", "floor of an H200, us"], lines)


def table(rows: list[Row]) -> str:
    """Markdown: steps and prefills with their floors and phases, then tokens per second."""
    parts = []
    for device in dict.fromkeys(row["device"] for row in rows):
        here = [row for row in rows if row["device"] == device]
        size = ("shape", "layers", "bits", "batch", "beams", "source", "tokens")
        whole = [row for row in here if row["phase"] == WHOLE]
        lines = [[*(row[n] for n in size), row["what"], number(row["us"]), row["nodes"], number(row["floor_us"]),
                  f"{row['share']:.0%}"] for row in whole]  # fmt: skip
        parts.append(f"{device}:\n")
        if lines:
            parts.append(markdown([*size, "what", "us", "nodes", "floor, us", "share"], lines) + "\n")
        for row in whole:
            same = [r for r in here if r["phase"] != WHOLE and all(r[n] == row[n] for n in (*size, "what"))]
            model = " ".join(row[n] for n in size[:3])
            title = f"{row['what']} of {model}, batch {row['batch']}, source {row['source']}"
            total = sum(r["us"] for r in same)
            lines = [[r["phase"], r["launches"], number(r["us"]), f"{r['us'] / row['us']:.0%}"]
                     for r in sorted(same, key=lambda r: -r["us"])]  # fmt: skip
            lines.append(["sum of phases", sum(r["launches"] for r in same), number(total), f"{total / row['us']:.0%}"])
            body = markdown(["phase, alone", "launches", "us", "of the whole"], lines)
            parts.append(f"<details><summary>{title}</summary>\n\n{body}\n\n</details>\n")
        written = [row for row in here if row["what"] == "generate"]
        call = ("shape", "layers", "batch", "beams", "source", "tokens")
        lines = [[*(row[n] for n in call), row["phase"], *_speed(row)] for row in written]
        if lines:
            parts.append(markdown([*call, "system", "tokens/s", "times eager bf16"], lines) + "\n")
    return "\n".join(parts).rstrip()


def _speed(row: Row) -> list[Any]:
    if "error" in row:
        return [row["error"], None]
    return [number(row["tokens_per_s"]), None if row["ratio"] is None else f"{row['ratio']:.2f}"]


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [name for name, shape in SHAPES.items() if shape.seq2seq]
    parser.add_argument("--shapes", nargs="+", choices=names, default=["bart-base", "bart-large", "mbart-large"],
                        metavar="SHAPE", help=", ".join(names))  # fmt: skip
    parser.add_argument("--layers", nargs="+", metavar="E-D", help="default: the full depth")
    parser.add_argument("--bits", nargs="+", default=["8-8-8", "2-2-8"], metavar="W-E-A")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64], metavar="N")
    parser.add_argument("--beams", type=int, default=4, metavar="N", help="default 4; from 2 on")
    parser.add_argument("--sources", nargs="+", type=int, metavar="N", help="source lengths, default 128")
    parser.add_argument("--tokens", type=int, default=64, help="written per text, default 64")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT), metavar="WHAT", help=", ".join(WHAT))
    parser.add_argument("--systems", nargs="+", metavar="TEXT", help="of generate, only these: part of a name")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--count", action="store_true", help="launches, bytes and floors, without measuring")
    parser.add_argument("--again", action="store_true", help="measure what the file has, too")
    parser.add_argument("--models", type=Path, default=CACHE / "latency-models", help="folder for the models")
    parser.add_argument("--out", type=Path, default=RESULTS / "step.json", help="ledger to fill")
    return parser.parse_args(words)


def measure(args: argparse.Namespace, ledger: Ledger, device: Any, name: str) -> None:
    """Fill the ledger with what it lacks."""
    bench = Bench(ledger, args, device, name)
    for case in cases(args):
        for bits in args.bits:
            bench.steps(case, bits)
            gc.collect()  # graphs and models go in cycles, and with them their memory
        if "generate" in args.what:
            bench.generations(case, args.bits)
            gc.collect()


@resumable
def main(words: list[str] | None = None) -> int:
    args = parse_arguments(words)
    if min(args.beams - 1, args.tokens, args.rounds, *args.batches, *(args.sources or [1])) < 1:
        print("beams from 2 on; tokens, rounds, batches and sources from 1 on", file=sys.stderr)
        return 2
    if args.count:
        rows = count(args)
        print(counted_table(rows))
        print(json.dumps({"rows": rows}))
        return 0
    import torch

    if not torch.cuda.is_available():
        print("step.py measures on a GPU, and torch sees none here; --count needs none", file=sys.stderr)
        return 2
    ledger = Ledger(args.out, KEYS)
    measure(args, ledger, torch.device("cuda"), torch.cuda.get_device_name())
    print(table(ledger.rows))
    print(json.dumps({"rows": len(ledger.rows), "errors": sum("error" in row for row in ledger.rows)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
