"""Attention for teachers, students and packed models: one function behind transformers' attention interface.

transformers' BART, mBART, BERT, RoBERTa, XLM-R, DistilBERT and ALBERT all hand q, k, v `[B, H, L, D]` to whatever
function their config names, after the KV cache was updated. Ours is eager attention plus two things: it quantizes
q, k, v (and probabilities) where a module carries settings, and it shows what it computed to whoever listens
(`dqbart.distill.capture`). So no modelling file is forked. The mask function must be registered under the same
name: without it transformers passes no mask at all and padding is attended, silently.

Integer numerics: one scale per (token, head); scores are exact integer products. Probabilities of 16 bits, the
default, stay float in training; outside it they meet the values in fixed point: exp(score - peak) s_v as a 15-bit code
against the row's largest, 300 times finer than the values themselves. Sums over keys are then integers, the same
whatever the padding, batch or cache length. Paper numerics: one scale per tensor, clip 2.5, q scaled before,
probabilities of 8 bits quantized after dropout (DQ-BART's modeling_bart_quant.py), those of 16 float.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dqbart.quant.quantizers import PaperQuantizer, Quantizer
from dqbart.quant.rounding import exponential

NAME = "dqbart"
_ROW = Quantizer(8, "row")
_TENSOR = PaperQuantizer(8, "tensor")
_LARGEST_WEIGHT = 127 * 257  # two digits of base 256, each an int8: what GPUs multiply


@dataclass(frozen=True)
class AttentionNumerics:
    """How one attention module quantizes; kept as its plain attribute `attention_numerics`."""

    numerics: Literal["integer", "paper"]
    probability_bits: Literal[8, 16]


@dataclass(frozen=True)
class AttentionRecord:
    """What one attention call computed. Shapes: q `[B,H,Q,D]`, k, v `[B,H,K,D]`, the others `[B,H,Q,K]`."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor  # before the softmax, mask added
    probabilities: Tensor  # after the softmax, before dropout and quantization
    scaling: float = 1.0

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """q and k as training multiplies them, quantized where integer numerics ask for it, and the scaling."""
        q, k = self.query, self.key
        if getattr(self.module, "attention_numerics", None) is not None:
            q, k = _ROW.fake(q), _ROW.fake(k)
        if torch.is_autocast_enabled(q.device.type):
            q, k = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k))
        return q, k, self.scaling


_listener: ContextVar[Callable[[AttentionRecord], None] | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Callable[[AttentionRecord], None]) -> Iterator[None]:
    """Call `listener` for every attention computed in the block, by this thread."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """transformers' attention interface: `([B, Q, H, D], probabilities [B, H, Q, K])`."""
    settings: AttentionNumerics | None = getattr(module, "attention_numerics", None)
    scaling = query.size(-1) ** -0.5 if scaling is None else scaling
    integer = settings is not None and settings.numerics == "integer"
    exact = integer and not module.training and not (torch.is_grad_enabled() and query.requires_grad)
    if exact and torch.is_autocast_enabled(query.device.type):
        with without_autocast(query.device):
            return attention(module, query, key, value, attention_mask, scaling, dropout)

    if settings is None:
        scores = query @ key.transpose(2, 3) * scaling
    elif settings.numerics == "paper":
        scores = _TENSOR.fake(query * scaling) @ _TENSOR.fake(key).transpose(2, 3)
    else:
        scores = _integer_scores(query, key, scaling, exact)

    if attention_mask is not None:
        scores = scores + attention_mask
    parts = exponential(scores.float() - scores.float().amax(-1, keepdim=True)) if exact else None
    if parts is None:
        probabilities = F.softmax(scores, dim=-1)
    else:
        total = (parts * 2.0**30).to(torch.int32).sum(-1, keepdim=True, dtype=torch.int64).double()
        probabilities = (parts * (2.0**30 / total).float()).to(scores.dtype)
    if (listener := _listener.get()) is not None:
        listener(AttentionRecord(module, query, key, value, scores, probabilities, scaling))
    weights = F.dropout(probabilities, p=dropout, training=module.training)

    if settings is None:
        output = weights @ value
    elif settings.numerics == "paper":
        output = (_TENSOR.fake(weights) if settings.probability_bits == 8 else weights) @ _TENSOR.fake(value)
    elif settings.probability_bits == 8:
        output = _quantized_mixture(weights, value)
    elif parts is not None:
        output = _fixed_point_mixture(parts, total, value)
    else:
        output = weights @ _ROW.fake(value)
    return output.transpose(1, 2).contiguous(), probabilities


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast would round exact sums to bfloat16."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def _integer_scores(query: Tensor, key: Tensor, scaling: float, exact: bool) -> Tensor:
    """(q . k) s_q s_k scaling, the sum over D exact."""
    if not exact:
        return _ROW.fake(query) @ _ROW.fake(key).transpose(2, 3) * scaling
    q, q_scale = _ROW.quantize_float(query)
    k, k_scale = _ROW.quantize_float(key)
    dots = _integer_product(q, k.transpose(2, 3)).float()
    return (dots.mul_(q_scale).mul_(k_scale.transpose(2, 3)) * scaling).to(query.dtype)


def _quantized_mixture(weights_BHQK: Tensor, value_BHKD: Tensor) -> Tensor:
    """8-bit probabilities: p_j s_v[j] is quantized per query row and meets V's integer codes."""
    codes, scale = _ROW.quantize_float(value_BHKD.detach())
    if torch.is_grad_enabled() and (weights_BHQK.requires_grad or value_BHKD.requires_grad):
        # fake(v) = codes * scale carries the gradient to v; dividing by the scale gives the codes back.
        scaled = _ROW.fake(weights_BHQK * scale.transpose(2, 3))
        return scaled @ (_ROW.fake(value_BHKD) / scale)
    left, left_scale = _ROW.quantize_float(weights_BHQK * scale.transpose(2, 3))
    return (_integer_product(left, codes).float() * left_scale).to(value_BHKD.dtype)


def _fixed_point_mixture(parts_BHQK: Tensor, total_BHQ1: Tensor, value_BHKD: Tensor) -> Tensor:
    """Sum over keys of exp(score - peak) v / total: 15-bit codes of exp(score - peak) s_v times V's integer codes.

    `total`: the sum of exp(score - peak) 2^30, each rounded down. The sum of products is exact: one of each digit.
    """
    codes, scale = _ROW.quantize_float(value_BHKD)
    weights = parts_BHQK * scale.transpose(2, 3)
    top = weights.amax(-1, keepdim=True)
    weights.mul_(top.reciprocal() * _LARGEST_WEIGHT).round_()
    high = weights.mul(2.0**-8).round_()
    low = weights.sub_(high, alpha=256)
    sums = _integer_product(high, codes).double().mul_(256).add_(_integer_product(low, codes))
    factor = top.double() * (2.0**30 / _LARGEST_WEIGHT) / total_BHQ1
    return (sums * factor).to(value_BHKD.dtype)


def _integer_product(left: Tensor, right: Tensor) -> Tensor:
    """Of integers up to 128 and 127, exactly: sums of 1,032 products stay below 2^24, which fp32 holds."""
    with without_autocast(left.device):
        return left @ right if left.size(-1) <= 1032 else left.double() @ right.double()


def register() -> None:
    """Make `"dqbart"` known to transformers: the attention and its mask, together."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, eager_mask)


def use_attention(model: Any) -> None:
    """Switch a model (a float teacher too) to our attention. It lives on the model's config object."""
    register()
    model.set_attn_implementation(NAME)


def quantize_attention(model: Any, *, numerics: str = "integer", probability_bits: int = 16) -> list[str]:
    """Give every attention module of `model` its settings, switch to our attention; returns their names."""
    settings = AttentionNumerics(numerics, probability_bits)  # type: ignore[arg-type]
    names = [n for n, m in model.named_modules() if _is_attention(m)]
    for name in names:
        model.get_submodule(name).attention_numerics = settings
    use_attention(model)
    return names


def _is_attention(module: nn.Module) -> bool:
    """An attention module is one that owns the projections: q and k linear layers, under either name."""
    own = dict(module.named_children())
    return any({q, k} <= own.keys() for q, k in (("q_proj", "k_proj"), ("query", "key"), ("q_lin", "k_lin")))
