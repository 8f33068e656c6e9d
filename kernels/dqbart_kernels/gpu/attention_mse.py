"""How far a student's attention is from its teacher's: the MSE of probabilities, without making any map of them.

    P = softmax(q k^T scaling)  over the keys that a query may see
    loss = sum of (P_s - P_t)^2 over heads and pairs of a real query and a real key / (heads * pairs)

Problem: the maps of both models, their difference and its gradient are [B, H, Q, K] each, 200 MB a layer in bf16 at 8 x
1024 tokens and 12 heads. Method: as FlashAttention-2 (arXiv 2307.08691), tiles of scores are made again wherever they
are needed, from q, k and the log-sum-exp of each row. With G = P_s - P_t and delta = the row's sum of P_s G, the
gradient of the student's scores is 2 P_s (G - delta) / (heads * pairs); one pass makes dq, one dk, without atomics, so
that a step repeated gives the same bits. The teacher gets none. Rejected: one kernel for both, whose dq would be added
up atomically.

Shape suffixes: B examples, H heads, Q queries, K keys, D the student's head width, E the teacher's.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


@triton.jit
def _rows(x_ptr, mask_ptr, start, LENGTH, H, D, BL: tl.constexpr, BD: tl.constexpr):
    """[BL, BD] of one head from row `start` on, zeros where the mask is 0; which rows are real; and their places."""
    row, d = start + tl.arange(0, BL), tl.arange(0, BD)
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1)
    real = tl.load(mask_ptr + b * LENGTH + row, mask=row < LENGTH, other=0) != 0
    place = ((b * LENGTH + row) * H + h)[:, None] * D + d[None, :]
    return tl.load(x_ptr + place, mask=real[:, None] & (d < D)[None, :], other=0), real, place


@triton.jit
def _scores(
    q, k, real, first_query, first_key, scaling,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """fp32 [TILE, TILE]; minus infinity where a query may not see a key."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
    scores = tl.where(real[None, :], scores, float("-inf"))
    if CAUSAL:
        query, key = first_query + tl.arange(0, TILE), first_key + tl.arange(0, TILE)
        scores = tl.where(key[None, :] <= query[:, None], scores, float("-inf"))
    return scores


@triton.jit
def _log_sum_exp(
    q, k_ptr, key_mask_ptr, first, end, K, H, D, scaling,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """fp32 [TILE]; 0 for a query that sees no key, so that its probabilities are 0."""
    peak, total = tl.full((TILE,), float("-inf"), tl.float32), tl.zeros((TILE,), tl.float32)
    for start in range(0, end, TILE):
        k, real, _ = _rows(k_ptr, key_mask_ptr, start, K, H, D, TILE, BD)
        scores = _scores(q, k, real, first, start, scaling, CAUSAL, PRECISION, TILE)
        higher = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(scores - base[:, None]), 1)
        peak = higher
    return tl.where(total == 0.0, 0.0, peak + tl.log(total))


@triton.jit
def _forward(
    q_ptr, k_ptr,  # student's [B, Q, H, D], [B, K, H, D]
    teacher_q_ptr, teacher_k_ptr,  # [B, Q, H, E], [B, K, H, E]
    query_mask_ptr, key_mask_ptr,  # uint8 [B, Q], [B, K]
    sum_ptr, teacher_sum_ptr,  # fp32 [B, H, Q]: log-sum-exps
    error_ptr,  # fp32 [B, H, Q]: sum of (P_s - P_t)^2 over keys
    delta_ptr,  # fp32 [B, H, Q]: sum of P_s (P_s - P_t)
    Q, K, H, D, E, scaling, teacher_scaling,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * TILE
    q, counted, _ = _rows(q_ptr, query_mask_ptr, first, Q, H, D, TILE, BD)
    teacher_q, _, _ = _rows(teacher_q_ptr, query_mask_ptr, first, Q, H, E, TILE, BE)
    end = tl.minimum(K, first + TILE) if CAUSAL else K
    lse = _log_sum_exp(q, k_ptr, key_mask_ptr, first, end, K, H, D, scaling, CAUSAL, PRECISION, TILE, BD)
    teacher_lse = _log_sum_exp(
        teacher_q, teacher_k_ptr, key_mask_ptr, first, end, K, H, E, teacher_scaling, CAUSAL, PRECISION, TILE, BE
    )
    error, delta = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
    for start in range(0, end, TILE):
        k, real, _ = _rows(k_ptr, key_mask_ptr, start, K, H, D, TILE, BD)
        teacher_k, _, _ = _rows(teacher_k_ptr, key_mask_ptr, start, K, H, E, TILE, BE)
        p = tl.exp(_scores(q, k, real, first, start, scaling, CAUSAL, PRECISION, TILE) - lse[:, None])
        theirs = _scores(teacher_q, teacher_k, real, first, start, teacher_scaling, CAUSAL, PRECISION, TILE)
        gap = p - tl.exp(theirs - teacher_lse[:, None])
        error += tl.sum(gap * gap, 1)
        delta += tl.sum(p * gap, 1)
    query = first + tl.arange(0, TILE)
    place = (tl.program_id(2).to(tl.int64) * H + tl.program_id(1)) * Q + query
    tl.store(sum_ptr + place, lse, mask=query < Q)
    tl.store(teacher_sum_ptr + place, teacher_lse, mask=query < Q)
    tl.store(error_ptr + place, tl.where(counted, error, 0.0), mask=query < Q)
    tl.store(delta_ptr + place, delta, mask=query < Q)


@triton.jit
def _score_gradient(
    q, k, teacher_q, teacher_k, counted, real, sum_ptr, teacher_sum_ptr, delta_ptr, first, start, Q, H, scaling,
    teacher_scaling, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """P_s (P_s - P_t - delta), fp32 [TILE, TILE]."""
    query = first + tl.arange(0, TILE)
    place = (tl.program_id(2).to(tl.int64) * H + tl.program_id(1)) * Q + query
    lse = tl.load(sum_ptr + place, mask=counted, other=0)
    teacher_lse = tl.load(teacher_sum_ptr + place, mask=counted, other=0)
    delta = tl.load(delta_ptr + place, mask=counted, other=0)
    p = tl.exp(_scores(q, k, real, first, start, scaling, CAUSAL, PRECISION, TILE) - lse[:, None])
    theirs = _scores(teacher_q, teacher_k, real, first, start, teacher_scaling, CAUSAL, PRECISION, TILE)
    gradient = p * (p - tl.exp(theirs - teacher_lse[:, None]) - delta[:, None])
    return tl.where(counted[:, None], gradient, 0.0)


@triton.jit
def _backward_queries(
    q_ptr, k_ptr, teacher_q_ptr, teacher_k_ptr, query_mask_ptr, key_mask_ptr, sum_ptr, teacher_sum_ptr, delta_ptr,
    factor_ptr,  # fp32 [1]: what the gradient is multiplied by
    gradient_ptr,  # as q
    Q, K, H, D, E, scaling, teacher_scaling,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * TILE
    q, counted, place = _rows(q_ptr, query_mask_ptr, first, Q, H, D, TILE, BD)
    teacher_q, _, _ = _rows(teacher_q_ptr, query_mask_ptr, first, Q, H, E, TILE, BE)
    end = tl.minimum(K, first + TILE) if CAUSAL else K
    total = tl.zeros((TILE, BD), tl.float32)
    for start in range(0, end, TILE):
        k, real, _ = _rows(k_ptr, key_mask_ptr, start, K, H, D, TILE, BD)
        teacher_k, _, _ = _rows(teacher_k_ptr, key_mask_ptr, start, K, H, E, TILE, BE)
        gradient = _score_gradient(q, k, teacher_q, teacher_k, counted, real, sum_ptr, teacher_sum_ptr, delta_ptr,
                                   first, start, Q, H, scaling, teacher_scaling, CAUSAL, PRECISION, TILE)  # fmt: skip
        total = tl.dot(gradient.to(k.dtype), k, total, input_precision=PRECISION)
    inside = (first + tl.arange(0, TILE) < Q)[:, None] & (tl.arange(0, BD) < D)[None, :]
    tl.store(gradient_ptr + place, total * tl.load(factor_ptr), mask=inside)


@triton.jit
def _backward_keys(
    q_ptr, k_ptr, teacher_q_ptr, teacher_k_ptr, query_mask_ptr, key_mask_ptr, sum_ptr, teacher_sum_ptr, delta_ptr,
    factor_ptr,
    gradient_ptr,  # as k
    Q, K, H, D, E, scaling, teacher_scaling,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * TILE
    k, real, place = _rows(k_ptr, key_mask_ptr, start, K, H, D, TILE, BD)
    teacher_k, _, _ = _rows(teacher_k_ptr, key_mask_ptr, start, K, H, E, TILE, BE)
    total = tl.zeros((TILE, BD), tl.float32)
    for first in range(start if CAUSAL else 0, Q, TILE):
        q, counted, _ = _rows(q_ptr, query_mask_ptr, first, Q, H, D, TILE, BD)
        teacher_q, _, _ = _rows(teacher_q_ptr, query_mask_ptr, first, Q, H, E, TILE, BE)
        gradient = _score_gradient(q, k, teacher_q, teacher_k, counted, real, sum_ptr, teacher_sum_ptr, delta_ptr,
                                   first, start, Q, H, scaling, teacher_scaling, CAUSAL, PRECISION, TILE)  # fmt: skip
        total = tl.dot(tl.trans(gradient).to(q.dtype), q, total, input_precision=PRECISION)
    inside = (start + tl.arange(0, TILE) < K)[:, None] & (tl.arange(0, BD) < D)[None, :]
    tl.store(gradient_ptr + place, total * tl.load(factor_ptr), mask=inside)


def attention_mse(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    query_mask_BQ: Tensor,
    key_mask_BK: Tensor,
    scaling: float,
    teacher_scaling: float,
    causal: bool = False,
) -> Tensor:
    """Mean of (P_s - P_t)^2 over heads and pairs of a real query and a real key: one fp32 number, 0 without pairs.

    `student`, `teacher`: q `[B, H, Q, D]` and k `[B, H, K, D]`, fp32, fp16 or bf16, D up to 256 and not the same for
    both. Masks: bool `[B, Q]`, `[B, K]`, true where real; queries see real keys only and, if `causal`, none after
    themselves. Differentiable in the student's q and k. Raises `ValueError` for shapes and types that don't fit.
    """
    _check(student, teacher, query_mask_BQ, key_mask_BK, causal)
    return _AttentionMse.apply(  # type: ignore[no-any-return]
        *student, *teacher, query_mask_BQ, key_mask_BK, scaling, teacher_scaling, causal
    )


def attention_mse_reference(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    query_mask_BQ: Tensor,
    key_mask_BK: Tensor,
    scaling: float,
    teacher_scaling: float,
    causal: bool = False,
) -> Tensor:
    """The same in torch, with maps, in the inputs' type."""
    seen = key_mask_BK[:, None, None, :].expand(-1, -1, query_mask_BQ.shape[1], -1)
    if causal:
        seen = seen & torch.ones(seen.shape[-2:], dtype=torch.bool, device=seen.device).tril()
    hidden = ~seen.any(-1, keepdim=True)  # a query that sees nothing
    maps = []
    for (q, k), factor in ((student, scaling), (teacher, teacher_scaling)):
        scores = (q @ k.mT * factor).masked_fill(~seen, -torch.inf).masked_fill(hidden, 0)
        maps.append(scores.softmax(-1).masked_fill(~seen, 0))
    error = (maps[0] - maps[1].detach()).square() * query_mask_BQ[:, None, :, None]
    return error.sum() / _count(query_mask_BQ, key_mask_BK, student[0].shape[1])


class _AttentionMse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, teacher_q: Tensor, teacher_k: Tensor, query_mask: Tensor, key_mask: Tensor,
        scaling: float, teacher_scaling: float, causal: bool,
    ) -> Tensor:  # fmt: skip
        b, h, queries, d = q.shape
        # [B, L, H, D] is how projections lie in memory: there no copy is made
        inputs = [x.transpose(1, 2).contiguous() for x in (q, k, teacher_q, teacher_k)]
        masks = [mask.contiguous().view(torch.uint8) for mask in (query_mask, key_mask)]
        rows = [torch.empty((b, h, queries), dtype=torch.float32, device=q.device) for _ in range(4)]
        e = teacher_q.shape[-1]
        sizes = (queries, k.shape[2], h, d, e, scaling, teacher_scaling)
        options = launch_options(q.dtype, max(d, e)) | dict(CAUSAL=causal, BD=_wide(d), BE=_wide(e))
        sums, teacher_sums, error, delta = rows
        if error.numel():
            _forward[(triton.cdiv(queries, options["TILE"]), h, b)](*inputs, *masks, *rows, *sizes, **options)
        count = _count(query_mask, key_mask, h)
        ctx.save_for_backward(*inputs, *masks, sums, teacher_sums, delta, count)
        ctx.launch = sizes, options
        return error.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, count = ctx.saved_tensors
        sizes, options = ctx.launch
        factor = (grad * 2 * sizes[5] / count).float().reshape(1)
        gradients: list[Tensor | None] = []
        for x, kernel, need in zip(
            saved[:2], (_backward_queries, _backward_keys), ctx.needs_input_grad[:2], strict=True
        ):
            gradient = torch.empty_like(x) if need else None
            if gradient is not None and gradient.numel():
                kernel[(triton.cdiv(x.shape[1], options["TILE"]), x.shape[2], len(x))](
                    *saved, factor, gradient, *sizes, **options
                )
            gradients.append(None if gradient is None else gradient.transpose(1, 2))
        return *gradients, *[None] * 7


def _count(query_mask_BQ: Tensor, key_mask_BK: Tensor, heads: int) -> Tensor:
    """Heads times pairs, at least 1, without waiting for the device."""
    return (query_mask_BQ.sum(1) * key_mask_BK.sum(1)).sum().clamp_min(1) * heads


def launch_options(dtype: torch.dtype, width: int, hip: bool = torch.version.hip is not None) -> dict[str, Any]:
    """Tile, and how fp32 is multiplied: on NVIDIA in three TF32 products, whose error is that of fp32, on AMD as it is.

    Tiles that registers hold: gpu_compile.py shows what spills.
    """
    half = dtype != torch.float32
    tile = 64 if half and width <= 64 else 32
    return dict(
        TILE=tile, PRECISION="ieee" if hip else "tf32x3", num_warps=4 if half else 8, num_stages=2 if half else 1
    )


def _wide(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _check(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], query_mask: Tensor, key_mask: Tensor, causal: bool
) -> None:
    b, h, queries, _ = student[0].shape if student[0].dim() == 4 else (0, 0, 0, 0)
    keys = student[1].shape[-2] if student[1].dim() == 4 else 0
    for name, (q, k) in (("student", student), ("teacher", teacher)):
        width = q.shape[-1]
        for part, x, length in (("queries", q, queries), ("keys", k, keys)):
            if list(x.shape) != [b, h, length, width] or not 1 <= width <= 256:
                raise ValueError(
                    f"{name}'s {part} {list(x.shape)}: expected [{b}, {h}, {length}, up to 256, as queries]"
                )
            if x.dtype != q.dtype or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise ValueError(f"{name}'s {part} {x.dtype}: expected fp32, fp16 or bf16, as its queries")
    for part, mask, shape in (("queries", query_mask, [b, queries]), ("keys", key_mask, [b, keys])):
        if mask.dtype != torch.bool or list(mask.shape) != shape:
            raise ValueError(f"mask of {part} {mask.dtype} {list(mask.shape)}: expected bool {shape}")
    if causal and queries != keys:
        raise ValueError(f"causal attention of {queries} queries to {keys} keys: expected as many")
