"""LayerNorm and GELU: correctly rounded without gradient, as ever with it, and undone without a trace."""

import copy

import pytest
import torch
from tiny_models import tiny_encoder, tiny_seq2seq, token_batch
from torch import nn
from torch.nn import functional as F

from dqbart.quant.rounding import RoundedOnceGELU, RoundedOnceLayerNorm, round_as_before, round_once


def test_values_are_those_of_float64_rounded_once() -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(37)
    norm.weight.data.normal_()
    x = torch.randn(50, 37) * 10
    round_once(norm)
    with torch.no_grad():
        want = F.layer_norm(x.double(), (37,), norm.weight.double(), norm.bias.double(), norm.eps).float()
        assert torch.equal(norm(x), want)
        assert torch.equal(RoundedOnceGELU()(x), F.gelu(x.double()).float())
    assert not torch.equal(want, F.layer_norm(x, (37,), norm.weight, norm.bias, norm.eps))  # or nothing was tested


def test_albert_s_gelu_is_the_one_by_tanh() -> None:
    from transformers.activations import NewGELUActivation

    model, x = nn.Sequential(NewGELUActivation()), torch.linspace(-5, 5, 99)
    before = model(x)
    round_once(model)
    assert torch.equal(model(x), F.gelu(x.double(), approximate="tanh").float())
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    round_as_before(model)
    assert type(model[0]) is NewGELUActivation and vars(model[0]).keys() == vars(NewGELUActivation()).keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half(dtype: torch.dtype) -> None:
    norm = nn.LayerNorm(8).to(dtype)
    round_once(norm)
    with torch.no_grad():
        assert norm(torch.randn(3, 8, dtype=dtype)).dtype == dtype
        assert RoundedOnceGELU()(torch.randn(3, dtype=dtype)).dtype == dtype


def test_with_gradient_nothing_changes() -> None:
    x = torch.randn(5, 16, requires_grad=True)
    plain = nn.LayerNorm(16)
    rounded = copy.deepcopy(plain)
    round_once(rounded)
    assert torch.equal(plain(x), rounded(x)) and torch.equal(F.gelu(x), RoundedOnceGELU()(x))
    (rounded(x) ** 2).sum().backward()
    assert rounded.weight.grad is not None and x.grad is not None


@pytest.mark.parametrize("kind", ["bart", "mbart", "bert", "distilbert", "albert"])
def test_it_finds_every_one_and_is_undone(kind: str) -> None:
    model = tiny_seq2seq(kind) if kind.endswith("bart") else tiny_encoder(kind)
    classes = {name: type(module) for name, module in model.named_modules()}
    state = {name: id(parameter) for name, parameter in model.named_parameters()}
    batch = token_batch([5, 3])
    before = model(**batch).logits
    round_once(model)
    norms = sum(cls is nn.LayerNorm for cls in classes.values())
    assert sum(isinstance(m, RoundedOnceLayerNorm) for m in model.modules()) == norms > 0
    assert any(isinstance(m, RoundedOnceGELU) for m in model.modules())
    round_once(model)  # twice is once
    with torch.no_grad():
        assert (model(**batch).logits - before).abs().max() < 1e-4
    round_as_before(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == state
    assert torch.equal(model(**batch).logits, before)
