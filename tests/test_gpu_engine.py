"""Engine `triton` behind load, warmup, doctor and bench: what it says where it can't run. Models: test_gpu_model.py."""

import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cpu_encoder import base_of, saved
from tiny_models import tiny_seq2seq, token_batch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from dqbart_kernels import gpu  # noqa: E402
from dqbart_kernels.gpu import model as gpu_model  # noqa: E402
from dqbart_kernels.gpu.graphs import MOST, Kept, Recorded  # noqa: E402

import dqbart  # noqa: E402
from dqbart.cli import main  # noqa: E402
from dqbart.engines import load  # noqa: E402
from dqbart.engines.text import TextModel  # noqa: E402
from dqbart.engines.triton import GpuRunner  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_seq2seq("bart", encoder=1, decoder=1)
    model.generation_config.update(decoder_start_token_id=2, max_length=3)
    return saved(model, tmp_path_factory.mktemp("engine") / "packed", "8-8-8")


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torch saw one GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu(folder: Path) -> None:
    for arguments, words in (
        ({"engine": "triton"}, r"engine 'triton' can't run here: torch sees no GPU \(torch.cuda.is_available\(\) is F"),
        ({"device": "cuda"}, "device 'cuda': torch sees no GPU; leave device out to run on the CPU"),
        ({"engine": "torch", "device": "cuda:1"}, "device 'cuda:1': torch sees no GPU"),
        ({"engine": "triton", "dtype": torch.bfloat16}, "engine 'triton' with dtype torch.bfloat16: .* are fp32"),
        ({"engine": "cpu", "device": "cuda"}, "engine 'cpu' with device 'cuda'"),
        ({"engine": "cuda"}, "engine 'cuda': expected 'auto' or one of 'cpu', 'triton', 'torch'"),
    ):
        with pytest.raises(ValueError, match=words):
            load(folder, **arguments)  # type: ignore[arg-type]


def test_an_old_gpu_and_a_missing_one(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.reason(torch.device("cuda")) == "Old Card has compute capability 7.5: it needs 8.0 (Ampere) or later"
    assert "there are 1 GPUs, from cuda:0 on" in str(gpu.reason(torch.device("cuda:3")))
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.reason(torch.device("cuda")) == "triton is not installed: pip install triton"


def test_without_the_interpreter_it_is_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert gpu.reason(torch.device("cpu")) == "device 'cpu': it runs on NVIDIA and AMD GPUs, device 'cuda'"


def test_auto_says_why_it_is_torch_on_a_gpu(
    folder: Path, a_gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the engine can't run, the torch engine gets the device that was asked for."""
    asked: list[Any] = []

    class Loaded:
        device = "cuda"

    monkeypatch.setattr("dqbart.packed.checkpoint.load_packed", lambda folder, **more: asked.append(more) or Loaded())
    with caplog.at_level(logging.INFO, "dqbart"):
        load(folder, device="cuda")
    assert asked == [{"device": torch.device("cuda"), "dtype": torch.float32}]
    assert "since engine triton can't: Old Card has compute capability 7.5" in caplog.text


def test_a_first_kernel_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch, a_gpu: None) -> None:
    def fails(rows: Any) -> Any:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("dqbart_kernels.gpu.rows.norm_and_quantize", fails)
    monkeypatch.setattr(torch, "arange", lambda *a, **k: torch.zeros(192))
    gpu._failure.cache_clear()
    found = gpu.reason(torch.device("cuda"))
    gpu._failure.cache_clear()
    assert found is not None and found.startswith("a first kernel fails: ")


def test_no_room_on_the_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TextModel(folder, GpuRunner(DEVICE))

    tries: list[int] = []
    generate = model.native.generate

    def full(*arguments: Any, **options: Any) -> Any:
        tries.append(1)
        if len(tries) != 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee documentation")
        assert len(model.native._batches) == 0  # what earlier sizes hold is given back first
        return generate(*arguments, **options)

    model.native._batches.get("an earlier size", object)
    monkeypatch.setattr(model.native, "generate", full)
    assert len(model.generate(**token_batch([3]), max_length=2)) == 1 and len(tries) == 2
    tries += [1]
    with pytest.raises(MemoryError, match="no room for 2 texts of 9 tokens with 4 beams: give fewer at a time, or "):
        model.generate(**token_batch([9, 4]), num_beams=4)


def test_what_the_loop_does_not_know_runs_in_torch(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = TextModel(folder, GpuRunner(DEVICE))
    with caplog.at_level(logging.WARNING, "dqbart"):
        assert model.generate(**token_batch([9, 4]), num_beams=33, max_length=4).shape[0] == 2
    assert "generate runs in the torch engine: engine triton does not know more than 32 beams" in caplog.text
    assert "engine triton: " in repr(model)


@pytest.mark.parametrize("bits", ["2-2-8", "1-1-8", "8-8-8"])
def test_what_a_gpu_trained_is_packed_as_the_gate_sees_it(bits: str, teacher_folder: Path, tmp_path: Path) -> None:
    """A GPU's kernels round some scales of 1 and 2 bits to another last bit than torch does on the CPU."""
    recipe = dqbart.Recipe(bits=bits, epochs=0)
    result = dqbart.compress(teacher_folder, recipe=recipe, output=tmp_path / "small", device=DEVICE)
    assert result.report["gate"]["max_logit_difference"] < 1e-4


def test_warmup_and_doctor(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_model, "TOKENS", 4)
    assert main(["warmup", str(folder), "--device", DEVICE, "--source-length", "5", "--beams", "1", "2"]) == 0
    out, err = capsys.readouterr()
    # sources of 4 and 8 tokens, with and without rules; outputs of up to 32 and 64, and a sample
    assert '"calls": 13' in out and "8 tokens, 1 texts, 2 beams" in err
    encoder = saved(base_of("bert"), tmp_path / "bert", "2-2-8")
    assert main(["warmup", str(encoder), "--device", DEVICE, "--source-length", "3"]) == 0
    assert '"calls": 2' in capsys.readouterr().out  # with token types, and without
    assert main(["warmup", str(folder), "--device", DEVICE, "--source-length", "65"]) == 2
    assert "source_length 65: expected 1 to 64" in capsys.readouterr().err
    assert main(["warmup", str(folder), "--device", DEVICE, "--beams", "0"]) == 2
    assert "beams [0]: expected numbers from 1 on" in capsys.readouterr().err
    assert main(["doctor"]) == 0
    assert "engine triton: " in capsys.readouterr().out


def test_buffers_made_in_inference_mode_serve_outside(folder: Path, tmp_path: Path) -> None:
    model = TextModel(folder, GpuRunner(DEVICE))
    encoder = load(saved(base_of("bert"), tmp_path / "bert", "2-2-8"), engine="triton", device=DEVICE)
    batch = {name: tensor.to(DEVICE) for name, tensor in token_batch([4, 3]).items()}
    with torch.inference_mode():
        inside = model.generate(**batch), encoder(**batch).last_hidden_state
    with torch.no_grad():
        outside = model.generate(**batch), encoder(**batch).last_hidden_state
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_forgotten_graphs_are_gone(folder: Path) -> None:
    runner = GpuRunner(DEVICE)
    model = TextModel(folder, runner)
    model.generate(**token_batch([4, 3]))
    (batch,) = runner.model._batches._items.values()
    gone = weakref.ref(batch)
    del batch
    runner.model.forget()
    assert gone() is None and len(runner.model._batches) == 0
    assert len(model.generate(**token_batch([4, 3]))) == 2


def test_the_last_graphs_are_kept() -> None:
    kept: Kept[int] = Kept()
    made: list[int] = []
    for key in (*range(MOST), 0, MOST, 0, 1):  # 1 went for MOST: 0 was used since
        kept.get(key, lambda key=key: made.append(key) or key)  # type: ignore[misc]
    assert made == [*range(MOST), MOST, 1] and len(kept) == MOST


def test_what_was_recorded_runs_again() -> None:
    x = torch.zeros(1, device=DEVICE)
    again = Recorded(lambda: x.add_(1), torch.device(DEVICE))
    before = float(x)
    assert float(again()) == before + 1 and float(again()) == before + 2
