"""Dropout of a student while it learns, whatever its config says.

A student that begins as a copy of its teacher and sees every example once has nothing to forget: what dropout adds is
noise between it and the teacher's outputs (Beyer et al. 2022, arXiv 2106.05237: a teacher should be consistent).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_RATES = ("dropout", "activation_dropout", "attention_dropout")  # numbers that BART and its kin keep beside modules


@contextmanager
def dropping(model: Any, rate: float | None) -> Iterator[None]:
    """During the block `model` drops with probability `rate` wherever it can; None: as it is."""
    found: list[tuple[nn.Module, str]] = []
    if rate is not None:
        for module in model.modules():
            names = ("p",) if isinstance(module, nn.Dropout) else _RATES
            found += [(module, name) for name in names if isinstance(vars(module).get(name), int | float)]
    before = [getattr(module, name) for module, name in found]
    try:
        for module, name in found:
            setattr(module, name, rate)
        yield
    finally:
        for (module, name), value in zip(found, before, strict=True):
            setattr(module, name, value)
