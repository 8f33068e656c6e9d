"""`prepare` on whole models: names, ties, what is quantized, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, SEQ2SEQ, inputs_for, tiny, tiny_encoder, tiny_seq2seq
from torch import nn
from torch.nn import functional as F

from dqbart.notation import Bits
from dqbart.quant.layers import FakeQuantEmbedding, FakeQuantLinear, prepare, quantizable
from dqbart.quant.quantizers import Quantizer

# linear layers inside one encoder or decoder layer, and modules that hold the vocabulary matrix
COUNTS = {
    "bart": (3 * 6 + 2 * 10, 4), "mbart": (3 * 6 + 2 * 10, 4), "bert": (3 * 6, 2), "roberta": (3 * 6, 2),
    "xlm-roberta": (3 * 6, 2), "distilbert": (3 * 6, 2), "albert": (6 + 1, 2),
}  # fmt: skip


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
        # The same up to fp32 rounding, and where that, or evaluation's 15-bit probabilities, tips an 8-bit rounding, up
        # to a step of it: in a model as narrow as these one step reaches every logit of the text.
        error = (found - trained.detach()).abs() / trained.detach().abs().max()
        common = 1e-5 if numerics == "paper" or bits == "2-2-32" else 5e-3
        assert error.median() < common and error.max() < 0.05, bits


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
        ({"probability_bits": 4}, "probability_bits 4: expected 8 or 16"),
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
