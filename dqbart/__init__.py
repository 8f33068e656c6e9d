"""Make BART, mBART and BERT-like checkpoints 10 to 30 times smaller, and run them.

    dqbart.compress("facebook/bart-base", data="train.jsonl", recipe=dqbart.Recipe(layers="6-3"), output="small/")
    model = dqbart.load("small/")

Importing this package also lets transformers' own `from_pretrained` load packed folders. It imports neither torch
nor transformers by itself: what is heavy is loaded when it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dqbart.packed import hook

if TYPE_CHECKING:
    from dqbart.dense import export
    from dqbart.engines import load
    from dqbart.extraction import extract
    from dqbart.notation import Bits, Layers
    from dqbart.pipeline import compress
    from dqbart.recipe import Recipe

__all__ = ["Bits", "Layers", "Recipe", "compress", "export", "extract", "load"]
__version__ = "0.1.0"

_HOME = {
    "Bits": "dqbart.notation",
    "Layers": "dqbart.notation",
    "Recipe": "dqbart.recipe",
    "compress": "dqbart.pipeline",
    "export": "dqbart.dense",
    "extract": "dqbart.extraction",
    "load": "dqbart.engines",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dqbart' has no attribute {name!r}: it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


hook.install()
