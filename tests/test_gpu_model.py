"""Whole models on the GPU's kernels, interpreted where there is no GPU, against the torch engine: the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_cpu_encoder import base_of, saved
from tiny_models import tiny_seq2seq, token_batch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from dqbart_kernels.gpu import model as gpu_model  # noqa: E402
from dqbart_kernels.gpu.model import Model  # noqa: E402

from dqbart.architectures import first_position  # noqa: E402
from dqbart.engines import load  # noqa: E402
from dqbart.engines.encoder import NativeBase  # noqa: E402
from dqbart.engines.native import open_native  # noqa: E402
from dqbart.engines.text import TextModel  # noqa: E402
from dqbart.packed.checkpoint import load_packed  # noqa: E402
from dqbart.packed.verify import build_skeleton, read_config, read_spec  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
TWO_HEADS: dict[str, Any] = dict(encoder_attention_heads=2, decoder_attention_heads=2)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def opened(folder: Path) -> Model:
    config = read_config(folder)
    spec = read_spec(folder, config)
    skeleton = build_skeleton(folder, config, spec)
    return open_native(folder, spec, skeleton, lambda *sizes: Model(*sizes, DEVICE))[0]


def on_device(batch: dict[str, Any]) -> tuple[Any, Any]:
    """int32 ids, and how many of each row are tokens."""
    return batch["input_ids"].int().to(DEVICE), batch["attention_mask"].sum(1).int().to(DEVICE)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "albert"])
def test_encoders(kind: str, tmp_path: Path) -> None:
    folder = saved(base_of(kind), tmp_path / "packed", "4-2-8")
    slow, fast = load_packed(folder, DEVICE), opened(folder)
    batch = token_batch([9, 3, 12])
    assert fast.sizes["position_offset"] == first_position(slow.config)
    with torch.no_grad():
        want = slow(**{name: x.to(DEVICE) for name, x in batch.items()}).last_hidden_state
    hidden = fast.encode(*on_device(batch)).value.view(want.shape)
    real = batch["attention_mask"].bool().to(DEVICE)
    assert torch.equal(hidden[real], want[real])


@pytest.mark.parametrize("kind", ["bart", "mbart"])
@pytest.mark.parametrize(("bits", "layers"), [("2-2-8", 2), ("8-4-8", 1)])
def test_encoder_and_decoder_steps(kind: str, bits: str, layers: int, tmp_path: Path) -> None:
    """Two hypotheses of each source, one of which takes over the other's past on the way."""
    model = tiny_seq2seq(kind, encoder=layers, decoder=layers, **TWO_HEADS)
    torch.manual_seed(1)
    model.final_logits_bias.normal_()
    folder = saved(model, tmp_path / "packed", bits)
    slow, fast = load_packed(folder, DEVICE), opened(folder)
    batch = token_batch([9, 4])
    encoded = fast.encode(*on_device(batch))
    given = {name: x.repeat_interleave(2, 0).to(DEVICE) for name, x in batch.items()}
    with torch.no_grad():
        want = slow.model.encoder(**{name: x.to(DEVICE) for name, x in batch.items()}).last_hidden_state
    real = batch["attention_mask"].bool().to(DEVICE)
    assert torch.equal(encoded.value.view(want.shape)[real], want[real])

    sources, state = fast.sources(encoded, on_device(batch)[1], want.shape[1]), fast.state(4, 4)
    tokens = torch.full((4, 1), 2, device=DEVICE)
    generator = torch.Generator().manual_seed(3)
    for t in range(4):
        state.tokens_TR[t] = tokens[:, -1]
        found = fast.logits(fast.decode(sources, state))
        with torch.no_grad():
            assert torch.equal(found, slow(**given, decoder_input_ids=tokens).logits[:, -1])
        state.history_RT[:, t] = torch.arange(4, dtype=torch.int32, device=DEVICE)
        if t == 1:  # the second hypothesis of each source goes on from the first
            parents = torch.tensor([0, 0, 2, 2], device=DEVICE)
            tokens = tokens[parents]
            state.history_RT.copy_(state.history_RT[parents])
        tokens = torch.cat([tokens, torch.randint(4, 100, (4, 1), generator=generator).to(DEVICE)], 1)
        state.step.add_(1)


@pytest.mark.parametrize("kind", ["bart", "mbart"])
def test_generation(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From ids to ids on our kernels alone, padded to buckets that are larger than the batch."""
    monkeypatch.setattr(gpu_model, "TOKENS", 16)
    model = tiny_seq2seq(kind, encoder=1, decoder=1, forced_eos_token_id=None, **TWO_HEADS)
    folder = saved(model, tmp_path / "packed", "2-2-8")
    slow, fast = load_packed(folder, DEVICE), load(folder, engine="triton", device=DEVICE)
    assert isinstance(fast, TextModel) and fast.runner.name == "triton"
    batch = {name: x.to(DEVICE) for name, x in token_batch([9, 4, 5]).items()}
    for settings in ({"max_length": 4, "num_beams": 2}, {"max_length": 4, "no_repeat_ngram_size": 1}):
        settings |= {"decoder_start_token_id": 2}
        assert torch.equal(fast.generate(**batch, **settings), slow.generate(**batch, **settings))


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_encoders_behind_transformers_classes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_model, "TOKENS", 16)
    folder = saved(base_of(kind), tmp_path / "packed", "2-2-8")
    slow, fast = load_packed(folder, DEVICE), load(folder, engine="triton", device=DEVICE)
    assert isinstance(fast, NativeBase) and fast.runner.name == "triton"
    batch = {name: x.to(DEVICE) for name, x in token_batch([9, 3, 12]).items()}
    with torch.no_grad():
        want, found = slow(**batch), fast(**batch)
    real = batch["attention_mask"].bool()
    assert torch.equal(found.last_hidden_state[real], want.last_hidden_state[real])
    assert not found.last_hidden_state[~real].any()
    longer = {name: torch.nn.functional.pad(x, (0, 60)) for name, x in batch.items()}  # more than there are positions
    assert torch.equal(fast(**longer).last_hidden_state[:, :12], found.last_hidden_state)
    if kind == "bert":
        torch.testing.assert_close(found.pooler_output, want.pooler_output)
        with pytest.raises(ValueError, match="token type 2: expected 0 to 1"):
            fast(**batch, token_type_ids=torch.full_like(batch["input_ids"], 2))


def test_a_missing_matrix_is_named() -> None:
    model = Model(
        dict(d=32, heads=2, encoder_layers=1, encoder_ffn=64, vocabulary=9, encoder_positions=8), 1.0, 1e-5, DEVICE
    )
    with pytest.raises(ValueError, match="encoder.layers.0.self_attn.q_proj: missing"):
        model.finish()
    with pytest.raises(ValueError, match="sizes: 'strange' is none of d, heads, "):
        Model({"d": 3, "strange": 1}, 1.0, 1e-5, DEVICE)
    with pytest.raises(ValueError, match="sizes: 'heads' is missing"):
        Model({"d": 3}, 1.0, 1e-5, DEVICE)
