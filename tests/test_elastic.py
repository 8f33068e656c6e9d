"""Many sub-networks, one set of weights: losses and gradients are those of sub-networks that stand alone."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import in_two_processes
from test_width import KINDS, classifier, labelled
from tiny_models import tiny_encoder, token_batch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertForQuestionAnswering

from dqbart.distill import chunked, losses
from dqbart.distill.elastic import ElasticObjective, Said, Stage, head_terms
from dqbart.quant.attention import use_attention
from dqbart.quant.layers import prepare
from dqbart.quant.narrow import layers_of
from dqbart.recipe import Recipe
from dqbart.student.importance import importance
from dqbart.student.maps import kept_layers
from dqbart.student.width import Shared, subnetwork
from dqbart.tasks.elastic import label_loss

RECIPES = Recipe(method="dynabert", label_epochs=1).stages()
WIDTH, DEPTH, LABELS = (ElasticObjective.of(recipe, classifier(layers=4), None).stage for recipe in RECIPES)


def changed(model: Any, by: float = 0.05) -> Any:
    """A copy with other weights."""
    other = copy.deepcopy(model)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return other


def alone(student: Any, teacher: Any, batch: dict[str, Tensor], stage: Stage) -> dict[tuple[float, float], Any]:
    """Every sub-network as a model of its own: the model, its terms and its kept layers, written out once more."""
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    found: dict[tuple[float, float], Any] = {}
    for width in stage.widths:
        guide = subnetwork(teacher, width) if stage.same_width else teacher
        with torch.no_grad():
            want = guide(**inputs, output_hidden_states=True)
        for depth in stage.depths:
            cut, kept = subnetwork(student, width, depth), kept_layers(student.config.num_hidden_layers, depth)
            got = cut(**inputs, output_hidden_states=True)
            rows = [want.hidden_states[i] for i in kept] + [want.hidden_states[-1]]
            assert len(rows) == len(got.hidden_states)
            hidden = sum(
                losses.hidden_mse(a, b, batch["attention_mask"]) for a, b in zip(got.hidden_states, rows, strict=True)
            )
            logits = -(want.logits.softmax(-1) * got.logits.log_softmax(-1)).sum(-1).mean()
            found[width, depth] = cut, {"logits": logits, "hidden": hidden}, kept
    return found


@pytest.mark.parametrize(
    ("kind", "stage", "bits"),
    [
        ("bert", WIDTH, None), ("bert", DEPTH, "2-2-8"), ("roberta", DEPTH, None),
        ("distilbert", WIDTH, "2-2-8"), ("distilbert", DEPTH, None),
    ],
)  # fmt: skip
def test_losses_and_gradients_are_the_sums(kind: str, stage: Stage, bits: str | None) -> None:
    student = classifier(kind, layers=4)
    teacher, batch = changed(student), labelled([9, 5])
    if bits:
        prepare(student, bits)
    total, terms, output = ElasticObjective(stage)(student, teacher, batch)
    total.backward()
    single = alone(student, teacher, batch, stage)
    assert len(single) == (4 if stage is WIDTH else 12)
    for term in ("logits", "hidden"):
        torch.testing.assert_close(terms[term], sum(t[term] for _, t, _ in single.values()).detach())
    torch.testing.assert_close(total, 1.0 * terms["logits"] + (0.1 if stage is WIDTH else 1.0) * terms["hidden"])
    torch.testing.assert_close(output.logits, student(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits)

    want = {key: torch.zeros_like(parameter) for key, parameter in student.named_parameters()}
    for (width, depth), (cut, own, kept) in single.items():
        sum(stage.weights[term] * value for term, value in own.items()).backward()
        sources = Shared(student, width, depth).sources
        assert {int(n) for s in sources.values() for n in s.split(".") if n.isdigit()} == set(kept)
        for key, parameter in cut.named_parameters():
            if parameter.grad is not None:
                want[sources[key]][tuple(slice(0, side) for side in parameter.shape)] += parameter.grad
    for key, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, want[key], rtol=1e-4, atol=1e-6, msg=key)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_published_weights_and_multipliers() -> None:
    assert WIDTH.weights == {"logits": 1.0, "hidden": 0.1} and not WIDTH.same_width
    assert DEPTH.weights == {"logits": 1.0, "hidden": 1.0} and DEPTH.same_width
    assert WIDTH.widths == DEPTH.widths == (0.25, 0.5, 0.75, 1.0)
    assert WIDTH.depths == (1.0,) and DEPTH.depths == (0.5, 0.75, 1.0)
    assert kept_layers(12, 0.5) == [0, 2, 4, 6, 8, 10] and kept_layers(12, 0.75) == [0, 1, 2, 4, 5, 6, 8, 9, 10]


def test_a_teacher_that_is_the_student() -> None:
    """In stage "depth" every width is held to itself: the released code's teacher, at full width, would not agree."""
    model, batch = classifier(layers=4), labelled([9, 5])
    whole = ElasticObjective(Stage(weights={"hidden": 1.0}, same_width=True))
    assert whole(model, model, batch)[1]["hidden"] == 0
    full = ElasticObjective(Stage(weights={"hidden": 1.0}))
    assert full(model, model, batch)[1]["hidden"] > 0.1
    logits = ElasticObjective(Stage(weights={"logits": 1.0}, widths=(0.5,), same_width=True))
    with torch.no_grad():
        p = subnetwork(model, 0.5)(**batch).logits.softmax(-1)
    torch.testing.assert_close(logits(model, model, batch)[0].detach(), -(p * p.log()).sum(-1).mean())


def test_layers_are_held_to_what_the_same_layers_are_given() -> None:
    model, batch = classifier(layers=4), labelled([9, 5])
    mask = batch["attention_mask"]
    _, terms, _ = ElasticObjective(Stage(weights={"hidden": 1.0}, widths=(1.0,), depths=(0.5,)))(model, model, batch)
    with torch.no_grad():
        cut, whole = (m(**batch, output_hidden_states=True).hidden_states for m in (subnetwork(model, 1, 0.5), model))
    # layers 0 and 2: the embedding and layer 0's input agree, the last hidden state is held to the last one
    want = losses.hidden_mse(cut[1], whole[2], mask) + losses.hidden_mse(cut[2], whole[4], mask)
    assert torch.equal(cut[0], whole[0])
    torch.testing.assert_close(terms["hidden"], want)


def test_padding_and_batch_mates_change_nothing() -> None:
    student = classifier()
    teacher, short, long = changed(student), labelled([7, 4]), labelled([7, 4])
    for name, value in (("input_ids", 1), ("attention_mask", 0)):
        long[name] = F.pad(long[name], (0, 6), value=value)
    objective = ElasticObjective(DEPTH)
    torch.testing.assert_close(objective(student, teacher, long)[1], objective(student, teacher, short)[1])


def test_gradients_accumulate_and_scale() -> None:
    student = classifier()
    teacher, batch = changed(student), labelled([9, 5])
    objective = ElasticObjective(WIDTH)
    objective(student, teacher, batch)[0].backward()
    once = [parameter.grad.clone() for parameter in student.parameters()]
    for _ in range(2):
        (objective(student, teacher, batch)[0] / 4).backward()
    for parameter, grad in zip(student.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 1.5 * grad)


def test_what_takes_no_part_gets_no_gradient() -> None:
    student = classifier()
    student.bert.embeddings.requires_grad_(False)
    teacher, batch = changed(student), labelled([9, 5])
    ElasticObjective(Stage(weights={"hidden": 1.0}))(student, teacher, batch)[0].backward()
    assert student.classifier.weight.grad is None and student.bert.embeddings.word_embeddings.weight.grad is None
    assert layers_of(student)[0].attention.self.query.weight.grad.abs().max() > 0
    with torch.no_grad():
        total, terms, _ = ElasticObjective(DEPTH)(student, teacher, batch)
    assert not total.requires_grad and total > 0 and set(terms) == {"logits", "hidden"}


def test_bf16() -> None:
    student = classifier()
    teacher, batch = changed(student), labelled([9, 5])
    exact, rough = (ElasticObjective(DEPTH, bf16=on)(student, teacher, batch) for on in (False, True))
    assert rough[2].logits.dtype == torch.bfloat16 and exact[2].logits.dtype == torch.float32
    for name in ("logits", "hidden"):
        torch.testing.assert_close(rough[1][name], exact[1][name], rtol=0.05, atol=0.05)
    rough[0].backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in student.parameters())


def test_the_students_mode_is_kept() -> None:
    student = classifier()
    teacher, batch = changed(student), labelled([9, 5])
    objective, values = ElasticObjective(Stage(weights={"hidden": 1.0}, widths=(0.5,))), []
    for training in (True, True, False, False):
        student.train(training)
        torch.manual_seed(len(values))
        values.append(objective(student, teacher, batch)[0].item())
        assert student.training == training and not teacher.training
    assert values[0] != values[1] and values[2] == values[3]  # dropout, and none


@pytest.mark.parametrize("bits", [None, "8-8-8"])
def test_all_sub_networks_learn(bits: str | None) -> None:
    """After a step of a fused optimizer, which tells no tensor that it changed, the next forward pass knows."""
    teacher, batch = classifier(), labelled([9, 5, 12, 7])
    student = changed(teacher, 0.02)
    if bits:
        prepare(student, bits)
    objective = ElasticObjective(Stage(weights={"logits": 1.0, "hidden": 1.0}, widths=(0.5, 1.0), depths=(0.5, 1.0)))
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, fused=True)
    shared, means = Shared(student, 0.5), []
    for _ in range(6):
        total, _, _ = objective(student, teacher, batch)
        means.append(total.item())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        with torch.no_grad():
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            assert torch.equal(shared(**inputs).logits, subnetwork(student, 0.5)(**inputs).logits)
    assert means[-1] < 0.9 * means[0]


# Heads


def test_regression_has_a_loss() -> None:
    """One soft class always costs 0: the released code leaves the term out."""
    student = classifier(labels=1)
    teacher, batch = changed(student), token_batch([9, 5])
    _, terms, output = ElasticObjective(Stage(weights={"logits": 1.0}, widths=(1.0,)))(student, teacher, batch)
    with torch.no_grad():
        want = (output.logits - teacher(**batch).logits).square().mean()
    torch.testing.assert_close(terms["logits"], want.detach())
    assert terms["logits"] > 0
    two = SimpleNamespace(logits=torch.tensor([[1.0, 2.0]])), SimpleNamespace(logits=torch.tensor([[3.0, 2.0]]))
    config = SimpleNamespace(problem_type="regression")
    said = [Said(output, config) for output in two]
    assert head_terms({"logits": 3.0}, *said, {}) == (6.0, {"logits": 2.0})
    labels = {"labels": torch.tensor([[2.0, 4.0]])}
    assert head_terms({"task": 1.0}, said[0], None, labels)[0] == 2.5


def test_golden_soft_cross_entropy() -> None:
    outputs = (SimpleNamespace(logits=torch.tensor([z])) for z in ([1.0, 2.0, 3.0], [1.0, 0.0, 2.0]))
    ours, theirs = (Said(output, SimpleNamespace(problem_type=None)) for output in outputs)
    assert head_terms({"logits": 1.0}, ours, theirs, {})[0].item() == pytest.approx(0.987093, 1e-6)


def whole_logits(student: Any, teacher: Any, batch: dict[str, Tensor], where: Tensor) -> dict[str, Tensor]:
    """The terms over words, of all sub-networks' logits at all positions."""
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    terms = {"task": torch.zeros(()), "logits": torch.zeros(())}
    for width in (0.5, 1.0):
        for depth in (0.5, 1.0):
            with torch.no_grad():
                t = teacher(**inputs).logits[where].softmax(-1)
            z = Shared(student, width, depth)(**inputs).logits[where].log_softmax(-1)
            terms["logits"] = terms["logits"] - (t * z).sum(-1).mean()
            terms["task"] = terms["task"] - z.gather(1, batch["labels"][where][:, None]).mean()
    return terms


@pytest.mark.parametrize("in_chunks", [False, True])
@pytest.mark.parametrize(("kind", "bits"), [*((kind, None) for kind in KINDS), ("bert", "2-2-8")])
def test_the_head_runs_on_words_with_a_label_alone(
    kind: str, bits: str | None, in_chunks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_chunks:
        monkeypatch.setattr(chunked, "LARGE", 0)
        monkeypatch.setattr(chunked, "CHUNK", 2)
    student = tiny_encoder(kind)
    use_attention(student)
    teacher, batch = changed(student), token_batch([9, 5])
    if bits:
        prepare(student, bits)
    batch["labels"] = torch.where(torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) < 0.5, 7, -100)
    batch["labels"][1, 5:] = -100
    where = batch["labels"] != -100
    batch["labels"][where] = torch.arange(int(where.sum())) + 20
    stage = Stage(weights={"task": 0.7, "logits": 2.0}, widths=(0.5, 1.0), depths=(0.5, 1.0))
    want = whole_logits(student, teacher, batch, where)
    (0.7 * want["task"] + 2 * want["logits"]).backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    student.zero_grad()
    made: list[int] = []  # positions that a head was asked for: of these models, and of parts, which copy the hooks
    for model in (student, teacher):
        model.get_output_embeddings().register_forward_hook(lambda _, x, y: made.append(y[..., 0].numel()))
    total, terms, _ = ElasticObjective(stage)(student, teacher, batch)
    total.backward()
    assert max(made) == (2 if in_chunks else where.sum()) < 9
    torch.testing.assert_close(terms, {name: term.detach() for name, term in want.items()})
    torch.testing.assert_close(total.detach(), 0.7 * terms["task"] + 2 * terms["logits"])
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_importance_asks_the_head_for_labels_alone(kind: str) -> None:
    model = tiny_encoder(kind)
    batch = token_batch([9, 5])
    batch["labels"] = torch.where(batch["input_ids"] % 3 == 0, batch["input_ids"], -100)
    made: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, x, y: made.append(y[..., 0].numel()))
    want, found = importance(model, [batch]), importance(model, [batch], label_loss)
    assert made == [18, 0, (batch["labels"] != -100).sum()]
    for a, b in zip((*want.heads, *want.neurons), (*found.heads, *found.neurons), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_words_that_count() -> None:
    student = tiny_encoder("bert")
    use_attention(student)
    teacher, batch = changed(student), token_batch([9, 5])
    objective = ElasticObjective(Stage(weights={"logits": 1.0}, widths=(0.5, 1.0), depths=(0.5, 1.0)))
    labels = torch.where(batch["attention_mask"].bool(), 3, -100)
    want = whole_logits(student, teacher, batch | {"labels": labels}, batch["attention_mask"].bool())["logits"].detach()
    of_sentences = batch | {"labels": torch.tensor([1, 2])}
    for without in (batch, of_sentences):  # no label of words: all that is real
        torch.testing.assert_close(objective(student, teacher, without)[1]["logits"], want)
    both = ElasticObjective(Stage(weights={"task": 1.0, "logits": 1.0, "hidden": 0.1}))
    total, terms, _ = both(student, teacher, batch | {"labels": torch.full((2, 9), -100)})  # nothing was masked
    total.backward()
    assert terms["task"] == terms["logits"] == 0 and total == 0.1 * terms["hidden"] > 0


def test_masked_language_models_learn() -> None:
    for kind in KINDS:
        student = tiny_encoder(kind)
        use_attention(student)
        teacher, batch = changed(student), token_batch([9, 5])
        total, terms, _ = ElasticObjective(WIDTH)(student, teacher, batch | {"labels": batch["input_ids"]})
        total.backward()
        word = student.get_input_embeddings().weight
        assert word.grad.abs().max() > 0 and student.get_output_embeddings().weight.grad is word.grad
        assert terms["logits"] > 0 and terms["hidden"] > 0


def test_question_answering_leaves_padding_out() -> None:
    torch.manual_seed(0)
    student = BertForQuestionAnswering(tiny_encoder("bert").config).eval()
    teacher, batch = changed(student), token_batch([9, 5])
    ends = {"start_positions": torch.tensor([3, 1]), "end_positions": torch.tensor([5, 2])}
    objective = ElasticObjective(Stage(weights={"task": 1.0, "logits": 1.0}, widths=(1.0,)))
    terms = objective(student, teacher, batch | ends)[1]
    wide = {name: F.pad(batch[name], (0, 5), value=pad) for name, pad in (("input_ids", 1), ("attention_mask", 0))}
    torch.testing.assert_close(objective(student, teacher, wide | ends)[1], terms)
    with torch.no_grad():
        ours, theirs = student(**batch), teacher(**batch)
    each = [
        -(t[i, :n].softmax(-1) * s[i, :n].log_softmax(-1)).sum()
        for s, t in ((ours.start_logits, theirs.start_logits), (ours.end_logits, theirs.end_logits))
        for i, n in enumerate((9, 5))
    ]
    torch.testing.assert_close(terms["logits"], torch.stack(each).mean())
    said = [
        -z[i, :n].log_softmax(-1)[ends[name][i]]
        for z, name in ((ours.start_logits, "start_positions"), (ours.end_logits, "end_positions"))
        for i, n in enumerate((9, 5))
    ]
    torch.testing.assert_close(terms["task"], torch.stack(said).mean())


def test_labels_alone_need_no_teacher() -> None:
    student, batch = classifier(layers=4), labelled([9, 5])
    objective = ElasticObjective(LABELS)
    total, terms, _ = objective(student, None, batch)
    want = sum(subnetwork(student, w, d)(**batch).loss for w in (0.25, 0.5, 0.75, 1.0) for d in (0.5, 0.75, 1.0))
    torch.testing.assert_close(terms["task"], want.detach())
    torch.testing.assert_close(total.detach(), terms["task"])
    assert not objective.needs_teacher
    with pytest.raises(ValueError, match="a batch of input_ids, attention_mask gives no loss: the term 'task' needs"):
        objective(student, None, token_batch([9, 5]))


def a_base_model() -> None:
    base = classifier().bert
    ElasticObjective(WIDTH)(base, base, token_batch([5]))


def several_labels() -> None:
    model = classifier()
    model.config.problem_type = "multi_label_classification"
    ElasticObjective(WIDTH)(model, model, token_batch([5]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Stage(weights={"attention": 1.0}), "weights 'attention': 1.0: expected task, logits, hidden"),
        (lambda: Stage(weights={"hidden": -1.0}), "weights 'hidden': -1.0"),
        (lambda: Stage(weights={"hidden": 0.0}), "expected a width, a depth and a positive weight at least"),
        (lambda: Stage(weights={"hidden": 1.0}, widths=()), "expected a width, a depth"),
        (
            lambda: ElasticObjective(WIDTH)(classifier(), classifier(layers=2), labelled([5])),
            "student of 3 layers, teacher of 2: elastic training needs as many",
        ),
        (
            lambda: ElasticObjective(Stage(weights={"hidden": 1.0}, widths=(0.1,)))(
                classifier(), classifier(), labelled([5])
            ),
            "width 0.1 of 4 heads",
        ),
        (a_base_model, "BaseModelOutputWithPooling.* has no logits: give the model a head"),
        (several_labels, "problem_type 'multi_label_classification': expected one label"),
    ],
)
def test_unsuitable(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


# Two processes

WORKER = """
import os, sys
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from test_elastic import WIDTH, changed
from test_width import classifier, labelled
from dqbart.distill.elastic import ElasticObjective
distributed.init_process_group("gloo")
rank, student = distributed.get_rank(), classifier()
teacher, objective = changed(student), ElasticObjective(WIDTH)
wrapped = DistributedDataParallel(student)
for _ in range(2):  # accumulated
    objective(wrapped, teacher, labelled([9, 5], seed=rank), student)[0].backward()
torch.save({n: p.grad for n, p in student.named_parameters()}, f"{sys.argv[1]}/rank{rank}.pt")
distributed.destroy_process_group()
"""


def test_two_processes_have_the_mean_gradient(tmp_path: Path) -> None:
    in_two_processes(WORKER, tmp_path)
    student = classifier()
    teacher, objective = changed(student), ElasticObjective(WIDTH)
    for rank in (0, 1):
        objective(student, teacher, labelled([9, 5], seed=rank))[0].backward()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        for name, parameter in student.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad)  # twice the mean of two is their sum
