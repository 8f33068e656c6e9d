"""What runs a packed model. One function picks an engine and says which one it is.

`torch` runs everywhere: transformers' own class with packed modules, exact integer products through torch's int8
operators. It is the oracle for every other engine.
"""

import logging
from pathlib import Path
from typing import Any

ENGINES = ("torch",)
log = logging.getLogger("dqbart")


def load(folder: str | Path, *, engine: str = "auto", device: Any = None, dtype: Any = None) -> Any:
    """The model of a folder that `compress` wrote, ready for `.generate()`, in eval mode.

    `engine`: "auto" or one of `ENGINES`. `device`: as in torch, default CPU. `dtype`: of activations between
    products, default fp32. Raises `FileNotFoundError` or `ValueError`, one line, for a folder or an engine
    that doesn't fit.
    """
    import torch

    from dqbart.packed.checkpoint import load_packed

    if engine not in ("auto", *ENGINES):
        raise ValueError(f"engine {engine!r}: expected 'auto' or one of {', '.join(map(repr, ENGINES))}")
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one that 'dqbart compress' wrote")
    dtype = torch.float32 if dtype is None else dtype
    model = load_packed(folder, device=device, dtype=dtype)
    log.info("engine torch: transformers' %s with packed modules on %s", type(model).__name__, model.device)
    return model
