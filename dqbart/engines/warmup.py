"""Everything that engine `triton` compiles, compiled before the first request.

Triton compiles a kernel when it is first called at a kind of shape, for a tenth of a second to a second, and keeps the
result on disk (~/.triton/cache, or TRITON_CACHE_DIR). Graphs are captured anew by every process, from compiled kernels,
in milliseconds. So this asks the model for one text of every bucket, then for the next process everything is there.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def warm_up(
    folder: str | Path,
    *,
    device: Any = "cuda",
    batch_sizes: Sequence[int] = (1,),
    beams: Sequence[int] = (1, 4),
    source_length: int | None = None,
) -> dict[str, Any]:
    """Run every bucket up to `source_length` tokens (default: all that the model has) at these widths, with the
    folder's own generation settings and without; of the shortest also all lengths of output, and a sample.

    Returns {"calls", "seconds", "cache"}.
    Raises `ValueError` where the engine can't run, or for lengths that the model hasn't.
    """
    import torch
    from triton import knobs

    from dqbart.architectures import first_position
    from dqbart.engines import load_model

    for name, values in (("batch_sizes", batch_sizes), ("beams", beams)):
        if not values or min(values) < 1:
            raise ValueError(f"{name} {list(values)!r}: expected numbers from 1 on")
    model = load_model(folder, engine="triton", device=device)
    writes = model.config.is_encoder_decoder
    room = model.config.max_position_embeddings - (0 if writes else first_position(model.config))
    longest = room if source_length is None else source_length
    if not 1 <= longest <= room:
        raise ValueError(f"source_length {longest}: expected 1 to {room}")
    runner = model.runner if writes else model.base_model.runner
    calls, start = 0, time.perf_counter()
    settings: list[dict[str, Any]] = [{}]
    if writes:
        settings.append({"forced_bos_token_id": None, "forced_eos_token_id": None})
    # tokenizers of models with several types give them, which makes another graph
    typed = getattr(model.config, "type_vocab_size", 0) > 1
    first = [{"max_length": most + 1} for most in runner.model.step_buckets()] + [{"do_sample": True}] if writes else []
    for length in runner.model.buckets(longest):
        for batch in batch_sizes:
            ids = torch.full((batch, length), 5, device=device)
            if not writes:
                print(f"\r{length} tokens, {batch} texts ...", end="", file=sys.stderr)
                for types in (None, torch.zeros_like(ids)) if typed else (None,):
                    with torch.no_grad():
                        model(input_ids=ids, token_type_ids=types)
                    calls += 1
                continue
            for width in beams:
                print(f"\r{length} tokens, {batch} texts, {width} beams ...", end="", file=sys.stderr)
                for rules in [*settings, *first[: len(first) - (width > 1)]]:  # beams are not sampled
                    model.generate(input_ids=ids, num_beams=width, **rules)
                    calls += 1
        first = []
    print(file=sys.stderr)
    return {"calls": calls, "seconds": round(time.perf_counter() - start, 1), "cache": knobs.cache.dir}
