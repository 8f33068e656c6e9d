"""The DQ-BART objective: which tensors of student and teacher are compared, and how they are summed.

Layers are aligned by the map that initialised the student: attention i with m(i); hidden state 0 (the embedding
output) with 0, and i with m(i - 1) + 1. Terms of one kind are summed over layers, as the paper does.
"""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from dqbart.distill import losses
from dqbart.distill.capture import forward_with_attention, no_grad_autocast
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


class Objective:
    """Loss terms of one batch. `maps`: layer map per stack (`dqbart.student.depth.stack_maps`).

    Calling it gives the weighted total and each term, unweighted, by name. In paper numerics nothing is
    masked, `logits` is an MSE, and `encoder_hidden_last` is an eighth term with encoder_hidden's weight.
    """

    def __init__(self, recipe: Recipe, maps: dict[str, list[int]]) -> None:
        self.recipe, self.maps = recipe, maps
        self.paper = recipe.numerics == "paper"
        self.weights: dict[str, float] = {k: w for k, w in asdict(recipe.losses).items() if w}
        self.attention = {k for k in ATTENTION if k in self.weights}
        self.hidden = [k for k in HIDDEN if k in self.weights]
        self.needs_teacher = set(self.weights) != {"task"}

    def __call__(
        self, student: Any, teacher: Any, batch: dict[str, Tensor], bare_student: Any = None
    ) -> tuple[Tensor, dict[str, Tensor], Any]:
        """`(total, terms, student output)`. Batch: input_ids, attention_mask `[B,S]`, labels `[B,T]`."""
        bare = student if bare_student is None else bare_student
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        inputs["decoder_input_ids"] = bare.prepare_decoder_input_ids_from_labels(batch["labels"])
        teacher_out: Any = None
        teacher_maps: dict[str, list[Tensor]] = {}
        if self.needs_teacher:
            with torch.no_grad(), no_grad_autocast(self.recipe.bf16, batch["input_ids"].device):
                teacher_out, teacher_maps = forward_with_attention(
                    teacher, inputs, self.attention, hidden=bool(self.hidden)
                )
        student_out, student_maps = forward_with_attention(
            student, inputs, self.attention, hidden=bool(self.hidden), modules_of=bare
        )
        terms = self.terms(student_out, teacher_out, student_maps, teacher_maps, batch)
        total = sum((self._weight(name) * term for name, term in terms.items()), torch.zeros(()))
        return total, terms, student_out

    def _weight(self, term: str) -> float:
        return self.weights["encoder_hidden" if term == "encoder_hidden_last" else term]

    def terms(
        self, student: Any, teacher: Any, student_maps: dict[str, list[Tensor]],
        teacher_maps: dict[str, list[Tensor]], batch: dict[str, Tensor],
    ) -> dict[str, Tensor]:  # fmt: skip
        labels_BT, source_BS = batch["labels"], batch["attention_mask"].bool()
        target_BT = labels_BT != -100
        terms: dict[str, Tensor] = {}
        if "task" in self.weights:
            terms["task"] = losses.task_loss(student.logits, labels_BT, self.recipe.label_smoothing)
        if "logits" in self.weights:
            terms["logits"] = self._logits(student.logits, teacher.logits, target_BT)
        masks = {
            "encoder_attention": (source_BS, source_BS),
            "decoder_attention": (target_BT, target_BT),
            "cross_attention": (target_BT, source_BS),
        }
        for kind in ATTENTION:
            if kind in self.attention:
                pairs = [(i, m) for i, m in enumerate(self.maps[STACK[kind]])]
                compare: Any = losses.paper_mse if self.paper else losses.attention_mse
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


def _sum(compare: Any, ours: Any, theirs: Any, pairs: list[tuple[int, int]], *masks: Tensor) -> Tensor:
    return torch.stack([compare(ours[i], theirs[j], *masks) for i, j in pairs]).sum()
