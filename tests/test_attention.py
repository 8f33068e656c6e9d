"""One attention for all families: eager's numbers without settings, and output that no batch mate can change."""

from typing import Any

import pytest
import torch
from tiny_models import ENCODERS, SEQ2SEQ, tiny_encoder, tiny_seq2seq, token_batch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from dqbart.distill.capture import attention_kinds, capture_attention
from dqbart.quant.attention import (
    AttentionRecord,
    _fixed_point_mixture,
    _quantized_mixture,
    attention,
    listening,
    quantize_attention,
    use_attention,
)
from dqbart.quant.layers import prepare
from dqbart.quant.quantizers import PaperQuantizer, Quantizer

FAMILIES = SEQ2SEQ + ENCODERS
INVARIANT = [("8-8-8", 16), ("4-4-8", 16), ("2-2-8", 16), ("1-1-8", 16), ("8-8-8", 8), ("2-2-8", 8)]
LENGTHS = [11, 4, 7, 2]


def tiny(kind: str) -> Any:
    return tiny_seq2seq(kind) if kind in SEQ2SEQ else tiny_encoder(kind)


def with_decoder(kind: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    rows = batch["input_ids"].shape[0]
    return batch | {"decoder_input_ids": token_batch([6] * rows, seed=1)["input_ids"]} if kind in SEQ2SEQ else batch


def widen(batch: dict[str, Tensor], columns: int, pad: int = 1) -> dict[str, Tensor]:
    fill = {"input_ids": pad, "attention_mask": 0}
    return {k: torch.nn.functional.pad(v, (0, columns), value=fill[k]) for k, v in batch.items() if k in fill}


# Without settings it is eager attention.


@pytest.mark.parametrize("kind", FAMILIES)
def test_float_models_equal_eager(kind: str) -> None:
    batch = with_decoder(kind, token_batch(LENGTHS))
    eager, ours = tiny(kind), tiny(kind)
    eager.set_attn_implementation("eager")
    use_attention(ours)
    assert ours.config._attn_implementation == "dqbart" and eager.config._attn_implementation == "eager"
    names = (
        {"encoder_attention": "encoder_attentions", "decoder_attention": "decoder_attentions",
         "cross_attention": "cross_attentions"} if kind in SEQ2SEQ else {"encoder_attention": "attentions"}
    )  # fmt: skip
    with torch.no_grad():
        expected = eager(**batch, output_attentions=True, output_hidden_states=True)
        with capture_attention(ours, set(names)) as maps:
            found = ours(**batch, output_attentions=True, output_hidden_states=True)
    assert torch.equal(found.logits, expected.logits)
    for name, theirs in names.items():
        assert len(maps[name]) == len(expected[theirs]) == len(found[theirs]) > 1
        for a, b, c in zip(maps[name], expected[theirs], found[theirs], strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)
    states = "encoder_hidden_states" if kind in SEQ2SEQ else "hidden_states"
    assert all(torch.equal(a, b) for a, b in zip(found[states], expected[states], strict=True))


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_float_generation_equals_eager(kind: str) -> None:
    batch, eager, ours = token_batch(LENGTHS), tiny(kind), tiny(kind)
    eager.set_attn_implementation("eager")
    use_attention(ours)
    for settings in ({"num_beams": 1}, {"num_beams": 4, "no_repeat_ngram_size": 2}):
        options = settings | {"max_new_tokens": 12, "decoder_start_token_id": 2}
        assert torch.equal(ours.generate(**batch, **options), eager.generate(**batch, **options))


def test_training_equals_eager() -> None:
    """Dropout draws the same numbers, gradients are the same."""
    results = []
    for ours in (True, False):
        model = tiny_seq2seq(attention_dropout=0.3, dropout=0.1).train()
        use_attention(model) if ours else model.set_attn_implementation("eager")
        torch.manual_seed(7)
        logits = model(**with_decoder("bart", token_batch(LENGTHS))).logits
        logits.square().mean().backward()
        results.append((logits, model.model.encoder.layers[0].self_attn.q_proj.weight.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("kind", FAMILIES)
def test_padding_is_masked(kind: str) -> None:
    """A mask function left unregistered would let padding be attended, silently."""
    model = prepare(tiny(kind), "2-2-8")
    batch = with_decoder(kind, token_batch(LENGTHS))
    other = dict(batch)
    other["input_ids"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], 77)
    with torch.no_grad(), capture_attention(model, {"encoder_attention", "cross_attention"}) as maps:
        first, second = model(**batch).logits, model(**other).logits
    real = batch["attention_mask"].bool() if kind not in SEQ2SEQ else torch.ones(4, 6, dtype=torch.bool)
    assert torch.equal(first[real], second[real])
    for probabilities in maps["encoder_attention"] + maps.get("cross_attention", []):
        hidden = (batch["attention_mask"] == 0)[:, None, None, :].expand_as(probabilities)
        assert not probabilities[hidden].any()


# What is captured.


def test_records_show_the_arithmetic() -> None:
    model = prepare(tiny_seq2seq(encoder=1, decoder=1), "2-2-8")
    records: list[AttentionRecord] = []
    with torch.no_grad(), listening(records.append):
        model(**with_decoder("bart", token_batch([5, 3])))
    assert [attention_kinds(model)[id(r.module)] for r in records] == [
        "encoder_attention", "decoder_attention", "cross_attention",
    ]  # fmt: skip
    row = Quantizer(8)
    for r in records:
        scores = row.dequantize(r.query) @ row.dequantize(r.key).transpose(2, 3) * 8**-0.5
        allowed = r.scores > -1e30
        torch.testing.assert_close(r.scores[allowed], scores[allowed], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(r.probabilities, r.scores.softmax(-1), rtol=1e-5, atol=1e-6)
        assert r.query.shape[:2] == (2, 4) and r.value.shape == r.key.shape
    with torch.no_grad():
        model(**with_decoder("bart", token_batch([5, 3])))
    assert len(records) == 3  # nobody listens any more


def test_capture_sees_its_own_model_only() -> None:
    one, two = (prepare(tiny_seq2seq(), "8-8-8") for _ in range(2))
    batch = with_decoder("bart", token_batch([5, 3]))
    with torch.no_grad(), capture_attention(one, {"encoder_attention"}) as maps:
        two(**batch)
        assert maps == {"encoder_attention": []}
        one(**batch)
    assert len(maps["encoder_attention"]) == 3
    with capture_attention(one, set()) as nothing:
        assert nothing == {}


def test_albert_reuses_one_module_and_is_seen_every_time() -> None:
    model = prepare(tiny("albert"), "8-8-8")
    with torch.no_grad(), capture_attention(model, {"encoder_attention"}) as maps:
        model(**token_batch([5, 3]))
    assert len(maps["encoder_attention"]) == 3


def test_activation_checkpointing_is_not_seen_twice() -> None:
    model = prepare(tiny_seq2seq(), "2-2-8").train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with capture_attention(model, {"encoder_attention", "cross_attention"}) as maps:
        logits = model(**with_decoder("bart", token_batch([5, 3])), use_cache=False).logits
    (logits.square().mean() + sum(m.square().mean() for m in maps["encoder_attention"])).backward()
    assert {k: len(v) for k, v in maps.items()} == {"encoder_attention": 3, "cross_attention": 2}
    assert model.model.encoder.layers[0].self_attn.q_proj.weight.grad.isfinite().all()


# Quantized arithmetic of the function itself.


class _Module(torch.nn.Module):
    attention_numerics: Any = None


def settings_module(numerics: str, probability_bits: int, training: bool = False) -> Any:
    module = _Module().train(training)
    holder = tiny_seq2seq(encoder=1, decoder=1)
    quantize_attention(holder, numerics=numerics, probability_bits=probability_bits)
    module.attention_numerics = holder.model.encoder.layers[0].self_attn.attention_numerics
    return module


def qkv(seed: int = 0, queries: int = 3, keys: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 4, n, 8, generator=generator) * 2 for n in (queries, keys, keys))  # type: ignore[return-value]


def test_integer_attention_by_hand() -> None:
    q, k, v = qkv()
    row = Quantizer(8)
    probabilities = (row.dequantize(q) @ row.dequantize(k).transpose(2, 3) / 8**0.5).softmax(-1)
    plain = (probabilities @ row.dequantize(v)).transpose(1, 2)
    codes, scale = row.quantize_float(v)
    mixed = (row.dequantize(probabilities * scale.transpose(2, 3)) @ codes).transpose(1, 2)
    for bits, expected in ((16, plain), (8, mixed)):
        module = settings_module("integer", bits)
        with torch.no_grad():
            found, shown = attention(module, q, k, v, None)
        torch.testing.assert_close(shown, probabilities, rtol=1e-5, atol=1e-6)
        error = (found - expected).abs()
        close = 2e-5 if bits == 16 else 1e-6
        assert error.median() < close and error.max() < 0.02  # a tipped rounding is a step of 1/127
        trained, _ = attention(module.train(), *(t.clone().requires_grad_(True) for t in (q, k, v)), None)
        assert (trained - found).abs().median() < close and (trained - found).abs().max() < 0.02
    assert not torch.equal(plain, mixed)


def test_paper_attention_by_hand() -> None:
    q, k, v = qkv(1)
    tensor = PaperQuantizer(8, "tensor")
    for scaling in (None, 0.25):
        scores = tensor.dequantize(q * (8**-0.5 if scaling is None else scaling)) @ tensor.dequantize(k).transpose(2, 3)
        probabilities = scores.softmax(-1)
        for bits in (8, 16):
            found, shown = attention(settings_module("paper", bits), q, k, v, None, scaling)
            weights = tensor.dequantize(probabilities) if bits == 8 else probabilities
            torch.testing.assert_close(shown, probabilities)
            torch.testing.assert_close(found, (weights @ tensor.dequantize(v)).transpose(1, 2))


@pytest.mark.parametrize("bits", [8, 16])
def test_gradients_pass_straight_through(bits: int) -> None:
    """As if the quantized q, k, v (and probabilities) were the inputs."""
    module = settings_module("integer", bits, training=True)
    leaves = [t.requires_grad_(True) for t in qkv(2)]
    attention(module, *leaves, None)[0].square().sum().backward()
    row = Quantizer(8)
    q, k, v = (row.dequantize(t.detach()).requires_grad_(True) for t in leaves)
    probabilities = (q @ k.transpose(2, 3) * 8**-0.5).softmax(-1)
    if bits == 8:
        scale = row.quantize(v.detach())[1].transpose(2, 3)
        probabilities = row.fake(probabilities * scale) / scale
    (probabilities @ v).square().sum().backward()
    for ours, theirs in zip(leaves, (q, k, v), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3 * float(theirs.grad.abs().max()))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("numerics", ["integer", "paper"])
def test_zero_queries_keys_and_values(numerics: str, bits: int) -> None:
    q, k, v = qkv(3)
    k, v = torch.zeros_like(k), v.clone()
    v[:, :, 2] = 0
    leaves = [t.requires_grad_(True) for t in (q, k, v)]
    for module in (settings_module(numerics, bits), settings_module(numerics, bits, training=True)):
        output, probabilities = attention(module, *leaves, None)
        torch.testing.assert_close(probabilities, torch.full((2, 4, 3, 5), 0.2))
        output.sum().backward()
        assert output.isfinite().all() and all(t.grad is not None and t.grad.isfinite().all() for t in leaves)
        with torch.no_grad():
            assert attention(module, q, k, torch.zeros_like(v), None)[0].abs().max() == 0


@pytest.mark.parametrize("bits", [8, 16])
def test_wide_heads_stay_exact(bits: int) -> None:
    """Above width 1040 the integer sums leave fp32."""
    torch.manual_seed(0)
    q, k, v = torch.ones(1, 1, 2, 2100), torch.ones(1, 1, 3, 2100), torch.randn(1, 1, 3, 2100)
    q[..., ::3] = 0.02
    records: list[AttentionRecord] = []
    with torch.no_grad(), listening(records.append):
        attention(settings_module("integer", bits), q, k, v, None, 1.0)
    a, s = Quantizer(8).quantize(q)
    b, t = Quantizer(8).quantize(k)
    assert torch.equal(records[0].scores, (a.long() @ b.long().transpose(2, 3)).float() * s * t.transpose(2, 3))


@pytest.mark.parametrize("keys", [1, 700, 1032, 1101])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_sums_over_keys_are_exact(keys: int, spread: float) -> None:
    """At their largest (equal scores, values of one sign) and with all digits in use; 1,032 keys fill fp32."""
    scores = torch.randn(1, 2, 3, keys, generator=torch.Generator().manual_seed(keys)) * spread
    parts = (scores - scores.amax(-1, keepdim=True)).exp()
    value = torch.full((1, 2, keys, 4), 1.5)
    value[..., 1:] += torch.linspace(0, 1, keys)[:, None] * spread
    total = (parts * 2.0**30).long().sum(-1, keepdim=True).double()
    codes, scale = Quantizer(8).quantize(value)
    weights = parts * scale.transpose(2, 3)
    top = weights.amax(-1, keepdim=True)
    integers = (weights * (top.reciprocal() * 127 * 257)).round().long()
    expected = (integers @ codes.long()).double() * (top.double() * (2.0**30 / (127 * 257)) / total)
    assert torch.equal(_fixed_point_mixture(parts, total, value), expected.float())


def test_eight_bit_probabilities_stay_exact_under_autocast() -> None:
    q, k, v = qkv(keys=40)
    weights = (q @ k.transpose(2, 3)).softmax(-1)
    expected = _quantized_mixture(weights, v)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_quantized_mixture(weights, v), expected)


# Invariance: what one example gives never depends on its batch mates, on padding, or on cached decoding.


def student(kind: str, bits: str, probability_bits: int, numerics: str = "integer") -> Any:
    return prepare(tiny_seq2seq(kind), bits, probability_bits=probability_bits, numerics=numerics).eval()


@pytest.mark.parametrize(("bits", "probability_bits"), INVARIANT)
@pytest.mark.parametrize("kind", SEQ2SEQ)
@torch.no_grad()
def test_invariance(kind: str, bits: str, probability_bits: int) -> None:
    model = student(kind, bits, probability_bits)
    batch = token_batch(LENGTHS)
    target = token_batch([9, 9, 9, 9], seed=3)["input_ids"]
    together = model(**batch, decoder_input_ids=target).logits
    assert together.isfinite().all() and (together[0] != together[1]).any()
    for columns in (1, 13, 50):
        wide = widen(batch, columns)
        assert torch.equal(model(**wide, decoder_input_ids=target).logits, together), columns
    longer = torch.nn.functional.pad(target, (0, 5), value=1)
    assert torch.equal(model(**batch, decoder_input_ids=longer).logits[:, :9], together)
    for row, length in enumerate(LENGTHS):
        alone = {k: v[row : row + 1, :length] for k, v in batch.items()}
        assert torch.equal(model(**alone, decoder_input_ids=target[row : row + 1]).logits[0], together[row]), row
        assert torch.equal(
            model(input_ids=alone["input_ids"], decoder_input_ids=target[row : row + 1]).logits[0], together[row]
        )
    mates = torch.tensor([2, 0, 0, 3, 1, 2])
    shuffled = {k: v[mates] for k, v in batch.items()}
    assert torch.equal(model(**shuffled, decoder_input_ids=target[mates]).logits, together[mates])


@pytest.mark.parametrize("probability_bits", [8, 16])
@torch.no_grad()
def test_long_inputs_are_invariant_too(probability_bits: int) -> None:
    """Sums over hundreds of keys: in fp32 their order, and so their last bit, would depend on padding."""
    wide = {"d_model": 128, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 700}
    model = prepare(tiny_seq2seq(**wide), "8-8-8", probability_bits=probability_bits)
    lengths = [301, 70, 257]
    batch, target = token_batch(lengths), token_batch([130] * 3, seed=3)["input_ids"]
    together = model(**batch, decoder_input_ids=target).logits
    assert torch.equal(model(**widen(batch, 345), decoder_input_ids=target).logits, together)
    past = model(**batch, decoder_input_ids=target[:, :67], use_cache=True)
    assert torch.equal(past.logits, together[:, :67])
    encoded = BaseModelOutput(last_hidden_state=past.encoder_last_hidden_state)
    cache = past.past_key_values
    for step in range(67, 90):  # one query at a time: torch takes other kernels for it
        found = model(
            encoder_outputs=encoded, attention_mask=batch["attention_mask"], past_key_values=cache,
            decoder_input_ids=target[:, step : step + 1], use_cache=True,
        ).logits  # fmt: skip
        assert torch.equal(found[:, 0], together[:, step]), step
    for row, length in enumerate(lengths):
        alone = {k: v[row : row + 1, :length] for k, v in batch.items()}
        assert torch.equal(model(**alone, decoder_input_ids=target[row : row + 1]).logits[0], together[row]), row


@pytest.mark.parametrize(("bits", "probability_bits"), INVARIANT)
@pytest.mark.parametrize("kind", SEQ2SEQ)
@torch.no_grad()
def test_cached_decoding_equals_teacher_forcing(kind: str, bits: str, probability_bits: int) -> None:
    model = student(kind, bits, probability_bits)
    batch = token_batch(LENGTHS)
    target = token_batch([9, 9, 9, 9], seed=3)["input_ids"]
    forced = model(**batch, decoder_input_ids=target).logits
    encoded = BaseModelOutput(last_hidden_state=model.get_encoder()(**batch).last_hidden_state)
    for steps in ([1] * 9, [4, 1, 3, 1]):
        cache, start, parts = None, 0, []
        for step in steps:
            output = model(
                encoder_outputs=encoded, attention_mask=batch["attention_mask"], use_cache=True,
                decoder_input_ids=target[:, start : start + step], past_key_values=cache,
            )  # fmt: skip
            cache, start = output.past_key_values, start + step
            parts.append(output.logits)
        assert torch.equal(torch.cat(parts, 1), forced), steps


@pytest.mark.parametrize("kind", SEQ2SEQ)
@torch.no_grad()
def test_reordered_beams_keep_their_past(kind: str) -> None:
    model = student(kind, "2-2-8", 8)
    batch = {k: v.repeat_interleave(2, 0) for k, v in token_batch(LENGTHS[:2]).items()}
    target = token_batch([7] * 4, seed=4)["input_ids"]
    order = torch.tensor([1, 1, 2, 3])
    first = model(**batch, decoder_input_ids=target[:, :4], use_cache=True)
    first.past_key_values.reorder_cache(order)
    encoded = BaseModelOutput(last_hidden_state=first.encoder_last_hidden_state)
    second = model(
        encoder_outputs=encoded, attention_mask=batch["attention_mask"], decoder_input_ids=target[:, 4:],
        past_key_values=first.past_key_values, use_cache=True,
    ).logits  # fmt: skip
    path = torch.cat([target[order, :4], target[:, 4:]], 1)
    assert torch.equal(model(**batch, decoder_input_ids=path).logits[:, 4:], second)


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_generation_does_not_see_batch_mates(kind: str, num_beams: int) -> None:
    model = student(kind, "2-2-8", 8)
    batch = token_batch(LENGTHS)
    options = {"max_new_tokens": 10, "num_beams": num_beams, "decoder_start_token_id": 2}
    together = model.generate(**batch, **options)
    assert torch.equal(model.generate(**widen(batch, 9), **options), together)
    for row, length in enumerate(LENGTHS):
        alone = model.generate(**{k: v[row : row + 1, :length] for k, v in batch.items()}, **options)[0]
        assert torch.equal(alone, together[row, : len(alone)]) and (together[row, len(alone) :] == 1).all()


@torch.no_grad()
def test_paper_numerics_do_leak() -> None:
    """The contrast: with DQ-BART's one scale per tensor a batch mate changes an example's logits."""
    model = student("bart", "8-8-8", 8, numerics="paper")
    batch = token_batch(LENGTHS)
    target = token_batch([9] * 4, seed=3)["input_ids"]
    together = model(**batch, decoder_input_ids=target).logits
    alone = model(input_ids=batch["input_ids"][1:2, :4], decoder_input_ids=target[1:2]).logits
    assert (alone[0] - together[1]).abs().max() > 1e-3
