"""Encoders' latency: who takes turns with whom, which ratios come of it, and what the table says of gaps."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import latency
import latency_encoders as encoders
import pytest
import size
from latency_figures import ratio
from latency_models import SHAPES
from ledger import RESULTS, Ledger
from peers import systems

FAKE = """
import json, sys
name, log, options = sys.argv[1], sys.argv[2], dict(zip(sys.argv[3::2], sys.argv[4::2]))
shape = "albert" if "albert" in options["--model"] else "bert"
if (name, shape) == ("picky", "albert"):
    print(json.dumps(dict(error="no such architecture")), flush=True)
    sys.exit(1)
print(json.dumps(dict(load_s=0.5, resident_mib=10.0, version=name)), flush=True)
times = {"bert": [99, 10, 20, 90], "albert": [1, 8, 5, 30]}[shape]
for turn, line in enumerate(sys.stdin):
    request = json.loads(line)
    rows = json.load(open(request["inputs"]))
    with open(log, "a") as file:
        print(name, shape, request["mode"], len(rows), file=file)
    answer = dict(ms=times[turn % 4], lengths=[len(row) for row in rows], vectors=[[1, 0]] * len(rows), peak_mib=11.0)
    print(json.dumps(answer), flush=True)
"""  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def bench(tmp_path, models, monkeypatch):
    """Runs main with fake peers over two tiny shapes; gives its exit code."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setattr(latency, "PAUSE_S", 0)

    def run(names: str, *words: str) -> int:
        own = [f"--peer={name}={shlex.join([sys.executable, str(script), name, str(tmp_path / 'log')])}"
               for name in names.split()]  # fmt: skip
        fixed = ["--base", "tiny-bert", "--shapes", "tiny-albert", "--threads", "1", "--rounds", "3", "--sources", "16"]
        places = ["--models", str(models), "--envs", str(tmp_path / "envs"), "--out", str(tmp_path / "out.json")]
        return encoders.main([*fixed, *places, "--batches", "2", "--systems", *names.split(), *own, *words])

    return run


def test_ratios_are_to_the_base_in_the_same_rounds_and_a_rerun_asks_nobody(bench, tmp_path, capsys):
    assert bench("fast picky") == 0
    ledger = Ledger(tmp_path / "out.json", encoders.KEYS)
    rows = {(row["system"], row["shape"]): row for row in ledger.rows}
    assert set(rows) == {(name, shape) for name in ("fast", "picky") for shape in ("tiny-bert", "tiny-albert")}
    albert, base = rows["fast", "tiny-albert"], rows["fast", "tiny-bert"]
    assert albert["rounds_ms"] == [8, 5, 30] and base["rounds_ms"] == [10, 20, 90]  # the warm-up is left out
    assert albert["vs_base"] == 3 and base["vs_base"] == 1  # of 1.25, 4, 3; of the medians it would be 2.5
    # transformers' own times of the base, over more and over less in every round
    assert base["vs_fp32"] > 0 and albert["vs_fp32"] > base["vs_fp32"]
    assert albert["layers"] == "3" and albert["base"] == "tiny-bert" and albert["agree"] is None
    gap = rows["picky", "tiny-albert"]
    assert gap["error"] == "not loaded: failed: no such architecture" and gap["median_ms"] is None
    assert rows["picky", "tiny-bert"]["error"] is None  # one shape that can't be loaded spoils no other
    asked = (tmp_path / "log").read_text().split("\n")[:-1]
    assert asked[:8] == [f"fast {shape} forward 2" for shape in
                         ("bert", "albert", "bert", "albert", "albert", "bert", "bert", "albert")]  # fmt: skip
    assert bench("fast picky") == 0
    assert len((tmp_path / "log").read_text().split("\n")[:-1]) == len(asked)
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]) == {"rows": 4, "gaps": 1, "different_vectors": []}
    assert "not loaded: failed: no such architecture |" in out


def test_the_base_takes_turns_in_the_system_and_in_the_reference_and_nobody_twice():
    found = {system.name: system for system in systems(["8-8-8"], {})}
    reference, ours = found["transformers-fp32"], found["dqbart-cpu"]
    assert encoders.members(["TinyBERT-4", "bert-base"], "bert-base", ours, reference) == [
        ("bert-base", reference), ("bert-base", ours), ("TinyBERT-4", ours)]  # fmt: skip
    assert encoders.members(["TinyBERT-4"], "bert-base", reference, reference) == [
        ("bert-base", reference), ("TinyBERT-4", reference)]  # fmt: skip


def test_a_ratio_is_the_median_of_rounds_without_the_warm_up():
    assert ratio([1000, 10, 20, 90], [1, 10, 5, 30]) == 3
    with pytest.raises(ValueError, match="zip"):
        ratio([1, 2, 3], [1, 2])


def test_multiply_adds_are_those_of_the_articles_shapes():
    base = encoders.multiply_adds("bert-base", 128)
    assert base == 12 * 128 * (4 * 768**2 + 2 * 768 * 3072 + 2 * 128 * 768)
    assert base / encoders.multiply_adds("TinyBERT-6", 128) == 2
    assert encoders.multiply_adds("albert-base", 128) == base  # shared layers still run twelve times
    found = [base / encoders.multiply_adds(name, 128) for name in encoders.CLAIMS]
    assert found == pytest.approx([3.895, 7.789, 17.917], abs=0.01)


@pytest.mark.parametrize("name", [*encoders.HEADLINE, encoders.BASE])
def test_speed_and_size_are_of_the_same_shapes(name, monkeypatch):
    shape = SHAPES[name]
    sizes = size.build(name, shape.layers[0])
    monkeypatch.setitem(size.MODELS, name, size.Shape(shape.architecture, shape.config, shape.layers))
    speeds = size.build(name, shape.layers[0])
    assert {k: v.shape for k, v in speeds.state_dict().items()} == {k: v.shape for k, v in sizes.state_dict().items()}
    assert sizes.config.num_attention_heads == speeds.config.num_attention_heads == 12


def row(shape: str, system: str, **more: object) -> dict:
    key = dict(device="cpu", base="bert-base", shape=shape, system=system, bits="8-8-8", source=128, batch=2, threads=2)
    return key | dict(error=None, agree=2, median_ms=12.34, iqr_ms=1.0, vs_base=6.5, vs_fp32=13.0) | more


def test_the_table_reads_rows_alone():
    gap = dict(error="not installed: do this", median_ms=None, agree=None)
    rows = [row("bert-base", "a", vs_base=1, vs_fp32=2), row("TinyBERT-4", "a"),
            row("TinyBERT-4", "a", threads=1, vs_base=7.5, agree=1), row("bert-base", "b"), row("TinyBERT-4", "b"),
            *(row(name, "c", **gap) for name in ("bert-base", "TinyBERT-4"))]  # fmt: skip
    for one in rows[-2:]:
        del one["vs_base"], one["vs_fp32"]
    del rows[-3]["vs_base"]  # the base failed there
    text = encoders.table(rows)
    assert "| the articles |  | 9.4 |" in text and "| multiply-adds |  | 17.92 |" in text
    assert "| a | 8-8-8 | 6.50 / 7.00 / 7.50 |" in text and "| b | 8-8-8 | – |" in text
    assert "| a | 8-8-8 | 2.00 | 13.00 / 13.00 / 13.00 |" in text
    assert "| 12.3 ± 1.00 · 1.00 x · 2.00 x | 12.3 ± 1.00 · 6.50 x · 13.00 x |" in text
    assert "7.50 x · 13.00 x * |" in text and text.count(" * |") == 1  # one of two vectors differs
    assert "12.3 ± 1.00 · ? · 13.00 x |" in text
    assert "| c | 8-8-8 | not installed: do this | – |" in text
    assert text.count("<details>") == text.count("</details>") == 2
    assert encoders.table([]) == ""


def test_vectors_of_an_exact_peer_that_differ_in_most_rows_are_found():
    rows = [row("bert-base", "ctranslate2-float32", agree=agree) for agree in (1, 0)]
    assert encoders._differs(rows, "ctranslate2-float32") and not encoders._differs(rows, "transformers-compiled")
    assert not encoders._differs([*rows, row("TinyBERT-4", "ctranslate2-float32")], "ctranslate2-float32")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--sources", "1000"], "sources 1000: expected 3 to 512 for TinyBERT-4 on this machine"),
        (["--systems", "vllm"], "system 'vllm': expected transformers-fp32"),
        (["--bits", "9-9-8"], "bits '9-9-8': expected W-E-A"),
    ],
)
def test_a_wrong_value_is_one_line_and_nothing_is_made(tmp_path, capsys, words, line):
    places = ["--out", str(tmp_path / "out.json"), "--models", str(tmp_path / "models"), "--envs", str(tmp_path)]
    assert encoders.main(["--shapes", "TinyBERT-4", "--device", "cpu", *places, *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(line) and captured.err.count("\n") == 1 and not captured.out
    assert not list(tmp_path.iterdir())


def test_a_model_that_writes_is_no_encoder(capsys):
    with pytest.raises(SystemExit):
        encoders.main(["--shapes", "bart-base"])
    assert "invalid choice: 'bart-base'" in capsys.readouterr().err


def test_the_script_is_imported_without_torch():
    code = "import sys, latency_encoders; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(encoders.__file__).parent)


def test_committed_vectors_agree_and_every_gap_has_its_reason():
    rows = Ledger(RESULTS / "latency_encoders.json", encoders.KEYS).rows
    assert {row["shape"] for row in rows} == {*encoders.HEADLINE, encoders.BASE}
    for found in rows:
        assert bool(found["error"]) != bool(found["median_ms"])
        if found["system"] in ("ctranslate2-float32", "dqbart-cpu") and found["agree"] is not None:
            assert found["agree"] == found["batch"], found["shape"]
