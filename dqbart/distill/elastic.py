"""DynaBERT's objective: one set of weights that works at every width, then at every width and depth.

arXiv 2004.04037. In each step every sub-network (dqbart/student/width.py) learns from a fixed teacher: a soft
cross-entropy of its predictions and the mean squared error of all its hidden states. In stage "width" the teacher is
the whole model; in "depth" it is what the first stage made, at the sub-network's width (as the article has it; the
released code runs it at full width every time). A regression compares predictions by their squared error (there,
they are dropped). A sub-network's layers are held to what the teacher's same layers are given, and its last hidden
state to the teacher's last one, as released.

Twelve graphs at once would need the memory of twelve models in training, so each sub-network's gradients are made
right after its forward pass and added up, and the total's backward pass hands out the sums. Rejected: a backward pass
per sub-network inside the objective, since what scales, clips or accumulates the loss in Trainer would not see it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dqbart.data.batches import LABELS, model_inputs
from dqbart.distill import losses
from dqbart.distill.capture import autocast, without_logits
from dqbart.distill.chunked import word_terms
from dqbart.distill.encoder_objective import of_real, real, task_term
from dqbart.recipe import Recipe
from dqbart.student.maps import kept_layers
from dqbart.student.width import Shared, width_sizes

TERMS = ("task", "logits", "hidden")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What is trained: sub-networks of all `widths` and `depths`, by terms of these `weights`. `same_width`: the
    teacher is an elastic model, too, and runs at the sub-network's width (and all of its depth).
    """

    weights: dict[str, float]
    widths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    depths: tuple[float, ...] = (1.0,)
    same_width: bool = False

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if name not in TERMS or not weight >= 0:
                raise ValueError(f"weights {name!r}: {weight!r}: expected {', '.join(TERMS)} with at least 0")
        if not any(self.weights.values()) or not self.widths or not self.depths:
            raise ValueError(f"{self}: expected a width, a depth and a positive weight at least")


class ElasticObjective:
    """Loss terms of one batch, each summed over sub-networks. Called like `dqbart.distill.objective.Objective`."""

    def __init__(self, stage: Stage, *, bf16: bool = False) -> None:
        self.stage = stage
        self.bf16 = bf16
        self.weights = {name: weight for name, weight in self.stage.weights.items() if weight}
        self.needs_teacher = set(self.weights) != {"task"}
        self._made: dict[tuple[int, float, float], Shared] = {}

    @classmethod
    def of(cls, recipe: Recipe, student: Any, teacher: Any) -> "ElasticObjective":
        """The objective of one of a resolved recipe's stages; the one that has depths is held to the student as the
        stage before it left it. Raises `ValueError` for what the method doesn't know, and as `width_sizes` and
        `kept_layers` do.
        """
        for name in recipe.terms:
            if name not in TERMS:
                raise ValueError(f"losses.{name}: method {recipe.method!r} has {', '.join(TERMS)}")
        for name, known in (("temperature", 1), ("logits_loss", "kl"), ("label_smoothing", 0)):
            if getattr(recipe, name) != known:
                raise ValueError(
                    f"{name} {getattr(recipe, name)!r}: method {recipe.method!r} has {known!r} alone; leave it out"
                )
        for width in recipe.widths:
            width_sizes(student.config, width)
        for depth in recipe.depths:
            kept_layers(student.config.num_hidden_layers, depth)
        stage = Stage(
            weights=recipe.terms, widths=recipe.widths, depths=recipe.depths, same_width=recipe.depths != (1.0,)
        )
        return cls(stage, bf16=recipe.bf16)

    def begin(self, student: Any) -> None:
        """Nothing is put into a student."""

    def finish(self, student: Any) -> None:
        """Let go of the models."""
        self._made.clear()

    def __call__(
        self, student: Any, teacher: Any, batch: dict[str, Tensor], bare_student: Any = None
    ) -> tuple[Tensor, dict[str, Tensor], Any]:
        """`(weighted total, terms, output of the largest sub-network)`.

        Batch: input_ids and attention_mask [B, L], and labels where `task` counts. Gradients flow from the total
        alone. In distributed training they are averaged here: DistributedDataParallel does it only after a
        forward pass of its own. Raises `ValueError` for models that don't fit each other or the method.
        """
        bare = student if bare_student is None else bare_student
        if self.needs_teacher and teacher.config.num_hidden_layers != bare.config.num_hidden_layers:
            raise ValueError(
                f"student of {bare.config.num_hidden_layers} layers, teacher of {teacher.config.num_hidden_layers}: "
                "elastic training needs as many; depth is what it makes elastic"
            )
        terms: dict[str, Tensor] = {}
        outputs: list[Any] = []
        parameters = [p for p in bare.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
        total = _Summed.apply(lambda: self._losses(bare, teacher, batch, terms, outputs), *parameters)
        return total, terms, outputs[-1]

    def _losses(
        self, student: Any, teacher: Any, batch: dict[str, Tensor], terms: dict[str, Tensor], outputs: list[Any]
    ) -> Iterator[Tensor]:
        """Each sub-network's loss, smallest first; `terms` and `outputs` are filled on the way."""
        inputs = model_inputs(student, {name: batch[name] for name in _INPUTS if name in batch})
        hidden, device = "hidden" in self.weights, batch["input_ids"].device
        theirs: Said | None = None
        for width in sorted(self.stage.widths):
            if self.needs_teacher and (theirs is None or self.stage.same_width):
                runs = self._shared(teacher, width, 1.0) if self.stage.same_width else teacher
                with torch.no_grad(), autocast(self.bf16, device):
                    theirs = say(runs, inputs, hidden=hidden)
            for depth in sorted(self.stage.depths):
                shared = self._shared(student, width, depth)
                with autocast(self.bf16, device):
                    ours = say(shared, inputs, hidden=hidden)
                    total, found = head_terms(self.weights, ours, theirs, batch)
                if hidden:
                    assert theirs is not None
                    found["hidden"] = _hidden_term(ours.output, theirs.output, batch, shared.kept)
                    total = total + self.weights["hidden"] * found["hidden"]
                for name, term in found.items():
                    terms[name] = terms.get(name, torch.zeros_like(term)) + term.detach()
                outputs[:] = [ours.output]
                yield total

    def _shared(self, model: Any, width: float, depth: float) -> Shared:
        key = id(model), width, depth
        if key not in self._made:
            self._made[key] = Shared(model, width, depth)  # keeps the model, and so its id
        return self._made[key]


class Said(NamedTuple):
    """A model's output. Of one with a language head, which put out no logits: the hidden states that the head would
    have taken, and the head.
    """

    output: Any
    config: Any
    words_BLD: Tensor | None = None
    head: Any = None


def say(model: Any, inputs: dict[str, Tensor], *, hidden: bool = False) -> Said:
    """Run a model, or a `Shared` part of one, whose head is the whole model's."""
    whole, runs = (model.model, model.blank) if isinstance(model, Shared) else (model, model)
    with without_logits(runs) as taken:
        output = model(**inputs, output_hidden_states=hidden)
    return Said(output, whole.config, *((taken[0], whole.get_output_embeddings()) if taken else ()))


def head_terms(
    weights: dict[str, float], ours: Said, theirs: Said | None, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted total and terms of what heads say: `task`, of the labels, and `logits`, of the teacher, whatever the
    head.

    Classes [B, C]: cross-entropy and soft cross-entropy; of a regression, or one class: mean squared errors. Words:
    mean over positions with a label, or, of `logits`, real ones if there are no labels per position; the head runs on
    these alone. Question answering: mean of both ends, over real positions. Raises `ValueError` for models without a
    head or of several labels, and for `task` without labels.
    """
    if "task" in weights and not set(LABELS) & batch.keys():
        raise ValueError(f"a batch of {', '.join(batch)} gives no loss: the term 'task' needs labels")
    if ours.words_BLD is not None:
        return _word_terms(weights, ours, theirs, batch)
    terms = {}
    if "task" in weights:
        terms["task"] = task_term(_kind(ours), ours.output, batch)
    if "logits" in weights:
        assert theirs is not None
        terms["logits"] = _logits_term(ours, theirs, batch)
    return sum((weights[name] * term for name, term in terms.items()), torch.zeros(())), terms


def _kind(said: Said) -> str:
    """The task that a head without words is for."""
    output = said.output
    if hasattr(output, "start_logits"):
        return "questions"
    if not hasattr(output, "logits"):
        raise ValueError(
            f"{type(output).__name__} has no logits: give the model a head, or the terms 'task' and 'logits' weight 0"
        )
    if said.config.problem_type == "multi_label_classification":
        raise ValueError("problem_type 'multi_label_classification': expected one label, or a regression")
    is_number = output.logits.size(-1) == 1 or said.config.problem_type == "regression"
    return "regression" if is_number else "classification"


def _logits_term(ours: Said, theirs: Said, batch: dict[str, Tensor]) -> Tensor:
    kind = _kind(ours)
    if kind == "questions":
        ends, mask_BL = ("start_logits", "end_logits"), real(batch)
        pairs = [[of_real(getattr(said.output, end), mask_BL) for said in (ours, theirs)] for end in ends]
        return torch.stack([losses.soft_cross_entropy(a, b) for a, b in pairs]).mean()
    a, b = ours.output.logits, theirs.output.logits
    return F.mse_loss(a.float(), b.float()) if kind == "regression" else losses.soft_cross_entropy(a, b)


def _word_terms(
    weights: dict[str, float], ours: Said, theirs: Said | None, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    assert ours.words_BLD is not None
    counted_BL, labels_N = real(batch), None
    if "labels" in batch and batch["labels"].shape == counted_BL.shape:
        counted_BL = batch["labels"] != -100
        labels_N = batch["labels"][counted_BL]
    ours_ND = ours.words_BLD[counted_BL]
    if not len(ours_ND):  # of which means would be NaN
        nothing = ours_ND.sum().float()
        return nothing, {name: nothing for name in weights if name != "hidden"}

    def terms_of(ours_nD: Tensor, piece: slice) -> dict[str, Tensor]:
        z_nV, terms = ours.head(ours_nD), {}
        if "task" in weights:
            assert labels_N is not None
            terms["task"] = F.cross_entropy(z_nV.float(), labels_N[piece])
        if "logits" in weights:
            assert theirs is not None and theirs.words_BLD is not None
            with torch.no_grad():
                t_nV = theirs.head(theirs.words_BLD[counted_BL][piece])
            terms["logits"] = losses.soft_cross_entropy(z_nV, t_nV)
        return terms

    return word_terms(ours_ND, ours.head, terms_of, weights)


def _hidden_term(ours: Any, theirs: Any, batch: dict[str, Tensor], kept: list[int]) -> Tensor:
    """Embedding outputs and inputs of the same layers, and the last hidden states."""
    mask_BL, rows = real(batch), [*kept, len(theirs.hidden_states) - 1]
    pairs = zip(ours.hidden_states, rows, strict=True)
    return torch.stack([losses.hidden_mse(a, theirs.hidden_states[i], mask_BL) for a, i in pairs]).sum()


class _Summed(torch.autograd.Function):
    """Sum of losses, gradients made one loss at a time."""

    @staticmethod
    def forward(ctx: Any, each: Callable[[], Iterator[Tensor]], *parameters: Tensor) -> Tensor:
        sums: list[Tensor | None] = [None] * len(parameters)
        values = []
        with torch.set_grad_enabled(bool(parameters)):
            for loss in each():
                values.append(loss.detach())
                if parameters:
                    found = torch.autograd.grad(loss, parameters, allow_unused=True)
                    sums = [a if b is None else b if a is None else a + b for a, b in zip(sums, found, strict=True)]
        ctx.save_for_backward(*(_mean_over_processes(gradient) for gradient in sums))
        return torch.stack(values).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, *(None if gradient is None else grad * gradient for gradient in ctx.saved_tensors)


def _mean_over_processes(gradient: Tensor | None) -> Tensor | None:
    from torch import distributed

    if gradient is None or not (distributed.is_available() and distributed.is_initialized()):
        return gradient
    gradient = gradient.contiguous()
    distributed.all_reduce(gradient)
    return gradient / distributed.get_world_size()
