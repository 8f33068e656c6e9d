"""What runs a packed model. One function picks an engine and says which one it is.

`cpu` is native code: the whole of `generate`, or of an encoder's layers, in one call, weights that stay packed.
`triton` is the same on GPUs. `torch` runs everywhere: transformers' own class with packed modules, exact integer
products through torch's int8 operators. It is the oracle for every other engine.
"""

import logging
from pathlib import Path
from typing import Any

ENGINES = ("cpu", "triton", "torch")
log = logging.getLogger("dqbart")


def load(
    folder: str | Path, *, engine: str = "auto", device: Any = None, dtype: Any = None, threads: int | None = None
) -> Any:
    """What is in a folder that `compress` wrote, ready to run, in eval mode: the model, or for one with modules.json a
    `dqbart.engines.sentence.SentenceEncoder`, which turns texts to vectors.

    `engine`: "auto" or one of `ENGINES`; auto is `cpu` on the CPU and `triton` on a GPU where these can run the folder,
    else `torch`. `device`: as in torch, default CPU, or "cuda" for engine `triton`. `dtype`: of activations between
    products, default fp32, the only one that the native engines have. `threads`: of engine `cpu`, default torch's.
    Raises `FileNotFoundError` or `ValueError`, one line, for a folder, a device or an engine that doesn't fit.
    """
    from dqbart.packed.sentence import read_pooling

    pooling = read_pooling(folder)  # before the model, so that what is wrong there is said at once
    model = load_model(folder, engine=engine, device=device, dtype=dtype, threads=threads)
    if pooling is None:
        return model
    from dqbart.engines.sentence import SentenceEncoder, read_tokenizer

    if hasattr(model.base_model, "runner"):
        # No vector is made of it, and torch's threads, once woken for its product, spin on the native engine's cores.
        model.base_model.pooler = None
    return SentenceEncoder(model, read_tokenizer(Path(folder)), pooling)


def load_model(
    folder: str | Path, *, engine: str = "auto", device: Any = None, dtype: Any = None, threads: int | None = None
) -> Any:
    """As `load`, and always the model, with `.generate()` if it writes, whatever the folder makes of its output."""
    if engine not in ("auto", *ENGINES):
        raise ValueError(f"engine {engine!r}: expected 'auto' or one of {', '.join(map(repr, ENGINES))}")
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one that 'dqbart compress' wrote")
    import torch

    from dqbart.engines.native import Runner, unsuitable
    from dqbart.packed.checkpoint import load_packed
    from dqbart.packed.plain import is_plain, load_plain
    from dqbart.packed.verify import unchanged

    try:
        where = torch.device(device if device is not None else "cuda" if engine == "triton" else "cpu")
    except (RuntimeError, TypeError):
        raise ValueError(f"device {device!r}: expected 'cpu' or 'cuda', or 'cuda:1' for the second GPU") from None
    if threads is not None and (type(threads) is not int or threads < 1):
        raise ValueError(f"threads {threads!r}: expected a whole number of at least 1")
    if is_plain(folder):
        if engine in ("cpu", "triton"):
            raise ValueError(
                f"engine {engine!r}: {folder} is a float model (bits 32-32-32); expected 'auto' or 'torch'"
            )
        log.info("engine torch: a float model, nothing is packed")
        return load_plain(folder, where, torch.float32 if dtype is None else dtype)
    if engine == "cpu" and (where.type != "cpu" or dtype not in (None, torch.float32)):
        raise ValueError(f"engine 'cpu' with device {device!r}, dtype {dtype}: it runs on the CPU in fp32")
    if engine == "triton" and dtype not in (None, torch.float32):
        raise ValueError(f"engine 'triton' with dtype {dtype}: its activations are fp32")
    if engine != "torch" and where.type in ("cpu", "cuda") and dtype in (None, torch.float32):
        from dqbart.engines.cpu import CpuRunner
        from dqbart.engines.triton import GpuRunner

        on_gpu = engine == "triton" or (engine == "auto" and where.type == "cuda")
        runner: Runner = GpuRunner(where) if on_gpu else CpuRunner(threads)
        reason = None if engine != "auto" else runner.reason() or unsuitable(folder)
        if reason is None:
            return _load_native(folder, runner)
        log.info("engine torch, since engine %s can't: %s", runner.name, reason)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: torch sees no GPU; leave device out to run on the CPU")
    with unchanged(folder):
        model = load_packed(folder, device=where, dtype=torch.float32 if dtype is None else dtype)
    log.info("engine torch: transformers' %s with packed modules on %s", type(model).__name__, model.device)
    return model


def _load_native(folder: Path, runner: Any) -> Any:
    from dqbart.packed.verify import read_config

    model: Any
    if read_config(folder).get("model_type") in ("bart", "mbart"):
        from dqbart.engines.text import TextModel

        model = TextModel(folder, runner)
    else:
        from dqbart.engines.encoder import load_encoder

        model = load_encoder(folder, runner)
    log.info("engine %s: %s", runner.name, runner.describe())
    return model
