"""LayerNorm and GELU rounded once, so that every engine computes the same floats.

Problem: between two exact integer products stand LayerNorm, GELU and softmax. Two fp32 implementations of them differ
in the last bit; now and then an activation near a rounding tie then takes the other code, and in a 2-bit model one
code moves logits by 0.05 and 4 texts of 100 (measured: 6+6 layers, tatoeba, greedy). Method: outside training they are
computed in float64 and rounded once to fp32, as attention does (attention.py). Rejected: fixing the order of fp32
operations (no engine could be fast then) and a wider quantization step (the tie only moves).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_GELU = {"GELUActivation": "none", "NewGELUActivation": "tanh"}  # by the name of transformers' class


class RoundedOnceLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm`; without gradient computed in float64."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad):
            return super().forward(input)
        weight, bias = self.weight.double(), None if self.bias is None else self.bias.double()
        return F.layer_norm(input.double(), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


class RoundedOnceGELU(nn.Module):
    """transformers' `GELUActivation` and `NewGELUActivation` (by tanh); without gradient computed in float64."""

    approximate = "none"

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and input.requires_grad:
            return F.gelu(input, approximate=self.approximate)
        return F.gelu(input.double(), approximate=self.approximate).to(input.dtype)


def round_once(model: Any) -> None:
    """Swap the classes of `model`'s LayerNorm and GELU modules in place; parameters and names stay."""
    for module in model.modules():
        old = type(module)
        if old is nn.LayerNorm:
            module.__class__ = RoundedOnceLayerNorm
        elif old.__module__ == "transformers.activations" and old.__name__ in _GELU:
            module.__class__, module.rounded_class, module.approximate = RoundedOnceGELU, old, _GELU[old.__name__]


def round_as_before(model: Any) -> None:
    """The inverse of `round_once`."""
    for module in model.modules():
        kind: type = type(module)
        if kind is RoundedOnceLayerNorm:
            module.__class__ = nn.LayerNorm
        elif kind is RoundedOnceGELU:
            module.__class__ = module.__dict__.pop("rounded_class")
            del module.approximate
