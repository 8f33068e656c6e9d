"""Sensitivity on tiny models: the switch is held to `prepare`, and a part that was spoilt is found."""

import copy
from typing import Any

import pytest
import torch
from conftest import sentences, word_tokenizer
from tiny_models import tiny_encoder, tiny_seq2seq

from dqbart.data.columns import Examples
from dqbart.evaluation.sensitivity import Switch, part_of, sensitivity
from dqbart.quant.attention import quantize_attention, use_attention
from dqbart.quant.layers import FakeQuantEmbedding, FakeQuantLinear, prepare, quantizable
from dqbart.quant.rounding import round_as_before
from dqbart.recipe import Recipe

SOURCES = sentences(12)
EXAMPLES = Examples(SOURCES, [" ".join(s.split()[:3]) for s in SOURCES])
PARTS = ["embedding", "encoder.0", "encoder.1", "encoder.2", "decoder.0", "decoder.1"]
INPUTS = {
    "input_ids": torch.tensor([[0, 5, 9, 7, 2], [0, 8, 2, 1, 1]]),
    "decoder_input_ids": torch.tensor([[2, 0, 6]] * 2),
}
INPUTS["attention_mask"] = (INPUTS["input_ids"] != 1).long()


def model(kind: str = "bart", **changes: Any) -> Any:
    return tiny_seq2seq(kind, vocab_size=28, **changes)


def recipe(bits: str = "2-2-8", **changes: Any) -> Recipe:
    return Recipe(**{"bits": bits, "eval_batch_size": 5, "max_source_length": 32, "max_target_length": 12} | changes)


def measure(teacher: Any, chosen: Recipe, **options: Any) -> dict[str, dict[str, Any]]:
    found = sensitivity(teacher, word_tokenizer(), EXAMPLES, chosen, **options)
    return {row["part"]: row for row in found}


@torch.no_grad()
def logits(of: Any) -> torch.Tensor:
    return of(**INPUTS).logits


def test_names() -> None:
    assert part_of("model.encoder.layers.11.self_attn.k_proj", "layer") == "encoder.11"
    assert part_of("model.decoder.layers.0.fc1", "module") == "decoder.0.fc1"
    assert {part_of(n, "layer") for n in ("lm_head", "model.shared", "model.encoder.embed_tokens")} == {"embedding"}


@pytest.mark.parametrize("kind", ["bart", "mbart"])
@pytest.mark.parametrize("numerics", ["integer", "paper"])
@pytest.mark.parametrize("part", ["embedding", "encoder.1", "decoder.0"])
def test_a_part_turned_on_is_what_prepare_would_make(kind: str, numerics: str, part: str) -> None:
    """By hand: skip all other modules, and take the attention numerics off all other layers."""
    teacher = model(kind)
    linear, vocabulary = quantizable(teacher)
    others = tuple(n for n in linear + vocabulary if part_of(n, "layer") != part)
    by_hand = prepare(copy.deepcopy(teacher), "2-2-8", skip=others, numerics=numerics, probability_bits=8)
    for name in quantize_attention(by_hand, numerics=numerics, probability_bits=8):
        if part_of(name, "layer") != part:
            del by_hand.get_submodule(name).attention_numerics
    for name, module in by_hand.named_modules():
        if part_of(name, "layer") != part and not list(module.children()):
            round_as_before(module)
    loss = {"logits_loss": "mse"} if numerics == "paper" else {}
    switch = Switch(teacher, recipe(numerics=numerics, probability_bits=8, **loss), "layer")
    assert list(switch.parts) == PARTS
    switch.turn_on("decoder.1")  # leaves nothing behind
    assert torch.equal(logits(switch.turn_on(part)), logits(by_hand))
    plain = copy.deepcopy(teacher)
    use_attention(plain)
    assert not torch.equal(logits(by_hand), logits(plain))
    assert torch.equal(logits(switch.turn_on("")), logits(plain))


def test_attention_alone_counts() -> None:
    """Queries, keys and values have no weights, yet belong to their layer."""
    switch = Switch(model(), recipe(), "module")
    before = logits(switch.turn_on(""))
    assert "encoder.1.self_attn" in switch.parts and "decoder.0.encoder_attn" in switch.parts
    assert not torch.equal(logits(switch.turn_on("decoder.0.encoder_attn")), before)


def test_what_is_not_quantized_costs_nothing() -> None:
    """Embeddings alone have bits: no other part is there. With a skipped layer, that layer is not."""
    rows = measure(model(), recipe("32-2-32"))
    assert list(rows) == ["embedding"] and rows["embedding"]["kl"] > 0
    rows = measure(model(), recipe("2-32-32", skip=("*.encoder.layers.1.*",)))
    assert list(rows) == ["encoder.0", "encoder.2", "decoder.0", "decoder.1"]


def test_losses_against_plain_torch() -> None:
    teacher = model()
    rows = measure(teacher, recipe("8-8-8"))
    tokenizer, total, count = word_tokenizer(), 0.0, 0
    for source, target in zip(EXAMPLES.sources, EXAMPLES.targets or [], strict=True):
        with torch.no_grad():
            labels = tokenizer(target, return_tensors="pt").input_ids
            total += float(teacher(**tokenizer(source, return_tensors="pt"), labels=labels).loss) * labels.numel()
            count += labels.numel()
    assert list(rows) == PARTS
    for row in rows.values():
        assert row["loss_float"] == pytest.approx(total / count, rel=1e-5)
        assert row["kl"] > 0 and row["score"] is None and row["drop"] is None and row["bits"] == "8-8-8"


def test_fewer_bits_cost_more_and_batches_do_not_matter() -> None:
    teacher = model()
    eight, four, two = (measure(teacher, recipe(bits)) for bits in ("8-8-32", "4-4-32", "2-2-32"))
    for part in PARTS:
        assert eight[part]["kl"] < four[part]["kl"] < two[part]["kl"]
    other = measure(teacher, recipe("4-4-32", eval_batch_size=12))
    assert all(other[part]["kl"] == pytest.approx(four[part]["kl"], rel=1e-3) for part in PARTS)


def test_the_spoilt_layer_is_found() -> None:
    """One huge weight in each row leaves a single level for all others."""
    teacher = model()
    with torch.no_grad():
        for name in ("fc1", "fc2"):
            weight = getattr(teacher.model.encoder.layers[2], name).weight
            weight[:, 0] = 30 * weight.abs().max()
    rows = measure(teacher, recipe("8-8-32"))
    assert max(rows, key=lambda part: rows[part]["kl"]) == "encoder.2"
    modules = measure(teacher, recipe("8-8-32"), per="module")
    assert not any("norm" in name or "activation" in name for name in modules)
    assert max(modules, key=lambda part: modules[part]["kl"]) in ("encoder.2.fc1", "encoder.2.fc2")


def test_scores_and_the_teacher_is_left_alone() -> None:
    teacher = model(dropout=0.1).train()
    before = copy.deepcopy(teacher.state_dict())
    rows = measure(teacher, recipe("2-2-8"), score_outputs=True, limit=6)
    float_scores = {round(row["score"] + row["drop"], 6) for row in rows.values()}
    assert len(float_scores) == 1 and all(0 <= row["score"] <= 100 for row in rows.values())
    assert teacher.training and teacher.config._attn_implementation != "dqbart"
    assert not any(isinstance(m, FakeQuantLinear | FakeQuantEmbedding) for m in teacher.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="per 'head': expected 'layer' or 'module'"):
        measure(model(), recipe(), per="head")
    with pytest.raises(ValueError, match="a bert model: expected an encoder-decoder, BART or mBART"):
        sensitivity(tiny_encoder("bert"), word_tokenizer(), EXAMPLES, recipe())
    with pytest.raises(ValueError, match="examples have no targets"):
        sensitivity(model(), word_tokenizer(), Examples(SOURCES), recipe())
