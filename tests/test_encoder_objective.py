"""The methods' objectives on real small encoders: what is compared with what, masking, widths, gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import in_two_processes
from tiny_models import ENCODERS, tiny_encoder, token_batch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from dqbart.distill import chunked, losses
from dqbart.distill.encoder_objective import EncoderObjective
from dqbart.distill.trainer import training_arguments
from dqbart.methods import METHODS, OF_ENCODERS, only
from dqbart.notation import Layers
from dqbart.quant.attention import use_attention
from dqbart.quant.layers import prepare
from dqbart.recipe import Recipe
from dqbart.student.depth import make_student, stack_maps

COMPARED = tuple(name for name in OF_ENCODERS if name != "order")  # with the teacher
ALL = Recipe(task="text", losses=only(task=1.0, logits=1.0, **dict.fromkeys(COMPARED, 1.0)))


def masked(lengths: list[int], seed: int = 3) -> dict[str, Tensor]:
    batch = token_batch(lengths, seed)
    labels = batch["input_ids"].clone()
    labels[batch["attention_mask"] == 0] = -100
    labels[:, 0] = -100
    return batch | {"labels": labels}


def pair(
    recipe: Recipe = ALL, kind: str = "bert", layers: int = 2, teacher: Any = None, quantize: str | None = None,
    **shape: int,
) -> tuple[Any, Any, EncoderObjective]:  # fmt: skip
    teacher = tiny_encoder(kind) if teacher is None else teacher
    torch.manual_seed(1)
    student = make_student(teacher, Layers(str(layers)), recipe.layer_map, **shape).eval()
    for model in (teacher, student):
        use_attention(model)
    if quantize:
        prepare(student, quantize)
    (layer_map,) = stack_maps(teacher.config, Layers(str(layers)), recipe.layer_map).values()
    objective = EncoderObjective(recipe, layer_map, student, teacher)
    objective.begin(student)
    return student, teacher, objective


@torch.no_grad()
def terms_of(objective: EncoderObjective, student: Any, teacher: Any, batch: dict[str, Tensor]) -> dict[str, float]:
    total, terms, _ = objective(student, teacher, batch)
    return {name: float(term) for name, term in terms.items()} | {"total": float(total)}


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_twin_has_nothing_to_learn(kind: str) -> None:
    terms = terms_of(*pair_first(kind, 3), masked([9, 4]))
    task = terms.pop("task")
    assert terms.pop("total") == pytest.approx(task, rel=1e-5) and task > 0
    assert set(terms) == {"logits", *COMPARED}
    assert max(terms.values()) == pytest.approx(0, abs=1e-5)


def pair_first(kind: str, layers: int) -> tuple[EncoderObjective, Any, Any]:
    student, teacher, objective = pair(kind=kind, layers=layers)
    return objective, student, teacher


@torch.no_grad()
@pytest.mark.parametrize("kind", ENCODERS)
def test_alignment_by_hand(kind: str) -> None:
    """3 -> 2 layers by the map [0, 2]: hidden (1,1) (2,3), attention 0-0, 1-2, relations 1-2; no padding."""
    student, teacher, objective = pair(kind=kind)
    batch = masked([8, 8])
    found = terms_of(objective, student, teacher, batch)
    for model in (student, teacher):
        model.set_attn_implementation("eager")  # shown by transformers itself
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    ours, theirs = (m(**inputs, output_attentions=True, output_hidden_states=True) for m in (student, teacher))
    h, g = ours.hidden_states, theirs.hidden_states
    expected = {
        "embedding": float(F.mse_loss(h[0], g[0])),
        "hidden": float(F.mse_loss(h[1], g[1]) + F.mse_loss(h[2], g[3])),
        "attention": float(sum(F.mse_loss(ours.attentions[i], theirs.attentions[j]) for i, j in ((0, 0), (1, 2)))),
        "attention_kl": float(F.kl_div(ours.attentions[1].log(), theirs.attentions[2], reduction="sum")) / (2 * 4 * 8),
        "cosine": float((1 - F.cosine_similarity(h[2], g[3], dim=-1)).mean()),
        "sentence": float((1 - F.cosine_similarity(h[2].mean(1), g[3].mean(1), dim=-1)).mean()),
        "task": float(F.cross_entropy(ours.logits.flatten(0, 1), batch["labels"].flatten())),
        "logits": float(losses.logits_kl(ours.logits, theirs.logits, batch["attention_mask"].bool())),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name
        assert value > 0 or name == "embedding", name  # which is copied
    # Up to what the softmax hides, scores are logarithms of probabilities.
    differences = [ours.attentions[i].log() - theirs.attentions[j].log() for i, j in ((0, 0), (1, 2))]
    centred = sum(float((d - d.mean(-1, keepdim=True)).square().mean()) for d in differences)
    assert found["scores"] >= centred - 1e-4 > 0
    assert found["queries"] > 0 and found["keys"] > 0 and found["values"] > 0


@pytest.mark.parametrize("kind", ["bert", "distilbert", "albert"])
def test_padding_and_batch_mates_change_nothing(kind: str) -> None:
    student, teacher, objective = pair(kind=kind, quantize="2-2-8")
    batch = masked([8, 3, 5])
    before = terms_of(objective, student, teacher, batch)
    wide = {
        "input_ids": F.pad(batch["input_ids"], (0, 7), value=1),
        "attention_mask": F.pad(batch["attention_mask"], (0, 7)),
        "labels": F.pad(batch["labels"], (0, 7), value=-100),
    }
    assert terms_of(objective, student, teacher, wide) == pytest.approx(before, rel=1e-4, abs=1e-7)


def test_another_width_is_compared_through_a_learned_projection() -> None:
    recipe = Recipe(task="text", losses=only(hidden=1.0, embedding=1.0, cosine=1.0))
    student, teacher, objective = pair(recipe, hidden_size=16, heads=4)
    weight = student.distill_projection.weight
    assert weight.shape == (32, 16) and any(p is weight for p in student.parameters())
    total, terms, _ = objective(student, teacher, masked([6, 4]))
    total.backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0 and set(terms) == set(recipe.terms)
    h = student(**token_batch([6, 4]), output_hidden_states=True).hidden_states
    assert h[0].shape[-1] == 32
    objective.finish(student)
    objective.finish(student)  # again: nothing to do
    assert not any("distill" in name for name in student.state_dict())
    assert student(**token_batch([6]), output_hidden_states=True).hidden_states[0].shape[-1] == 16
    same, _, _ = pair(recipe)
    assert not hasattr(same, "distill_projection")  # none where widths agree


def test_the_order_of_sentences_is_learnt_by_a_head_that_goes() -> None:
    recipe = Recipe(task="text", segments=2, losses=only(order=1.0, hidden=1.0))
    student, teacher, objective = pair(recipe, hidden_size=16, heads=4)
    batch = masked([7, 5]) | {"sentence_order_label": torch.tensor([1, 0])}
    total, terms, output = objective(student, teacher, batch)
    assert (
        output.order_logits.shape == (2, 2) and output.hidden_states[0].shape[-1] == 32
    )  # the head sees its own width
    by_hand = F.cross_entropy(output.order_logits, torch.tensor([1, 0]))
    assert float(terms["order"].detach()) == pytest.approx(float(by_hand.detach()))
    total.backward()
    assert student.distill_order.weight.grad.abs().sum() > 0
    objective.finish(student)
    assert not any("distill" in name for name in student.state_dict())
    alone = EncoderObjective(Recipe(task="text", segments=2, losses=only(order=1.0)), [0, 1], student, teacher)
    assert not alone.needs_teacher


def test_minilm_works_at_any_width_and_only_v1_needs_the_heads() -> None:
    batch = masked([7, 5])
    for method, shape in (("minilm", dict(hidden_size=16, heads=4)), ("minilm2", dict(hidden_size=24, heads=3))):
        recipe = Recipe(task="text", method=method, relation_heads=8 if method == "minilm2" else None)
        student, teacher, objective = pair(recipe, layers=1, **shape)
        total, terms, _ = objective(student, teacher, batch)
        assert set(terms) == set(METHODS[method].losses.used()) and total > 0
        total.backward()
        reached = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert any("query.weight" in name for name in reached) and any("word_embeddings" in name for name in reached)
    with pytest.raises(
        ValueError, match=r"attention_kl: compares head with head.*student has 3, the teacher 4.*minilm2"
    ):
        pair(Recipe(task="text", method="minilm"), hidden_size=24, heads=3)
    with pytest.raises(
        ValueError, match=r"relation_heads 5: don't divide the student's width 32; expected one of 1, 2"
    ):
        pair(Recipe(task="text", method="minilm2", relation_heads=5))


def test_the_teacher_layer_that_relations_look_at() -> None:
    """MiniLMv2 takes the 21st of BERT-large's 24: counted from 1."""
    base = dict(task="text", method="minilm2")
    batch = masked([8, 5])
    found = []
    for layer in (1, 2, 3, None):
        student, teacher, objective = pair(Recipe(**base, teacher_layer=layer))
        found.append(terms_of(objective, student, teacher, batch)["queries"])
    assert len(set(found[:3])) == 3 and found[3] == found[2]
    with pytest.raises(ValueError, match="teacher_layer 4: expected from 1 to 3"):
        pair(Recipe(**base, teacher_layer=4))


@torch.no_grad()
def test_tinybert_aligns_as_its_table() -> None:
    """12 -> 4: attention with the teacher's layers 2, 5, 8, 11 and hidden states with 3, 6, 9, 12 (methods.md, 3)."""
    teacher = type(tiny_encoder("bert"))(tiny_encoder("bert").config.__class__(
        **tiny_encoder("bert").config.to_dict() | dict(num_hidden_layers=12)
    )).eval()  # fmt: skip
    recipe = Recipe(task="text", method="tinybert")
    student, teacher, objective = pair(recipe, layers=4, teacher=teacher)
    assert objective.layer_map == [2, 5, 8, 11]
    batch = masked([8, 8])
    found = terms_of(objective, student, teacher, batch)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    h, g = (m(**inputs, output_hidden_states=True).hidden_states for m in (student, teacher))
    by_hand = sum(float(F.mse_loss(h[i], g[j])) for i, j in ((1, 3), (2, 6), (3, 9), (4, 12)))
    assert found["hidden"] == pytest.approx(by_hand, rel=1e-4)
    assert found["total"] == pytest.approx(found["hidden"] + found["embedding"] + found["scores"], rel=1e-5)


@pytest.mark.parametrize("labels", [1, 3])
def test_classes_and_numbers(labels: int) -> None:
    config = tiny_encoder("bert").config
    config.num_labels = labels
    torch.manual_seed(2)
    teacher = AutoModelForSequenceClassification.from_config(config).eval()
    task = "regression" if labels == 1 else "classification"
    for loss in ("kl", "mse"):
        recipe = Recipe(task=task, temperature=2.0, logits_loss=loss, losses={"hidden": 1})
        student, teacher, objective = pair(recipe, teacher=teacher)
        batch = token_batch([6, 4]) | {"labels": torch.tensor([0.5, 3.0]) if labels == 1 else torch.tensor([2, 0])}
        total, terms, output = objective(student, teacher, batch)
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        z, t = (m(**inputs).logits.detach() for m in (student, teacher))
        if labels == 1:
            by_hand = {"task": F.mse_loss(z[:, 0], batch["labels"]), "logits": F.mse_loss(z, t)}
        else:
            kl = F.kl_div((z / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="batchmean") * 4
            by_hand = {"task": F.cross_entropy(z, batch["labels"]), "logits": kl if loss == "kl" else F.mse_loss(z, t)}
        for name, value in by_hand.items():
            assert float(terms[name].detach()) == pytest.approx(float(value), rel=1e-4), (name, loss)
        assert output.logits.shape == (2, labels) and total.requires_grad


def test_spans_see_no_padding() -> None:
    torch.manual_seed(2)
    teacher = AutoModelForQuestionAnswering.from_config(tiny_encoder("bert").config).eval()
    student, teacher, objective = pair(Recipe(task="questions"), teacher=teacher)
    ends = {"start_positions": torch.tensor([3, 1]), "end_positions": torch.tensor([5, 2])}
    batch = token_batch([8, 5])
    before = terms_of(objective, student, teacher, batch | ends)
    wide = {
        "input_ids": F.pad(batch["input_ids"], (0, 4), value=1),
        "attention_mask": F.pad(batch["attention_mask"], (0, 4)),
    }
    after = terms_of(objective, student, teacher, wide | ends)
    assert before == pytest.approx(after, rel=1e-4) and min(before["logits"], before["task"]) > 1e-6


def test_chunks_of_the_vocabulary_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = chunked.LARGE
    for losses_ in (only(task=1.0), only(logits=2.0), only(task=0.5, logits=1.0)):
        gradients, totals = [], []
        for large in (usual, 0):
            monkeypatch.setattr(chunked, "LARGE", large)
            monkeypatch.setattr(chunked, "CHUNK", 3)
            student, teacher, objective = pair(Recipe(task="text", losses=losses_, label_smoothing=0.1))
            batch = masked([8, 5])
            batch["labels"][:, 2:4] = -100
            total, terms, _ = objective(student, teacher, batch)
            total.backward()
            totals.append([float(total.detach()), *(float(t.detach()) for t in terms.values())])
            gradients.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
        assert totals[0] == pytest.approx(totals[1], rel=1e-5)
        for name, gradient in gradients[0].items():
            assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_models_that_can_t_be_compared() -> None:
    teacher = tiny_encoder("bert")
    config = type(teacher.config)(**teacher.config.to_dict() | dict(vocab_size=60))
    other = type(teacher)(config)
    with pytest.raises(
        ValueError, match=r"losses.logits: the student has 2 labels and 60 tokens, the teacher 2 and 120"
    ):
        EncoderObjective(Recipe(task="text"), [0, 1, 2], other, teacher)


def test_gradients_reach_every_layer_through_every_term() -> None:
    for name in ("logits", *COMPARED):
        student, teacher, objective = pair(Recipe(task="text", losses=only(**{name: 1.0})), quantize="2-2-8")
        total, terms, _ = objective(student, teacher, masked([7, 4]))
        assert list(terms) == [name] and float(terms[name].detach()) > 0
        total.backward()
        embedding = student.get_input_embeddings().weight.grad
        assert embedding is not None and embedding.abs().sum() > 0, name
        assert all(p.grad is None for p in teacher.parameters()), name


@pytest.mark.parametrize("name", ["minilm2", "distilbert"])
def test_logits_that_nothing_looks_at_are_not_made(name: str) -> None:
    """Of a batch of 32 x 128 tokens and 30,522 words they would be half a gigabyte, for each model."""
    student, teacher, objective = pair(Recipe(task="text", method=name))
    made = []
    for model in (student, teacher):
        model.get_output_embeddings().register_forward_hook(lambda head, inputs, out: made.append(out[..., 0].numel()))
    objective(student, teacher, masked([9, 6]))
    assert max(made) <= (0 if name == "minilm2" else 15)


# Two processes: distributed training waits for the gradient of whatever went into an output.

CASES: dict[str, dict[str, Any]] = {
    "relations": dict(recipe=dict(task="text", method="minilm2")),
    "v1": dict(recipe=dict(task="text", method="minilm")),
    "pooler": dict(recipe=dict(task="text", method="minilm2"), base=True),
    "projection": dict(
        recipe=dict(task="text", method="tinybert"), layers=1, hidden_size=16, heads=4, intermediate_size=32
    ),
    "words": dict(recipe=dict(task="text", method="distilbert")),
}
WORKER = """
import sys
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from test_encoder_objective import CASES, case, masked, unused
distributed.init_process_group("gloo")
rank = distributed.get_rank()
for name in CASES:
    student, teacher, objective = case(name)
    wrapped = DistributedDataParallel(student, find_unused_parameters=unused(objective.recipe))
    for step in range(2):
        batch = masked([9, 5], seed=2 * step + rank)
        objective(wrapped, teacher, batch, student)[0].backward()
    torch.save({n: p.grad for n, p in student.named_parameters()}, f"{sys.argv[1]}/{name}-{rank}.pt")
distributed.destroy_process_group()
"""


def case(name: str) -> tuple[Any, Any, EncoderObjective]:
    settings = dict(CASES[name])
    teacher = tiny_encoder("bert")
    if settings.pop("base", False):
        teacher = AutoModel.from_config(teacher.config).eval()
    return pair(Recipe(**settings.pop("recipe")), teacher=teacher, **settings)


def unused(recipe: Recipe) -> bool:
    return bool(training_arguments(recipe, Path("nowhere"), 8, "cpu").ddp_find_unused_parameters)


def test_two_processes_have_the_mean_gradient(tmp_path: Path) -> None:
    in_two_processes(WORKER, tmp_path)
    for name in CASES:
        student, teacher, objective = case(name)
        for seed in range(4):
            objective(student, teacher, masked([9, 5], seed=seed))[0].backward()
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{name}-{rank}.pt")
            for key, parameter in student.named_parameters():
                mean = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / 2
                other = torch.zeros_like(parameter) if found[key] is None else found[key]
                assert torch.allclose(other, mean, rtol=1e-4, atol=1e-6), (name, key)
