"""Fake-quantized layers: exact products, honest gradients, codes never stale, checkpoints that stay ordinary."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import inputs_for, tiny_seq2seq
from torch import nn
from torch.nn import functional as F

from dqbart.quant.layers import FakeQuantEmbedding, FakeQuantLinear, QuantizedWeight, prepare
from dqbart.quant.quantizers import Quantizer

BITS = (1, 2, 3, 4, 8)


def linear(bits: int, in_features: int = 40, out_features: int = 24, bias: bool = True, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    layer: Any = nn.Linear(in_features, out_features, bias=bias)
    layer.quantized_weight, layer.input_quantizer, layer.integer = QuantizedWeight(Quantizer(bits)), Quantizer(8), True
    layer.__class__ = FakeQuantLinear
    return layer


# Products and gradients.


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bias", [True, False])
def test_integer_linear_is_the_product_of_faked_operands(bits: int, bias: bool) -> None:
    layer = linear(bits, bias=bias)
    x = torch.randn(3, 5, 40) * torch.logspace(-2, 2, 5).view(1, 5, 1)
    x[1, 2] = 0
    x.requires_grad_(True)
    upstream = torch.randn(3, 5, 24)
    y = layer(x)
    y.backward(upstream)
    found = [x.grad, layer.weight.grad] + ([layer.bias.grad] if bias else [])

    x2, w2 = x.detach().clone().requires_grad_(True), layer.weight.detach().clone().requires_grad_(True)
    b2 = layer.bias.detach().clone().requires_grad_(True) if bias else None
    expected = F.linear(Quantizer(8).fake(x2), Quantizer(bits).fake(w2), b2)
    expected.backward(upstream)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))
    for ours, theirs in zip(found, [x2.grad, w2.grad] + ([b2.grad] if b2 is not None else []), strict=True):
        assert theirs is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    with torch.no_grad():
        assert torch.equal(layer(x), y)  # evaluation multiplies the same integers
        assert torch.equal(layer(x[1:2, 3:4]), y[1:2, 3:4])
        if bias:
            assert torch.equal(layer(x)[1, 2], layer.bias)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [1, 17, 1040, 1041, 3001])
def test_products_are_exact_for_any_width(bits: int, width: int) -> None:
    layer = linear(bits, width, 7)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(7, width).sign() * (1 + torch.rand(7, width) / 50))  # codes near their largest
        x = torch.cat([layer.weight.sign() * 3, torch.ones(1, width), torch.randn(4, width)])
        a, scale_a = Quantizer(8).quantize(x)
        w, scale_w = layer.codes()
        exact = (a.long() @ w.long().T).float()  # rounded once above 2^24
        expected = exact * scale_a * scale_w.T + layer.bias
        assert torch.equal(layer(x), expected)
    x.requires_grad_(True)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("frozen", ["weight", "input", "both"])
def test_frozen_operands(frozen: str) -> None:
    layer = linear(2)
    x = torch.randn(4, 40, requires_grad=frozen == "weight")
    layer.weight.requires_grad_(frozen == "input")
    y = layer(x)
    y.sum().backward()
    assert (x.grad is None) == (frozen != "weight") and (layer.weight.grad is None) == (frozen != "input")
    torch.testing.assert_close(layer.bias.grad, torch.full((24,), 4.0))


def test_no_tokens_at_all() -> None:
    layer = linear(8)
    x = torch.empty(2, 0, 40, requires_grad=True)
    y = layer(x)
    assert y.shape == (2, 0, 24)
    y.sum().backward()
    assert layer.weight.grad.abs().sum() == 0 and not torch.is_nonzero(layer.bias.grad.abs().sum())
    with torch.no_grad():
        assert layer(x).shape == (2, 0, 24)


def test_overflown_input_raises() -> None:
    layer = linear(2)
    x = torch.randn(2, 40)
    x[1, 3] = float("nan")
    with pytest.raises(ValueError, match="cannot quantize NaN or infinite values"):
        layer(x)


@pytest.mark.parametrize("bits", BITS)
def test_embedding_rows_and_gradient(bits: int) -> None:
    torch.manual_seed(0)
    layer: Any = nn.Embedding(11, 16, padding_idx=1)
    layer.quantized_weight, layer.__class__ = QuantizedWeight(Quantizer(bits)), FakeQuantEmbedding
    layer.embed_scale = 4.0
    ids = torch.tensor([[3, 1, 3], [10, 0, 1]])
    trained = layer(ids)
    trained.backward(torch.ones_like(trained))
    assert layer.weight.grad[:, 0].tolist() == [4, 0, 0, 8, 0, 0, 0, 0, 0, 0, 4]  # padding has none
    with torch.no_grad():
        assert torch.equal(layer(ids), trained)
        assert not trained[0, 1].any()  # the padding row is zero, not NaN
        assert layer(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 16)


# Codes are never stale.


@pytest.mark.parametrize("optimizer", ["plain", "foreach", "fused"])
@pytest.mark.parametrize(("bits", "skip"), [("2-2-8", ()), ("2-4-32", ()), ("32-2-8", ()), ("2-2-8", ("lm_head",))])
def test_codes_follow_the_optimizer(optimizer: str, bits: str, skip: tuple[str, ...]) -> None:
    """Fused steps (Trainer's default) do not raise the version of a tensor."""
    model = prepare(tiny_seq2seq(encoder=1, decoder=1), bits, skip=skip)
    options = {"plain": {"foreach": False, "fused": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    step = torch.optim.AdamW(model.parameters(), lr=0.05, **options[optimizer])
    batch = inputs_for("bart")
    for _ in range(3):
        with torch.no_grad():
            model(**batch)  # fills the caches
        model(**batch).logits.square().mean().backward()
        step.step()
        step.zero_grad()
        check_fresh(model)


def check_fresh(model: Any) -> None:
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, FakeQuantLinear | FakeQuantEmbedding):
                codes, scale = module.codes()
                expected = module.quantized_weight.quantizer.quantize(module.weight)
                assert torch.equal(codes, expected[0]) and torch.equal(scale, expected[1]), name
                operand = module.quantized_weight.operand(module.weight)
                assert torch.equal(operand.codes(), codes), name


def _replace(layer: Any) -> None:
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda layer: layer.weight.detach().mul_(-1),
    "no grad": lambda layer: torch.no_grad()(layer.weight.zero_)(),
    "init": lambda layer: nn.init.normal_(layer.weight),
    "load_state_dict": lambda layer: layer.load_state_dict(linear(2, seed=5).state_dict()),
    "assign": lambda layer: layer.load_state_dict(linear(2, seed=5).state_dict(), assign=True),
    "replaced": _replace,
    "bf16 and back": lambda layer: layer.to(torch.bfloat16).to(torch.float32),
    "data swapped": lambda layer: setattr(layer.weight, "data", torch.randn(24, 40)),
    "cleared": lambda layer: (layer.weight.data.mul_(-1), layer.quantized_weight.clear()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_codes_notice_a_change(change: str) -> None:
    layer = linear(2)
    x = torch.randn(3, 40)
    for _ in range(5):  # freed memory may be used again at the same address
        with torch.no_grad():
            layer(x)
        CHANGES[change](layer)
        check_fresh(layer)
        with torch.no_grad():
            a, scale = Quantizer(8).quantize(x)
            codes, scale_w = Quantizer(2).quantize(layer.weight)
            expected = (a.long() @ codes.long().T).float() * scale * scale_w.T + layer.bias
            torch.testing.assert_close(layer(x), expected)


def test_codes_are_kept_while_nothing_changes() -> None:
    layer = linear(2).requires_grad_(False)
    first = layer.quantized_weight.operand(layer.weight)
    layer(torch.randn(2, 40))
    assert layer.quantized_weight.operand(layer.weight) is first and layer.codes()[0] is layer.codes()[0]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_independent(how: str) -> None:
    model = prepare(tiny_seq2seq(encoder=1, decoder=1), "2-2-8").eval()
    batch = inputs_for("bart")
    with torch.no_grad():
        before = model(**batch).logits
        twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        assert torch.equal(twin(**batch).logits, before)
        assert twin.lm_head.weight is twin.model.shared.weight
        assert twin.lm_head.quantized_weight is twin.model.shared.quantized_weight
        twin.lm_head.weight.normal_()
        assert not torch.equal(twin(**batch).logits, before) and torch.equal(model(**batch).logits, before)
    check_fresh(twin)


# prepare.
