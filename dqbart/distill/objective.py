"""The DQ-BART objective: which tensors of student and teacher are compared, and how they are summed.

Layers are aligned by the map that initialised the student: attention i with m(i); hidden state 0 (the embedding
output) with 0, and i with m(i - 1) + 1. Terms of one kind are summed over layers, as the paper does.
"""

import importlib.util
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dqbart.distill import losses
from dqbart.distill.capture import autocast, forward_with_attention, without_logits
from dqbart.distill.chunked import chunked_terms
from dqbart.quant.attention import AttentionRecord
from dqbart.quant.layers import FakeQuantLinear
from dqbart.recipe import Recipe

ATTENTION = ("encoder_attention", "decoder_attention", "cross_attention")
HIDDEN = {"encoder_hidden": "encoder_hidden_states", "decoder_hidden": "decoder_hidden_states"}
STACK = {
    "encoder_attention": "encoder_layers",
    "encoder_hidden": "encoder_layers",
    "decoder_attention": "decoder_layers",
    "cross_attention": "decoder_layers",
    "decoder_hidden": "decoder_layers",
}
LARGE = 1 << 26  # elements of one model's logits, or of one layer's attention maps: 256 MiB of fp32


class Objective:
    """Loss terms of one batch. `maps`: layer map per stack (`dqbart.student.depth.stack_maps`).

    Calling it gives the weighted total and each term, unweighted, by name. In paper numerics nothing is
    masked, `logits` is an MSE, and `encoder_hidden_last` is an eighth term with encoder_hidden's weight.
    `chunked`: make vocabulary losses without whole logits; None, the default: on GPUs, where they are large.
    `mapless`: make attention losses from queries and keys (dqbart_kernels/gpu/attention_mse.py); None likewise.
    """

    def __init__(self, recipe: Recipe, maps: dict[str, list[int]]) -> None:
        self.recipe, self.maps = recipe, maps
        self.paper = recipe.numerics == "paper"
        self.weights = recipe.terms
        self.attention = {k for k in ATTENTION if k in self.weights}
        self.hidden = [k for k in HIDDEN if k in self.weights]
        self.needs_teacher = set(self.weights) != {"task"}
        self.chunked: bool | None = None
        self.mapless: bool | None = None

    def __call__(
        self, student: Any, teacher: Any, batch: dict[str, Tensor], bare_student: Any = None
    ) -> tuple[Tensor, dict[str, Tensor], Any]:
        """`(total, terms, student output)`. Batch: input_ids, attention_mask `[B,S]`, labels `[B,T]`."""
        bare = student if bare_student is None else bare_student
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        inputs["decoder_input_ids"] = bare.prepare_decoder_input_ids_from_labels(batch["labels"])
        chunked = self._in_chunks(batch["labels"], bare.config.vocab_size)
        head = bare.get_output_embeddings()
        mapless = self._is_mapless(batch, bare.config.encoder_attention_heads)
        forward = partial(
            forward_with_attention, inputs=inputs, kinds=self.attention, hidden=bool(self.hidden),
            keep=AttentionRecord.factors if mapless else lambda record: record.probabilities,
        )  # fmt: skip
        teacher_out: Any = None
        teacher_maps: dict[str, list[Any]] = {}
        teacher_taken: list[Tensor] = []
        if self.needs_teacher:
            with (
                torch.no_grad(),
                autocast(self.recipe.bf16, batch["input_ids"].device),
                without_logits(teacher, chunked) as teacher_taken,
            ):
                teacher_out, teacher_maps = forward(teacher)
        # The head multiplies every chunk by the same codes.
        kept = head.quantized_weight.fixed() if chunked and isinstance(head, FakeQuantLinear) else nullcontext()
        with kept:
            with without_logits(bare, chunked) as student_taken:
                student_out, student_maps = forward(student, modules_of=bare)
            if chunked:
                total, terms = self._chunked_vocabulary(bare, teacher, student_taken, teacher_taken, batch["labels"])
            else:
                terms = self._vocabulary(student_out.logits, getattr(teacher_out, "logits", None), batch["labels"])
                total = self._add(torch.zeros(()), terms)
        others = self._layers(student_out, teacher_out, student_maps, teacher_maps, batch, mapless)
        return self._add(total, others), terms | others, student_out

    def begin(self, student: Any) -> None:
        """The student is as it is."""

    def finish(self, student: Any) -> None:
        """Nothing of the objective is in the student."""

    def _add(self, total: Tensor, terms: dict[str, Tensor]) -> Tensor:
        return sum((self._weight(name) * term for name, term in terms.items()), total)

    def _in_chunks(self, labels_BT: Tensor, vocabulary: int) -> bool:
        if self.paper or not {"task", "logits"} & set(self.weights):
            return False
        if self.chunked is not None:
            return self.chunked
        return labels_BT.device.type != "cpu" and labels_BT.numel() * vocabulary > LARGE

    def _is_mapless(self, batch: dict[str, Tensor], heads: int) -> bool:
        if self.paper or not self.attention:
            return False
        if self.mapless is not None:
            return self.mapless
        ids_BS = batch["input_ids"]
        large = heads * len(ids_BS) * max(ids_BS.shape[1], batch["labels"].shape[1]) ** 2 > LARGE
        return large and ids_BS.is_cuda and importlib.util.find_spec("triton") is not None

    def _weight(self, term: str) -> float:
        return self.weights["encoder_hidden" if term == "encoder_hidden_last" else term]

    def _vocabulary(self, student_BTV: Tensor, teacher_BTV: Tensor | None, labels_BT: Tensor) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        if "task" in self.weights:
            terms["task"] = losses.task_loss(student_BTV, labels_BT, self.recipe.label_smoothing)
        if "logits" in self.weights:
            assert teacher_BTV is not None
            terms["logits"] = self._logits(student_BTV, teacher_BTV, labels_BT != -100)
        return terms

    def _chunked_vocabulary(
        self, student: Any, teacher: Any, student_taken: list[Tensor], teacher_taken: list[Tensor], labels_BT: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same terms, and their total, of real tokens' hidden states."""
        real_BT = labels_BT != -100
        labels_N, student_ND = labels_BT[real_BT], student_taken[0][real_BT]
        teacher_ND = teacher_taken[0][real_BT] if "logits" in self.weights else None

        def terms_of(student_nD: Tensor, piece: slice) -> dict[str, Tensor]:
            teacher_nV = None
            if teacher_ND is not None:
                with torch.no_grad():
                    teacher_nV = _logits_of(teacher, teacher_ND[piece])[None]
            return self._vocabulary(_logits_of(student, student_nD)[None], teacher_nV, labels_N[piece][None])

        with autocast(self.recipe.bf16, labels_BT.device):
            return chunked_terms(student_ND, student.get_output_embeddings(), terms_of, self.weights)

    def _layers(
        self, student: Any, teacher: Any, student_maps: dict[str, list[Any]],
        teacher_maps: dict[str, list[Any]], batch: dict[str, Tensor], mapless: bool,
    ) -> dict[str, Tensor]:  # fmt: skip
        source_BS, target_BT = batch["attention_mask"].bool(), batch["labels"] != -100
        terms: dict[str, Tensor] = {}
        masks = {
            "encoder_attention": (source_BS, source_BS),
            "decoder_attention": (target_BT, target_BT),
            "cross_attention": (target_BT, source_BS),
        }
        for kind in ATTENTION:
            if kind in self.attention:
                pairs = [(i, m) for i, m in enumerate(self.maps[STACK[kind]])]
                compare: Any = losses.paper_mse if self.paper else losses.attention_mse
                if mapless:
                    compare = partial(_attention_mse, causal=kind == "decoder_attention")
                args: tuple[Tensor, ...] = () if self.paper else masks[kind]
                terms[kind] = _sum(compare, student_maps[kind], teacher_maps[kind], pairs, *args)
        for kind in self.hidden:
            pairs = [(0, 0)] + [(i + 1, m + 1) for i, m in enumerate(self.maps[STACK[kind]])]
            compare = losses.paper_mse if self.paper else losses.hidden_mse
            args = () if self.paper else (source_BS if kind == "encoder_hidden" else target_BT,)
            ours, theirs = (getattr(out, HIDDEN[kind]) for out in (student, teacher))
            terms[kind] = _sum(compare, ours, theirs, pairs, *args)
        if self.paper and "encoder_hidden" in self.hidden:
            terms["encoder_hidden_last"] = losses.paper_last_hidden(
                student.encoder_last_hidden_state, teacher.encoder_last_hidden_state
            )
        return terms

    def _logits(self, student_BTV: Tensor, teacher_BTV: Tensor, target_BT: Tensor) -> Tensor:
        if self.paper:
            return losses.paper_mse(student_BTV, teacher_BTV)
        if self.recipe.logits_loss == "mse":
            return losses.logits_mse(student_BTV, teacher_BTV, target_BT)
        return losses.logits_kl(student_BTV, teacher_BTV, target_BT, self.recipe.temperature)


def open_objective(recipe: Recipe, maps: dict[str, list[int]], student: Any, teacher: Any, pooling: Any = None) -> Any:
    """The objective of a resolved recipe; `pooling` is that of sentence embeddings.

    Raises `ValueError` where student and teacher can't be compared so.
    """
    if student.config.is_encoder_decoder:
        return Objective(recipe, maps)
    from dqbart.distill.elastic import ElasticObjective
    from dqbart.distill.encoder_objective import EncoderObjective

    if recipe.elastic:
        return ElasticObjective.of(recipe, student, teacher)
    (layer_map,) = maps.values()
    return EncoderObjective(recipe, layer_map, student, teacher, pooling)


def _logits_of(model: Any, hidden: Tensor) -> Tensor:
    """What BART and mBART make of the decoder's last hidden states."""
    return model.get_output_embeddings()(hidden) + model.final_logits_bias


def _attention_mse(
    student: tuple[Tensor, Tensor, float], teacher: tuple[Tensor, Tensor, float], *masks: Tensor, causal: bool
) -> Tensor:
    """`losses.attention_mse` of what `AttentionRecord.factors` gives, where padding is at the end, as in batches."""
    from dqbart_kernels.gpu.attention_mse import attention_mse  # needs triton

    query_mask, key_mask = masks
    return attention_mse(student[:2], teacher[:2], query_mask, key_mask, student[2], teacher[2], causal)


def _sum(compare: Any, ours: Any, theirs: Any, pairs: list[tuple[int, int]], *masks: Tensor) -> Tensor:
    return torch.stack([compare(ours[i], theirs[j], *masks) for i, j in pairs]).sum()
