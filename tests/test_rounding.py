"""exp, GELU and LayerNorm: the contract's without gradient, as ever with it, and undone without a trace."""

import copy

import pytest
import torch
from tiny_models import tiny_encoder, tiny_seq2seq, token_batch
from torch import nn
from torch.nn import functional as F

from dqbart.quant.rounding import FixedOrderGELU, RoundedOnceLayerNorm, exponential, gelu, round_as_before, round_once


def test_exponential() -> None:
    x = -torch.logspace(-6, 1.6, 5000)  # to -39.8
    want = x.double().exp()
    error = (exponential(x).double() / want - 1).abs()
    assert error[x > -5].max() < 4e-7 and error.max() < 4e-6
    found = exponential(torch.tensor([0.0, -0.0, -40.0, -40.1, -1e30, -torch.inf, torch.nan]))
    assert found[:2].tolist() == [1.0, 1.0] and 0 < found[2] < 1e-17 and found[3:6].tolist() == [0.0] * 3
    assert found[6].isnan()


def test_norms_are_those_of_float64_rounded_once() -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(37)
    norm.weight.data.normal_()
    x = torch.randn(50, 37) * 10
    round_once(norm)
    with torch.no_grad():
        want = F.layer_norm(x.double(), (37,), norm.weight.double(), norm.bias.double(), norm.eps).float()
        assert torch.equal(norm(x), want)
    assert not torch.equal(want, F.layer_norm(x, (37,), norm.weight, norm.bias, norm.eps))  # or nothing was tested


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_as_good_as_torch_s(approximate: str) -> None:
    module, x = FixedOrderGELU(), torch.linspace(-14, 14, 9999)
    module.approximate = approximate
    want = F.gelu(x.double(), approximate=approximate)
    assert (module(x) - want).abs().max() <= max(1e-6, float((F.gelu(x, approximate=approximate) - want).abs().max()))
    ends = module(torch.tensor([0.0, -1e30, 1e30, torch.inf, torch.nan]))
    assert ends[:3].tolist() == [0.0, 0.0, float(torch.tensor(1e30))] and ends[3] == torch.inf and ends[4].isnan()
    assert not module(torch.tensor([-torch.inf])).isfinite()  # what overflowed is seen, not hidden


def test_albert_s_gelu_is_the_one_by_tanh() -> None:
    from transformers.activations import NewGELUActivation

    model, x = nn.Sequential(NewGELUActivation()), torch.linspace(-5, 5, 99)
    before = model(x)
    round_once(model)
    assert not torch.equal(model(x), gelu(x))
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    round_as_before(model)
    assert type(model[0]) is NewGELUActivation and vars(model[0]).keys() == vars(NewGELUActivation()).keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half(dtype: torch.dtype) -> None:
    norm = nn.LayerNorm(8).to(dtype)
    round_once(norm)
    with torch.no_grad():
        assert norm(torch.randn(3, 8, dtype=dtype)).dtype == dtype
        assert FixedOrderGELU()(torch.randn(3, dtype=dtype)).dtype == dtype


def test_with_gradient_nothing_changes() -> None:
    x = torch.randn(5, 16, requires_grad=True)
    plain = nn.LayerNorm(16)
    rounded = copy.deepcopy(plain)
    round_once(rounded)
    assert torch.equal(plain(x), rounded(x)) and torch.equal(F.gelu(x), FixedOrderGELU()(x))
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
    assert any(isinstance(m, FixedOrderGELU) for m in model.modules())
    round_once(model)  # twice is once
    with torch.no_grad():
        assert (model(**batch).logits - before).abs().max() < 1e-4
    round_as_before(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == state
    assert torch.equal(model(**batch).logits, before)
