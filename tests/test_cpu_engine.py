"""The native engine writes what the torch engine writes, over the grid of options, and refuses what it can't do."""

import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dqbart_kernels import cpu
from dqbart_kernels.sizes import SIZES
from tiny_models import tiny_seq2seq, token_batch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from dqbart.engines import load
from dqbart.engines.cpu import CpuRunner
from dqbart.engines.text import TextModel
from dqbart.packed.checkpoint import load_packed, save_packed
from dqbart.quant.layers import prepare

pytestmark = pytest.mark.skipif(cpu.reason() is not None, reason=str(cpu.reason()))
LENGTHS = [9, 3, 20, 33, 4]


def opened(folder: Path, threads: int = 2) -> TextModel:
    return TextModel(folder, CpuRunner(threads))


def check_equal(found: list[Any], want: list[Any]) -> None:
    """To the last bit. LayerNorm is rounded once from float64 in both engines; one text in thousands may still meet a
    tie of that rounding, so one of the five may differ.
    """
    different = [i for i, (a, b) in enumerate(zip(found, want, strict=True)) if not np.array_equal(a, b)]
    assert len(different) <= 1 and all(np.abs(a - b).max() < 0.5 for a, b in zip(found, want, strict=True)), different


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    made = {}
    for kind in ("bart", "mbart"):
        for bits in ("2-2-8", "8-8-8", "4-4-8", "1-1-8", "2-4-8"):
            model = tiny_seq2seq(kind, encoder=2, decoder=2, seed=len(made), forced_eos_token_id=None)
            with torch.no_grad():
                model.final_logits_bias.normal_()
                model.final_logits_bias[0, 2] += 2  # so that hypotheses end
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(0.1 * torch.randn_like(parameter))
            model.generation_config.update(decoder_start_token_id=2, max_length=14)
            storage = "trits" if bits == "2-2-8" and kind == "mbart" else "planar32"
            folder = tmp_path_factory.mktemp("packed") / f"{kind}-{bits}"
            made[kind, bits] = save_packed(prepare(model, bits), folder, storage=storage)
    return made


@pytest.mark.parametrize("kind", ["bart", "mbart"])
@pytest.mark.parametrize("bits", ["2-2-8", "8-8-8", "4-4-8", "1-1-8", "2-4-8"])
@pytest.mark.parametrize("isa", cpu.instruction_sets() if cpu.reason() is None else [])
def test_hidden_states_and_logits(
    kind: str, bits: str, isa: str, folders: dict[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cpu.VARIABLE, isa)
    fast, slow = opened(folders[kind, bits], 2), load_packed(folders[kind, bits])
    batch = token_batch(LENGTHS)
    decoder = torch.randint(4, 120, (5, 7), generator=torch.Generator().manual_seed(3))
    sources = [row[mask.bool()].numpy().astype(np.int32) for row, mask in zip(*batch.values(), strict=True)]
    with torch.no_grad():
        hidden = slow.model.encoder(**batch).last_hidden_state.numpy()
        logits = slow(**batch, decoder_input_ids=decoder).logits.numpy()
    check_equal(fast.native.encode(sources, 2), [row[:length] for row, length in zip(hidden, LENGTHS, strict=True)])
    check_equal(list(fast.native.logits(sources, decoder.numpy().astype(np.int32), 2)), list(logits))


OPTIONS: list[dict[str, Any]] = [
    {}, {"min_length": 8}, {"no_repeat_ngram_size": 2}, {"repetition_penalty": 1.4}, {"forced_bos_token_id": 5},
    {"forced_bos_token_id": 0, "min_length": 4},
    {"forced_eos_token_id": 2, "max_length": 9}, {"bad_words_ids": [[7], [8, 9], [10, 11, 12], [2]]},
    {"suppress_tokens": [20, 21], "begin_suppress_tokens": [2, 30]}, {"max_new_tokens": 3},
    {"no_repeat_ngram_size": 1, "min_new_tokens": 6, "repetition_penalty": 0.8, "eos_token_id": [2, 40, 41]},
]  # fmt: skip
BEAMS: list[dict[str, Any]] = [
    {"num_beams": 1},
    {"num_beams": 2, "early_stopping": True, "num_return_sequences": 2},
    {"num_beams": 4, "early_stopping": False, "length_penalty": 2.0},
    {"num_beams": 4, "early_stopping": "never", "length_penalty": 0.5},
    {"num_beams": 6, "early_stopping": False, "length_penalty": -1.0, "num_return_sequences": 3},
]


@pytest.mark.parametrize("beams", BEAMS, ids=lambda b: f"beams{b['num_beams']}-{b.get('early_stopping')}")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_same_ids_as_the_torch_engine(beams: dict[str, Any], options: dict[str, Any], folders: dict[Any, Path]) -> None:
    for key in (("bart", "2-2-8"), ("mbart", "8-8-8")):
        batch = token_batch(LENGTHS, seed=len(options))
        found = _opened(folders[key]).generate(**batch, **beams, **options)
        assert torch.equal(found, _slow(folders[key]).generate(**batch, **beams, **options)), key


NO_ENDS = {"eos_token_id": None, "max_length": 12}
STRANGE: list[dict[str, Any]] = [
    # fewer texts than beams: what transformers fills up with
    {"forced_bos_token_id": 4, "forced_eos_token_id": 2, "max_length": 3},
    {"forced_bos_token_id": 4, "forced_eos_token_id": 2, "max_length": 3, "length_penalty": 0.0},
    {"suppress_tokens": list(range(5, 120)), "no_repeat_ngram_size": 1, **NO_ENDS},
    # suppressed after it was forced
    {"forced_eos_token_id": 2, "begin_suppress_tokens": [2], "max_length": 2},
    # beam search takes a padding id of 0 for none
    {"pad_token_id": 0, "eos_token_id": [2, 98]},
]  # fmt: skip


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("options", STRANGE, ids=lambda o: "+".join(o))
def test_strange_settings_give_what_transformers_gives(
    options: dict[str, Any], beams: int, count: int, folders: dict[Any, Path]
) -> None:
    fast, slow = _pair(folders["bart", "2-2-8"])
    call = token_batch(LENGTHS) | options | {"num_beams": beams, "num_return_sequences": min(count, beams)}
    assert torch.equal(fast.generate(**call), slow.generate(**call))


def test_rows_without_a_text_are_said(folders: dict[Any, Path]) -> None:
    rows, scores, _ = _opened(folders["bart", "2-2-8"]).native.generate(
        [np.arange(3, 9, dtype=np.int32)], threads=1, start_token=2, max_length=3, eos=[2], num_beams=3,
        num_return_sequences=3, forced_bos_token=5, forced_eos_token=2,
    )  # fmt: skip
    assert [row.tolist() for row in rows] == [[2, 5, 2], [2], [2]] and scores.tolist() == [0, -1e9, -1e9]


@pytest.mark.parametrize("name", ["forced_bos_token_id", "forced_eos_token_id"])
def test_a_forced_token_that_is_suppressed_meets_transformers_own_words(name: str, folders: dict[Any, Path]) -> None:
    words = []
    for model in _pair(folders["bart", "2-2-8"]):
        with pytest.raises(ValueError, match=f"{name}.*is also in `suppress_tokens`") as caught:
            model.generate(**token_batch([9]), suppress_tokens=[7], max_length=6, **{name: 7})
        words.append(str(caught.value))
    assert words[0] == words[1]


def test_begin_suppress_tokens_and_a_forced_end_stay_native(
    folders: dict[Any, Path], caplog: pytest.LogCaptureFixture
) -> None:
    fast = opened(folders["bart", "2-2-8"])
    fast.generate(**token_batch([9]), forced_eos_token_id=2, begin_suppress_tokens=[2], max_length=6, num_beams=2)
    assert not caplog.text
    fast.generate(**token_batch([9]), forced_eos_token_id=2, begin_suppress_tokens=[2], max_length=2)
    assert "a forced token that is suppressed" in caplog.text


def test_the_length_penalty_is_a_double(folders: dict[Any, Path]) -> None:
    """As in transformers: lengths are raised to it in Python, and only the result is rounded."""
    native = _opened(folders["bart", "8-8-8"]).native
    source = [np.arange(4, 12, dtype=np.int32)]
    for length in range(3, 12):
        call: dict[str, Any] = dict(threads=1, start_token=2, max_length=length + 1, num_beams=2)
        (plain,), sums, _ = native.generate(source, length_penalty=0.0, **call)
        (row,), scores, _ = native.generate(source, length_penalty=8.3, **call)
        assert np.array_equal(row, plain) and scores[0] == sums[0] / np.float32(length**8.3)


_models: dict[Path, tuple[Any, Any]] = {}


def _pair(folder: Path) -> tuple[Any, Any]:
    if folder not in _models:
        _models[folder] = opened(folder, 2), load_packed(folder)
    return _models[folder]


def _opened(folder: Path) -> Any:
    return _pair(folder)[0]


def _slow(folder: Path) -> Any:
    return _pair(folder)[1]


def test_alone_in_a_batch_padded_and_threaded_alike(folders: dict[Any, Path]) -> None:
    fast = _opened(folders["bart", "2-2-8"])
    batch = token_batch(LENGTHS)
    together = fast.generate(**batch, num_beams=3)
    wider = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 9), value=1),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 9)),
    }
    assert torch.equal(fast.generate(**wider, num_beams=3), together)
    for threads in (1, 4):
        assert torch.equal(opened(fast.folder, threads).generate(**batch, num_beams=3), together)
    for i, length in enumerate(LENGTHS):
        alone = fast.generate(input_ids=batch["input_ids"][i : i + 1, :length], num_beams=3)[0]
        assert torch.equal(alone, together[i, : len(alone)]) and (together[i, len(alone) :] == 1).all()


def test_several_python_threads_at_once(folders: dict[Any, Path]) -> None:
    fast = _opened(folders["mbart", "8-8-8"])
    batches = [token_batch([n + 2, n + 5], seed=n) for n in range(6)]
    want = [fast.generate(**batch, num_beams=2) for batch in batches]
    got: list[Any] = [None] * 6

    def work(i: int) -> None:
        got[i] = fast.generate(**batches[i], num_beams=2)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_sampling_follows_seed_and_distribution(folders: dict[Any, Path]) -> None:
    fast, slow = _pair(folders["bart", "8-8-8"])
    batch = token_batch([9])
    call: dict[str, Any] = dict(do_sample=True, top_k=0, max_new_tokens=1, num_return_sequences=1000)
    first = fast.generate(**batch, **call, seed=1)
    assert torch.equal(first, fast.generate(**batch, **call, seed=1))
    assert not torch.equal(first, fast.generate(**batch, **call, seed=2))
    with torch.no_grad():
        p = slow(**batch, decoder_input_ids=torch.tensor([[2]])).logits[0, -1].softmax(-1)
    seen = torch.cat([fast.generate(**batch, **call, seed=s)[:, 1] for s in range(8)]).bincount(minlength=120) / 8000
    assert (seen - p).abs().sum() < 0.12  # total variation of 8,000 draws over 120 tokens
    few = fast.generate(**batch, **call | {"top_k": 3}, seed=3)[:, 1]
    assert set(few.tolist()) == set(p.topk(3).indices.tolist())
    top_p = fast.generate(**batch, **call | {"top_p": 0.3}, seed=3)[:, 1]
    order = p.sort(descending=True)
    assert set(top_p.tolist()) <= set(order.indices[: int((order.values.cumsum(0) < 0.3).sum()) + 1].tolist())
    cold = fast.generate(**batch, do_sample=True, temperature=1e-6, max_new_tokens=6, seed=0)
    assert torch.equal(cold, fast.generate(**batch, max_new_tokens=6))


def test_streaming_and_its_errors(folders: dict[Any, Path]) -> None:
    fast = _opened(folders["bart", "2-2-8"])
    batch = token_batch([9])

    class Streamer:
        def __init__(self, limit: int = 99) -> None:
            self.seen: list[int] = []
            self.limit, self.ended = limit, False

        def put(self, tokens: torch.Tensor) -> None:
            self.seen += tokens.reshape(-1).tolist()
            if len(self.seen) > self.limit:
                raise RuntimeError("the reader went away")

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    assert fast.generate(**batch, streamer=streamer)[0].tolist() == streamer.seen and streamer.ended
    with pytest.raises(RuntimeError, match="went away"):
        fast.generate(**batch, streamer=Streamer(limit=2), min_length=10)


class _NoSeven(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, 7] = -torch.inf
        return scores


@pytest.mark.parametrize(
    "call, word",
    [
        ({"num_beams": 2, "do_sample": True}, "sampling with beams"),
        ({"logits_processor": LogitsProcessorList([_NoSeven()])}, "logits_processor"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"decoder_input_ids": torch.tensor([[2, 5], [2, 6]])}, "decoder_input_ids"),
        ({"renormalize_logits": True}, "renormalize_logits"),
    ],
)
def test_what_it_does_not_know_runs_in_the_torch_engine(
    call: dict[str, Any], word: str, folders: dict[Any, Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = folders["bart", "2-2-8"]
    fast, slow = opened(folder), _slow(folder)
    with caplog.at_level(logging.WARNING, "dqbart"):
        torch.manual_seed(0)
        found = fast.generate(**token_batch([9, 4]), **call)
    assert sum(word in record.message for record in caplog.records) == 1
    torch.manual_seed(0)
    want = slow.generate(**token_batch([9, 4]), **call)
    assert torch.equal(getattr(found, "sequences", found), getattr(want, "sequences", want))


def test_left_padding_is_not_taken_for_right(folders: dict[Any, Path], caplog: pytest.LogCaptureFixture) -> None:
    fast, slow = _pair(folders["mbart", "8-8-8"])
    batch = {key: value.flip(1) for key, value in token_batch([9, 4]).items()}
    with caplog.at_level(logging.WARNING, "dqbart"):
        assert torch.equal(fast.generate(**batch), slow.generate(**batch))
    assert "padding on the left" in caplog.text


def test_generation_config_object_and_bad_input(folders: dict[Any, Path]) -> None:
    fast, slow = _pair(folders["bart", "2-2-8"])
    batch = token_batch([9, 4])
    config = GenerationConfig(num_beams=3, max_new_tokens=5, decoder_start_token_id=2, eos_token_id=2, pad_token_id=1)
    assert torch.equal(
        fast.generate(**batch, generation_config=config), slow.generate(**batch, generation_config=config)
    )
    with pytest.raises(ValueError, match="source id 120: expected 0 to 119"):
        fast.generate(input_ids=torch.tensor([[0, 120, 2]]))
    with pytest.raises(ValueError, match="65 tokens: expected 1 to 64"):
        fast.generate(input_ids=torch.full((1, 65), 5))
    with pytest.raises(ValueError, match=r"max_length 80: expected 2 to 65"):
        fast.generate(**batch, max_length=80)
    with pytest.raises(ValueError, match=r"input_ids \[0, 3\]"):
        fast.generate(input_ids=torch.zeros(0, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="attention_mask"):
        fast.generate(input_ids=batch["input_ids"], attention_mask=torch.ones(1, 2))


def test_load_picks_it_and_says_why_not(folders: dict[Any, Path], tmp_path: Path) -> None:
    folder = folders["bart", "8-8-8"]
    assert isinstance(load(folder), TextModel) and isinstance(load(folder, engine="cpu"), TextModel)
    assert not isinstance(load(folder, engine="torch"), TextModel)
    paper = save_packed(prepare(tiny_seq2seq(), "2-2-8", numerics="paper"), tmp_path / "paper")
    assert not isinstance(load(paper), TextModel)
    with pytest.raises(ValueError, match="engine 'cpu' can't run .*integer numerics.*use engine 'torch'"):
        load(paper, engine="cpu")
    mixed = save_packed(prepare(tiny_seq2seq(), "2-2-8", skip=("*.fc1",)), tmp_path / "mixed")
    with pytest.raises(ValueError, match="linear layers are packed"):
        load(mixed, engine="cpu")


def test_a_damaged_file_never_reaches_native_code(folders: dict[Any, Path], tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(folders["bart", "8-8-8"], tmp_path / "hurt"))
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="sha256"):
        load(folder, engine="cpu")


def _empty_model() -> cpu.Model:
    sizes = dict.fromkeys(SIZES, 1) | {"d": 32, "heads": 2, "vocabulary": 3, "position_offset": 0}
    sizes |= {"embedding_d": 32, "embedding_map": 0, "token_types": 0}
    return cpu.Model(sizes, embed_scale=1.0, eps=1e-5)


@pytest.mark.parametrize("bits, byte", [(2, 0b10), (4, 0b1000), (8, 0x80)])
def test_codes_that_nobody_writes_are_refused(bits: int, byte: int) -> None:
    """The most negative code would break the bound that keeps 16-bit sums exact."""
    planar = np.zeros((3, -(-32 * bits // 256) * 32), np.uint8)
    scale = np.ones(3, np.float32)
    _empty_model().set_matrix("shared", bits, (3, 32), planar, scale, None)
    planar[1, 5] = byte
    with pytest.raises(ValueError, match="shared: row 1 has a code"):
        _empty_model().set_matrix("shared", bits, (3, 32), planar, scale, None)


def test_the_binding_checks_names_shapes_and_dtypes() -> None:
    planar, scale = np.zeros((3, 32), np.uint8), np.ones(3, np.float32)
    model = _empty_model()
    with pytest.raises(ValueError, match="lm_head: no such matrix"):
        model.set_matrix("lm_head", 8, (3, 32), planar, scale, None)
    with pytest.raises(ValueError, match=r"shape \[3, 31\], expected \[3, 32\]"):
        model.set_matrix("shared", 8, (3, 31), planar, scale, None)
    with pytest.raises(ValueError, match="64 bytes of codes, expected 96"):
        model.set_matrix("shared", 8, (3, 32), planar[:2].copy(), scale, None)
    with pytest.raises(ValueError, match="3 bits, expected 1, 2, 4 or 8"):
        model.set_matrix("shared", 3, (3, 32), planar, scale, None)
    with pytest.raises(TypeError, match="expected a contiguous array of float32"):
        model.set_matrix("shared", 8, (3, 32), planar, scale.astype(np.float64), None)
    with pytest.raises(TypeError, match="expected shape"):
        model.set_matrix("shared", 8, (3, 32), planar, scale[:2].copy(), None)
    with pytest.raises(ValueError, match="31 values, expected 32"):
        model.set_vector("encoder.layernorm_embedding.weight", np.zeros(31, np.float32))
    with pytest.raises(ValueError, match="missing"):
        model.finish()
    with pytest.raises(ValueError, match="not finished"):
        model.encode([np.zeros(3, np.int32)], 1)
    with pytest.raises(ValueError, match="heads must divide the width"):
        cpu.Model(model.sizes | {"heads": 5}, 1.0, 1e-5)


def test_stacks_with_different_numbers_of_heads_run_in_torch(tmp_path: Path) -> None:
    folder = save_packed(prepare(tiny_seq2seq(decoder_attention_heads=2), "2-2-8"), tmp_path / "m")
    assert not isinstance(load(folder), TextModel)
    with pytest.raises(ValueError, match="different numbers of heads"):
        load(folder, engine="cpu")


@pytest.mark.parametrize("kind", ["bart", "mbart"])
def test_heads_as_wide_as_a_panel(kind: str, tmp_path: Path) -> None:
    """Projections of such heads lie head by head, those of others row by row."""
    model = tiny_seq2seq(kind, encoder_attention_heads=2, decoder_attention_heads=2)
    folder = save_packed(prepare(model, "2-2-8"), tmp_path / "m")
    fast, slow, batch = opened(folder, 2), load_packed(folder), token_batch(LENGTHS)
    sources = [row[:n].to(torch.int32).numpy() for row, n in zip(batch["input_ids"], LENGTHS, strict=True)]
    with torch.no_grad():
        want = slow.get_encoder()(**batch).last_hidden_state.numpy()
    check_equal(fast.native.encode(sources, 2), [row[:n] for row, n in zip(want, LENGTHS, strict=True)])
    settings = {"max_length": 12, "num_beams": 3}
    assert torch.equal(fast.generate(**batch, **settings), slow.generate(**batch, **settings))
