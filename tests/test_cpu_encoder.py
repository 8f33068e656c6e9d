"""Encoders in native code: the same hidden states as the torch engine, every head class, and what falls back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from dqbart_kernels import cpu
from tiny_models import ENCODERS, tiny_encoder, token_batch
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AlbertModel,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DistilBertForSequenceClassification,
    DistilBertModel,
    RobertaForSequenceClassification,
    RobertaModel,
    XLMRobertaModel,
)

from dqbart.engines import load
from dqbart.engines.encoder import NativeBase
from dqbart.packed.checkpoint import load_packed, save_packed
from dqbart.quant.layers import prepare

pytestmark = pytest.mark.skipif(cpu.reason() is not None, reason=str(cpu.reason()))
BASES = {
    "bert": BertModel, "roberta": RobertaModel, "xlm-roberta": XLMRobertaModel, "distilbert": DistilBertModel,
    "albert": AlbertModel,
}  # fmt: skip
LENGTHS = [9, 3, 20, 33, 4]


def saved(model: Any, folder: Path, bits: str = "2-2-8", storage: str = "planar32") -> Path:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return save_packed(prepare(model.eval(), bits), folder, storage=storage)


def base_of(kind: str) -> Any:
    return BASES[kind](tiny_encoder(kind).config)


def real_rows(hidden: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return hidden[batch["attention_mask"].bool()]


@pytest.mark.parametrize("isa", cpu.instruction_sets() if cpu.reason() is None else [])
@pytest.mark.parametrize("bits", ["2-2-8", "8-8-8", "1-4-8"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_hidden_states_and_pooled_output(
    kind: str, bits: str, isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cpu.VARIABLE, isa)
    folder = saved(base_of(kind), tmp_path / "m", bits)
    fast, slow = load(folder, threads=2), load_packed(folder)
    assert isinstance(fast, NativeBase) and isinstance(fast, BASES[kind]) and fast.runner.model.instruction_set == isa
    batch = token_batch(LENGTHS)
    with torch.no_grad():
        found, want = fast(**batch), slow(**batch)
    assert torch.equal(real_rows(found.last_hidden_state, batch), real_rows(want.last_hidden_state, batch))
    assert type(found) is type(want) or kind not in ("albert", "distilbert")
    assert not found.last_hidden_state[~batch["attention_mask"].bool()].any()
    if kind != "distilbert":
        torch.testing.assert_close(found.pooler_output, want.pooler_output, rtol=1e-6, atol=1e-6)


def test_small_activations(tmp_path: Path) -> None:
    """What is added to a small variance is the same number everywhere, an fp32 one."""
    config = tiny_encoder("bert").config
    config.initializer_range, config.layer_norm_eps = 0.01, 1e-5
    folder = save_packed(prepare(BertModel(config).eval(), "8-8-8"), tmp_path / "m")
    batch = token_batch([60] * 4)
    with torch.no_grad():
        assert torch.equal(*(model(**batch).last_hidden_state for model in (load(folder), load_packed(folder))))


def test_token_types(tmp_path: Path) -> None:
    folder = saved(base_of("bert"), tmp_path / "m")
    fast, slow, batch = load(folder), load_packed(folder), token_batch([12, 7])
    batch["token_type_ids"] = (torch.arange(12) > 5).long().expand(2, -1)
    with torch.no_grad():
        found, want = (real_rows(model(**batch).last_hidden_state, batch) for model in (fast, slow))
    assert torch.equal(found, want)
    with torch.no_grad(), pytest.raises(ValueError, match="token type 2: expected less than 2"):
        fast(**batch | {"token_type_ids": torch.full((2, 12), 2)})


@pytest.mark.parametrize(
    "kind, head",
    [
        ("bert", BertForSequenceClassification), ("bert", BertForTokenClassification),
        ("roberta", RobertaForSequenceClassification), ("distilbert", DistilBertForSequenceClassification),
        ("albert", AlbertForSequenceClassification),
    ],
)  # fmt: skip
def test_heads_are_transformers_own(kind: str, head: Any, tmp_path: Path) -> None:
    config = tiny_encoder(kind).config
    config.num_labels = 5
    folder = saved(head(config), tmp_path / "m")
    fast, slow, batch = load(folder), load_packed(folder), token_batch(LENGTHS)
    assert type(fast) is head and isinstance(fast.base_model, NativeBase)
    with torch.no_grad():
        found, want = fast(**batch).logits, slow(**batch).logits
        as_tuple = fast(**batch, return_dict=False)
    if head is BertForTokenClassification:
        found, want = real_rows(found, batch), real_rows(want, batch)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)
    assert isinstance(as_tuple, tuple) and as_tuple[0].shape == fast(**batch).logits.shape


def test_a_text_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    fast, batch = load(saved(base_of("roberta"), tmp_path / "m")), token_batch(LENGTHS)
    with torch.no_grad():
        whole = fast(**batch).last_hidden_state
        for i, length in enumerate(LENGTHS):
            alone = fast(batch["input_ids"][i : i + 1, :length]).last_hidden_state
            assert torch.equal(alone[0], whole[i, :length])


def test_a_batch_of_more_tokens_than_are_computed_at_once(tmp_path: Path) -> None:
    folder = saved(base_of("bert"), tmp_path / "m")
    fast, slow, batch = load(folder, threads=2), load_packed(folder), token_batch([60, 3, 64, *[50] * 40])
    with torch.no_grad():
        found, want = (real_rows(model(**batch).last_hidden_state, batch) for model in (fast, slow))
    assert torch.equal(found, want)


def test_albert_groups_and_widths(tmp_path: Path) -> None:
    """Two groups over four steps, an embedding as wide as the layers, and the exact GELU."""
    config = AlbertConfig(
        vocab_size=120, embedding_size=32, hidden_size=32, num_hidden_layers=4, num_hidden_groups=2,
        num_attention_heads=2, intermediate_size=48, max_position_embeddings=40, hidden_act="gelu",
    )  # fmt: skip
    folder = saved(AlbertModel(config), tmp_path / "m", storage="trits")
    fast, slow, batch = load(folder), load_packed(folder), token_batch(LENGTHS)
    with torch.no_grad():
        found, want = (real_rows(model(**batch).last_hidden_state, batch) for model in (fast, slow))
    assert isinstance(fast, NativeBase) and torch.equal(found, want)


def test_what_the_native_pass_does_not_know_runs_in_torch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(base_of("bert"), tmp_path / "m")
    fast, slow, batch = load(folder), load_packed(folder), token_batch([6, 4])
    left = {name: value.flip(1) for name, value in batch.items()}
    with torch.no_grad():
        for inputs in (left, batch | {"output_hidden_states": True}, batch | {"position_ids": torch.arange(6)[None]}):
            found, want = fast(**inputs), slow(**inputs)
            assert torch.equal(found.last_hidden_state, want.last_hidden_state)
        assert len(fast(**batch, output_hidden_states=True).hidden_states) == 4
    said = [record.getMessage() for record in caplog.records if "torch engine runs" in record.getMessage()]
    assert len(said) == 3 and "padding on the left" in said[0]  # each reason once


def test_roberta_counts_positions_from_what_is_not_padding(tmp_path: Path) -> None:
    folder = saved(base_of("roberta"), tmp_path / "m")
    fast, slow = load(folder), load_packed(folder)
    ids = torch.tensor([[0, 7, 1, 8, 2]])  # 1 is padding, attended to since no mask says otherwise
    with torch.no_grad():
        assert torch.equal(fast(ids).last_hidden_state, slow(ids).last_hidden_state)


def test_models_that_need_more_than_the_stack_run_in_torch(tmp_path: Path) -> None:
    folder = saved(tiny_encoder("bert"), tmp_path / "mlm")  # its head is the packed vocabulary matrix
    assert type(load(folder)).__name__ == "BertForMaskedLM" and not isinstance(load(folder).base_model, NativeBase)
    with pytest.raises(ValueError, match="decoder is packed: of encoders it runs the stack of layers"):
        load(folder, engine="cpu")
    config = tiny_encoder("bert").config
    config.hidden_act = "relu"
    folder = saved(BertModel(config), tmp_path / "relu")
    with pytest.raises(ValueError, match="activation 'relu': it runs gelu and gelu_new"):
        load(folder, engine="cpu")
    config = tiny_encoder("bert").config
    config.is_decoder = True  # attends to what came before only
    folder = saved(BertModel(config), tmp_path / "decoder")
    with pytest.raises(ValueError, match="is_decoder: of this family it runs encoders"):
        load(folder, engine="cpu")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input_ids": torch.ones(3)}, r"input_ids \[3\]: expected token ids"),
        ({"input_ids": torch.ones(2, 0, dtype=torch.long)}, r"input_ids \[2, 0\]"),
        ({"input_ids": torch.full((1, 4), 120)}, "source id 120: expected 0 to 119"),
        ({"input_ids": torch.full((1, 4), -1)}, "source id -1"),
        ({"input_ids": torch.full((1, 65), 5)}, "source 0 has 65 tokens: expected 1 to 64"),
        ({"input_ids": torch.full((1, 4), 5), "attention_mask": torch.ones(1, 3)}, r"attention_mask \[1, 3\]"),
    ],
)
def test_bad_input_is_named(change: Any, message: str, tmp_path: Path) -> None:
    model = load(saved(base_of("bert"), tmp_path / "m"))
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(**change)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    folder = saved(base_of("bert"), tmp_path / "m")
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-40] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="model.safetensors"):
        load(folder)


def test_bench_times_a_forward_pass(tmp_path: Path) -> None:
    from dqbart.evaluation.bench import bench, lines

    model = base_of("roberta")
    model.save_pretrained(tmp_path / "float")
    folder = saved(model, tmp_path / "m")
    found = bench(folder, against=str(tmp_path / "float"), source_length=20, rounds=1, threads=1)
    assert [row["system"] for row in found["rows"]] == ["dqbart-cpu", "dqbart-torch", "transformers-fp32"]
    assert {(row["mode"], row["layers"], row["tokens"]) for row in found["rows"]} == {("forward", "3", 0)}
    assert "no new ones" in lines(found)[0]
    with pytest.raises(ValueError, match="source_length 63, .*: the model has 62 positions"):
        bench(folder, source_length=63)
