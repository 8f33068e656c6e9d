"""Vocabulary losses in chunks: what the whole logits give, without them."""

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from test_objective import ALL, PAPER, batch_of, pair, terms_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dqbart.distill import chunked, objective
from dqbart.distill.chunked import chunked_terms
from dqbart.quant.layers import FakeQuantLinear
from dqbart.recipe import LossWeights, Recipe


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("count", [1, 4, 11, 12])
@pytest.mark.parametrize("frozen", [(), ("hidden",), ("head",), ("hidden", "head")])
def test_gradients_in_double_precision(count: int, frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK", 4)
    torch.manual_seed(count)
    head = nn.Linear(3, 7, dtype=torch.float64).requires_grad_("head" not in frozen)
    hidden = torch.randn(count, 3, dtype=torch.float64, requires_grad="hidden" not in frozen)
    other = torch.randn(count, 7, dtype=torch.float64)

    def terms_of_(h: Tensor, piece: slice) -> dict[str, Tensor]:
        logits = head(h)
        return {"a": (logits - other[piece]).square().mean(), "b": logits.logsumexp(-1).mean()}

    weights = {"a": 0.3, "b": 2.0}
    total, terms = chunked_terms(hidden, head, terms_of_, weights)
    want = terms_of_(hidden, slice(None))
    torch.testing.assert_close(terms, {name: term.detach() for name, term in want.items()})
    expected = 0.3 * want["a"] + 2 * want["b"]
    torch.testing.assert_close(total, expected, check_stride=False)
    assert total.requires_grad == (len(frozen) < 2) and not any(term.requires_grad for term in terms.values())
    if total.requires_grad:
        leaves = [x for x in (hidden, *head.parameters()) if x.requires_grad]
        found, wanted = (torch.autograd.grad(x * 5, leaves) for x in (total, expected))
        torch.testing.assert_close(found, wanted)


RECIPES = {
    "default": Recipe(),
    "mse": replace(ALL, logits_loss="mse"),
    "smoothed": Recipe(label_smoothing=0.1, temperature=2.0),
    "task": Recipe(losses=LossWeights(task=1, logits=0)),
    "logits": Recipe(losses=LossWeights(task=0, logits=1)),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize(
    ("kind", "bits"), [("bart", "2-2-8"), ("bart", None), ("mbart", "2-32-8"), ("mbart", "4-4-32")]
)
def test_the_objective_s_are_the_same(
    recipe: Recipe, kind: str, bits: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "CHUNK", 3)
    student, teacher, whole = pair(recipe, "2-2", kind, bits, deep=(3, 2))
    student.final_logits_bias.normal_()
    batch = batch_of([8, 3], [6, 2])
    found = []
    for in_chunks in (False, True):
        whole.chunked = in_chunks
        total, terms, output = whole(student, teacher, batch)
        assert output.logits.shape == (2, 0 if in_chunks else 6, 120)
        gradients = torch.autograd.grad(total, list(student.parameters()), allow_unused=True)
        found.append((total.detach(), {name: term.detach() for name, term in terms.items()}, gradients))
        head = student.get_output_embeddings()
        assert not isinstance(head, FakeQuantLinear) or not head.quantized_weight._fixed
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert list(found[0][1]) == list(found[1][1])
    without_gradient = []
    for whole.chunked in (False, True):
        without_gradient.append(terms_of(whole, student, teacher, batch))
    assert without_gradient[1] == pytest.approx(without_gradient[0], rel=1e-5)


def test_no_tensor_is_as_large_as_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK", 8)
    student, teacher, whole = pair(Recipe(), "1-1", deep=(1, 1), vocab_size=1000)
    batch = batch_of([4] * 8, [8] * 8)
    for in_chunks in (False, True):
        whole.chunked = in_chunks
        with LargestTensor() as largest:
            total, _, _ = whole(student, teacher, batch)
            total.backward()
        # 64 tokens of 1000 words; in chunks the largest is the vocabulary matrix
        assert largest.elements == (1000 * 32 if in_chunks else 64 * 1000)


def test_when(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default only on GPUs and where logits are large; never the paper's losses, which count padding."""
    labels = torch.zeros(2, 5, dtype=torch.long)
    assert not plain(Recipe())._in_chunks(labels, 1 << 40)
    assert plain(Recipe())._in_chunks(labels.to("meta"), objective.LARGE // 10 + 1)
    assert not plain(Recipe())._in_chunks(labels.to("meta"), objective.LARGE // 10)
    only_hidden = LossWeights(**{name: float(name == "encoder_hidden") for name in asdict(LossWeights())})
    for recipe in (PAPER, Recipe(losses=only_hidden)):
        made = plain(recipe)
        made.chunked = True
        assert not made._in_chunks(labels, 1 << 40)


def plain(recipe: Recipe) -> Any:
    return objective.Objective(recipe, {})


@pytest.mark.parametrize("weight", ["task", "logits"])
def test_no_real_token(weight: str) -> None:
    """Nothing but padding gives what it gives without chunks: no KL, and torch's NaN for a task without labels."""
    recipe = Recipe(losses=LossWeights(task=float(weight == "task"), logits=float(weight == "logits")))
    student, teacher, whole = pair(recipe, "1-1", deep=(1, 1))
    batch = batch_of([4], [3])
    batch["labels"][:] = -100
    totals = []
    for whole.chunked in (False, True):
        total, _, _ = whole(student, teacher, batch)
        total.backward()
        totals.append(total.detach())
    torch.testing.assert_close(totals[0], totals[1], equal_nan=True)
