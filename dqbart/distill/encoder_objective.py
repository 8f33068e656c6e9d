"""The objective of encoders: every method's losses, between the layers that its terms name.

Terms of one kind are summed over the mapped layers. `hidden` compares the outputs of layer i and map(i), `attention`
and `scores` their attention maps; `embedding` is hidden state 0; relations are those of the student's last layer and
one teacher layer. A student of another width is compared through one learned projection, TinyBERT's `fit_dense`; the
order of sentences is read off the first token by a linear head. Both are made inside the student's forward pass, by a
hook, so that a wrapper for distributed training sees their parameters used; `finish` takes them out again.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dqbart.architectures import first_position
from dqbart.data.batches import model_inputs
from dqbart.distill import losses
from dqbart.distill.capture import autocast, forward_with_attention, without_logits
from dqbart.distill.chunked import word_terms
from dqbart.packed.sentence import Pooling, pool
from dqbart.quant.attention import AttentionRecord
from dqbart.recipe import Recipe

MAPS = ("attention", "scores")
RELATIONS = {"queries": "query", "keys": "key", "values": "value"}
COMPARED = ("embedding", "hidden", "cosine")  # hidden states, through a projection where widths differ
HIDDEN = (*COMPARED, "sentence", "order")
FAR = -1e4  # a logit whose probability is 0 in fp32


class EncoderObjective:
    """Loss terms of one batch. `layer_map`: the teacher layer, from 0, that each student layer is held to.

    Calling it gives the weighted total, each term, unweighted, by name, and the student's output. Raises `ValueError`
    at once for a student and a teacher that the terms can't compare.
    """

    def __init__(
        self, recipe: Recipe, layer_map: list[int], student: Any, teacher: Any, pooling: Pooling | None = None
    ) -> None:
        self.recipe, self.layer_map, self.weights = recipe, layer_map, recipe.terms
        self.needs_teacher = bool(set(self.weights) - {"task", "order"})
        self.pooling = pooling or Pooling()
        ours, theirs = student.config, teacher.config
        self.last = recipe.teacher_layer or theirs.num_hidden_layers
        if not 1 <= self.last <= theirs.num_hidden_layers:
            raise ValueError(f"teacher_layer {self.last}: expected from 1 to {theirs.num_hidden_layers}")
        self.relation_heads = recipe.relation_heads or theirs.num_attention_heads
        self._check(ours, theirs)
        self.width = theirs.hidden_size

    def _check(self, ours: Any, theirs: Any) -> None:
        by_head = [name for name in (*MAPS, "attention_kl") if name in self.weights]
        if by_head and ours.num_attention_heads != theirs.num_attention_heads:
            raise ValueError(
                f"losses.{by_head[0]}: compares head with head, but the student has {ours.num_attention_heads}, the "
                f"teacher {theirs.num_attention_heads}; give heads {theirs.num_attention_heads}, or method 'minilm2'"
            )
        if set(RELATIONS) & set(self.weights):
            for name, width in (("student", ours.hidden_size), ("teacher", theirs.hidden_size)):
                if width % self.relation_heads:
                    fit = [n for n in range(1, width + 1) if ours.hidden_size % n == theirs.hidden_size % n == 0]
                    raise ValueError(
                        f"relation_heads {self.relation_heads}: don't divide the {name}'s width {width}; "
                        f"expected one of {', '.join(map(str, fit))}"
                    )
        if self.recipe.task == "s2s" and first_position(ours) != first_position(theirs):
            raise ValueError(
                f"task 's2s': positions begin at {first_position(theirs)} in the teacher ({theirs.model_type}), at "
                f"{first_position(ours)} in the student ({ours.model_type}); expected models of one family"
            )
        if "logits" in self.weights and (ours.num_labels, ours.vocab_size) != (theirs.num_labels, theirs.vocab_size):
            raise ValueError(
                f"losses.logits: the student has {ours.num_labels} labels and {ours.vocab_size} tokens, the teacher "
                f"{theirs.num_labels} and {theirs.vocab_size}; expected the same, or a method without logits"
            )

    def begin(self, student: Any) -> None:
        """Put projection and head, where they are needed, into a student that is going to be trained."""
        width = student.config.hidden_size
        if set(COMPARED) & set(self.weights) and width != self.width:
            student.distill_projection = nn.Linear(width, self.width, device=student.device)
        if "order" in self.weights:
            student.distill_order = nn.Linear(width, 2, device=student.device)
        if _extras(student):
            student.distill_hook = student.register_forward_hook(_with_extras)

    def finish(self, student: Any) -> None:
        """Take them out of a trained student."""
        for name in _extras(student):
            delattr(student, name)
        if hasattr(student, "distill_hook"):
            student.distill_hook.remove()
            del student.distill_hook

    def __call__(
        self, student: Any, teacher: Any, batch: dict[str, Tensor], bare_student: Any = None
    ) -> tuple[Tensor, dict[str, Tensor], Any]:
        bare = student if bare_student is None else bare_student
        words = self.recipe.task in ("text", "s2s") and bool({"task", "logits"} & set(self.weights))
        theirs, their_taps, their_words = None, _Taps({}), [torch.empty(0)]
        if self.needs_teacher:
            their_taps = _Taps({m: {*MAPS} for m in self.layer_map}, self.last - 1, set(self.weights))
            with (
                torch.no_grad(),
                autocast(self.recipe.bf16, batch["input_ids"].device),
                without_logits(teacher) as their_words,
            ):
                theirs = self._forward(teacher, teacher, model_inputs(teacher, batch), their_taps)
        layers = range(len(self.layer_map))
        our_taps = _Taps({i: {*MAPS} for i in layers}, layers[-1], set(self.weights))
        with without_logits(bare) as our_words:
            ours = self._forward(student, bare, model_inputs(bare, batch), our_taps)
        terms = dict(self._terms(ours, theirs, our_taps, their_taps, batch))
        total = sum((self.weights[name] * term for name, term in terms.items()), torch.zeros(()))
        if words:
            more, said = self._word_terms(bare, teacher, our_words[0], their_words[0:1], batch)
            total, terms = total + more, said | terms
        # A wrapper for distributed training waits for gradients of all that went into the output.
        return total + 0 * sum(x.sum() for x in ours.values() if isinstance(x, Tensor)), terms, ours

    def _word_terms(
        self, student: Any, teacher: Any, ours_BLD: Tensor, theirs: list[Tensor], batch: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted total and terms over the vocabulary, of the positions that have a label or, on plain text, are real:
        whole logits of a batch would be gigabytes.
        """
        labels_BL = batch.get("labels")
        if labels_BL is None or (self.recipe.task == "text" and "logits" in self.weights):
            asked_BL = real(batch)
        else:
            asked_BL = labels_BL != -100
        labels_N = None if labels_BL is None else labels_BL[asked_BL]
        ours_ND = ours_BLD[asked_BL]
        theirs_ND = theirs[0][asked_BL] if "logits" in self.weights else None
        labelled = 0 if labels_N is None else int((labels_N != -100).sum())

        def terms_of(ours_nD: Tensor, piece: slice) -> dict[str, Tensor]:
            z_nV = student.get_output_embeddings()(ours_nD)
            terms = {}
            if "task" in self.weights:
                assert labels_N is not None
                loss = F.cross_entropy(
                    z_nV.float(), labels_N[piece], reduction="sum", label_smoothing=self.recipe.label_smoothing
                )
                terms["task"] = loss * (len(labels_N) / max(1, labelled * len(z_nV)))  # chunks are weighted by tokens
            if theirs_ND is not None:
                with torch.no_grad():
                    t_nV = teacher.get_output_embeddings()(theirs_ND[piece])
                compare = losses.logits_mse if self.recipe.logits_loss == "mse" else losses.logits_kl
                more = (self.recipe.temperature,) if compare is losses.logits_kl else ()
                terms["logits"] = compare(z_nV[None], t_nV[None], asked_BL.new_ones(1, len(z_nV)), *more)
            return terms

        with autocast(self.recipe.bf16, ours_BLD.device):
            return word_terms(ours_ND, student.get_output_embeddings(), terms_of, self.weights)

    def _forward(self, model: Any, bare: Any, inputs: dict[str, Tensor], taps: "_Taps") -> Any:
        hidden = bool(set(HIDDEN) & set(self.weights))
        if not taps.wanted():
            return model(**inputs, output_hidden_states=hidden)
        return forward_with_attention(model, inputs, {"encoder_attention"}, hidden=hidden, modules_of=bare, keep=taps)[
            0
        ]

    def _terms(
        self, ours: Any, theirs: Any, our_maps: "_Taps", their_maps: "_Taps", batch: dict[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        mask_BL = real(batch)
        if self.recipe.task not in ("text", "s2s"):
            if "task" in self.weights:
                yield "task", task_term(str(self.recipe.task), ours, batch, self.recipe.label_smoothing)
            if "logits" in self.weights:
                yield "logits", logits_term(self.recipe, ours, theirs, mask_BL)
        if "embedding" in self.weights:
            yield "embedding", losses.hidden_mse(ours.hidden_states[0], theirs.hidden_states[0], mask_BL)
        pairs = list(enumerate(self.layer_map))
        if "hidden" in self.weights:
            yield (
                "hidden",
                _sum(
                    losses.hidden_mse(ours.hidden_states[i + 1], theirs.hidden_states[m + 1], mask_BL) for i, m in pairs
                ),
            )
        for name in MAPS:
            if name in self.weights:
                yield (
                    name,
                    _sum(
                        losses.attention_mse(our_maps[i, name], their_maps[m, name], mask_BL, mask_BL) for i, m in pairs
                    ),
                )
        if "attention_kl" in self.weights:
            a, b = ((x.last("query"), x.last("key")) for x in (our_maps, their_maps))
            yield "attention_kl", losses.attention_kl(a, b, mask_BL)
        for name, part in RELATIONS.items():
            if name in self.weights:
                a_BLD, b_BLD = (x.last(part).transpose(1, 2).flatten(2) for x in (our_maps, their_maps))
                yield name, losses.relation_kl(a_BLD, b_BLD, mask_BL, self.relation_heads)
        if "cosine" in self.weights:
            yield "cosine", losses.hidden_cosine(ours.hidden_states[-1], theirs.hidden_states[-1], mask_BL)
        if "order" in self.weights:
            yield "order", F.cross_entropy(ours.order_logits.float(), batch["sentence_order_label"])
        if "sentence" in self.weights:
            a_BD, b_BE = (pool(_last(x).float(), mask_BL, self.pooling) for x in (ours, theirs))
            yield "sentence", losses.sentence_gap(a_BD, b_BE)


def real(batch: dict[str, Tensor]) -> Tensor:
    """bool `[B, L]`: no padding. In the additive mask of sequence-to-sequence training, who sees itself is real."""
    mask = batch["attention_mask"]
    return mask.bool() if mask.dim() == 2 else mask[:, 0].diagonal(dim1=1, dim2=2) == 0


def task_term(task: str, output: Any, batch: dict[str, Tensor], label_smoothing: float = 0.0) -> Tensor:
    """What the labels say: cross-entropy of classes, or of both ends of a span among the real positions; squared error
    of a number.
    """
    if task == "regression":
        return F.mse_loss(output.logits.float().squeeze(-1), batch["labels"].float())
    if task == "questions":
        ends, mask_BL = ((output.start_logits, "start_positions"), (output.end_logits, "end_positions")), real(batch)
        return torch.stack([F.cross_entropy(of_real(logits, mask_BL), batch[name]) for logits, name in ends]).mean()
    return F.cross_entropy(output.logits.float(), batch["labels"], label_smoothing=label_smoothing)


def of_real(logits_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Logits of one end of a span, those of padding out of sight."""
    return logits_BL.float().masked_fill(~mask_BL, FAR)


def logits_term(recipe: Recipe, ours: Any, theirs: Any, mask_BL: Tensor) -> Tensor:
    """What the teacher says of classes or of both ends of a span: T^2 KL, or squared error of the logits; of one
    number, squared error.
    """
    compare = losses.logits_mse if recipe.logits_loss == "mse" or recipe.task == "regression" else losses.logits_kl
    more: tuple[float, ...] = (recipe.temperature,) if compare is losses.logits_kl else ()
    one_B1 = mask_BL.new_ones(len(mask_BL), 1)
    if recipe.task == "questions":
        spans = [(getattr(ours, n), getattr(theirs, n)) for n in ("start_logits", "end_logits")]
        seen = [tuple(of_real(x, mask_BL)[:, None] for x in pair) for pair in spans]
        return torch.stack([compare(a, b, one_B1, *more) for a, b in seen]).mean()
    return compare(ours.logits[:, None], theirs.logits[:, None], one_B1, *more)


class _Taps:
    """Keeps of each attention call, counted by layer, what the terms want: maps of some layers, q, k, v of one."""

    def __init__(self, maps: dict[int, set[str]], last: int | None = None, terms: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        self.maps = {layer: kinds & terms for layer, kinds in maps.items()}
        self.relations = last if {"attention_kl", *RELATIONS} & terms else None
        self.calls = 0
        self.kept: dict[tuple[int, str], Tensor] = {}

    def wanted(self) -> bool:
        return self.relations is not None or any(self.maps.values())

    def __call__(self, record: AttentionRecord) -> bool:
        layer, self.calls = self.calls, self.calls + 1
        for kind in self.maps.get(layer, ()):
            self.kept[layer, kind] = record.scores if kind == "scores" else record.probabilities
        if layer == self.relations:
            for part in RELATIONS.values():
                self.kept[layer, part] = getattr(record, part)
        return True

    def __getitem__(self, key: tuple[int, str]) -> Tensor:
        return self.kept[key]

    def last(self, part: str) -> Tensor:
        assert self.relations is not None
        return self.kept[self.relations, part]


def _last(output: Any) -> Tensor:
    """Last hidden states in the model's own width."""
    found = output.get("last_hidden_state")
    return output.hidden_states[-1] if found is None else found


def _extras(student: Any) -> list[str]:
    return [name for name in ("distill_projection", "distill_order") if hasattr(student, name)]


def _with_extras(student: Any, args: Any, output: Any) -> Any:
    """Where hidden states are put out: those in the teacher's width, and `order_logits` [B, 2]."""
    states = output.get("hidden_states")
    if states is not None:
        if hasattr(student, "distill_order"):
            output["order_logits"] = student.distill_order(states[-1][:, 0])
        if hasattr(student, "distill_projection"):
            output["hidden_states"] = tuple(student.distill_projection(state) for state in states)
    return output


def _sum(terms: Iterator[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()
