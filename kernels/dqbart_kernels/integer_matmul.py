"""The exact product of int8 codes, `acc[m, n] = sum_k a[m, k] w[n, k]`, by the fastest operator torch has.

Every engine must get the same integers, so a path counts as usable only after it has multiplied a worst case
correctly in this process. What torch 2.13 offers on CPU (2 threads, AVX2 without VNNI, M=4 K=768 N=50265): an fp32
GEMM over the codes 31 ms, `torch._int_mm` 75 ms, fbgemm 1.6 ms. So:

    fbgemm  x86. Takes float codes, returns the int32 accumulator rounded once to fp32. Without VNNI its `maddubs`
            adds two products in int16 and saturates once two neighbouring |w| sum to more than 128. Then 8-bit
            codes are split, w = 2 h + l with h in [-64, 63] and l in {0, 1}, into two products that can't.
    int_mm  CUDA. `torch._int_mm`, with M, N and K padded to what cuBLAS takes.
    fp32    everything else. Sums of integers below 2^24 are exact in fp32 in any order; a K too long for that is
            cut into pieces that are added in fp64.

The result is the accumulator as fp32, rounded to nearest where it exceeds 2^24, exactly as `acc.float()` would.
Rejected: `onednn.qlinear_pointwise`, as quick as fbgemm with VNNI but failing on most shapes without it.

Shape suffixes: M rows of activations, N output features, K input features.
"""

import functools
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Path = Literal["fbgemm", "int_mm", "fp32"]

EXACT = 1 << 24  # largest magnitude up to which fp32 holds every integer
FP32_PIECE = 1024  # 128 * 128 * 1024 = 2^24
FBGEMM_PIECE = 2048  # 128 * 64 * 2048 = 2^24
INT16_SAFE = 64  # 255 * (64 + 64) < 2^15

_engine_lock = threading.Lock()


def int_matmul_reference(a_MK: Tensor, w_NK: Tensor) -> Tensor:
    """int32 [M, N] of int8 [M, K] and int8 [N, K]: what the other paths are held to."""
    return (a_MK.to(torch.int64) @ w_NK.to(torch.int64).T).to(torch.int32)


class PreparedWeight(ABC):
    """int8 codes [N, K] in the form one path wants. Immutable; copying shares it, pickling stores the codes."""

    path: Path

    def __init__(self, codes_NK: Tensor) -> None:
        self.out_features, self.in_features = codes_NK.shape

    def matmul(self, a_MK: Tensor) -> Tensor:
        """New contiguous fp32 [M, N] for codes [M, K] in -128..127, given as int8 or as floats."""
        if a_MK.dim() != 2 or a_MK.shape[1] != self.in_features:
            raise ValueError(f"activations {list(a_MK.shape)}: expected [M, {self.in_features}]")
        if 0 in (a_MK.shape[0], self.in_features, self.out_features):
            return a_MK.new_zeros((a_MK.shape[0], self.out_features), dtype=torch.float32)
        return self._matmul(a_MK)

    @abstractmethod
    def _matmul(self, a_MK: Tensor) -> Tensor: ...

    @abstractmethod
    def codes(self) -> Tensor:
        """The int8 codes [N, K] that were given."""

    def __copy__(self) -> "PreparedWeight":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "PreparedWeight":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return prepare_weight, (self.codes(),)


class _Fp32Weight(PreparedWeight):
    path: Path = "fp32"

    def __init__(self, codes_NK: Tensor) -> None:
        super().__init__(codes_NK)
        self.weight_NK = codes_NK.float()
        self.exact = _fp32_is_exact(self.weight_NK)

    def _matmul(self, a_MK: Tensor) -> Tensor:
        return _fp32_product(a_MK.float(), self.weight_NK, self.exact)

    def codes(self) -> Tensor:
        return self.weight_NK.to(torch.int8)


class _FbgemmWeight(PreparedWeight):
    path: Path = "fbgemm"

    def __init__(self, codes_NK: Tensor) -> None:
        super().__init__(codes_NK)
        # int16 abs: |-128| has no int8
        self.split = codes_NK.numel() > 0 and bool((codes_NK.short().abs() > INT16_SAFE).any()) and _saturates()
        if not self.split:
            self.pieces: list[tuple[Any, Any]] = [(_fbgemm_pack(codes_NK), None)]
            return
        high, low = codes_NK >> 1, codes_NK & 1
        # Each product is read as fp32, so it must stay below 2^24; K is cut only where |w| calls for it.
        fits = bool((high.float().abs().sum(1) * 128 <= EXACT).all())
        step = self.in_features if fits else FBGEMM_PIECE
        self.pieces = [
            (_fbgemm_pack(h), _fbgemm_pack(lo)) for h, lo in zip(high.split(step, 1), low.split(step, 1), strict=True)
        ]

    def _matmul(self, a_MK: Tensor) -> Tensor:
        a_MK = a_MK.float()
        if len(self.pieces) == 1:
            high, low = self.pieces[0]
            if low is None:
                return _fbgemm_multiply(a_MK, high)
            return _fbgemm_multiply(a_MK, low).add_(_fbgemm_multiply(a_MK, high), alpha=2)
        total_MN = a_MK.new_zeros((a_MK.shape[0], self.out_features), dtype=torch.float64)
        for a, (high, low) in zip(a_MK.split(FBGEMM_PIECE, 1), self.pieces, strict=True):
            total_MN.add_(_fbgemm_multiply(a, high), alpha=2).add_(_fbgemm_multiply(a, low))
        return total_MN.float()

    def codes(self) -> Tensor:
        if not self.split:
            return _fbgemm_unpack(self.pieces[0][0])
        return torch.cat([2 * _fbgemm_unpack(h) + _fbgemm_unpack(lo) for h, lo in self.pieces], 1)


class _IntMmWeight(PreparedWeight):
    path: Path = "int_mm"

    def __init__(self, codes_NK: Tensor) -> None:
        super().__init__(codes_NK)
        self.weight_NK = F.pad(codes_NK, (0, -self.in_features % 8, 0, -self.out_features % 8))

    def _matmul(self, a_MK: Tensor) -> Tensor:
        rows, k = a_MK.shape[0], self.weight_NK.shape[1]
        # cuBLAS takes M above 16 and M, N, K that are multiples of 8
        a_MK = F.pad(a_MK.to(torch.int8), (0, k - self.in_features, 0, max(-rows % 8, 24 - rows)))
        acc_MN = torch._int_mm(a_MK.contiguous(), self.weight_NK.T)
        return acc_MN[:rows, : self.out_features].float().contiguous()

    def codes(self) -> Tensor:
        return self.weight_NK[: self.out_features, : self.in_features]


_KINDS: dict[Path, type[PreparedWeight]] = {"fbgemm": _FbgemmWeight, "int_mm": _IntMmWeight, "fp32": _Fp32Weight}


def prepare_weight(w_NK: Tensor, path: Path | None = None) -> PreparedWeight:
    """Bring int8 codes [N, K] into the form of `path`, by default the best one on the tensor's device.

    Done once per matrix: it costs about as much as ten products. Raises `ValueError` for anything but a 2-D
    int8 tensor.
    """
    if w_NK.dtype != torch.int8 or w_NK.dim() != 2:
        raise ValueError(f"codes {w_NK.dtype} {list(w_NK.shape)}: expected torch.int8 [N, K]")
    with torch.no_grad():
        return _KINDS[path or best_path(w_NK.device)](w_NK.detach())


def int_matmul(a_MK: Tensor, operand: PreparedWeight) -> Tensor:
    """`operand.matmul(a_MK)`: fp32 [M, N], the exact accumulator rounded once."""
    return operand.matmul(a_MK)


def float_matmul(a_MK: Tensor, w_NK: Tensor) -> Tensor:
    """The same product for codes that change every step, so without preparation: fp32 [M, N].

    `a_MK` holds float codes, `w_NK` int8 codes. On CPU an fp32 GEMM; on CUDA int8 where that works.
    """
    if best_path(w_NK.device) == "int_mm":
        return _IntMmWeight(w_NK).matmul(a_MK)
    w = w_NK.float()
    return _fp32_product(a_MK.float(), w, _fp32_is_exact(w))


def best_path(device: torch.device) -> Path:
    """Which path `prepare_weight` takes on `device`; `dqbart doctor` shows it."""
    if device.type == "cuda":
        return "int_mm" if _works("int_mm", device) else "fp32"
    if device.type == "cpu":
        return "fbgemm" if _works("fbgemm", device) else "fp32"
    return "fp32"


@functools.cache
def _works(path: Path, device: torch.device) -> bool:
    """Whether `path` exists here and multiplies the largest codes that reach it correctly."""
    if path == "fbgemm" and "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    w_NK = torch.tensor([[INT16_SAFE], [-INT16_SAFE], [1]], dtype=torch.int8, device=device).repeat(3, 96)
    a_MK = torch.tensor([[127], [-127], [-128]], dtype=torch.int8, device=device).repeat(1, 96)
    try:
        product = _KINDS[path](w_NK).matmul(a_MK)
    except (RuntimeError, NotImplementedError):  # the operator is not built for this processor
        return False
    return torch.equal(product.cpu(), int_matmul_reference(a_MK.cpu(), w_NK.cpu()).float())


@functools.cache
def _saturates() -> bool:
    """Whether fbgemm's int8 product overflows int16 here. Asked of the operator: CPU flags don't say."""
    for rows in (1, 40):  # fbgemm has a kernel for one row and one for many
        a_MK = torch.full((rows, 128), 127.0)
        for value in (127, -128):
            packed = _fbgemm_pack(torch.full((40, 128), value, dtype=torch.int8))
            if not bool((_fbgemm_multiply(a_MK, packed) == 127 * 128 * value).all()):
                return True
    return False


def _fp32_is_exact(w_NK: Tensor) -> bool:
    """Whether no partial sum with |a| <= 128 can pass 2^24."""
    if w_NK.shape[1] <= FP32_PIECE or w_NK.shape[0] == 0:
        return True
    return bool(torch.linalg.vector_norm(w_NK, 1, dim=1).max() * 128 <= EXACT)


def _fp32_product(a_MK: Tensor, w_NK: Tensor, exact: bool) -> Tensor:
    if exact:
        return F.linear(a_MK, w_NK)
    pieces: Sequence[tuple[Tensor, Tensor]] = list(
        zip(a_MK.split(FP32_PIECE, 1), w_NK.split(FP32_PIECE, 1), strict=True)
    )
    total_MN = F.linear(*pieces[0]).double()
    for a, w in pieces[1:]:
        total_MN += F.linear(a, w)
    return total_MN.float()


def _fbgemm_pack(codes_NK: Tensor) -> Any:
    """An opaque packed matrix. The engine setting is global and read by the prepack only: set, then restored."""
    with _engine_lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)  # torch.ao deprecations, not of this operator
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"
        try:
            weight = torch._make_per_tensor_quantized_tensor(codes_NK.contiguous(), 1.0, 0)
            return torch.ops.quantized.linear_prepack(weight, None)
        finally:
            torch.backends.quantized.engine = before


def _fbgemm_multiply(a_MK: Tensor, packed: Any) -> Tensor:
    """fp32 [M, N]: a is read as uint8 with scale 1 and zero point 128, i.e. as the integers it holds."""
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(a_MK, 1.0, 128, packed)  # type: ignore[no-any-return]


def _fbgemm_unpack(packed: Any) -> Tensor:
    return torch.ops.quantized.linear_unpack(packed)[0].int_repr()  # type: ignore[no-any-return]
