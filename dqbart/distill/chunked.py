"""Vocabulary losses from hidden states, a chunk of tokens at a time, so that no model's logits are ever whole.

Problem: the logits of 2048 tokens over 50265 words take 412 MB in fp32, and comparing those of two models holds about
eight tensors of that size. Method: losses are means over tokens, so each chunk's logits, loss and gradients are made
and dropped in the forward pass; the backward pass scales the gradients of hidden states and head that were added up
(as Liger's fused linear losses do, arXiv 2410.10989). Rejected: checkpointing each chunk, which would multiply by both
heads once more.

Shape suffixes: N tokens, n of a chunk, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK = 1024  # tokens
LARGE = 1 << 26  # elements of one model's logits: 256 MiB of fp32


def word_terms(
    hidden_ND: Tensor,
    head: Any,
    terms_of: Callable[[Tensor, slice], dict[str, Tensor]],
    weights: dict[str, float],
) -> tuple[Tensor, dict[str, Tensor]]:
    """`chunked_terms` where the logits of all tokens would be large; at once, which is quicker, where not."""
    if len(hidden_ND) * len(head.weight) > LARGE:
        return chunked_terms(hidden_ND, head, terms_of, weights)
    terms = terms_of(hidden_ND, slice(0, len(hidden_ND)))
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum(), terms


def chunked_terms(
    hidden_ND: Tensor,
    head: nn.Module,
    terms_of: Callable[[Tensor, slice], dict[str, Tensor]],
    weights: dict[str, float],
) -> tuple[Tensor, dict[str, Tensor]]:
    """`(weighted total, terms)` of loss terms that are means over tokens.

    `terms_of(hidden_nD, piece)` maps the student's hidden states of the tokens in `piece` to each term's mean over
    them; it must use no parameters but those of `head`. Gradients flow from the total alone: terms are for show.
    """
    names: list[str] = []
    parameters = [p for p in head.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
    total, *means = _ChunkedTotal.apply(hidden_ND, terms_of, weights, names, *parameters)
    return total, dict(zip(names, means, strict=True))


class _ChunkedTotal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        terms_of: Callable[[Tensor, slice], dict[str, Tensor]],
        weights: dict[str, float],
        names: list[str],
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        count = len(hidden_ND)
        wanted = [x for x, need in zip((hidden_ND, *parameters), _needed(ctx), strict=True) if need]
        sums = [torch.zeros_like(x) for x in wanted]
        means: dict[str, Tensor] = {}
        for start in range(0, max(count, 1), CHUNK):  # of no tokens at all too, which have losses of their own
            piece = slice(start, min(start + CHUNK, count))
            share = (piece.stop - start) / count if count else 1.0
            with torch.set_grad_enabled(bool(wanted)):
                hidden_nD = hidden_ND[piece].detach().requires_grad_(ctx.needs_input_grad[0])
                terms = terms_of(hidden_nD, piece)
                total = torch.stack([weights[name] * share * term for name, term in terms.items()]).sum()
            for name, term in terms.items():
                part = share * term.detach()
                means[name] = means[name] + part if name in means else part
            if wanted:
                leaves = [hidden_nD if x is hidden_ND else x for x in wanted]
                for x, so_far, grad in zip(wanted, sums, torch.autograd.grad(total, leaves), strict=True):
                    (so_far[piece] if x is hidden_ND else so_far).add_(grad)
        ctx.save_for_backward(*sums)
        names.extend(means)
        outputs = tuple(means.values())
        ctx.mark_non_differentiable(*outputs)
        return torch.stack([weights[name] * mean for name, mean in means.items()]).sum(), *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scaled = iter([grad * gradient for gradient in ctx.saved_tensors])
        first, *others = (next(scaled) if need else None for need in _needed(ctx))
        return first, None, None, None, *others


def _needed(ctx: Any) -> tuple[bool, ...]:
    """Which of hidden states and parameters want a gradient."""
    return ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]
