"""Fake-quantized layers: exact products, honest gradients, codes never stale, checkpoints that stay ordinary."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ENCODERS, SEQ2SEQ, tiny_encoder, tiny_seq2seq, token_batch
from torch import Tensor, nn
from torch.nn import functional as F

from dqbart.quant.layers import FakeQuantEmbedding, FakeQuantLinear, QuantizedWeight, prepare, quantizable
from dqbart.quant.quantizers import Quantizer
from dqbart.recipe import Bits

FAMILIES = SEQ2SEQ + ENCODERS
BITS = (1, 2, 3, 4, 8)
# linear layers inside one encoder or decoder layer, and modules that hold the vocabulary matrix
COUNTS = {
    "bart": (3 * 6 + 2 * 10, 4), "mbart": (3 * 6 + 2 * 10, 4), "bert": (3 * 6, 2), "roberta": (3 * 6, 2),
    "xlm-roberta": (3 * 6, 2), "distilbert": (3 * 6, 2), "albert": (6 + 1, 2),
}  # fmt: skip


def tiny(kind: str) -> Any:
    return tiny_seq2seq(kind) if kind in SEQ2SEQ else tiny_encoder(kind)


def inputs_for(kind: str, lengths: tuple[int, ...] = (9, 5)) -> dict[str, Tensor]:
    batch = token_batch(list(lengths))
    if kind in SEQ2SEQ:
        batch["decoder_input_ids"] = token_batch([6] * len(lengths), seed=1)["input_ids"]
    return batch


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


@pytest.mark.parametrize("numerics", ["integer", "paper"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_prepare_keeps_names_ties_and_parameters(kind: str, numerics: str) -> None:
    model = tiny(kind)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    parameters = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
    names, ties = [n for n, _ in model.named_modules()], dict(model.all_tied_weights_keys)
    assert prepare(model, "2-2-8", numerics=numerics) is model
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)} == parameters
    assert [n for n, _ in model.named_modules()] == names and model.all_tied_weights_keys == ties


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_quantized(kind: str) -> None:
    model = prepare(tiny(kind), "2-4-8")
    names, vocabulary = quantizable(model)
    assert (len(names), len(vocabulary)) == COUNTS[kind]
    bits = {
        n: m.quantized_weight.quantizer.bits
        for n, m in model.named_modules()
        if isinstance(m, FakeQuantLinear | FakeQuantEmbedding)
    }
    assert bits == {n: 2 for n in names} | {n: 4 for n in vocabulary}
    floats = [n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Embedding)]
    assert not any(word in n for n in floats for word in ("attn", "attention", "fc", "ffn", "lin1", "query"))
    head = model.get_output_embeddings()
    assert isinstance(head, FakeQuantLinear) and head.weight is model.get_input_embeddings().weight
    assert head.quantized_weight is model.get_input_embeddings().quantized_weight


def test_poolers_stay_float() -> None:
    from transformers import AlbertModel, BertModel

    for kind in (BertModel, AlbertModel):
        config = tiny_encoder("bert" if kind is BertModel else "albert").config
        model = prepare(kind(config), "2-2-8")
        poolers = [m for n, m in model.named_modules() if "pooler" in n and isinstance(m, nn.Linear)]
        assert poolers and not any(isinstance(m, FakeQuantLinear) for m in poolers)
        assert isinstance(model.get_submodule("embeddings.word_embeddings"), FakeQuantEmbedding)


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_the_head_is_quantized_in_integer_numerics_only(kind: str) -> None:
    hidden = torch.randn(3, 32)
    ours, paper = prepare(tiny(kind), "2-2-8"), prepare(tiny(kind), "2-2-8", numerics="paper")
    with torch.no_grad():
        codes, scale = Quantizer(2).quantize(ours.lm_head.weight)
        faked = F.linear(Quantizer(8).dequantize(hidden), codes.float() * scale)
        torch.testing.assert_close(ours.lm_head(hidden), faked, rtol=1e-5, atol=1e-5)
        assert type(paper.lm_head) is nn.Linear
        assert torch.equal(paper.lm_head(hidden), F.linear(hidden, paper.lm_head.weight))
        assert isinstance(paper.model.shared, FakeQuantEmbedding)


@pytest.mark.parametrize("numerics", ["integer", "paper"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_training_and_evaluation_agree(kind: str, numerics: str) -> None:
    batch = inputs_for(kind)
    for bits in ("8-8-8", "2-2-8") if numerics == "paper" else ("8-8-8", "1-3-8", "2-4-8", "2-2-32", "32-2-8"):
        model = prepare(tiny(kind), bits, numerics=numerics)
        trained = model(**batch).logits
        assert trained.requires_grad
        trained.square().mean().backward()
        untouched = [n for n, p in model.named_parameters() if p.grad is None and "pooler" not in n]
        assert not untouched
        with torch.no_grad():
            found = model(**batch).logits
        # The same up to fp32 rounding, and where that tips an 8-bit rounding, up to a step of it.
        error = (found - trained.detach()).abs() / trained.detach().abs().max()
        assert error.median() < 1e-5 and error.max() < 0.05, bits


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_student_checkpoint_is_an_ordinary_one(kind: str, tmp_path: Path) -> None:
    plain, student = tiny(kind), prepare(tiny(kind), "2-2-8")
    student.save_pretrained(tmp_path)
    again, info = type(plain).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not hasattr(again.config, "quantization_config")
    assert not any(isinstance(m, FakeQuantLinear | FakeQuantEmbedding) for m in again.modules())
    state = again.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(torch.equal(v, state[k]) for k, v in plain.state_dict().items())
    batch = inputs_for(kind)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**batch).logits, plain(**batch).logits)


def test_32_bits_leave_a_model_alone() -> None:
    model, plain = prepare(tiny_seq2seq(), "32-32-32"), tiny_seq2seq()
    batch = inputs_for("bart")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)


def test_weight_only() -> None:
    model = prepare(tiny_seq2seq(), "4-4-32")
    layer = model.model.encoder.layers[0].fc1
    assert layer.input_quantizer is None and model.config._attn_implementation != "dqbart"
    x = torch.randn(2, 32)
    with torch.no_grad():
        codes, scale = layer.codes()
        torch.testing.assert_close(layer(x), F.linear(x, codes.float() * scale, layer.bias))
    assert prepare(tiny_seq2seq(), "4-4-8").model.encoder.layers[0].fc1.input_quantizer == Quantizer(8)


def test_skip() -> None:
    skip = ("*.layers.0.fc2", "lm_head", "model.decoder.layers.1.encoder_attn.*")
    model = prepare(tiny_seq2seq(), "2-2-8", skip=skip)
    modules = dict(model.named_modules())
    names, vocabulary = quantizable(model)
    left = {n for n in names + vocabulary if not isinstance(modules[n], FakeQuantLinear | FakeQuantEmbedding)}
    cross = {f"model.decoder.layers.1.encoder_attn.{p}_proj" for p in ("q", "k", "v", "out")}
    assert left == {"model.encoder.layers.0.fc2", "model.decoder.layers.0.fc2", "lm_head"} | cross
    with torch.no_grad():
        hidden = torch.randn(2, 32)
        assert torch.equal(model.lm_head(hidden), F.linear(hidden, model.lm_head.weight))


def test_what_does_not_fit_is_refused_and_nothing_is_changed() -> None:
    model = tiny_seq2seq()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"skip": ("*.fc3",)}, r"skip '\*.fc3' matches no module; there are model.encoder.layers.0.self_attn.k_proj, "),
        ({"skip": ("*.fc1", "FC2")}, "skip 'FC2' matches no module"),
        ({"numerics": "exact"}, "numerics 'exact': expected 'integer' or 'paper'"),
        ({"bits": "2-2-4"}, "bits '2-2-4': expected W-E-A"),
        ({"probability_bits": 4}, "probability_bits 4: expected 8 or 32"),
        ({"bits": "2-2-32", "probability_bits": 8}, "probability_bits 8 with bits 2-2-32: needs 8-bit activations"),
    ]
    for arguments, words in wrong:
        with pytest.raises(ValueError, match=words):
            prepare(model, **({"bits": "2-2-8"} | arguments))
    assert not any(isinstance(m, FakeQuantLinear | FakeQuantEmbedding) for m in model.modules())


def test_unsupported_models_are_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    words = "expected one of bart, mbart, bert, roberta, xlm-roberta, distilbert, albert"
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=f"architecture 'gpt2' is not supported: {words}"):
        prepare(gpt, "2-2-8")
    with pytest.raises(ValueError, match=f"architecture 'Linear' is not supported: {words}"):
        prepare(nn.Linear(2, 2), Bits("2-2-8"))
    with pytest.raises(ValueError, match="embed_tokens has a vocabulary matrix of its own"):
        prepare(tiny_seq2seq(tie_word_embeddings=False), "2-2-8")


def test_preparing_twice_is_refused() -> None:
    """What the first call quantized and the second leaves alone would stay as it is."""
    with pytest.raises(ValueError, match="the model is prepared already: expected a float one"):
        prepare(prepare(tiny_seq2seq(), "2-2-8"), "8-32-32")


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_bf16_autocast(kind: str) -> None:
    for bits, numerics in (("2-2-8", "integer"), ("8-8-8", "integer"), ("2-2-8", "paper")):
        model = prepare(tiny(kind), bits, numerics=numerics, probability_bits=8)
        batch = inputs_for(kind)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(**batch).logits
            loss = logits.float().square().mean()
        loss.backward()
        assert logits.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        with torch.no_grad():
            exact = model(**batch).logits
            assert (logits - exact).abs().max() < 0.3 * exact.abs().max()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                if numerics == "integer":  # sums stay exact, so dev scores are those of the packed model
                    assert torch.equal(model(**batch).logits, exact)


def test_a_bfloat16_model() -> None:
    model = prepare(tiny_seq2seq().to(torch.bfloat16), "2-2-8")
    batch = inputs_for("bart")
    logits = model(**batch).logits
    logits.float().square().mean().backward()
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in model.parameters())
    with torch.no_grad():
        assert (model(**batch).logits - logits).float().abs().max() < 0.1 * logits.float().abs().max()
