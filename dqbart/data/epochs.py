"""Data sets whose items are drawn anew in every epoch, and yet can be said in advance.

Every item has its own generator, seeded with (seed, epoch, index): what is drawn depends neither on the batch that an
item is in, nor on the number of worker processes, nor on where a run was interrupted. Drawing in the collator from a
global generator, as most masked-LM code does, depends on all three.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np


class EpochItems:
    """Wraps a map-style data set; subclasses draw in `__getitem__` from `generator(index)`.

    The trainer calls `set_epoch`. The epoch lies in shared memory, so that workers that outlive an epoch see it too.
    """

    stream: ClassVar[int] = 0  # data sets that wrap each other must not draw the same numbers

    def __init__(self, items: Any, seed: int) -> None:
        import torch

        self.items = items
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)
        if isinstance(self.items, EpochItems):
            self.items.set_epoch(epoch)

    def generator(self, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, int(self._epoch), index, self.stream])

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise NotImplementedError

    def __str__(self) -> str:
        return str(self.items)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))
