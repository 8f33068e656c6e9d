"""The native CPU engine."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from dqbart_kernels import cpu
from torch import Tensor


class CpuRunner:
    """Runs on `threads` threads of each call, by default torch's."""

    name = "cpu"
    device = torch.device("cpu")
    model: cpu.Model

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or torch.get_num_threads()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self  # a model that nothing changes serves copies, too

    def __reduce__(self) -> Any:
        return CpuRunner, (self.threads,)  # whoever unpickles it reads the folder again

    def reason(self) -> str | None:
        return cpu.reason()

    def describe(self) -> str:
        return f"{self.model.instruction_set}, {self.threads} threads"

    def most_beams(self, ends: int) -> int:
        return 1024

    def make(self, sizes: dict[str, int], embed_scale: float, eps: float) -> cpu.Model:
        self.model = cpu.Model(sizes, embed_scale, eps)
        return self.model

    def hidden(self, ids_BL: Tensor, length_B: Tensor, types_BL: Tensor | None) -> Tensor:
        lengths = length_B.tolist()

        def rows(of_BL: Tensor) -> list[cpu.I32]:
            found = of_BL.cpu().to(torch.int32).numpy()
            return [found[i, :length] for i, length in enumerate(lengths)]

        types = rows(types_BL) if types_BL is not None and self.model.sizes["token_types"] else None
        hidden = np.zeros((*ids_BL.shape, self.model.sizes["d"]), np.float32)
        for i, row in enumerate(self.model.encode(rows(ids_BL), self.threads, types)):
            hidden[i, : len(row)] = row
        return torch.from_numpy(hidden)

    def generate(self, sources: Sequence[cpu.I32], **options: Any) -> tuple[list[cpu.I32], cpu.F32, bool]:
        return self.model.generate(sources, threads=self.threads, **options)


def describe() -> str:
    """One line for `dqbart doctor`."""
    reason = cpu.reason()
    if reason is not None:
        return f"not available: {reason}"
    forced = f", forced by {cpu.VARIABLE}" if os.environ.get(cpu.VARIABLE) else ""
    return f"{cpu.chosen_instruction_set()}{forced} (this processor runs {', '.join(cpu.instruction_sets())})"
