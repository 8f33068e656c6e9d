"""Quantizers: a float matrix goes in, integer codes and scales come out, and `x ~ codes * scale`.

There is one definition of each. Training fakes it (codes times scale, straight-through gradient), packing stores it,
engines multiply it, so a packed model equals its trained student by construction. The schemes:

    8, 4, 3 bits  symmetric  scale = max|x| / qmax, codes = round_half_even(x * (1 / max|x| * qmax)), rounded each time
    2 bits        ternary    TWN (Li & Liu 2016): t = 0.7 mean|x|; codes = sign(x) where |x| > t;
                             scale = mean of |x| over those
    1 bit         binary     scale = mean|x|, codes = 1 where x >= 0, else -1 (XNOR-Net)

`granularity` says what shares a scale: "row" (the last dimension: an output feature of `nn.Linear.weight`, a token of
an embedding or of an activation) or "tensor". DQ-BART uses "tensor" for linear weights and activations; that makes a
result depend on its batch mates, which is why "row" is ours. All arithmetic is fp32, whatever comes in.

On GPUs one Triton kernel does what is a chain of operators here (dqbart_kernels/gpu/quantize.py, held to this file).
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

QMAX = {8: 127, 4: 7, 3: 3, 2: 1, 1: 1}
SCHEMES = {8: "symmetric", 4: "symmetric", 3: "symmetric", 2: "ternary", 1: "binary"}

# Rows whose largest magnitude lies below this quantize as zeros: qmax / max would overflow.
TINY = 1e-30
# Rows per piece in `Quantizer.quantize`: about 6 MB of fp32 at width 768, so temporaries stay in cache.
CHUNK_ELEMENTS = 1 << 20
# Devices whose tensors the Triton kernels take, if Triton is there. Its interpreter takes "cpu" too: for tests.
FUSED = {"cuda"}


@functools.cache
def _kernels() -> Any:
    if importlib.util.find_spec("triton") is None:
        return None
    from dqbart_kernels.gpu import quantize

    return quantize


@dataclass(frozen=True)
class Quantizer:
    """Maps `x [..., K]` to codes `[..., K]` and an fp32 scale `[..., 1]` (or `[1, ..., 1]` for a tensor).

    `clip` clamps to [-clip, clip] first and stops the gradient outside (DQ-BART's 2.5). Scales are finite
    and >= 0; zero rows give zeros. Raises `ValueError` for unknown bits, integer input, NaN or infinity.
    """

    bits: int
    granularity: Literal["row", "tensor"] = "row"
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.bits not in QMAX:
            raise ValueError(f"quantizer bits {self.bits!r}: expected one of {sorted(QMAX)}")
        if self.granularity not in ("row", "tensor"):
            raise ValueError(f"quantizer granularity {self.granularity!r}: expected 'row' or 'tensor'")

    @property
    def qmax(self) -> int:
        return QMAX[self.bits]

    @property
    def scheme(self) -> str:
        return SCHEMES[self.bits]

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes as int8, and the scale."""
        if (kernels := self._fused(x)) is not None:
            codes, scale = kernels.quantize(x, self.bits, self.clip)
            _require_finite(scale)
            return codes, scale
        rows = x.shape[0] if x.dim() == 2 and self.granularity == "row" else 0
        step = max(1, CHUNK_ELEMENTS // max(1, x.shape[-1])) if rows else 0
        if rows <= step:
            codes, scale = self.quantize_float(x)
            return codes.to(torch.int8), scale
        codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
        for start in range(0, rows, step):
            piece = slice(start, start + step)
            c, scale[piece] = self.quantize_float(x[piece])
            codes[piece] = c
        return codes, scale

    def quantize_float(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same with the codes as fp32 integers, which is what a float GEMM or fbgemm takes."""
        if not x.is_floating_point():
            raise ValueError(f"cannot quantize a {x.dtype} tensor: expected a floating-point one")
        if self._fused(x) is not None:
            codes, scale = self.quantize(x)
            return codes.float(), scale
        x = x.float()
        if x.numel() == 0:
            shape = [*x.shape[:-1], 1] if self.granularity == "row" else [1] * x.dim()
            return x.clone(), x.new_ones(shape)
        if self.clip is not None:
            _require_finite(x.abs().amax())  # the clamp would hide an infinity
            x = x.clamp(-self.clip, self.clip)
        codes, scale = _SCHEME[self.scheme](x if self.granularity == "row" else x.reshape(1, -1), self.qmax)
        if self.granularity == "tensor":
            codes, scale = codes.view(x.shape), scale.view([1] * x.dim())
        _require_finite(scale)
        return codes, scale

    def _fused(self, x: Tensor) -> Any:
        """The kernels, where they serve `x`: rows of our own numerics (the authors' arithmetic stays as it was)."""
        fits = x.device.type in FUSED and type(self) is Quantizer and self.granularity == "row" and x.numel() > 0
        if not fits or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return None
        kernels = _kernels()
        return kernels if kernels is not None and x.shape[-1] <= kernels.LONGEST else None

    def dequantize(self, x: Tensor) -> Tensor:
        """What `x` becomes: codes times scale, in fp32, no gradient."""
        return self.values(*self.quantize_float(x))

    def values(self, codes: Tensor, scale: Tensor) -> Tensor:
        """What float codes stand for: codes times scale."""
        return codes * scale

    def fake(self, x: Tensor) -> Tensor:
        """`dequantize` in the input's dtype, with the straight-through gradient (1 inside the clip, else 0)."""
        return _StraightThrough.apply(x, self)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class PaperQuantizer(Quantizer):
    """DQ-BART's released arithmetic: clip at 2.5, and symmetric codes *divided by* qmax / max|x|.

    That is within one ulp of codes times scale, but one ulp decides roundings further down, and then a loss
    differs in its third digit: to reproduce the authors' numbers the division has to stay.
    """

    clip: float | None = 2.5

    def quantize_float(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `Quantizer`; the scale of symmetric codes is its reciprocal, qmax / max|x|."""
        codes, scale = super().quantize_float(x)
        if self.scheme != "symmetric" or x.numel() == 0:
            return codes, scale
        peak = _largest(x.float()) if self.granularity == "row" else x.float().abs().amax()
        return codes, (self.qmax / peak.clamp(TINY, self.clip)).view(scale.shape)

    def values(self, codes: Tensor, scale: Tensor) -> Tensor:
        return codes / scale if self.scheme == "symmetric" else super().values(codes, scale)


def _symmetric(x: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    peak = _largest(x).clamp_min_(TINY)
    # torch takes qmax / peak as (1 / peak) * qmax, and so do all engines; by a Python number it divides on CPUs alone
    return (x * (qmax / peak)).round_(), peak / torch.full_like(peak, qmax)


def _largest(x: Tensor) -> Tensor:
    """max|x| over the last dimension. Without a tensor of |x| in between: that costs more to allocate than to fill."""
    return torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())


def _mean_magnitude(x: Tensor) -> Tensor:
    """mean|x| over the last dimension; rows of huge values are divided first, so that their sum stays finite."""
    mean = x.abs().mean(-1, keepdim=True)
    if not mean.isfinite().all():
        mean = (x.abs() / x.shape[-1]).sum(-1, keepdim=True)
    return mean


def _ternary(x: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    threshold = (0.7 * _mean_magnitude(x)).clamp_min_(TINY)
    codes = (x > threshold).to(x.dtype).sub_((x < -threshold).to(x.dtype))
    kept = codes.abs().sum(-1, keepdim=True).clamp_min_(1)
    return codes, ((x / kept) * codes).sum(-1, keepdim=True).clamp_min_(TINY)


def _binary(x: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    return (x >= 0).to(x.dtype).mul_(2).sub_(1), _mean_magnitude(x)


_SCHEME: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {
    "symmetric": _symmetric,
    "ternary": _ternary,
    "binary": _binary,
}


def _require_finite(scale: Tensor) -> None:
    """A NaN or an infinity anywhere in a row shows in its scale, which is cheap to look at."""
    if scale.is_cuda:
        # No host sync; and fewer kernels than isfinite, which is four. Scales are not negative, and a NaN is a maximum.
        torch._assert_async(scale.amax() < math.inf, "cannot quantize NaN or infinite values")
    elif not scale.isfinite().all():
        raise ValueError("cannot quantize NaN or infinite values: the model or its input has overflowed")


class _StraightThrough(torch.autograd.Function):
    """dL/dx = dL/dQ, or dL/dQ * 1[|x| < clip]; nothing flows to the scale (Bengio 2013; DQ-BART's code)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: Quantizer) -> Tensor:
        ctx.clip, ctx.fused = quantizer.clip, x.device.type in FUSED and _kernels() is not None
        if ctx.clip is not None:
            ctx.save_for_backward(x if ctx.fused else x.abs() < ctx.clip)
        if (kernels := quantizer._fused(x)) is not None:
            values, scale = kernels.fake(x, quantizer.bits, quantizer.clip)
            _require_finite(scale)
            return values
        return quantizer.dequantize(x).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        if ctx.clip is None:
            return grad, None
        (seen,) = ctx.saved_tensors
        return (_kernels().straight_through(grad, seen, ctx.clip) if ctx.fused else grad * seen), None
