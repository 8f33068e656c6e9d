"""The step benchmark: what is counted on paper is what runs, floors are those of the notes, and every gap shows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

import step  # noqa: E402
from dqbart_kernels.gpu import model as gpu_model  # noqa: E402
from latency_models import BART, SHAPES, Shape, _bart  # noqa: E402
from ledger import Ledger  # noqa: E402
from step_counts import Session, recorded, shapes_only, work_of_prefill, work_of_step  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("shape", "layers", "batch", "source", "floors"),
    [("bart-base", "6-6", 1, 1024, (23, 13, 8)), ("mbart-large", "12-12", 1, 64, (102, 51, 26))],
)
def test_floors_are_those_of_the_notes(shape: str, layers: str, batch: int, source: int, floors: Any) -> None:
    """Microseconds of a step at 8, 4 and 2 bits, beam 4; the notes count neither scales nor biases."""
    for bits, want in zip(("8-8-8", "4-4-8", "2-2-8"), floors, strict=True):
        found = work_of_step(shapes_only(SHAPES[shape], layers, bits), batch, 4, source, 32).floor_us()
        assert want - 0.5 <= found <= want + 1.5


def test_prefill_of_one_layer_by_hand() -> None:
    model = shapes_only(SHAPES["tiny"], "1-1", "8-8-8")  # d 64, 4 heads, feed-forward 128
    weights = 4 * 64 * 64 + 2 * 64 * 128 + 2 * 64 * 64
    work = work_of_prefill(model, 2, 16)
    assert work.operations == 2 * 32 * weights + 4 * 2 * 16 * 16 * 64
    assert work.bytes == weights + 8 * (4 * 64 + 128 + 64 + 2 * 64) + 2 * 32 * (64 + 16)
    assert work_of_step(model, 2, 3, 16, 5).operations == (
        2 * 6 * (6 * 64 * 64 + 2 * 64 * 128 + 512 * 64) + 4 * 6 * 64 * 21
    )


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> step.Bench:
    """Of a tiny model, run by the interpreter where there is no GPU."""
    monkeypatch.setattr(gpu_model, "TOKENS", 4)
    tinier = Shape(BART, _bart(32, 2, 64, vocab_size=64, max_position_embeddings=32), ("1-1",))
    monkeypatch.setitem(SHAPES, "tiny", tinier)  # the interpreter takes seconds for what a GPU takes microseconds
    words = ["--shapes", "tiny", "--bits", "2-2-8", "--batches", "1", "--beams", "2", "--tokens", "1", "--rounds", "1"]
    systems = ["bf16", "dqbart"] if DEVICE.type == "cuda" else ["bf16"]
    args = step.parse_arguments([*words, "--systems", *systems, "--models", str(tmp_path / "m")])
    made = step.Bench(Ledger(tmp_path / "step.json", step.KEYS), args, DEVICE, "Test GPU")
    made._limits = (1e9, 1e12)
    return made


def test_measuring_a_tiny_model(bench: step.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    case, bits = ("tiny", "1-1", 1, 4), "2-2-8"
    bench.steps(case, bits)
    rows = list(bench.ledger.rows)
    for what in ("step", "prefill"):
        whole = bench.ledger.find(**bench.key(case, bits, what, step.WHOLE))
        phases = [row for row in rows if row["what"] == what and row["phase"] != step.WHOLE]
        assert whole and whole["us"] > 0 and whole["share"] == whole["floor_us"] / whole["us"]
        assert sum(row["launches"] for row in phases) + len(whole["torch_operators"]) == whole["nodes"]
        assert all(row["us"] > 0 for row in phases if "advance" not in row["phase"])

        on_paper = shapes_only(SHAPES["tiny"], "1-1", bits)
        session = Session.of(on_paper, 1, 2, 4, 1)
        with recorded(on_paper, execute=False) as counted:
            (session.step if what == "step" else session.prefill)()
        assert counted.nodes == whole["nodes"]
        assert {name: len(launches) for name, launches in counted.phases().items()} == {
            row["phase"]: row["launches"] for row in phases
        }
    assert {"one_shot_matmul decoder.fc1", "vocabulary_stats vocabulary"} <= {row["phase"] for row in rows}

    def no_compiler(model: Any) -> Any:
        raise RuntimeError("no\ncompiler")

    monkeypatch.setattr("peer_runner.compiled", no_compiler)
    bench.generations(case, [bits])
    rows = bench.ledger.rows
    written = {row["phase"]: row for row in rows if row["what"] == "generate"}
    ours = {f"{step.OURS} {bits}"} if DEVICE.type == "cuda" else set()
    assert set(written) == {step.EAGER, step.COMPILED} | ours
    assert written[step.COMPILED]["error"] == "RuntimeError: no compiler" and written[step.EAGER]["ratio"] == 1
    assert all(row["tokens_per_s"] > 0 for row in written.values() if "error" not in row)
    text = step.table(rows)
    assert "RuntimeError: no compiler" in text and "| sum of phases |" in text and "Test GPU" in text

    before = json.dumps(rows)
    monkeypatch.setattr(bench, "packed", None)  # called again, it would fail
    bench.steps(case, bits)
    bench.generations(case, [bits])
    assert json.dumps(bench.ledger.rows) == before


def test_counting_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main(["--count", "--shapes", "tiny", "--bits", "1-1-8", "--batches", "1", "2", "--tokens", "4"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["what"], row["batch"]) for row in rows] == [("step", 1), ("prefill", 1), ("step", 2), ("prefill", 2)]
    assert rows[0]["nodes"] == rows[2]["nodes"] >= sum(rows[0]["phases"].values()) > 10
    assert rows[2]["operations"] == 2 * rows[0]["operations"] and rows[2]["bytes"] < 2 * rows[0]["bytes"]


def test_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main(["--count", "--beams", "1"]) == 2
    assert step.main(["--count", "--shapes", "tiny", "--bits", "9-9-9"]) == 2
    if DEVICE.type == "cpu":
        assert step.main([]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            "step.py measures on a GPU, and torch sees none here; --count needs none"
        )
