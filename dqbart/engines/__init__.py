"""What runs a packed model. One function picks an engine and says which one it is.

`cpu` is native code: the whole of `generate`, or of an encoder's layers, in one call, weights that stay packed.
`torch` runs everywhere: transformers' own class with packed modules, exact integer products through torch's int8
operators. It is the oracle for every other engine.
"""

import logging
from pathlib import Path
from typing import Any

ENGINES = ("cpu", "torch")
log = logging.getLogger("dqbart")


def load(
    folder: str | Path, *, engine: str = "auto", device: Any = None, dtype: Any = None, threads: int | None = None
) -> Any:
    """The model of a folder that `compress` wrote, ready for `.generate()`, in eval mode.

    `engine`: "auto" or one of `ENGINES`; auto is `cpu` where that can run the folder, else `torch`. `device`: as in
    torch, default CPU. `dtype`: of activations between products, default fp32. `threads`: of engine `cpu`, default
    torch's. Raises `FileNotFoundError` or `ValueError`, one line, for a folder or an engine that doesn't fit.
    """
    if engine not in ("auto", *ENGINES):
        raise ValueError(f"engine {engine!r}: expected 'auto' or one of {', '.join(map(repr, ENGINES))}")
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one that 'dqbart compress' wrote")
    import torch

    from dqbart.packed.checkpoint import load_packed
    from dqbart.packed.verify import read_config

    on_cpu = device is None or torch.device(device).type == "cpu"
    if engine == "cpu" and not (on_cpu and dtype in (None, torch.float32)):
        raise ValueError(f"engine 'cpu' with device {device!r}, dtype {dtype}: it runs on the CPU in fp32")
    if engine == "cpu" or (engine == "auto" and on_cpu and dtype in (None, torch.float32)):
        from dqbart.engines.native import why_not

        reason = why_not(folder)
        if reason is None or engine == "cpu":
            return _load_native(folder, read_config(folder).get("model_type"), threads)
        log.info("engine torch, since the native one can't: %s", reason)
    model = load_packed(folder, device=device, dtype=torch.float32 if dtype is None else dtype)
    log.info("engine torch: transformers' %s with packed modules on %s", type(model).__name__, model.device)
    return model


def _load_native(folder: Path, model_type: Any, threads: int | None) -> Any:
    model: Any
    if model_type in ("bart", "mbart"):
        from dqbart.engines.cpu import CpuModel

        model = runs = CpuModel(folder, threads=threads)
    else:
        from dqbart.engines.cpu_encoder import load_encoder

        model = load_encoder(folder, threads=threads)
        runs = model.base_model
    log.info("engine cpu: %s, %s threads", runs.native.instruction_set, runs.threads)
    return model
