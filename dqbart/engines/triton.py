"""The GPU engine: Triton kernels in CUDA graphs, on NVIDIA and AMD GPUs."""

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from dqbart_kernels import gpu
from torch import Tensor

if TYPE_CHECKING:
    from dqbart_kernels.cpu import F32, I32
    from dqbart_kernels.gpu.model import Model


class GpuRunner:
    """Runs on one GPU. With TRITON_INTERPRET=1 also on the CPU, slowly: for tests."""

    name = "triton"
    model: "Model"

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self.device = torch.device(device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self  # a model that nothing changes serves copies, too

    def __reduce__(self) -> Any:
        return GpuRunner, (self.device,)  # whoever unpickles it reads the folder again

    def reason(self) -> str | None:
        return gpu.reason(self.device)

    def describe(self) -> str:
        return gpu.name_of(self.device)

    def most_beams(self, ends: int) -> int:
        from dqbart_kernels.gpu.model import most_beams

        return most_beams(ends)

    def make(self, sizes: dict[str, int], embed_scale: float, eps: float) -> "Model":
        from dqbart_kernels.gpu.model import Model

        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())  # which may be another one later
        self.model = Model(sizes, embed_scale, eps, self.device)
        return self.model

    def hidden(self, ids_BL: Tensor, length_B: Tensor, types_BL: Tensor | None) -> Tensor:
        types = None if types_BL is None else types_BL.int()
        return self._with_room(self.model.hidden, tuple(ids_BL.shape), ids_BL.int(), length_B.int(), types)

    def generate(self, sources: Sequence["I32"], **options: Any) -> tuple[list["I32"], "F32", bool]:
        shape = len(sources), max(map(len, sources))
        return self._with_room(self.model.generate, shape, sources, **options)

    def _with_room(self, call: Any, shape: tuple[int, ...], *arguments: Any, **options: Any) -> Any:
        """The call; where memory is out, once more without the graphs of earlier sizes."""
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            return call(*arguments, **options)
        self.model.forget()  # here: an exception holds on to what its frames had
        try:
            return call(*arguments, **options)
        except torch.cuda.OutOfMemoryError as error:
            self.model.forget()
            rows = f"{options['num_beams']} beams" if options.get("num_beams", 1) > 1 else "no beams"
            raise MemoryError(
                f"the GPU has no room for {shape[0]} texts of {shape[1]} tokens with {rows}: give fewer at a time, or "
                f"take engine 'cpu' ({str(error).splitlines()[0]})"
            ) from None


def describe() -> str:
    """One line for `dqbart doctor`."""
    device = torch.device("cuda")
    found = gpu.reason(device)
    return gpu.name_of(device) if found is None else f"not available: {found}"
