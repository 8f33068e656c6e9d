"""The GPU engine: Triton kernels in CUDA graphs, on NVIDIA and AMD GPUs."""

import functools
import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dqbart_kernels.cpu import F32, I32
    from dqbart_kernels.gpu.model import Model

CAPABILITY = (8, 0)  # the first with the int8 matrix instruction that the kernels need


class GpuRunner:
    """Runs on one GPU. With TRITON_INTERPRET=1 also on the CPU, slowly: for tests."""

    name = "triton"
    model: "Model"

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self.device = torch.device(device)

    def reason(self) -> str | None:
        return reason(self.device)

    def describe(self) -> str:
        return name_of(self.device)

    def most_beams(self, ends: int) -> int:
        from dqbart_kernels.gpu.model import most_beams

        return most_beams(ends)

    def make(self, sizes: dict[str, int], embed_scale: float, eps: float) -> "Model":
        from dqbart_kernels.gpu.model import Model

        self.model = Model(sizes, embed_scale, eps, self.device)
        return self.model

    def hidden(self, ids_BL: Tensor, length_B: Tensor, types_BL: Tensor | None) -> Tensor:
        types = None if types_BL is None else types_BL.int()
        return _with_room(self.model.hidden, tuple(ids_BL.shape), ids_BL.int(), length_B.int(), types)

    def generate(self, sources: Sequence["I32"], **options: Any) -> tuple[list["I32"], "F32", bool]:
        shape = len(sources), max(map(len, sources))
        return _with_room(self.model.generate, shape, sources, **options)


def _with_room(call: Any, shape: tuple[int, ...], *arguments: Any, **options: Any) -> Any:
    try:
        return call(*arguments, **options)
    except torch.cuda.OutOfMemoryError as error:
        rows = f"{options['num_beams']} beams" if options.get("num_beams", 1) > 1 else "no beams"
        raise MemoryError(
            f"the GPU has no room for {shape[0]} texts of {shape[1]} tokens with {rows}: give fewer at a time, or "
            f"engine 'cpu' ({str(error).splitlines()[0]})"
        ) from None


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"


def reason(device: torch.device) -> str | None:
    """Why the engine can't run on a device, in a line; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if device.type != "cuda":
        interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else f"device '{device}': it runs on NVIDIA and AMD GPUs, device 'cuda'"
    if not torch.cuda.is_available():
        return "torch sees no GPU (torch.cuda.is_available() is False)"
    if (device.index or 0) >= torch.cuda.device_count():
        return f"device '{device}': there are {torch.cuda.device_count()} GPUs, from cuda:0 on"
    found = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and found < CAPABILITY:
        need = ".".join(map(str, CAPABILITY))
        return f"{name_of(device)} has compute capability {found[0]}.{found[1]}: it needs {need} (Ampere) or later"
    return _failure(device)


@functools.cache
def _failure(device: torch.device) -> str | None:
    """Why a first small kernel fails on the device, as it does without a C compiler for Triton's launchers."""
    from dqbart_kernels.gpu.rows import norm_and_quantize, norm_and_quantize_reference

    rows = torch.arange(-96.0, 96.0, device=device).view(2, 96)
    try:
        with torch.cuda.device(device):
            same = torch.equal(norm_and_quantize(rows)[0], norm_and_quantize_reference(rows)[0])
    except Exception as error:  # whatever a compiler, a driver or a launcher may say
        return f"a first kernel fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None if same else "a first kernel computes something else than torch"


def describe() -> str:
    """One line for `dqbart doctor`."""
    device = torch.device("cuda")
    found = reason(device)
    return name_of(device) if found is None else f"not available: {found}"
