"""What matmul.py measures: kernels, the matrices of real models, and how a product is found wrong.

A new kernel is a new entry of `KERNELS`; nothing else has to change. Operands are integers for everybody: 8-bit
activations and codes are exact in bf16 and fp32 too, so one exact product judges all kernels. Each operand holds a row
of largest codes, because random ones never fill an accumulator and a kernel that saturates would pass.

Shape suffixes: M rows of activations, N output features, K input features.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Product = Callable[[Tensor], Tensor]

LARGEST = {8: 127, 4: 7, 2: 1, 1: 1}


@dataclass(frozen=True)
class Kernel:
    """One way to multiply. `make(codes_NK, bits)` gives the product and the bytes of weight that one call reads.

    The product takes activations [M, K] of dtype `activations`, integers in -127..127, and returns [M, N].
    `bits`: widths it takes; 32 and 16 mean a float kernel, which is given 8-bit codes as floats. `arithmetic`: fp32,
    bf16 or int8, whose peak rate is its limit. `tolerance`: largest `error_of`. `missing`: None, or why it can't run.
    `partial`: an optional peer, or one for some sizes only, whose exceptions are gaps in the table and end no run.
    """

    name: str
    bits: tuple[int, ...]
    arithmetic: str
    activations: str
    make: Callable[[Tensor, int], tuple[Product, int]]
    tolerance: float = 0.0
    missing: Callable[[torch.device], str | None] = lambda device: None
    partial: bool = False


def _float_linear(dtype: str) -> Callable[[Tensor, int], tuple[Product, int]]:
    def make(codes_NK: Tensor, bits: int) -> tuple[Product, int]:
        import torch
        from torch.nn import functional as F

        weight_NK = codes_NK.to(getattr(torch, dtype))
        return lambda a_MK: F.linear(a_MK, weight_NK), weight_NK.nbytes

    return make


def _int_mm(codes_NK: Tensor, bits: int) -> tuple[Product, int]:
    import torch
    from torch.nn import functional as F

    n = len(codes_NK)
    # cuBLAS takes M above 16 and N in eights
    weight_KN = F.pad(codes_NK, (0, 0, 0, -n % 8)).T if codes_NK.is_cuda else codes_NK.clone().T

    def product(a_MK: Tensor) -> Tensor:
        rows = len(a_MK)
        if a_MK.is_cuda and rows <= 16:
            a_MK = F.pad(a_MK, (0, 0, 0, 24 - rows))
        return torch._int_mm(a_MK, weight_KN)[:rows, :n]

    return product, codes_NK.nbytes


def _fp32_is_no_peer(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "on a GPU the baseline is bf16, which matrix units multiply"


def _fbgemm_dynamic(codes_NK: Tensor, bits: int) -> tuple[Product, int]:
    """What `torch.ao.quantization.quantize_dynamic` runs: activations are quantized inside, to 7 bits."""
    import torch

    n = len(codes_NK)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)  # torch.ao deprecations
        scales, zeros = torch.ones(n, dtype=torch.float64), torch.zeros(n, dtype=torch.int64)
        packed = torch.ops.quantized.linear_prepack(
            torch._make_per_channel_quantized_tensor(codes_NK, scales, zeros, 0), None
        )
    return lambda a_MK: torch.ops.quantized.linear_dynamic(a_MK, packed, True), codes_NK.nbytes


def _no_fbgemm(device: torch.device) -> str | None:
    import torch

    if device.type != "cpu":
        return "runs on CPU only"
    return None if "fbgemm" in torch.backends.quantized.supported_engines else "this torch was built without fbgemm"


def _integer_matmul(codes_NK: Tensor, bits: int) -> tuple[Product, int]:
    """The torch engine's: every width through 8-bit operands (two where fbgemm would saturate), or fp32 ones."""
    from dqbart_kernels.integer_matmul import prepare_weight

    operand = prepare_weight(codes_NK)
    width = {"fbgemm": 2 if getattr(operand, "split", False) else 1, "int_mm": 1, "fp32": 4}[operand.path]
    return operand.matmul, width * codes_NK.nbytes


def _no_native(device: torch.device) -> str | None:
    from dqbart_kernels import cpu

    return "runs on CPU only" if device.type != "cpu" else cpu.reason()


@functools.lru_cache(maxsize=1)
def _result(m: int, n: int) -> Any:
    """One for all copies of a weight: libraries get theirs from an allocator that gives them the same place again."""
    import numpy as np

    return np.empty((m, n), np.float32)


def _native(codes_NK: Tensor, bits: int) -> tuple[Product, int]:
    """The native engine's product alone. The last activations stay loaded: in the engine they come with their sums."""
    import numpy as np
    import torch
    from dqbart_kernels import cpu
    from dqbart_kernels.cpu.products import Product as NativeProduct
    from dqbart_kernels.cpu.products import pack

    from dqbart.packed import layout

    n, k = codes_NK.shape
    packed = pack(layout.pack(codes_NK, bits).numpy(), (n, k), bits)
    loaded: list[Any] = [None, None]

    def product(a_MK: Tensor) -> Tensor:
        if loaded[0] is not a_MK:
            m, isa, threads = len(a_MK), cpu.chosen_instruction_set(), torch.get_num_threads()
            w_scale, a_scale = np.ones(n, np.float32), np.ones(m, np.float32)
            made = NativeProduct(isa, packed, bits, w_scale, a_MK.numpy(), a_scale, threads, _result(m, n))
            loaded[:] = a_MK, made
        return torch.from_numpy(loaded[1].run())

    return product, packed.nbytes


def _no_triton(device: torch.device) -> str | None:
    from dqbart_kernels.gpu import reason

    return reason(device)


@functools.cache
def _ones(m: int, device: torch.device) -> Tensor:
    """Made by the first call, which no graph captures."""
    import torch

    return torch.ones(m, device=device)


def _packed(codes_NK: Tensor, bits: int) -> Any:
    """As the GPU engine holds it; all scales are 1."""
    import torch
    from dqbart_kernels.gpu.products import Weight

    from dqbart.packed import layout

    n, k = codes_NK.shape
    return Weight(layout.pack(codes_NK, bits), torch.ones(n, device=codes_NK.device), bits, k)


def _int8_matmul(dtype: str) -> Callable[[Tensor, int], tuple[Product, int]]:
    """`dtype`: of the result; the engine's are float32."""

    def make(codes_NK: Tensor, bits: int) -> tuple[Product, int]:
        import torch
        from dqbart_kernels.gpu.products import int8_matmul

        weight, out_dtype = _packed(codes_NK, bits), getattr(torch, dtype)

        def product(a_MK: Tensor) -> Tensor:
            return int8_matmul(a_MK, _ones(len(a_MK), a_MK.device), weight, out_dtype=out_dtype)

        return product, weight.packed_NW.nbytes

    return make


def _one_shot_matmul(codes_NK: Tensor, bits: int) -> tuple[Product, int]:
    """It quantizes its rows itself."""
    from dqbart_kernels.gpu.one_shot import one_shot_matmul

    weight = _packed(codes_NK, bits)
    return lambda a_MK: one_shot_matmul(a_MK, weight)[0], weight.packed_NW.nbytes


def _weight_only_matmul(codes_NK: Tensor, bits: int) -> tuple[Product, int]:
    from dqbart_kernels.gpu.weight_only import weight_only_matmul

    weight = _packed(codes_NK, bits)
    return lambda a_MK: weight_only_matmul(a_MK, weight), weight.packed_NW.nbytes


def _no_gemlite(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "runs on GPUs only"
    return None if importlib.util.find_spec("gemlite") else "not installed: pip install gemlite"


def _gemlite(codes_NK: Tensor, bits: int) -> tuple[Product, int]:
    """int8 activations as they are, one scale a column. At 1 bit its zero point would be half a code: it has none."""
    import torch
    from gemlite.core import DType, GemLiteLinearTriton  # type: ignore[import-not-found]

    n, k = codes_NK.shape
    linear = GemLiteLinearTriton(
        bits, group_size=k, in_features=k, out_features=n, input_dtype=DType.INT8, output_dtype=DType.BF16,
        scaled_activations=False,
    )  # fmt: skip
    shift = LARGEST[bits] if bits < 8 else None  # its fields have no sign
    codes = codes_NK if shift is None else (codes_NK + shift).view(torch.uint8)
    linear.pack(codes, torch.ones((n, 1), device=codes_NK.device), zeros=shift, bias=None)
    return linear.forward, n * k * bits // 8


KERNELS = [  # the baseline first; on a GPU, where fp32 is none, it is bf16
    Kernel("torch fp32", (32,), "fp32", "float32", _float_linear("float32"), 1e-6, _fp32_is_no_peer),
    Kernel("torch bf16", (16,), "bf16", "bfloat16", _float_linear("bfloat16"), tolerance=2**-8),
    Kernel("torch _int_mm", (8,), "int8", "int8", _int_mm),
    Kernel("fbgemm dynamic", (8,), "int8", "float32", _fbgemm_dynamic, tolerance=0.05, missing=_no_fbgemm),
    Kernel("dqbart integer_matmul", (8, 4, 2, 1), "int8", "float32", _integer_matmul),
    Kernel("dqbart cpu", (8, 4, 2, 1), "int8", "int8", _native, missing=_no_native),
    Kernel("gemlite", (8, 4, 2), "int8", "int8", _gemlite, 0.05, _no_gemlite, partial=True),
    Kernel("dqbart int8_matmul", (8, 4, 2, 1), "int8", "int8", _int8_matmul("float32"), 1e-6, _no_triton),
    Kernel("dqbart int8_matmul, bf16 out", (8, 4, 2, 1), "int8", "int8", _int8_matmul("bfloat16"), 2**-8, _no_triton),
    Kernel("dqbart one_shot_matmul", (8, 4, 2, 1), "int8", "float32", _one_shot_matmul, 0.05, _no_triton, True),
    Kernel("dqbart weight_only_matmul", (8, 4, 2, 1), "bf16", "bfloat16", _weight_only_matmul, 2**-7, _no_triton),
]


@dataclass(frozen=True)
class Shape:
    """A weight [n, k], and how many weights its model reads in one decode step (an encoder: in one pass)."""

    n: int
    k: int
    step: int


def _shapes() -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for name, d, ffn, vocabulary, layers, attention, head in (  # attention: d x d matrices read in each layer
        ("MiniLM-L12-H384", 384, 1536, 30_522, 12, 4, False),  # q k v o
        ("bart-base", 768, 3072, 50_265, 6, 6, True),  # and q o of cross-attention
        ("bart-large", 1024, 4096, 50_265, 12, 6, True),
        ("mbart-large-cc25", 1024, 4096, 250_027, 12, 6, True),
    ):
        step = layers * (attention * d * d + 2 * d * ffn) + (vocabulary * d if head else 0)
        sides = {"q/k/v/out": (d, d), "fc1": (ffn, d), "fc2": (d, ffn), "vocabulary": (vocabulary, d)}
        if name == "mbart-large-cc25":  # the rest is bart-large's
            sides = {"vocabulary": sides["vocabulary"]}
        shapes |= {f"{name} {part}": Shape(n, k, step) for part, (n, k) in sides.items()}
    return shapes


SHAPES = _shapes()


def random_codes(n: int, k: int, bits: int) -> Tensor:
    """int8 codes [n, k]; the first two rows hold the largest and the smallest."""
    import torch

    largest = LARGEST.get(bits, 127)
    codes = torch.randint(-largest, largest + 1, (n, k), dtype=torch.int8)
    if bits == 1:
        codes = codes.ge(0).to(torch.int8).mul_(2).sub_(1)
    codes[0], codes[1:2] = largest, -largest
    return codes


def random_activations(m: int, k: int) -> Tensor:
    """int8 [m, k]; the first row holds the largest."""
    import torch

    a = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    a[0] = 127
    return a


def error_of(y_MN: Tensor, a_MK: Tensor, codes_NK: Tensor) -> float:
    """Largest |found - exact| / (|exact| + rms), over up to 16 rows and 1024 columns, first and last included.

    A product of the wrong shape is infinitely wrong; NaN stays NaN.
    """
    import torch

    if y_MN.shape != (len(a_MK), len(codes_NK)):
        return float("inf")
    rows, columns = (
        torch.linspace(0, length - 1, min(length, most)).round().long()
        for length, most in ((len(a_MK), 16), (len(codes_NK), 1024))
    )
    exact = (a_MK[rows].double() @ codes_NK[columns].double().T).float().double()  # rounded once, as kernels may
    found = y_MN[rows.to(y_MN.device)][:, columns.to(y_MN.device)].cpu().float().double()
    return float(((found - exact).abs() / (exact.abs() + exact.square().mean().sqrt())).max())
