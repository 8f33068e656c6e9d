"""Shared layers through copies, steps, float checkpoints, quantization, packed folders and engines."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sharing import BATCH, SHARINGS, count, layers_of, made, said
from tiny_models import tiny_encoder
from transformers import AlbertForMaskedLM, AutoModel, RobertaModel

from dqbart.engines import load
from dqbart.engines.cpu import CpuRunner
from dqbart.engines.encoder import NativeBase
from dqbart.engines.native import unsuitable
from dqbart.packed import hook
from dqbart.packed.checkpoint import load_packed, round_floats_, save_packed, size_table
from dqbart.packed.shards import read_shard
from dqbart.packed.verify import verify
from dqbart.quant.attention import use_attention
from dqbart.quant.layers import FakeQuantLinear, QuantizedWeight, prepare
from dqbart.quant.sharing import share_again

hook.install()
# Linear layers that exist, of three layers with six each; the map behind the embedding is one more.
LINEARS = {"all": 6 + 1, "attention": 4 + 3 * 2 + 1, "ffn": 3 * 4 + 2 + 1, "none": 3 * 6 + 1}


def prepared(sharing: str, bits: str = "2-2-8", model: Any = None) -> Any:
    student = prepare(model or made(sharing), bits)
    round_floats_(student, torch.float16)
    return student


# --- copies, steps and float checkpoints -------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", SHARINGS)
def test_copies_share_among_themselves_alone(sharing: str) -> None:
    model = made(sharing)
    expected, parameters = said(model), count(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).to(torch.float64)):
        assert count(twin) == parameters
        torch.testing.assert_close(said(twin).float(), expected, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(said(model), expected)
    model.load_state_dict(copy.deepcopy(model).state_dict())
    assert torch.equal(said(model), expected)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("bits", [None, "2-2-8"])
def test_a_step_keeps_them_one(sharing: str, bits: str | None) -> None:
    model = made(sharing)
    model = (prepare(model, bits) if bits else model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "pooler" not in name)
    optimizer.step()
    state = model.state_dict()
    for part, name in (("attention", "attention.query.weight"), ("ffn", "ffn_output.weight")):
        if sharing not in ("all",):
            one, other = (state[f"albert.encoder.albert_layer_groups.{i}.albert_layers.0.{name}"] for i in (0, 2))
            assert torch.equal(one, other) == (sharing == part)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_float_checkpoints_are_whole(sharing: str, tmp_path: Path) -> None:
    """transformers alone reads a model that says the same, in which nothing was filled up at random."""
    model = made(sharing)
    model.save_pretrained(tmp_path)
    plain, info = AlbertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    assert torch.equal(said(plain), said(model)) and plain.config.dqbart_sharing == sharing
    assert (count(plain) > count(model)) == (sharing in ("attention", "ffn"))
    again = share_again(plain)
    assert again is plain and count(again) == count(model) and torch.equal(said(again), said(model))
    assert count(share_again(again)) == count(model)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    body = share_again(AutoModel.from_pretrained(tmp_path, attn_implementation="eager")).eval()
    assert torch.equal(said(body), said(model.albert))


def test_every_attention_is_reported_once() -> None:
    for sharing in SHARINGS:
        output = made(sharing)(**BATCH, output_attentions=True, output_hidden_states=True)
        assert len(output.attentions) == 3 and len(output.hidden_states) == 4


def test_copies_that_were_trained_apart(tmp_path: Path) -> None:
    made("attention").save_pretrained(tmp_path)
    plain = AlbertForMaskedLM.from_pretrained(tmp_path)
    with torch.no_grad():
        layers_of(plain)[2].attention.LayerNorm.bias[3] = 7
    state = plain.state_dict()
    with pytest.raises(ValueError, match=r"'attention', but attention differs between layers \(LayerNorm.bias\)"):
        share_again(plain)
    with pytest.raises(
        RuntimeError, match="2.*attention.LayerNorm.bias: differs from .*0.*the model's layers share it"
    ):
        made("attention").load_state_dict(state)
    with pytest.raises(ValueError, match="each layer has a copy: call dqbart.quant.sharing.share_again"):
        save_packed(prepare(plain, "2-2-8"), tmp_path / "small")
    assert not (tmp_path / "small").exists()


# --- quantized and packed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", SHARINGS)
def test_codes_are_made_once_a_matrix(sharing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(sharing)
    linears = [m for m in model.albert.modules() if isinstance(m, FakeQuantLinear)]
    assert len(linears) == LINEARS[sharing]
    made_codes: list[int] = []
    clear = QuantizedWeight.clear

    def count_and_clear(self: QuantizedWeight) -> None:
        made_codes.append(id(self))
        clear(self)

    monkeypatch.setattr(QuantizedWeight, "clear", count_and_clear)
    said(model)
    assert len(made_codes) == LINEARS[sharing] + 1  # and the vocabulary


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("bits", ["2-2-8", "8-8-8", "2-2-32"])
def test_packed_folders(sharing: str, bits: str, tmp_path: Path) -> None:
    model = prepared(sharing, bits)
    use_attention(model)
    folder = save_packed(model, tmp_path / "small")
    report = verify(folder)
    assert report.packed_modules == LINEARS[sharing] + 2  # the vocabulary, and the head tied to it
    names = [name for name in read_shard(folder / "model.safetensors").tensors if "albert_layer_groups" in name]
    shared = {"attention": ".attention.", "ffn": "ffn", "all": "", "none": "nothing"}[sharing]
    assert not [name for name in names if shared in name and "albert_layer_groups.0" not in name]
    loaded = load_packed(folder)
    plain, info = AlbertForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    for found in (loaded, plain, copy.deepcopy(loaded)):
        assert found.config.dqbart_sharing == sharing
        found.set_attn_implementation("dqbart")
        assert torch.equal(said(found), said(model))
    save_packed(loaded, tmp_path / "again")
    plain.save_pretrained(tmp_path / "transformers")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert verify(tmp_path / "transformers").tensors == report.tensors
    body = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    body.set_attn_implementation("dqbart")
    assert torch.equal(said(body), said(model.albert))


def test_sizes_count_what_is_shared_once(tmp_path: Path) -> None:
    bytes_of = {}
    for sharing in SHARINGS:
        bytes_of[sharing] = dict(size_table(save_packed(prepared(sharing, "8-8-8"), tmp_path / sharing)))[
            "linear codes"
        ]
    attention, ffn, embedding = 4 * 32 * 32, 2 * 32 * 48 + 32 * 16, 32 * 32  # rows are filled up to 32 codes
    assert bytes_of == {
        "all": embedding + attention + ffn,
        "attention": embedding + attention + 3 * ffn,
        "ffn": embedding + 3 * attention + ffn,
        "none": embedding + 3 * (attention + ffn),
    }


@pytest.mark.parametrize("sharing", SHARINGS)
def test_dequantized_models_share_still(sharing: str, tmp_path: Path) -> None:
    model = load_packed(save_packed(prepared(sharing, "2-2-32"), tmp_path / "small"))
    expected = said(model)
    floats = model.dequantize()
    torch.testing.assert_close(said(floats), expected, rtol=1e-4, atol=1e-4)
    assert count(floats) == count(made(sharing))
    floats.save_pretrained(tmp_path / "float")
    plain, info = AlbertForMaskedLM.from_pretrained(tmp_path / "float", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(said(plain), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dqbart_sharing": "none"}, "albert_layer_groups.1.albert_layers.0.attention.*missing"),
        ({"dqbart_sharing": "ffn"}, "1.albert_layers.0.ffn: AlbertForMaskedLM has no such module"),
        ({"dqbart_sharing": 7}, "config.json: dqbart_sharing 7 in a albert config"),
        ({"num_hidden_groups": 1}, "dqbart_sharing 'attention' with num_hidden_groups 1"),
    ],
)
def test_a_damaged_config_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = save_packed(prepared("attention"), tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    for use in (verify, load_packed):
        with pytest.raises(ValueError, match=words):
            use(folder)


@pytest.mark.skipif(CpuRunner(1).reason() is not None, reason="no native engine here")
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("storage", ["planar32", "trits"])
def test_the_native_engine_says_the_same(sharing: str, storage: str, tmp_path: Path) -> None:
    teacher = tiny_encoder("roberta").base_model
    student = prepared(sharing, model=made(sharing, teacher))
    folder = save_packed(student, tmp_path / "small", storage=storage)
    assert unsuitable(folder) is None
    fast, slow = load(folder, engine="cpu"), load_packed(folder)
    assert isinstance(fast, NativeBase) and isinstance(teacher, RobertaModel)
    real = BATCH["attention_mask"].bool()
    assert torch.equal(said(fast)[real], said(slow)[real])


@pytest.mark.parametrize("sharing", SHARINGS)
def test_what_the_native_engine_cannot_run_runs_in_torch(sharing: str, tmp_path: Path) -> None:
    head = save_packed(prepared(sharing), tmp_path / "head")
    assert "heads stay in float" in str(unsuitable(head))
    skipped = prepare(made(sharing, tiny_encoder("bert").base_model), "2-2-8", skip=("*.0.*.ffn",))
    words = {"all": "6 of 7", "attention": "18 of 19", "ffn": "16 of 19", "none": "18 of 19"}[sharing]
    part = save_packed(skipped, tmp_path / "part")
    assert f"{words} linear layers are packed" in str(unsuitable(part))
    for folder in (head, part):
        model = load(folder)
        assert not isinstance(model.base_model, NativeBase) and said(model).isfinite().all()
    with pytest.raises(ValueError, match="engine 'cpu' can't run .*; use engine 'torch'"):
        load(head, engine="cpu")
