"""Latency: peers are real processes here, small ones that speak the protocol and misbehave in known ways."""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import latency
import latency_models
import peers
import pytest
from ledger import Ledger

FAKE = """
import json, os, signal, sys, time
name, log = sys.argv[1:3]
assert sys.argv[3::2] == ["--model", "--threads", "--device"]
with open(log, "a") as file:
    print("start", name, os.getpid(), file=file)
def say(**message):
    print(json.dumps(message), flush=True)
if name == "unloadable":
    say(error="no such weights")
    sys.exit(1)
if name == "stillborn":
    sys.exit("Traceback\\nno library in " + sys.argv[4])
say(load_s=0.5, resident_mib=10.0, version=name)
times = {"fast": [9, 10, 20, 30], "slow": [9, 40, 20, 90]}.get(name, [1, 5, 5, 5])
seen = {}
for line in sys.stdin:
    request = json.loads(line)
    rows, mode, tokens = len(json.load(open(request["inputs"]))), request["mode"], request["tokens"]
    turn = seen[mode, rows] = seen.get((mode, rows), -1) + 1
    with open(log, "a") as file:
        print("ask", name, mode, rows, request["reset"], file=file)
    if name == "stops" and rows == 2:
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(3)
    if name == "silent" and mode == "greedy":
        time.sleep(60)
    if name == "dies" and mode == "greedy" and turn == 2:
        sys.exit("boom")
    if name == "killed" and mode == "greedy":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "fails" and mode == "greedy":
        say(error="ValueError: cannot")
        continue
    if name == "babbles":
        print("hello", flush=True)
        continue
    if name == "vague":
        say(ms=1.0)
        continue
    short = name == "short" and mode == "greedy" and turn == 3
    say(ms=times[turn % 4], ids=[[5] * tokens] * rows, lengths=[tokens - short] * rows, peak_mib=11.0 + turn)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def bench(tmp_path, models, monkeypatch):
    """Runs main with fake peers: `bench("fast slow", "--batches", "1")` gives its exit code."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setattr(latency, "PAUSE_S", 0)

    def run(names: str, *words: str) -> int:
        own = [f"--peer={name}={shlex.join([sys.executable, str(script), name, str(tmp_path / 'log')])}"
               for name in names.split()]  # fmt: skip
        fixed = ["--shapes", "tiny", "--layers", "2-2", "--threads", "1", "--tokens", "4", "--rounds", "3"]
        modes = [] if "--modes" in words else ["--modes", "greedy"]
        places = ["--models", str(models), "--envs", str(tmp_path / "envs"), "--out", str(tmp_path / "out.json")]
        return latency.main([*fixed, *modes, *places, "--systems", *names.split(), *own, *words])

    return run


def rows(tmp_path: Path) -> dict:
    found = Ledger(tmp_path / "out.json", latency.KEYS).rows
    return {(row["system"], row["mode"], row["batch"]): row for row in found}


def log(tmp_path: Path) -> list[list[str]]:
    return [line.split() for line in (tmp_path / "log").read_text().splitlines()]


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_ratios_are_taken_round_by_round_and_the_warm_up_is_left_out(bench, tmp_path, capsys):
    assert bench("fast slow", "--batches", "1") == 0
    fast, slow = (rows(tmp_path)[name, "greedy", 1] for name in ("fast", "slow"))
    assert fast["rounds_ms"] == [10, 20, 30] and fast["median_ms"] == 20 and fast["first_ms"] == 9
    assert (fast["min_ms"], fast["iqr_ms"]) == (10, 10)
    assert fast["vs_slow"] == 3  # the median of 4, 1, 3; of the medians it would be 2
    assert slow["vs_fast"] == pytest.approx(1 / 3, abs=1e-4)
    assert fast["tokens_per_s"] == 200 and fast["load_s"] == 0.5 and fast["loaded_mib"] == 10 and fast["peak_mib"] == 14
    assert fast["start_s"] > 0 and fast["error"] is None and fast["agree"] is None
    assert [words[4] for words in log(tmp_path) if words[:2] == ["ask", "fast"]] == ["True", "False", "False", "False"]
    turns = [words[1] for words in log(tmp_path) if words[0] == "ask"]
    assert turns == ["fast", "slow", "slow", "fast", "fast", "slow", "slow", "fast"]
    out = capsys.readouterr().out
    assert "20.0 ± 10.0 · 200/s · 1.00 x · ?" in out  # transformers fp32 was not in this run
    assert json.loads(out.splitlines()[-1]) == {"rows": 2, "gaps": 0, "different_ids": []}
    assert not any(alive(int(words[2])) for words in log(tmp_path) if words[0] == "start")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("unloadable", "not loaded: failed: no such weights"),
        ("stillborn", "not loaded: ended with 1: no library in tiny-"),
        ("dies", "ended with 1: boom"),
        ("killed", "killed by SIGKILL, as where memory runs out"),
        ("fails", "failed: ValueError: cannot"),
        ("babbles", "answered with something else than a JSON object: 'hello'"),
        ("vague", "answered without lengths, peak_mib, ids: peer_runner.py says what an answer is"),
        ("short", "refused: 1 rows of 3 tokens came back, 1 of 4 were asked for"),
    ],
)
def test_a_peer_that_misbehaves_is_a_gap_with_its_reason_and_spoils_nothing(bench, tmp_path, capsys, name, reason):
    assert bench(f"{name} fast", "--batches", "1", "--modes", "greedy", "beam4") == 0
    found = rows(tmp_path)
    assert found[name, "greedy", 1]["error"].startswith(reason) and found[name, "greedy", 1]["median_ms"] is None
    assert str(tmp_path.parent) not in (tmp_path / "out.json").read_text().split('"rows"')[1]
    assert found["fast", "greedy", 1]["rounds_ms"] == [10, 20, 30]
    assert f"vs_{name}" not in found["fast", "greedy", 1]
    recovered = name in ("dies", "killed", "fails", "short")
    assert (found[name, "beam4", 1]["error"] is None) == recovered
    assert reason in capsys.readouterr().out
    starts = sum(words[:2] == ["start", name] for words in log(tmp_path))
    assert starts == {"dies": 2, "killed": 2, "babbles": 2}.get(name, 1)


def test_what_is_more_work_than_a_case_that_timed_out_is_not_tried(bench, tmp_path):
    modes = ["--modes", "prefill", "greedy", "beam4"]
    assert bench("silent fast", "--batches", "1", *modes, "--timeout", "1") == 0
    found = rows(tmp_path)
    assert found["silent", "prefill", 1]["error"] is None
    assert found["silent", "greedy", 1]["error"] == "timed out: no answer in 1 s"
    assert found["silent", "beam4", 1]["error"] == "not tried: timed out at greedy, source 16, batch 1"
    assert found["fast", "beam4", 1]["median_ms"] == 20


def test_an_interrupted_run_keeps_its_rows_and_goes_on(bench, tmp_path, capsys):
    assert bench("fast stops", "--batches", "1", "2") == 130
    kept = rows(tmp_path)
    assert set(kept) == {("fast", "greedy", 1), ("stops", "greedy", 1)}
    assert "interrupted: the same command goes on with what its results file lacks\n" in capsys.readouterr().err
    assert not any(alive(int(words[2])) for words in log(tmp_path) if words[0] == "start")
    (tmp_path / "log").unlink()
    script = tmp_path / "fake.py"
    script.write_text(FAKE.replace('name == "stops"', "False"))
    assert bench("fast stops", "--batches", "1", "2") == 0
    assert len(rows(tmp_path)) == 4 and rows(tmp_path)["fast", "greedy", 1] == kept["fast", "greedy", 1]
    assert {words[3] for words in log(tmp_path) if words[0] == "ask"} == {"2"}


def test_a_rerun_asks_nobody_and_another_system_has_the_whole_case_measured_again(bench, tmp_path):
    asked = []
    for names, more in (("fast", []), ("fast", []), ("fast slow", []), ("fast slow", []), ("slow", []),
                        ("fast", ["--again"]), ("fast slow", []), ("fast", ["--tokens", "5"])):  # fmt: skip
        (tmp_path / "log").write_text("")
        assert bench(names, "--batches", "1", *more) == 0
        asked.append(sorted({words[1] for words in log(tmp_path)}))
    assert asked == [["fast"], [], ["fast", "slow"], [], [], ["fast"], ["fast", "slow"], ["fast"]]


def test_quick_measures_its_few_cases_and_writes_nothing_unless_told(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(latency, "RESULTS", tmp_path / "results")
    script = shlex.join([sys.executable, str(tmp_path / "fake.py"), "fast", str(tmp_path / "log")])
    words = ["--quick", "--shapes", "tiny", "--layers", "2-2", "--models", str(tmp_path / "models"), "--peer",
             f"fast={script}", "--systems", "fast"]  # fmt: skip
    assert latency.main(words) == 0
    asked = [words[2:4] for words in log(tmp_path) if words[0] == "ask"]
    assert asked == [["greedy", "1"]] * 4 + [["beam4", "1"]] * 4
    assert "16 tokens" in capsys.readouterr().out and not (tmp_path / "results").exists()
    compiled = next(one for one in peers.systems([], {}) if one.name == "transformers-compiled")
    for quick, systems, left_out in ((True, None, True), (True, [compiled.name], False), (False, None, False)):
        args = argparse.Namespace(quick=quick, systems=systems, device="cpu", envs=tmp_path)
        assert bool(latency.why_not(compiled, args)) == left_out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--sources", "2000"], "sources 2000: expected 3 to 1024 for tiny on this machine"),
        (["--batches", "0"], "batches 0: expected 1 to 4096 for tiny on this machine"),
        (["--tokens", "1024"], "tokens 1024: expected 1 to 1022 for tiny on this machine"),
        (["--threads", "100000"], f"threads 100000: expected 1 to {os.cpu_count()} for tiny on this machine"),
        (["--rounds", "0"], "rounds 0: expected 1 to 10000 for tiny on this machine"),
        (["--layers", "3-2"], "layers '3-2': tiny has 2-2; expected as many numbers, none larger"),
        (["--layers", "2"], "layers '2': tiny has 2-2; expected as many numbers, none larger"),
        (["--layers", "x"], "layers 'x': expected E-D"),
        (["--bits", "9-9-8"], "bits '9-9-8': expected W-E-A"),
        (["--systems", "vllm"], "system 'vllm': expected transformers-fp32, transformers-fp16"),
        (["--peer", "dqbart-mine=x"], "peer 'dqbart-mine=x': expected NAME=COMMAND"),
        (["--peer", "mine"], "peer 'mine': expected NAME=COMMAND"),
    ],
)
def test_a_wrong_value_is_one_line_that_says_what_is_allowed(tmp_path, capsys, words, line):
    places = ["--out", str(tmp_path / "out.json"), "--models", str(tmp_path / "models"), "--envs", str(tmp_path)]
    assert latency.main(["--shapes", "tiny", *places, *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(line) and captured.err.count("\n") == 1 and not captured.out
    assert not (tmp_path / "out.json").exists() and not (tmp_path / "models").exists()


def test_a_peer_that_is_not_installed_is_a_visible_gap_and_measured_rows_outlive_their_peer(bench, tmp_path, capsys):
    missing = "not installed: python benchmarks/peers.py install ctranslate2 --envs DIR"
    assert bench("fast", "--systems", "fast", "ctranslate2-int8", "--batches", "1") == 0
    out = capsys.readouterr().out
    assert f"| 2-2 | ctranslate2-int8 | 8-8-8 | {missing} |" in out
    assert json.loads(out.splitlines()[-1])["gaps"] == 1
    ledger = Ledger(tmp_path / "out.json", latency.KEYS)
    row = next(row for row in ledger.rows if row["system"] == "ctranslate2-int8")
    fast = next(row for row in ledger.rows if row["system"] == "fast")
    ledger.add(fast | {key: row[key] for key in latency.KEYS} | {"median_ms": 77.0})
    assert bench("fast", "--systems", "fast", "ctranslate2-int8", "--batches", "1") == 0
    assert rows(tmp_path)["ctranslate2-int8", "greedy", 1]["median_ms"] == 77.0


def environment(folder: Path, pins: object = None) -> None:
    python = peers.python_of("ctranslate2", folder)
    python.parent.mkdir(parents=True)
    python.write_text("")
    if pins is not None:
        (folder / "ctranslate2" / peers.MARK).write_text(json.dumps(pins))


def test_environments_say_why_they_cannot_be_used(tmp_path, capsys):
    assert peers.unusable("ctranslate2", tmp_path / "a").startswith("not installed: ")
    environment(tmp_path / "b")
    assert peers.unusable("ctranslate2", tmp_path / "b").startswith("half installed: ")
    environment(tmp_path / "c", [["ctranslate2==1.0"]])
    assert peers.unusable("ctranslate2", tmp_path / "c").startswith("other versions installed: ")
    environment(tmp_path / "d", peers.ENVIRONMENTS["ctranslate2"].pins())
    assert peers.unusable("ctranslate2", tmp_path / "d") is None
    assert peers.main(["list", "--envs", str(tmp_path / "d")]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["ctranslate2"] is None and last["onnxruntime"].startswith("not installed")


def test_install_names_an_unknown_peer_and_spares_a_folder_of_something_else(tmp_path, capsys):
    assert peers.main(["install", "vllm", "--envs", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "peer 'vllm': expected ctranslate2, onnxruntime\n"
    precious = tmp_path / "ctranslate2" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("x")
    assert peers.main(["install", "ctranslate2", "--envs", str(tmp_path)]) == 2
    assert "is no virtual environment" in capsys.readouterr().err and precious.exists()


def test_every_engine_appears_by_itself_at_every_bits():
    from dqbart.engines import ENGINES

    found = [(system.name, system.bits) for system in peers.systems(["2-2-8", "8-8-8"], {})]
    assert len(set(found)) == len(found)
    assert {(f"dqbart-{engine}", bits) for engine in ENGINES for bits in ("2-2-8", "8-8-8")} <= set(found)


def test_a_model_folder_is_whole_or_absent(tmp_path, monkeypatch):
    store = latency_models.Models(tmp_path / "models", tmp_path / "envs")

    def half(name, layers, teacher, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(latency_models, "save_float", half)
        with pytest.raises(OSError, match="disk full"):
            store.float("tiny", "2-2")
    assert not [path for path in (tmp_path / "models").rglob("*") if path.is_file()]
    folder = store.float("tiny", "2-2")
    before = (folder / "model.safetensors").stat()
    assert store.float("tiny", "2-2") == folder and (folder / "model.safetensors").stat() == before


def test_a_failed_conversion_is_the_peers_gap(bench, tmp_path, monkeypatch):
    environment(tmp_path / "envs", peers.ENVIRONMENTS["ctranslate2"].pins())
    python = peers.python_of("ctranslate2", tmp_path / "envs")
    python.write_text("#!/bin/sh\necho 'no normalize_before' >&2\nexit 4\n")
    python.chmod(0o755)
    assert bench("fast", "--systems", "fast", "ctranslate2-int8", "--batches", "1") == 0
    error = rows(tmp_path)["ctranslate2-int8", "greedy", 1]["error"]
    assert error.startswith("not loaded: python") and error.endswith("ended with 4: no normalize_before")


def test_weights_are_seeded_and_a_student_is_made_of_its_teacher(tmp_path):
    import torch
    from transformers import AutoModelForSeq2SeqLM

    first, second = (latency_models.Models(tmp_path / name, tmp_path) for name in "ab")
    teacher = AutoModelForSeq2SeqLM.from_pretrained(first.float("tiny", "2-2"))
    again = AutoModelForSeq2SeqLM.from_pretrained(second.float("tiny", "2-2"))
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), again.parameters(), strict=True))
    student = AutoModelForSeq2SeqLM.from_pretrained(first.float("tiny", "2-1"))
    assert student.config.decoder_layers == 1
    assert torch.equal(student.model.decoder.layers[0].fc1.weight, teacher.model.decoder.layers[1].fc1.weight)
    ids = torch.tensor(latency_models.inputs("tiny", 16, 2))
    written = teacher.generate(input_ids=ids, min_new_tokens=8, max_new_tokens=8, num_beams=1, do_sample=False)
    assert written.shape == (2, 9) and len(set(written[0, 1:].tolist())) > 4  # no word repeated for ever


def test_inputs_fit_the_shape():
    import transformers

    for name in ("tiny", "bart-base", "mbart-large", "bert-base"):
        shape = latency_models.SHAPES[name]
        vocabulary = getattr(transformers, shape.architecture).config_class(**shape.config).vocab_size
        found = latency_models.inputs(name, 16, 3)
        assert [len(row) for row in found] == [16] * 3 and found == latency_models.inputs(name, 16, 3)
        assert all(row[0] == 0 and row[-1] == 2 and min(row[1:-1]) >= 4 for row in found)
        assert max(max(row) for row in found) < vocabulary
        assert found[0] != found[1]


def test_agreement_is_with_transformers_for_peers_and_with_the_torch_engine_for_ours():
    found = {(system.name, system.bits): system for system in peers.systems(["2-2-8", "8-8-8"], {})}
    fp32, int8 = found["transformers-fp32", "32-32-32"], found["ctranslate2-int8", "8-8-8"]
    torch8, torch2 = found["dqbart-torch", "8-8-8"], found["dqbart-torch", "2-2-8"]
    answers = {int8: {"ids": [[1, 2], [3, 4]]}, torch8: {"ids": [[9]]}, fp32: {"ids": [[1, 2], [3, 5]]}}
    assert latency.agreement(int8, answers) == 1
    assert latency.agreement(fp32, answers) is None and latency.agreement(torch8, answers) is None
    other = peers.System("dqbart-other", "8-8-8", "dqbart", "other")
    assert latency.agreement(other, {torch2: {"ids": [[7]]}, torch8: {"ids": [[8]]}, other: {"ids": [[8]]}}) == 1
    vectors = {int8: {"vectors": [[1.0, 0.0], [1.0, 0.1]]}, fp32: {"vectors": [[2.0, 0.0], [1.0, 0.0]]}}
    assert latency.agreement(int8, vectors) == 1


def test_an_fp32_peer_with_other_ids_fails_the_run(tmp_path, capsys):
    key = dict(device=latency.device_name("cpu"), shape="tiny", layers="2-2", system="ctranslate2-float32",
               bits="32-32-32", mode="greedy", source=16, batch=8, threads=1)  # fmt: skip
    row = key | latency.figures([1.0, 2.0, 3.0], latency.Case("greedy", 16, 8, 4))
    row |= dict(tokens=4, tried=True, agree=3, load_s=1.0, loaded_mib=1.0, peak_mib=1.0)
    out = tmp_path / "out.json"
    words = ["--shapes", "tiny", "--layers", "2-2", "--threads", "1", "--modes", "greedy", "--batches", "8", "--tokens",
             "4", "--systems", "ctranslate2-float32", "--out", str(out), "--envs", str(tmp_path)]  # fmt: skip
    for agree, code in ((3, 1), (4, 0)):
        Ledger(out, latency.KEYS).add(row | {"agree": agree})
        assert latency.main(words) == code
        captured = capsys.readouterr()
        assert ("fewer than half" in captured.err) == bool(code) and f"| {agree}/8 |" in captured.out
    for agree, code in ((7, 1), (8, 0)):  # our own may differ in none, whatever was measured on other machines
        Ledger(out, latency.KEYS).add(row | dict(system="dqbart-cpu", bits="2-2-8", agree=agree))
        Ledger(out, latency.KEYS).add(row | dict(system="dqbart-cpu", bits="2-2-8", agree=0, device="elsewhere"))
        assert latency.main(words) == code
        said = "dqbart-cpu: its ids are not those of dqbart-torch: tiny 2-2 2-2-8 greedy, source 16, batch 8"
        assert (said in capsys.readouterr().err) == bool(code)


def test_the_table_reads_rows_alone():
    base = dict(device="cpu", shape="bart-base", threads=2, source=128, batch=1, layers="6-6", tokens=16, load_s=2.0,
                loaded_mib=900.0, peak_mib=1000.0, error=None, agree=1, run=0)  # fmt: skip
    times = base | dict(median_ms=1234.5, iqr_ms=12.25, tokens_per_s=13.0, mode="greedy")

    def ratios(ct: float, fp32: float) -> dict:
        return {"vs_ct": ct, "vs_transformers-fp32": fp32}

    fp32 = times | ratios(0.5, 1) | dict(system="transformers-fp32", bits="32-32-32", agree=None)
    peer = times | ratios(1, 2) | dict(system="ct", bits="8-8-8", median_ms=600.0)
    ours = times | ratios(0.26, 0.51) | dict(system="dqbart-torch", bits="2-2-8", median_ms=2400.0, agree=None)
    gap = {key: base[key] for key in ("device", "shape", "threads", "source", "batch", "layers", "tokens")}
    gap |= dict(system="onnxruntime-int8", bits="8-8-8", error="not installed: do this", tried=False, median_ms=None)
    both = [gap | {"mode": mode} for mode in ("greedy", "beam4")]
    shallow = [ours | {"layers": "3-1", "vs_ct": ratio, "source": source} for ratio, source in ((1.5, 512), (4, 256))]
    text = latency.table([fp32, peer, ours, *both, *shallow])
    assert "| 6-6 | transformers-fp32 | 32-32-32 | 1234 ± 12.2 · 13.0/s · 0.50 x · 1.00 x |" in text
    assert "| 6-6 | ct | 8-8-8 | 600 ± 12.2 · 13.0/s · 1.00 x · 2.00 x |  | 1/1 | 2.00 | 900 | 1000 |" in text
    assert "| 6-6 | dqbart-torch | 2-2-8 | 2400 ± 12.2 · 13.0/s · 0.26 x · 0.51 x |" in text
    assert "| 6-6 | onnxruntime-int8 | 8-8-8 | not installed: do this | – |" in text
    assert text.count("<details>") == text.count("</details>") == 3
    assert "| cpu | bart-base | 6-6 | dqbart-torch | 2-2-8 | greedy | 0.26 | 0.51 |" in text
    assert "| 3-1 | dqbart-torch | 2-2-8 | greedy | 1.50 / 2.75 / 4.00 | 0.51 / 0.51 / 0.51 |" in text
    assert latency.table([]) == latency.table([]).strip()


def test_the_script_is_imported_without_torch():
    code = "import sys, latency; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(latency.__file__).parent)


def test_real_systems_write_as_many_tokens_and_measure_their_own_memory(bench, tmp_path):
    systems = ["--systems", "transformers-fp32", "dqbart-torch", "--bits", "8-8-8", "--batches", "2"]
    assert bench("fast", *systems, "--modes", "prefill", "beam4") == 0
    found = rows(tmp_path)
    assert set(found) == {
        (name, mode, 2) for name in ("transformers-fp32", "dqbart-torch") for mode in ("prefill", "beam4")
    }
    for row in found.values():
        assert row["error"] is None, row["error"]
        assert len(row["rounds_ms"]) == 3 and row["median_ms"] > 0 and "torch" in row["version"]
        assert 50 < row["loaded_mib"] <= row["peak_mib"] + 50 < 20_000 and row["start_s"] > row["load_s"] > 0
    assert found["dqbart-torch", "beam4", 2]["vs_transformers-fp32"] > 0
    assert "vs_dqbart-torch" not in found["transformers-fp32", "beam4", 2]
