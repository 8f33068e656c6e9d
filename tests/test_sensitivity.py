"""Sensitivity on tiny models: the switch is held to `prepare`, and a part that was spoilt is found."""

import copy
from typing import Any

import pytest
import torch
from conftest import sentences, word_tokenizer
from tiny_models import tiny_encoder, tiny_seq2seq
from transformers import (
    AlbertForSequenceClassification,
    BertForSequenceClassification,
    DistilBertForSequenceClassification,
    RobertaForSequenceClassification,
)

from dqbart.quant.attention import quantize_attention, use_attention
from dqbart.quant.layers import FakeQuantEmbedding, FakeQuantLinear, prepare, quantizable
from dqbart.quant.rounding import round_as_before
from dqbart.recipe import Recipe
from dqbart.tasks.sensitivity import Switch, lines, part_of, sensitivity

SOURCES = sentences(12)
ROWS = [{"source": s, "target": " ".join(s.split()[:3])} for s in SOURCES]
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
    found = sensitivity(teacher, ROWS, chosen, tokenizer=word_tokenizer(), **options)
    return {row["part"]: row for row in found}


@torch.no_grad()
def logits(of: Any) -> torch.Tensor:
    return of(**INPUTS).logits


def test_names() -> None:
    assert part_of("model.encoder.layers.11.self_attn.k_proj", "layer") == "encoder.11"
    assert part_of("model.decoder.layers.0.fc1", "module") == "decoder.0.fc1"
    assert {part_of(n, "layer") for n in ("lm_head", "model.shared", "model.encoder.embed_tokens")} == {"embedding"}
    names = "cls.predictions.decoder lm_head.decoder vocab_projector albert.encoder.embedding_hidden_mapping_in".split()
    assert {part_of(n, per) for n in names for per in ("layer", "module")} == {"embedding"}
    assert part_of("distilbert.transformer.layer.1.ffn.lin1", "module") == "encoder.1.ffn.lin1"
    assert part_of("albert.encoder.albert_layer_groups.0.albert_layers.0.ffn", "layer") == "encoder.0"
    assert part_of("bert.pooler.dense", "layer") == "pooler"
    assert part_of("cls.predictions.transform.dense", "layer") == "predictions"
    assert part_of("lm_head.dense", "module") == "lm_head.dense"


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
    for row in ROWS:
        with torch.no_grad():
            labels = tokenizer(row["target"], return_tensors="pt").input_ids
            total += (
                float(teacher(**tokenizer(row["source"], return_tensors="pt"), labels=labels).loss) * labels.numel()
            )
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
    untold = [{"text": source} for source in SOURCES]
    with pytest.raises(ValueError, match="no target column to score against; give --target-column"):
        sensitivity(model(), untold, recipe(), tokenizer=word_tokenizer())
    with pytest.raises(ValueError, match="no target column to score against"):
        of_encoder(classifier("bert"), rows=untold, score_outputs=True)


# Encoders


CLASSES = [{"sentence": source, "label": "cat" if "cat" in source else "other"} for source in SOURCES]
HEADED = {"bert": BertForSequenceClassification, "roberta": RobertaForSequenceClassification,
          "distilbert": DistilBertForSequenceClassification, "albert": AlbertForSequenceClassification}  # fmt: skip


def classifier(kind: str) -> Any:
    config = tiny_encoder(kind).config
    config.vocab_size, config.id2label = 28, {0: "cat", 1: "other"}
    torch.manual_seed(0)
    return HEADED[kind](config).eval()


def of_encoder(teacher: Any, bits: str = "2-2-8", rows: Any = None, **options: Any) -> dict[str, dict[str, Any]]:
    chosen = Recipe(bits=bits, eval_batch_size=5, max_source_length=32, **options.pop("recipe", {}))  # type: ignore[arg-type]
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    found = sensitivity(teacher, rows or CLASSES, chosen, tokenizer=tokenizer, **options)
    return {row["part"]: row for row in found}


@pytest.mark.parametrize("kind", list(HEADED))
def test_encoders_of_every_family(kind: str) -> None:
    teacher = classifier(kind)
    layers = [f"encoder.{i}" for i in range(1 if kind == "albert" else 3)]  # ALBERT's share one
    eight, two = (of_encoder(teacher, bits) for bits in ("8-8-32", "2-2-32"))
    assert list(two) == ["embedding", *layers]
    for part, row in two.items():
        assert 0 < eight[part]["hidden"] < 0.05 and eight[part]["hidden"] < row["hidden"] < 3
        assert row["score"] is None and row["drop"] is None and "kl" not in row
    heads = of_encoder(teacher, recipe={"quantize_heads": True})
    assert set(heads) > set(two) and any("classifier" in name for name in heads)


def test_hidden_errors_by_hand_and_scores() -> None:
    teacher = classifier("bert")
    rows = of_encoder(teacher, "2-2-32", score_outputs=True)
    alone = prepare(copy.deepcopy(teacher), "2-2-32", skip=("*layer.0.*", "*layer.2.*", "*word_embeddings"))
    squares, whole, right = 0.0, 0.0, [0, 0]
    for row in CLASSES:
        inputs = word_tokenizer()(row["sentence"], return_tensors="pt")
        with torch.no_grad():
            ours, theirs = (m(**inputs, output_hidden_states=True) for m in (alone, teacher))
        squares += float((ours.hidden_states[-1] - theirs.hidden_states[-1]).square().sum())
        whole += float(theirs.hidden_states[-1].square().sum())
        wanted = ["cat", "other"].index(row["label"])
        right = [n + (int(x.logits.argmax()) == wanted) for n, x in zip(right, (ours, theirs), strict=True)]
    found = rows["encoder.1"]
    assert found["hidden"] == pytest.approx((squares / whole) ** 0.5, rel=1e-4)
    assert found["score"] == pytest.approx(100 * right[0] / 12)
    assert {round(row["score"] + row["drop"], 6) for row in rows.values()} == {round(100 * right[1] / 12, 6)}
    text = lines(list(rows.values()))
    assert "error of the last hidden states" in text[0] and all("error 0." in line for line in text[1:])


def test_unlabelled_texts_and_other_tasks() -> None:
    """No label is needed, and no head: what is compared is inside."""
    plain = [{"sentence": source} for source in SOURCES]
    labelled, unlabelled = (of_encoder(classifier("bert"), rows=rows) for rows in (CLASSES, plain))
    assert unlabelled == labelled
    texts = of_encoder(tiny_encoder("bert"), rows=[{"text": source} for source in SOURCES], score_outputs=True)
    assert all(0 <= row["score"] <= 100 for row in texts.values())
    body = tiny_encoder("roberta").base_model
    pairs = [{"sentence1": SOURCES[i], "sentence2": SOURCES[-i - 1], "score": i + 0.5} for i in range(12)]
    found = of_encoder(body, rows=pairs, recipe={"task": "sentences"}, score_outputs=True)
    assert list(found) == PARTS[:4] and all(-100 <= row["score"] <= 100 for row in found.values())
