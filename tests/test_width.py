"""Sub-networks: slices of a model that are models of their own, in memory and on disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dqbart_kernels import cpu
from tiny_models import tiny_encoder, tiny_seq2seq, token_batch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
)

import dqbart
from dqbart.engines.native import unsuitable
from dqbart.packed.checkpoint import load_packed, save_packed
from dqbart.packed.plain import load_plain
from dqbart.packed.verify import verify
from dqbart.quant.attention import use_attention
from dqbart.quant.layers import FakeQuantLinear, prepare
from dqbart.quant.narrow import FIELD, layer_names, layers_of
from dqbart.student.width import Shared, subnetwork, width_sizes

KINDS = ("bert", "roberta", "xlm-roberta", "distilbert")
HEADS = {
    "bert": BertForSequenceClassification, "roberta": RobertaForSequenceClassification,
    "distilbert": DistilBertForSequenceClassification,
}  # fmt: skip


def classifier(kind: str = "bert", labels: int = 3, layers: int = 3) -> Any:
    torch.manual_seed(0)
    config = tiny_encoder(kind).config
    config.num_labels, config.initializer_range = labels, 0.2
    config.num_hidden_layers = layers
    model = HEADS[kind](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms that aren't all 0 and 1
                parameter.add_(0.1 * torch.randn_like(parameter))
    use_attention(model)
    return model


def labelled(lengths: list[int], seed: int = 0, labels: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return token_batch(lengths, seed) | {"labels": torch.randint(0, labels, (len(lengths),), generator=generator)}


@pytest.mark.parametrize(("width", "sizes"), [(0.25, (3, 768)), (0.5, (6, 1536)), (0.75, (9, 2304)), (1.0, (12, 3072))])
@pytest.mark.parametrize("config", [BertConfig, RobertaConfig, XLMRobertaConfig, DistilBertConfig])
def test_published_widths(config: Any, width: float, sizes: tuple[int, int]) -> None:
    assert width_sizes(config(), width) == sizes


@pytest.mark.parametrize("width", [0.1, 0, -0.5, 1.25, float("nan")])
def test_a_width_that_leaves_no_head(width: float) -> None:
    model = classifier()
    with pytest.raises(ValueError, match=rf"width {width} of 4 heads and 48 neurons: expected 1/4 to 1"):
        subnetwork(model, width)
    with pytest.raises(ValueError, match="depth 0.1 of 3 layers"):
        subnetwork(model, depth=0.1)


def test_families_without_elastic_width() -> None:
    for model in (tiny_seq2seq(), tiny_encoder("albert")):
        with pytest.raises(ValueError, match=f"architecture '{model.config.model_type}': width is elastic for bert, "):
            subnetwork(model)
    config = tiny_encoder("bert").config
    config.is_decoder = config.add_cross_attention = True
    with pytest.raises(ValueError, match="add_cross_attention True: width is elastic for encoders"):
        subnetwork(BertModel(config))


# Sub-networks


@pytest.mark.parametrize("bits", [None, "8-8-8", "2-2-8", "1-32-32"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sub_network_gives_what_the_shared_weights_give(kind: str, bits: str | None) -> None:
    model, batch = tiny_encoder(kind), token_batch([9, 5, 12])
    use_attention(model)
    if bits:
        prepare(model, bits)
    for width, depth in ((0.25, 1.0), (0.5, 0.5), (0.75, 0.7), (1.0, 1.0)):
        own, shared = subnetwork(model, width, depth), Shared(model, width, depth)
        for gradient in (True, False):
            with torch.set_grad_enabled(gradient):
                found, want = (m(**batch, output_hidden_states=True) for m in (own, shared))
            assert len(found.hidden_states) == len(shared.kept) + 1
            assert torch.equal(found.logits, want.logits)
            assert all(torch.equal(a, b) for a, b in zip(found.hidden_states, want.hidden_states, strict=True))
    with torch.no_grad():
        assert torch.equal(Shared(model)(**batch).logits, model(**batch).logits)


def test_shapes_and_bookkeeping() -> None:
    for kind in KINDS:
        model = tiny_encoder(kind)
        cut = subnetwork(model, 0.25, 0.5)
        names = layer_names(cut.config)
        assert type(cut) is type(model) and getattr(cut.config, FIELD) == 1 and cut.config.num_attention_heads == 4
        assert cut.config.num_hidden_layers == 2 and getattr(cut.config, names.neurons) == 12
        for i, (layer, source) in enumerate(zip(layers_of(cut), (0, 2), strict=True)):
            shapes = [tuple(layer.get_submodule(n).weight.shape) for n in (*names.projections, names.out)]
            assert shapes == [(8, 32)] * 3 + [(32, 8)]
            up, whole = layer.get_submodule(names.up), layers_of(model)[source].get_submodule(names.up)
            assert (up.out_features, up.in_features) == (12, 32) and torch.equal(up.weight, whole.weight[:12])
            assert all(m.layer_idx == i for m in layer.modules() if hasattr(m, "layer_idx"))
        assert not any(tensor.is_meta for tensor in (*cut.parameters(), *cut.buffers()))
        assert cut.get_output_embeddings().weight is cut.get_input_embeddings().weight
        assert getattr(model.config, FIELD, None) is None and model.config.num_hidden_layers == 3


def test_a_sub_network_shares_nothing_with_its_model() -> None:
    model, batch = classifier(), labelled([9, 5])
    cut = subnetwork(model, 0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cut(**batch).loss.backward()
    with torch.no_grad():
        for parameter in cut.parameters():
            parameter.mul_(2)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert cut.config is not model.config and layers_of(cut)[0].attention.self.config is cut.config


def test_a_sub_network_of_a_sub_network() -> None:
    model, batch = classifier(), labelled([9, 5])
    half = subnetwork(model, 0.5)
    twice, once = subnetwork(half, 0.5), subnetwork(model, 0.25)
    assert width_sizes(half.config, 1.0) == (2, 24)
    with torch.no_grad():
        assert torch.equal(twice(**batch).logits, once(**batch).logits)
    assert getattr(subnetwork(model, 0.9).config, FIELD, None) is None  # all four heads, 43 neurons


def test_mode_freezing_and_one_head() -> None:
    model = classifier().train()
    model.bert.embeddings.requires_grad_(False)
    with torch.no_grad():
        cut = subnetwork(model, 0.25)
    assert cut.training and not cut.bert.embeddings.word_embeddings.weight.requires_grad
    assert cut.classifier.weight.requires_grad and cut.bert.encoder.layer[0].output.dense.weight.requires_grad
    one = tiny_encoder("bert").config
    one.num_attention_heads = 1
    assert width_sizes(one, 0.75) == (1, 36)
    with pytest.raises(ValueError, match="width 0.25 of 1 heads and 48 neurons: expected 1/1 to 1"):
        width_sizes(one, 0.25)


@pytest.mark.parametrize(
    "head", [BertModel, BertForTokenClassification, BertForQuestionAnswering, BertForMultipleChoice]
)
def test_every_head_class_runs(head: Any) -> None:
    torch.manual_seed(0)
    model, batch = head(tiny_encoder("bert").config).eval(), token_batch([9, 5])
    if head is BertForMultipleChoice:
        batch = {name: value[None] for name, value in batch.items()}
    cut = subnetwork(model, 0.5, 0.5)
    with torch.no_grad():
        found, want = cut(**batch), Shared(model, 0.5, 0.5)(**batch)
    assert type(found) is type(model(**batch)) and torch.equal(found[0], want[0])


# On disk


@pytest.mark.parametrize("kind", KINDS)
def test_a_float_sub_network_is_saved_and_read(kind: str, tmp_path: Path) -> None:
    cut, batch = subnetwork(tiny_encoder(kind), 0.5, 0.5), token_batch([9, 5])
    cut.save_pretrained(tmp_path / "m")
    again = load_plain(tmp_path / "m")
    with torch.no_grad():
        assert type(again) is type(cut) and torch.equal(again(**batch).logits, cut(**batch).logits)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # loudly, never noise
        type(cut).from_pretrained(tmp_path / "m")
    values = json.loads((tmp_path / "m" / "config.json").read_text())
    for heads, message in ((0, f"{FIELD} 0: expected 1 to 4"), (3, "size mismatch"), ("2", f"{FIELD} '2': expected")):
        (tmp_path / "m" / "config.json").write_text(json.dumps(values | {FIELD: heads}))
        with pytest.raises(ValueError, match=message):
            load_plain(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="none"):
        load_plain(tmp_path / "none")


@pytest.mark.parametrize("bits", ["8-8-8", "2-2-8"])
@pytest.mark.parametrize("kind", HEADS)
def test_a_packed_sub_network(kind: str, bits: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = classifier(kind), token_batch([9, 5, 12])
    prepare(model, bits)
    cut = subnetwork(model, 0.5, 0.5)
    assert any(isinstance(m, FakeQuantLinear) for m in cut.modules())
    folder = save_packed(cut, tmp_path / "m", float_dtype=torch.float32, storage="trits" if bits[0] == "2" else None)
    packed = dqbart.load(folder, engine="torch")
    assert verify(folder).packed_modules == 2 * 6 + 1 and type(packed) is type(cut)
    with torch.no_grad():
        want = cut(**batch).logits
        assert torch.equal(packed(**batch).logits, want)
        assert (want - model(**batch).logits).abs().max() > 1e-3
    assert unsuitable(folder) == "attention with 2 of 4 heads: it runs all of them"
    with caplog.at_level("INFO", logger="dqbart"):
        assert type(dqbart.load(folder)) is type(cut)
    if cpu.reason() is None:
        assert any("attention with 2 of 4 heads: it runs all of them" in r.getMessage() for r in caplog.records)
        with pytest.raises(ValueError, match="engine 'cpu' can't run .*attention with 2 of 4 heads"):
            dqbart.load(folder, engine="cpu")
    with pytest.raises(ValueError, match="2 of 4 heads a layer, which transformers' own classes have no setting for"):
        dqbart.export(folder, output=tmp_path / "float")
    twice = save_packed(packed, tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(load_packed(twice)(**batch).logits, want)
        dense = packed.dequantize()
        dense.save_pretrained(tmp_path / "dense")
        torch.testing.assert_close(load_plain(tmp_path / "dense")(**batch).logits, dense(**batch).logits)
    with pytest.raises(ValueError, match="the model is packed"):
        subnetwork(load_packed(folder), 0.5)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (None, r"modules\..*output.dense: shape \[32, 16\], but the rest of config.json makes it \[32, 32\]"),
        (3, r"modules\..*output.dense: shape \[32, 16\], but the rest of config.json makes it \[32, 24\]"),
        (5, f"{FIELD} 5: expected 1 to 4"),
        (True, f"{FIELD} True: expected 1 to 4"),
        ("2", f"{FIELD} '2': expected 1 to 4"),
    ],
)
def test_a_config_that_lies_about_heads(heads: Any, message: str, tmp_path: Path) -> None:
    folder = save_packed(subnetwork(prepare(classifier(), "8-8-8"), 0.5), tmp_path / "m")
    values = json.loads((folder / "config.json").read_text())
    assert values[FIELD] == 2
    (folder / "config.json").write_text(json.dumps(values | {FIELD: heads}))
    for read in (verify, lambda place: dqbart.load(place, engine="torch")):
        with pytest.raises(ValueError, match=f"config.json: {message}"):
            read(folder)
    if heads is not None and cpu.reason() is None:
        with pytest.raises(ValueError, match="config.json|it runs all of them"):
            dqbart.load(folder, engine="cpu")
