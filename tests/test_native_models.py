"""Native models in everyday use: what transformers' class would do with a call, a setting or a cast, they do, too."""

import copy
import hashlib
import logging
import os
import pickle
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from dqbart_kernels import cpu
from tiny_models import tiny_encoder, tiny_seq2seq, token_batch
from transformers import AutoModelForSeq2SeqLM, BertForSequenceClassification, DistilBertModel, GenerationConfig

from dqbart.engines import load
from dqbart.packed.checkpoint import load_packed, save_packed
from dqbart.packed.shards import read_shard
from dqbart.quant.layers import prepare

pytestmark = pytest.mark.skipif(cpu.reason() is not None, reason=str(cpu.reason()))
BATCH = token_batch([9, 5])
TOKENS: dict[str, Any] = dict(decoder_start_token_id=2, eos_token_id=2, pad_token_id=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model that would write on, and says nothing of lengths."""
    model = tiny_seq2seq("bart", 2, 2, forced_eos_token_id=None)
    with torch.no_grad():
        model.final_logits_bias.normal_()
    model.generation_config.update(decoder_start_token_id=2)
    model.generation_config.max_length = None
    return save_packed(prepare(model, "2-2-8"), tmp_path_factory.mktemp("packed") / "bart")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = BertForSequenceClassification(tiny_encoder("bert").config)
    return save_packed(prepare(model, "8-8-8"), tmp_path_factory.mktemp("packed") / "bert")


def pair(folder: Path) -> tuple[Any, Any]:
    return load(folder), load(folder, engine="torch")


@pytest.mark.parametrize(
    "call",
    [
        dict(), dict(num_beams=2), dict(min_new_tokens=30), dict(max_new_tokens=4),
        dict(min_new_tokens=2, min_length=9), dict(generation_config=GenerationConfig(max_length=7, **TOKENS)),
        dict(eos_token_id=-1, max_length=9), dict(eos_token_id=[2, 120]), dict(suppress_tokens=[-1, 5]),
        dict(max_length=9.0), dict(forced_bos_token_id=[5]), dict(min_length=9),
    ],
    ids=str,
)  # fmt: skip
def test_lengths_and_lists_are_read_as_transformers_does(call: dict[str, Any], folder: Path) -> None:
    fast, slow = pair(folder)
    assert torch.equal(fast.generate(**BATCH, **call), slow.generate(**BATCH, **call))


@pytest.mark.parametrize(
    "call",
    [dict(bad_words_ids=[7]), dict(bad_words_ids="no"), dict(bad_words_ids=[]), dict(suppress_tokens=5)],
    ids=str,
)
def test_wrong_lists_meet_transformers_own_words(call: dict[str, Any], folder: Path) -> None:
    words = []
    for model in pair(folder):
        with pytest.raises(Exception) as caught:
            model.generate(**BATCH, **call)
        words.append(str(caught.value))
    assert words[0] == words[1]


def test_groups_of_beams_and_zeros_are_not_dropped(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    fast = load(folder)
    with caplog.at_level(logging.WARNING, "dqbart"):
        assert torch.equal(fast.generate(**BATCH, guidance_scale=1, max_length=6), fast.generate(**BATCH, max_length=6))
        with pytest.raises(Exception, match="[Gg]roup|trust_remote_code"):
            fast.generate(**BATCH, num_beams=4, num_beam_groups=2, diversity_penalty=0.5)
    assert "guidance_scale" in caplog.text and "diversity_penalty" in caplog.text or "num_beam_groups" in caplog.text


def test_padding_without_a_mask_is_text_in_both_engines(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    fast, slow = pair(folder)
    for seed in range(4):
        ids = token_batch([12, 3], seed=seed)["input_ids"]
        with caplog.at_level(logging.WARNING, "dqbart"):
            assert torch.equal(fast.generate(ids, max_length=9), slow.generate(ids, max_length=9))
    assert caplog.text.count("no attention_mask") == 1


def test_settings_of_the_model_hold_where_torch_runs(folder: Path) -> None:
    fast = load(folder)
    fast.generation_config = GenerationConfig(max_length=5, **TOKENS)
    assert fast.generate(**BATCH).shape == (2, 5) == fast.generate(**BATCH, renormalize_logits=True).shape
    fast.generation_config.max_length = 6
    assert fast.generate(**BATCH).shape == (2, 6) == fast.generate(**BATCH, renormalize_logits=True).shape


def test_other_inputs_run_in_torch(folder: Path) -> None:
    fast, slow = pair(folder)
    embeds = slow.get_input_embeddings()(BATCH["input_ids"])
    encoded = slow.get_encoder()(**BATCH)
    calls: list[dict[str, Any]] = [dict(inputs_embeds=embeds), dict(encoder_outputs=encoded)]
    for call in calls:
        call |= {"attention_mask": BATCH["attention_mask"], "max_length": 7}
        assert torch.equal(fast.generate(**call), slow.generate(**call))
    drawn = [fast.generate(**BATCH, do_sample=True, num_beams=2, seed=3, max_length=9) for _ in range(2)]
    assert torch.equal(*drawn)


def test_a_streamer_sees_one_sequence(folder: Path) -> None:
    class Streamer:
        def put(self, value: Any) -> None:
            if len(value) > 1:
                raise ValueError("TextStreamer only supports batch size 1")

        def end(self) -> None: ...

    one = {name: x[:1] for name, x in BATCH.items()}
    with pytest.raises(ValueError, match="batch size 1"):
        load(folder).generate(**one, do_sample=True, num_return_sequences=2, max_length=6, streamer=Streamer())


def test_nothing_left_to_sample_is_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match="every token is suppressed: nothing is left to sample"):
        load(folder).generate(**BATCH, do_sample=True, suppress_tokens=list(range(120)))


def test_ids_of_more_than_32_bits_are_not_cut(folder: Path, bert: Path) -> None:
    wrong = torch.tensor([[0, 2**32 + 5, 2]])
    for model in (load(folder).generate, load(bert)):
        with pytest.raises(ValueError, match="source id 4294967301: expected 0 to 119"):
            model(input_ids=wrong)


def test_threads_that_cannot_be_started_are_an_error(folder: Path) -> None:
    """In a process of its own, which may have little address space: it used to hang."""
    code = (
        "import resource, sys, torch, dqbart\n"
        f"model = dqbart.load({str(folder)!r}, threads=1000)\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 2**29,) * 2)\n"
        "model.generate(input_ids=torch.tensor([[0, 5, 6, 2]]))\n"
    )
    if not Path("/proc/self/statm").exists() or resource.getrlimit(resource.RLIMIT_AS)[1] != resource.RLIM_INFINITY:
        pytest.skip("needs Linux, without a limit of its own")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "of 1000 threads could be started" in done.stderr and "load with fewer threads" in done.stderr


def test_what_a_text_model_is_not(folder: Path, tmp_path: Path) -> None:
    fast = load(folder)
    assert fast.to("cpu") is fast and fast.eval() is fast
    with pytest.raises(ValueError, match="engine cpu stays as it is; load with device= or engine="):
        fast.to(torch.float16)
    with pytest.raises(AttributeError, match="'state_dict': engine cpu has none; load with engine='torch'"):
        fast.state_dict()
    other = copy.deepcopy(fast)
    other.generation_config.max_length = 4
    assert other.generate(**BATCH).shape == (2, 4) and fast.generate(**BATCH).shape[1] > 4


def test_a_relative_folder_is_found_from_elsewhere(folder: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    text, encoder = load(folder.name), load(os.path.relpath(bert))
    monkeypatch.chdir("/")
    assert len(text.generate(**BATCH, renormalize_logits=True, max_length=5)) == 2
    assert encoder(**BATCH, output_attentions=True).attentions is not None


def at_hash(number: int, act: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something as that tensor of a folder that is being loaded has been read, and is checked."""
    calls = iter(range(1, 10**6))

    def sha256(data: Any, original: Any = hashlib.sha256) -> Any:
        if isinstance(data, bytearray) and next(calls) == number:
            act()
        return original(data)

    monkeypatch.setattr(hashlib, "sha256", sha256)


@pytest.mark.parametrize("place", [3, -1], ids=["early", "at the end"])
@pytest.mark.parametrize("engine", ["cpu", "torch", "transformers"])
def test_a_folder_replaced_while_it_is_read(
    engine: str, place: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was a model of both, or one that nobody had checked."""
    one = Path(shutil.copytree(folder, tmp_path / "m"))
    two = save_packed(prepare(tiny_seq2seq("bart", 2, 2, seed=1, forced_eos_token_id=None), "2-2-8"), tmp_path / "new")
    count = len(read_shard(one / "model.safetensors").tensors)

    def replace() -> None:
        os.replace(one, tmp_path / "old")
        os.replace(two, one)

    at_hash(place % (count + 1), replace, monkeypatch)
    with pytest.raises(ValueError, match="m: changed while it was read, as by a save over it; load it again"):
        AutoModelForSeq2SeqLM.from_pretrained(one) if engine == "transformers" else load(one, engine=engine)
    assert (tmp_path / "old").exists()
    load(one, engine="cpu" if engine == "cpu" else "torch")


def test_native_memory_holds_what_was_hashed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes written into the same file, its times set back."""
    file = Path(shutil.copytree(folder, tmp_path / "m")) / "model.safetensors"
    times, tensors = file.stat(), read_shard(file).tensors.values()

    def write() -> None:
        with open(file, "rb+") as out:
            for info in tensors:
                out.seek(info.begin)
                out.write(b"\x11" * (info.end - info.begin))
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    at_hash(len(tensors), write, monkeypatch)
    last = load(file.parent)
    assert torch.equal(last.generate(**BATCH, max_length=9), load(folder).generate(**BATCH, max_length=9))
    with pytest.raises(ValueError, match="tensor .*: sha256 .*; the file is damaged, fetch or save it again"):
        load(file.parent)


def test_pickles_read_their_folder_again(folder: Path, bert: Path, tmp_path: Path) -> None:
    text, encoder = load(folder, threads=1), load(bert)
    text.generation_config.max_length = 5
    text.generate(**BATCH, renormalize_logits=True)  # wakes the torch engine, which stays out of it
    with torch.no_grad():
        encoder.classifier.weight.mul_(2)  # the head is transformers' own
        encoder(**BATCH, output_attentions=True)
        for one in (text, encoder):
            (tmp_path / "model.pkl").write_bytes(pickle.dumps(one))
            call = "generate(**BATCH)" if one is text else "forward(**BATCH).logits"
            code = (
                "import pickle, sys, torch; from test_native_models import BATCH; torch.set_grad_enabled(False); "
                f"torch.save(pickle.load(open(sys.argv[1], 'rb')).{call}, sys.argv[2])"
            )
            command = [sys.executable, "-c", code, str(tmp_path / "model.pkl"), str(tmp_path / "found.pt")]
            subprocess.run(command, check=True, timeout=120, cwd=Path(__file__).parent)
            want = one.generate(**BATCH) if one is text else one(**BATCH).logits
            torch.testing.assert_close(torch.load(tmp_path / "found.pt"), want)
    assert pickle.loads(pickle.dumps(text)).runner.threads == 1 and len(pickle.dumps(encoder)) < 100_000
    shutil.copytree(bert, tmp_path / "moved")
    saved = pickle.dumps(load(tmp_path / "moved"))
    shutil.rmtree(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="moved"):
        pickle.loads(saved)


def test_encoders_casts_masks_copies_and_config(bert: Path, tmp_path: Path) -> None:
    fast, slow = pair(bert)
    with torch.no_grad():
        want = slow(**BATCH).logits
        masked = BATCH | {"attention_mask": BATCH["attention_mask"].float()}
        torch.testing.assert_close(fast(**masked).logits, want)
        torch.testing.assert_close(copy.deepcopy(fast)(**BATCH).logits, want)
        left = {name: x.flip(1) for name, x in BATCH.items()}
        embeds = slow.get_input_embeddings()(BATCH["input_ids"])
        for cast in ("bfloat16", "half", "double"):
            other = getattr(copy.deepcopy(fast), cast)()
            native, kind = other(**BATCH).logits, other.dtype
            assert native.dtype == kind != torch.float32
            calls: list[dict[str, Any]] = [left, BATCH | {"output_hidden_states": True}, {"inputs_embeds": embeds}]
            for call, same in zip([*calls[:2], {"inputs_embeds": embeds.to(kind)}], calls, strict=True):
                found = other(**call, return_dict=True)
                assert found.logits.dtype == kind and (found.logits - slow(**same).logits).abs().max() < 0.1
                assert all(x.dtype == kind for x in found.hidden_states or ())
            assert other(**left, return_dict=False)[0].dtype == kind
        fast.config.output_hidden_states = True
        assert fast(**BATCH).hidden_states is not None
    with pytest.raises(ValueError, match="save_pretrained: .*bert is the model; copy it, or load with engine='torch'"):
        fast.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="not in the model; one of a native engine has no layers"):
        save_packed(fast, tmp_path / "again")
    base = save_packed(prepare(DistilBertModel(tiny_encoder("distilbert").config), "8-8-8"), tmp_path / "base")
    assert load(base).device == torch.device("cpu") and load(base).dtype == torch.float32
    with pytest.raises(TypeError):
        load(bert).base_model(BATCH["input_ids"], BATCH["attention_mask"], None, torch.arange(9))


@pytest.mark.parametrize("writes", [True, False])
def test_the_torch_engine_finds_the_weights_that_were_loaded(
    writes: bool, folder: Path, bert: Path, tmp_path: Path
) -> None:
    """It reads the folder when it is first needed, perhaps days later."""
    other = save_packed(prepare(tiny_seq2seq("bart", 2, 2, seed=1), "2-2-8"), tmp_path / "other")
    left = {name: x.flip(1) for name, x in BATCH.items()}
    source = folder if writes else bert
    here = Path(shutil.copytree(source, tmp_path / "m"))
    model = load(here)
    call = partial(model.generate if writes else model, **left)
    unpickle = partial(pickle.loads, pickle.dumps(model))
    (here / "README.md").write_text("a card, which is no weights")
    unpickle()
    shutil.rmtree(here)
    shutil.copytree(other, here)
    for again in (call, unpickle):
        with pytest.raises(ValueError, match="m: replaced by other weights since this model was loaded, and .*load"):
            again()
    shutil.rmtree(here)
    for again in (call, unpickle):
        with pytest.raises(FileNotFoundError, match="m: gone since this model was loaded, and .*; put it back"):
            again()
    shutil.copytree(source, here)
    call()
    shutil.rmtree(here)
    call()  # it is there by now


def test_an_encoder_stays_where_its_layers_are(bert: Path) -> None:
    model = load(bert)
    assert model.to("cpu") is model and model.cpu() is model
    for move in (model.to, model.base_model.to):
        with pytest.raises(ValueError, match=r"to\('meta'\): engine cpu stays on cpu; load with device= or engine="):
            move("meta")
    with torch.no_grad():
        assert model(**BATCH).logits.device == torch.device("cpu")


def test_the_default_dtype_is_not_that_of_the_model(folder: Path, bert: Path) -> None:
    want = [load(bert)(**BATCH).logits, load(bert, engine="torch")(**BATCH, output_attentions=True).logits]
    torch.set_default_dtype(torch.float16)
    try:
        model = load(bert)
        found = [model(**BATCH).logits, model(**BATCH, output_attentions=True).logits]
        ids = load(folder).generate(**BATCH, max_length=6)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, want)
    assert torch.equal(ids, load(folder).generate(**BATCH, max_length=6))


def test_other_weights_after_a_first_call(tmp_path: Path) -> None:
    one, two = (
        load_packed(save_packed(prepare(tiny_seq2seq("bart", 1, 1, seed=s), "2-2-8"), tmp_path / str(s)))
        for s in (0, 7)
    )
    call = BATCH | {"decoder_input_ids": BATCH["input_ids"]}
    with torch.no_grad():
        one(**call)
        one.load_state_dict(two.state_dict())
        assert torch.equal(one(**call).logits, two(**call).logits)
        with torch.inference_mode():
            student = prepare(tiny_seq2seq("bart", 1, 1), "2-2-8")
            assert student(**call).logits.isfinite().all()
