"""Packed modules against the fake-quantized ones they come from: equal to the last bit, whatever is done to them."""

import copy
import pickle
from typing import Any

import pytest
import torch
from tiny_models import ENCODERS, SEQ2SEQ, tiny_encoder, tiny_seq2seq, token_batch
from torch import nn
from transformers import BertForMaskedLM

from dqbart.packed.layout import as_words, pack
from dqbart.packed.modules import PackedEmbedding, PackedHead, PackedLinear, TiedEmbedding
from dqbart.packed.skeleton import round_floats_, spec_of, swap_modules
from dqbart.packed.spec import ModuleSpec
from dqbart.quant.layers import prepare
from dqbart.quant.quantizers import SCHEMES, Quantizer

CPU = torch.device("cpu")


def fill(module: Any, weight: torch.Tensor, bits: int) -> Any:
    codes, module.weight_scale = Quantizer(bits).quantize(weight)
    module.weight = as_words(pack(codes, bits))
    return module


def spec_for(kind: Any, shape: tuple[int, int], bits: int) -> ModuleSpec:
    return ModuleSpec(kind=kind, bits=bits, scheme=SCHEMES[bits], shape=shape)


def packed_linear(bits: int = 2, activations: int = 8) -> PackedLinear:
    torch.manual_seed(bits)
    quantizer = Quantizer(8) if activations == 8 else None
    module = PackedLinear(spec_for("linear", (5, 40), bits), Quantizer(bits), quantizer, torch.float32, CPU, bias=True)
    nn.init.normal_(module.bias)
    return fill(module, torch.randn(5, 40), bits)


def packed_embedding(bits: int = 2, dtype: torch.dtype = torch.float32) -> PackedEmbedding:
    torch.manual_seed(bits)
    spec = spec_for("embedding", (7, 40), bits)
    return fill(
        PackedEmbedding(spec, Quantizer(bits), Quantizer(8), dtype, CPU, padding_idx=1, embed_scale=3.0),
        torch.randn(7, 40),
        bits,
    )


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("shape", [(1, 40), (2, 3, 40), (0, 40), (2, 0, 40), (40,)])
def test_linear_follows_the_contract(bits: int, shape: tuple[int, ...]) -> None:
    module = packed_linear(bits)
    x = torch.randn(shape)
    peak = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) if x.numel() else x.new_ones(*shape[:-1], 1)
    codes = (x * (127 / peak)).round()
    acc = (codes.long() @ module.codes().long().T).float()
    assert torch.equal(module(x), acc * (peak / 127) * module.weight_scale[:, 0] + module.bias)


def test_linear_with_float_inputs_multiplies_the_dequantized_matrix() -> None:
    module = packed_linear(activations=32)
    x = torch.randn(3, 40)
    assert torch.equal(module(x), nn.functional.linear(x, module.dequantize(), module.bias))


def test_zero_input_gives_the_bias_and_infinite_input_raises() -> None:
    module = packed_linear()
    assert torch.equal(module(torch.zeros(2, 40)), module.bias.expand(2, 5))
    with pytest.raises(ValueError, match="NaN or infinite"):
        module(torch.full((1, 40), float("inf")))


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_embedding_rows(bits: int) -> None:
    module = packed_embedding(bits)
    ids = torch.tensor([[0, 6], [3, 3]])
    assert torch.equal(module(ids), module.dequantize()[ids] * 3.0)
    assert module(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 40)
    for bad in (7, -1):
        with pytest.raises(IndexError):
            module(torch.tensor([bad]))


def test_tied_modules_hold_no_tensors() -> None:
    owner = packed_embedding()
    head, lookup = PackedHead(owner, bias=False), TiedEmbedding(owner, padding_idx=1, embed_scale=1.0)
    assert not head.state_dict() and not lookup.state_dict() and not list(head.children())
    x = torch.randn(2, 40)
    linear = PackedLinear(owner.spec, owner.quantizer, Quantizer(8), torch.float32, CPU, bias=False)
    linear.weight, linear.weight_scale = owner.weight, owner.weight_scale
    assert torch.equal(head(x), linear(x))
    assert torch.equal(lookup(torch.tensor([4])) * 3.0, owner(torch.tensor([4])))


def test_moving_keeps_scales_in_fp32() -> None:
    linear, embedding = packed_linear(), packed_embedding()
    scale = linear.weight_scale.clone()
    x = torch.randn(2, 40)
    before = linear(x)
    linear.to(torch.bfloat16), embedding.half()
    assert linear._operand is None  # it lived on the old device
    assert linear.weight_scale.dtype == torch.float32 and torch.equal(linear.weight_scale, scale)
    assert linear.weight.dtype == torch.int32 and linear.bias.dtype == torch.bfloat16
    assert embedding(torch.tensor([2])).dtype == torch.float16 and embedding.weight_scale.dtype == torch.float32
    assert linear(x.bfloat16()).dtype == torch.bfloat16
    assert torch.allclose(linear(x).float(), before, atol=0.1)
    moved = packed_linear().to(torch.device("meta"))
    assert moved.weight.is_meta and moved.weight_scale.dtype == torch.float32


def test_copies_and_pickles_compute_the_same_and_share_nothing() -> None:
    linear = packed_linear()
    x = torch.randn(2, 40)
    size = len(pickle.dumps(linear))
    expected = linear(x)  # prepares the operand, which must not travel
    assert len(pickle.dumps(linear)) == size and copy.deepcopy(linear)._operand is None
    for again in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert torch.equal(again(x), expected)
        again.weight.zero_()
    assert torch.equal(linear(x), expected)
    model = nn.ModuleList([packed_embedding()])
    model.append(PackedHead(model[0], bias=False))
    twin = copy.deepcopy(model)
    assert twin[1].owner is twin[0] and twin[1].owner is not model[0]


def test_weights_are_unpacked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, calls = packed_linear(), []
    original = PackedLinear.codes
    monkeypatch.setattr(PackedLinear, "codes", lambda self: calls.append(1) or original(self))
    for _ in range(3):
        linear(torch.randn(2, 40))
    assert len(calls) == 1


def test_nothing_builds_a_graph() -> None:
    x = torch.randn(2, 40, requires_grad=True)
    assert not packed_linear()(x).requires_grad


def student(kind: str, bits: str, **options: Any) -> Any:
    model = tiny_seq2seq(kind) if kind in SEQ2SEQ else tiny_encoder(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # biases and norms too
    prepare(model, bits, **options)
    round_floats_(model, torch.float16)
    return model


def packed_twin(model: Any) -> Any:
    """The packed form in memory, without a file."""
    spec = spec_of(model, storage="planar32", float_dtype=torch.float16, matrix_dtype=torch.float32)
    twin = type(model)(copy.deepcopy(model.config))
    twin.load_state_dict(model.state_dict())
    swap_modules(twin, spec)
    for name, entry in spec.modules.items():
        if entry.tied_to is None:
            module = twin.get_submodule(name)
            codes, module.weight_scale = model.get_submodule(name).codes()
            module.weight = as_words(pack(codes, entry.bits))
        if getattr(model.get_submodule(name), "bias", None) is not None:
            twin.get_submodule(name).bias.data = model.get_submodule(name).bias.data.clone()
    return twin.eval()


def logits(model: Any) -> torch.Tensor:
    batch = token_batch([9, 4, 6])
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = token_batch([5, 3, 5], seed=1)["input_ids"]
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("kind", SEQ2SEQ + ENCODERS)
@pytest.mark.parametrize("bits", ["2-2-8", "8-8-8", "1-4-8", "3-32-8", "32-2-8", "4-2-32", "32-32-32"])
def test_swapped_model_equals_its_student(kind: str, bits: str) -> None:
    model = student(kind, bits)
    assert torch.equal(logits(packed_twin(model)), logits(model))


@pytest.mark.parametrize(
    "skip", [("lm_head",), ("model.shared",), ("model.encoder.embed_tokens", "lm_head"), ("*.layers.0.fc*",)]
)
def test_skipped_modules_stay_float(skip: tuple[str, ...]) -> None:
    model = student("bart", "2-2-8", skip=skip)
    twin = packed_twin(model)
    assert torch.equal(logits(twin), logits(model))
    if skip == ("lm_head",):
        assert type(twin.lm_head) is nn.Linear and isinstance(twin.model.decoder.embed_tokens, TiedEmbedding)
        assert "lm_head.weight" not in twin.all_tied_weights_keys
    if skip == ("model.shared",):  # the first that is left owns the matrix
        assert isinstance(twin.model.encoder.embed_tokens, PackedEmbedding)
        assert twin.lm_head.owner is twin.model.encoder.embed_tokens


def test_paper_numerics() -> None:
    model = student("bart", "2-2-8", numerics="paper", probability_bits=8)
    twin = packed_twin(model)
    assert type(twin.lm_head) is nn.Linear and twin.model.encoder.layers[0].fc1.spec.granularity == "tensor"
    assert torch.allclose(logits(twin), logits(model), rtol=0, atol=1e-5)


def test_probability_bits_travel() -> None:
    model = student("bart", "2-2-8", probability_bits=8)
    twin = packed_twin(model)
    assert twin.model.encoder.layers[0].self_attn.attention_numerics.probability_bits == 8
    assert torch.equal(logits(twin), logits(model))


def test_untied_models() -> None:
    config = tiny_encoder("bert").config
    config.tie_word_embeddings = False
    model = prepare(BertForMaskedLM(config).eval(), "2-2-8")
    twin = packed_twin(model)
    assert torch.equal(logits(twin), logits(model)) and not twin.all_tied_weights_keys


def test_attention_can_not_be_switched_off() -> None:
    twin = packed_twin(student("bart", "2-2-8"))
    for part in (twin, twin.model):
        part.set_attn_implementation("dqbart")
        with pytest.raises(ValueError, match=r"set_attn_implementation\('sdpa'\): .*is 'dqbart'.*model.dequantize"):
            part.set_attn_implementation("sdpa")
    assert twin.config._attn_implementation == "dqbart"
    float_attention = packed_twin(student("bart", "2-2-32"))
    float_attention.set_attn_implementation("eager")


def test_resize_says_what_to_do() -> None:
    twin = packed_twin(student("bart", "2-2-8"))
    with pytest.raises(ValueError, match=r"resize_token_embeddings\(130\).*model.dequantize"):
        twin.resize_token_embeddings(130)
    with pytest.raises(ValueError, match="fixed"):
        twin.model.resize_token_embeddings(130)


def test_rounding_touches_floats_and_not_quantized_matrices() -> None:
    model = tiny_seq2seq("bart")
    prepare(model, "2-32-8", skip=("*.fc1",))
    before = copy.deepcopy(model.state_dict())
    round_floats_(model, torch.float16)
    for name, tensor in model.state_dict().items():
        same = torch.equal(tensor, before[name])
        matrix = name.endswith("proj.weight") or "fc" in name and name.endswith("weight") or "embed_tokens" in name
        if matrix or name in ("model.shared.weight", "lm_head.weight"):
            assert same, name
        else:
            assert torch.equal(tensor, before[name].half().float()), name
    round_floats_(model, torch.float16, torch.float16)
    assert torch.equal(model.model.shared.weight, before["model.shared.weight"].half().float())
    assert torch.equal(
        model.model.encoder.layers[0].fc1.weight, before["model.encoder.layers.0.fc1.weight"].half().float()
    )
    assert torch.equal(model.model.encoder.layers[0].fc2.weight, before["model.encoder.layers.0.fc2.weight"])


def test_rounding_refuses_what_overflows() -> None:
    model = tiny_seq2seq("bart")
    model.final_logits_bias[0, 3] = 1e6
    with pytest.raises(ValueError, match="final_logits_bias: holds values that torch.float16 can't"):
        round_floats_(model, torch.float16)


def test_eight_columns_are_refused() -> None:
    model = tiny_seq2seq("bart", d_model=8, encoder_attention_heads=2, decoder_attention_heads=2)
    prepare(model, "2-2-8")
    with pytest.raises(ValueError, match="model.shared: rows of 8 codes in planar32 have the shape of a float weight"):
        spec_of(model, storage="planar32", float_dtype=torch.float16, matrix_dtype=torch.float32)
