"""How fast is this folder here? Its engines, and whatever it is held against, side by side on this machine.

Engines take turns on the same random sources, so that noise hits all alike, and every one must write the same number
of tokens: the shortest and the longest length are forced equal. Encoders make one forward pass. Medians and ratios
within a round are reported, never a best run. benchmarks/latency.py is the larger version, with other people's engines.
"""

import statistics
import time
from pathlib import Path
from typing import Any

from dqbart.evaluation import card
from dqbart.evaluation.environment import environment
from dqbart.evaluation.recorded import record


def bench(
    folder: str | Path,
    *,
    against: str | None = None,
    source_length: int = 128,
    new_tokens: int = 32,
    batch_size: int = 1,
    beams: tuple[int, ...] = (1, 4),
    threads: int | None = None,
    rounds: int = 5,
    device: Any = "cpu",
) -> dict[str, Any]:
    """Milliseconds per `generate`, of encoders per forward pass, for every engine of `folder` and, in fp32, for the
    checkpoint `against`.

    Returns {"rows", "environment"}, rows as of benchmarks/latency.py: system, bits, layers, mode, source, batch,
    threads, tokens, median_ms, spread_ms and ratio, the time over that of the folder's first engine, round by round.
    Raises `ValueError` for lengths that the model hasn't.
    """
    import torch

    from dqbart.architectures import first_position
    from dqbart.engines import load_model
    from dqbart.engines.cpu import CpuRunner
    from dqbart.engines.native import Runner, unsuitable
    from dqbart.engines.triton import GpuRunner
    from dqbart.packed.verify import read_config, read_spec
    from dqbart.teacher import choose_device

    counts = {
        "source_length": source_length, "new_tokens": new_tokens, "batch_size": batch_size, "rounds": rounds,
        "threads": 1 if threads is None else threads,
    }  # fmt: skip
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} {value!r}: expected at least 1")
    spec, device = read_spec(Path(folder), read_config(Path(folder))), torch.device(choose_device(str(device)))
    before = torch.get_num_threads()
    threads = threads or before
    torch.set_num_threads(threads)
    try:
        runner: Runner = CpuRunner(threads) if device.type == "cpu" else GpuRunner(device)
        native = [] if runner.reason() or unsuitable(Path(folder)) else [runner.name]
        systems = {
            f"dqbart-{engine}": load_model(folder, engine=engine, device=device, threads=threads)
            for engine in (*native, "torch")
        }
        first = next(iter(systems.values()))
        writes = first.config.is_encoder_decoder
        if against is not None:
            systems["transformers-fp32"] = _in_fp32(against, None if writes else type(systems["dqbart-torch"]), device)
        room = first.config.max_position_embeddings - (0 if writes else first_position(first.config))
        new_tokens = new_tokens if writes else 0
        if source_length > room or new_tokens >= room:
            raise ValueError(f"source_length {source_length}, new_tokens {new_tokens}: the model has {room} positions")
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(4, first.config.vocab_size, (batch_size, source_length), generator=generator).to(device)
        rows = []
        for width in beams if writes else (0,):
            seconds = _interleaved(systems, ids, width, new_tokens, rounds)
            rows += [
                _row(name, systems[name], _bits(spec), times, seconds, ids, width, new_tokens, threads)
                for name, times in seconds.items()
            ]
    finally:
        torch.set_num_threads(before)
    return {"rows": rows, "environment": environment()}


def _in_fp32(checkpoint: str, cls: Any, device: Any) -> Any:
    """The checkpoint in transformers, as this class or as the teacher that it is."""
    import torch

    from dqbart.teacher import load_teacher

    if cls is None:
        return load_teacher(checkpoint, None, str(device), role="model")[0].eval()
    return cls.from_pretrained(checkpoint, dtype=torch.float32).to(device).eval()


def _interleaved(systems: dict[str, Any], ids: Any, beams: int, new_tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per system; the first turn of each warms up and is not counted. `beams` 0: a forward pass."""
    import torch

    settings: dict[str, Any] = dict(
        num_beams=beams, do_sample=False, min_length=new_tokens + 1, max_length=new_tokens + 1,
        forced_bos_token_id=None, forced_eos_token_id=None,
    )  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(rounds + 1):
        for name, model in systems.items():
            start = time.perf_counter()
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.no_grad():
                out = model.generate(**inputs, **settings) if beams else model(**inputs)
            if ids.is_cuda:
                torch.cuda.synchronize(ids.device)
            took = time.perf_counter() - start
            if beams and out.shape[1] != new_tokens + 1:
                raise RuntimeError(f"{name} wrote {out.shape[1] - 1} tokens, expected {new_tokens}: not comparable")
            if turn:
                seconds[name].append(took)
    return seconds


def _row(
    name: str, model: Any, bits: str, times: list[float], seconds: dict[str, list[float]], ids: Any, beams: int,
    new_tokens: int, threads: int,
) -> dict[str, Any]:  # fmt: skip
    config = model.config
    reference = next(iter(seconds.values()))
    layers = f"{config.encoder_layers}-{config.decoder_layers}" if beams else str(config.num_hidden_layers)
    return {
        "device": ids.device.type,
        "shape": f"width {config.hidden_size}",
        "layers": layers,
        "system": name,
        "bits": bits if name.startswith("dqbart") else None,
        "mode": "forward" if beams == 0 else "greedy" if beams == 1 else f"beam{beams}",
        "source": ids.shape[1],
        "batch": ids.shape[0],
        "threads": threads,
        "tokens": new_tokens,
        "median_ms": round(1e3 * statistics.median(times), 2),
        "spread_ms": [round(1e3 * min(times), 2), round(1e3 * max(times), 2)],
        "ratio": round(statistics.median(a / b for a, b in zip(times, reference, strict=True)), 2),
    }


def _bits(spec: Any) -> str:
    """Weights-embeddings-activations of a folder."""
    stored = [module for module in spec.modules.values() if module.tied_to is None]
    widths = [{module.bits for module in stored if module.kind == kind} for kind in ("linear", "embedding")]
    return "-".join("/".join(map(str, sorted(width))) or "32" for width in widths) + f"-{spec.activation_bits}"


def lines(found: dict[str, Any]) -> list[str]:
    """The rows for a person."""
    first = found["rows"][0]
    head = (
        f"source {first['source']} tokens, {first['tokens'] or 'no'} new ones, batch {first['batch']}, "
        f"{first['threads']} threads, medians of rounds in turns; ratio: time over the first's"
    )
    return [head] + [
        f"  {row['system']:20s} {row['bits'] or '':8s} {row['mode']:7s} {row['median_ms']:9.1f} ms "
        f"[{row['spread_ms'][0]:.1f}, {row['spread_ms'][1]:.1f}]  ratio {row['ratio']:.2f}"
        for row in found["rows"]
    ]


def save(folder: str | Path, found: dict[str, Any]) -> None:
    """Put what `bench` found into a packed folder: report.json, and the speed section of its card. Raises as `record`
    does.
    """
    card.rewrite_speed(Path(folder), record(folder, speed=found))
