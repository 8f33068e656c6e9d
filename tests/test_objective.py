"""The objective on real small models: alignment, masking, and which tensors take part."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import SEQ2SEQ, tiny_seq2seq, token_batch
from torch import Tensor
from torch.nn import functional as F

from dqbart.distill import objective as module
from dqbart.distill.objective import Objective
from dqbart.notation import Layers
from dqbart.quant.attention import use_attention
from dqbart.quant.layers import prepare
from dqbart.recipe import PAPER_LOSSES, LossWeights, Recipe
from dqbart.student.depth import make_student, stack_maps

ALL = Recipe(losses=PAPER_LOSSES)
PAPER = Recipe.preset("paper-2-2-8")
TERMS = list(PAPER_LOSSES.used())


def labels_for(lengths: list[int], seed: int = 5) -> Tensor:
    ids = token_batch(lengths, seed)["input_ids"]
    return torch.where(ids == 1, -100, ids)


def batch_of(sources: list[int], targets: list[int]) -> dict[str, Tensor]:
    return token_batch(sources) | {"labels": labels_for(targets)}


def pair(
    recipe: Recipe,
    layers: str = "3-2",
    kind: str = "bart",
    quantize: str | None = "2-2-8",
    deep: tuple[int, int] = (6, 6),
    **changes: Any,
) -> tuple[Any, Any, Objective]:
    teacher = tiny_seq2seq(kind, *deep, **changes)
    student = make_student(teacher, Layers(layers)).eval()
    use_attention(teacher)
    use_attention(student)
    if quantize:
        prepare(student, quantize, numerics=recipe.numerics, probability_bits=recipe.probability_bits)
    return student, teacher, Objective(recipe, stack_maps(teacher.config, Layers(layers)))


@torch.no_grad()
def terms_of(objective: Objective, student: Any, teacher: Any, batch: dict[str, Tensor]) -> dict[str, float]:
    total, terms, _ = objective(student, teacher, batch)
    assert total.isfinite()
    return {k: float(v) for k, v in terms.items()} | {"total": float(total)}


@pytest.mark.parametrize(
    "recipe", [ALL, PAPER, replace(ALL, logits_loss="mse", temperature=2.0)], ids=["kl", "paper", "mse"]
)
@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_a_twin_has_nothing_to_learn(kind: str, recipe: Recipe) -> None:
    student, teacher, objective = pair(recipe, "3-2", kind, quantize=None, deep=(3, 2))
    terms = terms_of(objective, student, teacher, batch_of([8, 3], [6, 4]))
    assert terms.pop("task") == terms.pop("total") > 0
    assert set(terms.values()) == {0.0}
    expected = set(TERMS) - {"task"} | ({"encoder_hidden_last"} if recipe.numerics == "paper" else set())
    assert set(terms) == expected


@torch.no_grad()
def test_alignment_by_hand() -> None:
    """6 -> 3 layers: attention 0-0, 1-2, 2-5; hidden states (0,0) (1,1) (2,3) (3,6). The decoder, 6 -> 2: 0-0, 1-5."""
    student, teacher, objective = pair(ALL, "3-2")
    batch = batch_of([8, 8], [6, 6])  # no padding: plain means
    found = terms_of(objective, student, teacher, batch)
    teacher.set_attn_implementation("eager")  # shown by transformers itself
    inputs = {
        "input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "output_attentions": True,
        "decoder_input_ids": student.prepare_decoder_input_ids_from_labels(batch["labels"]),
        "output_hidden_states": True,
    }  # fmt: skip
    ours, theirs = student(**inputs), teacher(**inputs)

    def by_hand(field: str, pairs: list[tuple[int, int]]) -> float:
        a, b = getattr(ours, field), getattr(theirs, field)
        return float(sum(F.mse_loss(a[i], b[j]) for i, j in pairs))

    expected = {
        "encoder_attention": by_hand("encoder_attentions", [(0, 0), (1, 2), (2, 5)]),
        "decoder_attention": by_hand("decoder_attentions", [(0, 0), (1, 5)]),
        "cross_attention": by_hand("cross_attentions", [(0, 0), (1, 5)]),
        "encoder_hidden": by_hand("encoder_hidden_states", [(0, 0), (1, 1), (2, 3), (3, 6)]),
        "decoder_hidden": by_hand("decoder_hidden_states", [(0, 0), (1, 1), (2, 6)]),
        "task": float(F.cross_entropy(ours.logits.flatten(0, 1), batch["labels"].flatten())),
        "logits": float(F.kl_div(
            ours.logits.log_softmax(-1).flatten(0, 1), theirs.logits.softmax(-1).flatten(0, 1), reduction="batchmean"
        )),
    }  # fmt: skip
    # attention here masks query-key pairs that causality hides: they are zero in both and count in both
    for name, number in expected.items():
        assert found[name] == pytest.approx(number, rel=1e-4), name
        assert number > 1e-6, name
    assert found["total"] == pytest.approx(sum(expected.values()), rel=1e-4)


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_padding_never_changes_a_masked_term(kind: str) -> None:
    student, teacher, objective = pair(ALL, "2-2", kind, deep=(3, 2))
    batch = batch_of([8, 3, 5], [6, 2, 4])
    before = terms_of(objective, student, teacher, batch)
    wide = {
        "input_ids": F.pad(batch["input_ids"], (0, 7), value=1),
        "attention_mask": F.pad(batch["attention_mask"], (0, 7)),
        "labels": F.pad(batch["labels"], (0, 5), value=-100),
    }
    after = terms_of(objective, student, teacher, wide)
    assert after == pytest.approx(before, rel=1e-5)
    paper_student, _, paper = pair(PAPER, "2-2", kind, deep=(3, 2))
    leaked = [terms_of(paper, paper_student, teacher, b)["encoder_attention"] for b in (batch, wide)]
    assert abs(leaked[0] - leaked[1]) > 0.05 * leaked[0]  # the paper's terms do change


def test_batch_size_changes_nothing() -> None:
    student, teacher, objective = pair(ALL, "2-2", deep=(3, 2))
    batch = batch_of([8, 3, 5], [6, 2, 4])
    before = terms_of(objective, student, teacher, batch)
    doubled = {k: v.repeat(2, 1) for k, v in batch.items()}
    assert terms_of(objective, student, teacher, doubled) == pytest.approx(before, rel=1e-5)
    even = batch_of([8, 8, 8, 8], [6, 6, 6, 6])  # equal lengths: the mean of examples is the mean of the batch
    single = [terms_of(objective, student, teacher, {k: v[i : i + 1] for k, v in even.items()}) for i in range(4)]
    together = terms_of(objective, student, teacher, even)
    for name, number in together.items():
        assert number == pytest.approx(sum(s[name] for s in single) / 4, rel=1e-4), name
    # DQ-BART's enc_hid_last grows with the batch
    paper_student, _, paper = pair(PAPER, "2-2", deep=(3, 2))
    once, twice = (terms_of(paper, paper_student, teacher, b) for b in (batch, doubled))
    assert twice["encoder_hidden_last"] == pytest.approx(2 * once["encoder_hidden_last"], rel=1e-4)


@pytest.mark.parametrize("left_out", TERMS)
def test_weight_zero_leaves_a_term_out(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {name: i + 0.5 for i, name in enumerate(TERMS) if name != left_out}
    student, teacher, objective = pair(
        Recipe(losses=LossWeights(**{n: 0.0 for n in TERMS} | weights)), "2-2", deep=(3, 2)
    )
    asked: list[tuple[set[str], bool]] = []
    forward = module.forward_with_attention

    def spy(model: Any, *, kinds: set[str], hidden: bool, **more: Any) -> Any:
        asked.append((kinds, hidden))
        return forward(model, kinds=kinds, hidden=hidden, **more)

    monkeypatch.setattr(module, "forward_with_attention", spy)
    batch = batch_of([8, 3], [6, 4])
    terms = terms_of(objective, student, teacher, batch)
    total = terms.pop("total")
    assert set(terms) == set(TERMS) - {left_out}
    assert total == pytest.approx(sum(weights[n] * v for n, v in terms.items()), rel=1e-5)
    kinds = {n for n in weights if n.endswith("attention")}
    assert asked == [(kinds, True)] * 2
    whole = terms_of(pair(ALL, "2-2", deep=(3, 2))[2], student, teacher, batch)
    assert terms == pytest.approx({n: whole[n] for n in terms}, rel=1e-5)


def test_the_task_alone_needs_no_teacher() -> None:
    losses = LossWeights(task=1, logits=0)
    student, _, objective = pair(Recipe(losses=losses, label_smoothing=0.1), "2-2", deep=(3, 2))
    total, terms, output = objective(student, None, batch_of([8, 3], [6, 4]))
    assert list(terms) == ["task"] and total.item() == terms["task"].item()
    assert output.encoder_hidden_states is None and output.logits.shape == (2, 6, 120)
    plain = pair(Recipe(losses=losses), "2-2", deep=(3, 2))[2]
    assert plain(student, None, batch_of([8, 3], [6, 4]))[0].item() != total.item()


@pytest.mark.parametrize("numerics", ["integer", "paper"])
@pytest.mark.parametrize("term", TERMS)
def test_every_term_reaches_the_weights(term: str, numerics: str) -> None:
    base = PAPER if numerics == "paper" else ALL
    recipe = replace(base, losses=LossWeights(**{n: float(n == term) for n in TERMS}))
    student, teacher, objective = pair(recipe, "2-2", deep=(3, 2))
    total, terms, _ = objective(student.train(), teacher, batch_of([8, 3], [6, 4]))
    total.backward()
    assert term in terms and total.item() > 0
    layer = student.model.encoder.layers[0] if "encoder" in term else student.model.decoder.layers[-1]
    attention = layer.encoder_attn if term == "cross_attention" else layer.self_attn
    for weight in (attention.q_proj.weight, student.model.shared.weight):
        assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.any(), term
    assert all(p.grad is None for p in teacher.parameters())
    if "encoder" in term:
        assert student.model.decoder.layers[0].fc1.weight.grad is None


def test_the_teacher_is_read_without_gradient_and_stays_as_it_is() -> None:
    student, teacher, objective = pair(ALL, "2-2", deep=(3, 2))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    objective(student.train(), teacher, batch_of([8, 3], [6, 4]))[0].backward()
    assert not teacher.training and all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_bf16_recipe_computes_losses_in_fp32() -> None:
    student, teacher, objective = pair(replace(ALL, bf16=True), "2-2", deep=(3, 2))
    batch = batch_of([8, 3], [6, 4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, terms, _ = objective(student, teacher, batch)
    assert all(t.dtype == torch.float32 and t.isfinite() for t in terms.values())
    exact = terms_of(pair(ALL, "2-2", deep=(3, 2))[2], student, teacher, batch)
    assert total.item() == pytest.approx(exact["total"], rel=0.1)


def test_paper_weights_its_eighth_term_like_encoder_hidden() -> None:
    weights = replace(PAPER_LOSSES, encoder_hidden=3.0)
    student, teacher, objective = pair(replace(PAPER, losses=weights), "2-2", deep=(3, 2))
    terms = terms_of(objective, student, teacher, batch_of([8, 3], [6, 4]))
    total = terms.pop("total")
    extra = 2 * (terms["encoder_hidden"] + terms["encoder_hidden_last"])
    assert len(terms) == 8 and total == pytest.approx(sum(terms.values()) + extra, rel=1e-5)


def test_a_model_with_another_attention_is_told_so() -> None:
    student, teacher, objective = pair(ALL, "2-2", deep=(3, 2))
    teacher.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="no attention was seen: call dqbart.quant.attention.use_attention"):
        objective(student, teacher, batch_of([8, 3], [6, 4]))
