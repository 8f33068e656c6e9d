"""Fake-quantized linear and embedding layers, and `prepare`, which puts them into a model in place.

In integer numerics a linear layer multiplies integer codes and scales the exact result once:

    y[m, n] = (sum_k a[m, k] w[n, k]) * s_a[m] * s_w[n] + bias[n]

The sum is exact wherever it is computed (an fp32 GEMM over small integers is exact below 2^24; int8 instructions
always), so training, the packed torch model and the native engines agree to the last bit, whatever the batch.
In paper numerics (DQ-BART's released code) both operands are faked in fp32 and multiplied as floats.

`prepare` changes the class of existing modules rather than replacing them: parameters keep their names, ties and
hooks, so a student checkpoint stays an ordinary transformers checkpoint.
"""

import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from dqbart_kernels.integer_matmul import PreparedWeight, float_matmul, prepare_weight
from torch import Tensor, nn
from torch.nn import functional as F

from dqbart.notation import Bits
from dqbart.quant.attention import quantize_attention, without_autocast
from dqbart.quant.quantizers import PaperQuantizer, Quantizer
from dqbart.quant.rounding import round_once
from dqbart.quant.sharing import require_tied

SUPPORTED = ("bart", "mbart", "bert", "roberta", "xlm-roberta", "distilbert", "albert")


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version  # what inference mode makes has none


class QuantizedWeight:
    """Codes of one weight matrix, recomputed when the matrix may have changed; tied modules share one.

    Without gradient they are kept until the matrix has another storage or autograd version. (Writing through
    `weight.data` changes neither: call `clear()` after that.) A call with gradient keeps nothing and drops what was
    kept, because a step will follow and torch's fused optimizers, Trainer's default, raise no version.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self._fixed = False
        self.clear()

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """No step happens during the block: with gradient too, codes are kept."""
        self._fixed = True
        try:
            yield
        finally:
            self._fixed = False
            self.clear()

    def clear(self) -> None:
        self._seen: tuple[Tensor, int] | None = None  # holds the storage, so that no other one gets its address
        self._codes: tuple[Tensor, Tensor] | None = None
        self._operand: PreparedWeight | None = None

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """int8 codes [N, K] and fp32 scale [N, 1] or [1, 1]."""
        if torch.is_grad_enabled() and weight.requires_grad and not self._fixed:
            self.clear()
            return self.quantizer.quantize(weight.detach())
        if not self._is_seen(weight) or self._codes is None:
            self.clear()
            with torch.no_grad():
                self._codes = self.quantizer.quantize(weight)
            self._seen = weight.detach(), _version(weight)
        return self._codes

    def _is_seen(self, weight: Tensor) -> bool:
        if self._seen is None:
            return False
        seen, version = self._seen
        return seen.data_ptr() == weight.data_ptr() and version == _version(weight)

    def operand(self, weight: Tensor) -> PreparedWeight:
        """The codes in the form that the fast integer product wants."""
        codes, _ = self.codes(weight)
        if self._operand is None:
            self._operand = prepare_weight(codes)
        return self._operand

    def __getstate__(self) -> dict[str, Any]:
        return {"quantizer": self.quantizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["quantizer"])  # type: ignore[misc]


class FakeQuantLinear(nn.Linear):
    """`nn.Linear` with quantized weights and (unless 32-bit) quantized inputs."""

    quantized_weight: QuantizedWeight
    input_quantizer: Quantizer | None
    integer: bool  # multiply codes exactly; else multiply faked floats

    def forward(self, input: Tensor) -> Tensor:
        if not self.integer or self.input_quantizer is None:
            if torch.is_grad_enabled():
                self.quantized_weight.clear()
            x = self.input_quantizer.fake(input) if self.input_quantizer else input
            return F.linear(x, self.quantized_weight.quantizer.fake(self.weight).to(x.dtype), self.bias)
        x_MK = input.reshape(-1, self.in_features)
        if torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad):
            codes_NK, scale_N1 = self.quantized_weight.codes(self.weight)
            y_MN = _IntegerLinear.apply(x_MK, self.weight, self.bias, codes_NK, scale_N1, self.input_quantizer)
        else:
            _, scale_N1 = self.quantized_weight.codes(self.weight)
            y_MN = integer_linear(
                x_MK, self.quantized_weight.operand(self.weight), scale_N1, self.bias, self.input_quantizer
            )
        return y_MN.view(*input.shape[:-1], self.out_features)  # type: ignore[no-any-return]

    def codes(self) -> tuple[Tensor, Tensor]:
        return self.quantized_weight.codes(self.weight)


class FakeQuantEmbedding(nn.Embedding):
    """`nn.Embedding` (or BART's scaled one) whose rows are quantized, one scale per token."""

    quantized_weight: QuantizedWeight
    embed_scale: float = 1.0

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.weight.requires_grad:
            self.quantized_weight.clear()
            # Scales are per row, so quantizing the looked-up rows is quantizing the matrix.
            rows = self.quantized_weight.quantizer.fake(super().forward(input))
        else:
            codes_VD, scale_V1 = self.codes()
            codes, scale = F.embedding(input, codes_VD).float(), F.embedding(input, scale_V1)
            rows = self.quantized_weight.quantizer.values(codes, scale).to(self.weight.dtype)
        return rows * self.embed_scale

    def codes(self) -> tuple[Tensor, Tensor]:
        return self.quantized_weight.codes(self.weight)


def integer_linear(
    x_MK: Tensor, operand: PreparedWeight, scale_N1: Tensor, bias_N: Tensor | None, quantizer: Quantizer
) -> Tensor:
    """The contract's product, without gradient: packed modules and evaluation both run this."""
    a_MK, scale_M1 = _quantize_input(x_MK, quantizer)
    with without_autocast(x_MK.device):
        acc_MN = operand.matmul(a_MK)
    return _finish(acc_MN, scale_M1, scale_N1, bias_N).to(x_MK.dtype)


def _quantize_input(x_MK: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """Codes in the type that the product takes on this device without a copy, and the scale."""
    return quantizer.quantize(x_MK) if x_MK.is_cuda else quantizer.quantize_float(x_MK)


def _finish(acc_MN: Tensor, scale_M1: Tensor, scale_N1: Tensor, bias_N: Tensor | None) -> Tensor:
    """fp32 accumulator -> output, in place, in the order that every engine keeps."""
    y_MN = acc_MN.mul_(scale_M1).mul_(scale_N1.T)
    return y_MN if bias_N is None else y_MN.add_(bias_N)


class _IntegerLinear(torch.autograd.Function):
    """Forward over integer codes; backward as if the codes' values were the weights and inputs (STE)."""

    @staticmethod
    def forward(
        ctx: Any, x_MK: Tensor, w_NK: Tensor, bias_N: Tensor | None, codes_NK: Tensor, scale_N1: Tensor, q: Quantizer
    ) -> Tensor:
        a_MK, scale_M1 = _quantize_input(x_MK, q)
        with without_autocast(x_MK.device):
            acc_MN = float_matmul(a_MK, codes_NK)
        ctx.save_for_backward(a_MK.to(torch.int8), scale_M1, codes_NK, scale_N1)
        ctx.dtypes = x_MK.dtype, w_NK.dtype
        # Gradients on a GPU as autocast would have them for a float layer: in half precision, which holds every code.
        half = x_MK.is_cuda and torch.is_autocast_enabled("cuda")
        ctx.product = torch.get_autocast_dtype("cuda") if half else torch.float32
        return _finish(acc_MN, scale_M1, scale_N1, bias_N).to(x_MK.dtype)

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        a_MK, scale_M1, codes_NK, scale_N1 = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        need_x, need_w, need_bias = ctx.needs_input_grad[:3]
        grad_MN = grad_MN.float()
        dx = dw = db = None
        if need_x:
            dx = ((grad_MN * scale_N1.T).to(ctx.product) @ codes_NK.to(ctx.product)).to(x_dtype)
        if need_w:
            dw = ((grad_MN * scale_M1).T.to(ctx.product) @ a_MK.to(ctx.product)).to(w_dtype)
        if need_bias:
            db = grad_MN.sum(0)
        return dx, dw, db, None, None, None


def quantizable(model: Any, heads: bool = False) -> tuple[list[str], list[str]]:
    """Names of the linear modules, and of the modules that hold the vocabulary matrix, in `model`.

    Linear: every `nn.Linear` of the base model except poolers, with `heads` those and what stands on the base model,
    too. Vocabulary: the input embedding, whatever is tied to it, and the output embedding if tied. Positions and token
    types stay float.
    Raises `ValueError` for an unsupported architecture.
    """
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in SUPPORTED:
        name = getattr(config, "model_type", type(model).__name__)
        raise ValueError(f"architecture {name!r} is not supported: expected one of {', '.join(SUPPORTED)}")
    require_tied(model)
    base = model.base_model
    shared = model.get_input_embeddings().weight
    modules = dict(model.named_modules())
    apart = [n for n, m in modules.items() if n.endswith("embed_tokens") and getattr(m, "weight", shared) is not shared]
    if apart:
        raise ValueError(
            f"{apart[0]} has a vocabulary matrix of its own (tie_word_embeddings=False): expected one shared matrix"
        )
    inside = {id(m) for name, m in base.named_modules() if "pooler" not in name}
    untied = {n for n, m in modules.items() if getattr(m, "weight", None) is not shared}
    linear = [
        n for n, m in modules.items() if isinstance(m, nn.Linear) and (id(m) in inside or (heads and n in untied))
    ]
    vocabulary = [n for n, m in modules.items() if getattr(m, "weight", None) is shared]
    return linear, vocabulary


def prepare(
    model: nn.Module,
    bits: Bits | str,
    *,
    skip: tuple[str, ...] = (),
    numerics: str = "integer",
    probability_bits: int = 16,
    heads: bool = False,
) -> nn.Module:
    """Make `model` fake-quantized, in place, and return it. Parameter names and ties stay as they were.

    `skip`: `fnmatch` patterns of module names left in float. `heads`: quantize poolers and heads, too.
    `numerics="paper"` follows DQ-BART's code: one scale per matrix and per activation tensor, clip 2.5, lm_head in
    float.
    Raises `ValueError` for an architecture, a pattern or bits that don't fit.
    """
    bits = Bits(bits) if isinstance(bits, str) else bits
    if numerics not in ("integer", "paper"):
        raise ValueError(f"numerics {numerics!r}: expected 'integer' or 'paper'")
    if probability_bits not in (8, 16):
        raise ValueError(f"probability_bits {probability_bits!r}: expected 8 or 16")
    if probability_bits == 8 and bits.activations != 8:
        raise ValueError(f"probability_bits 8 with bits {bits}: needs 8-bit activations, such as 2-2-8")
    linear, vocabulary = quantizable(model, heads)
    if any(isinstance(m, FakeQuantLinear | FakeQuantEmbedding) for m in model.modules()):
        raise ValueError("the model is prepared already: expected a float one, such as from from_pretrained")
    for pattern in skip:
        if not fnmatch.filter(linear + vocabulary, pattern):
            raise ValueError(
                f"skip {pattern!r} matches no module; there are {', '.join((linear + vocabulary)[:3])}, ..."
            )
    keep = [n for n in linear + vocabulary if not any(fnmatch.fnmatchcase(n, p) for p in skip)]
    paper = numerics == "paper"
    quantizer = partial(PaperQuantizer, granularity="tensor") if paper else Quantizer
    rows = PaperQuantizer if paper else Quantizer
    act = quantizer(8) if bits.activations == 8 else None
    shared = QuantizedWeight(rows(bits.embeddings)) if bits.embeddings != 32 else None
    modules = dict(model.named_modules())
    for name in keep:
        module: Any = modules[name]
        is_linear = isinstance(module, nn.Linear)
        if name in vocabulary:
            if shared is None or (paper and is_linear):
                continue
            module.quantized_weight = shared
        elif bits.weights != 32:
            module.quantized_weight = QuantizedWeight(quantizer(bits.weights))
        else:
            continue
        if is_linear:
            module.input_quantizer, module.integer = act, not paper
            module.__class__ = FakeQuantLinear
        else:
            module.__class__ = FakeQuantEmbedding
    if bits.activations == 8:
        quantize_attention(model, numerics=numerics, probability_bits=probability_bits)
        if not paper:
            round_once(model)
    return model
