"""Results survive interruption, find their rows again, and say which run made them."""

import json
import os
import signal
import time

import pytest
from ledger import CHECKPOINT, Ledger, describe_run, fingerprint, markdown, require_same_files, resumable


def test_rows_are_found_again_and_replaced(tmp_path):
    path = tmp_path / "deep" / "x.json"
    ledger = Ledger(path, ["bits", "layers"])
    ledger.add({"bits": "2-2-8", "layers": "6-3", "score": 1.0})
    ledger.add({"bits": "8-8-8", "layers": "6-3", "score": 2.0})
    again = Ledger(path, ["bits", "layers"])
    assert again.find(bits="2-2-8", layers="6-3")["score"] == 1.0
    assert again.find(bits="2-2-8", layers="6-6") is None
    again.add({"bits": "2-2-8", "layers": "6-3", "score": 3.0})
    final = Ledger(path, ["bits", "layers"])
    assert [row["score"] for row in final.rows] == [3.0, 2.0]
    assert [row["run"] for row in final.rows] == [1, 0]
    assert not list(path.parent.glob("*.partial"))


def test_a_run_that_made_no_row_that_is_left_is_dropped(tmp_path):
    path = tmp_path / "x.json"
    for score in range(3):
        Ledger(path, ["bits"]).add({"bits": "8-8-8", "score": score})
    content = json.loads(path.read_text())
    assert len(content["runs"]) == 1 and content["rows"][0] == {"bits": "8-8-8", "score": 2, "run": 0}


def test_two_processes_lose_no_rows(tmp_path):
    one, two = (Ledger(tmp_path / "x.json", ["bits"]) for _ in range(2))
    one.add({"bits": "8-8-8"})
    two.add({"bits": "4-4-8"})
    one.add({"bits": "2-2-8"})
    two.add({"bits": "8-8-8", "score": 1})
    found = Ledger(tmp_path / "x.json", ["bits"]).rows
    assert [(row["bits"], row.get("score")) for row in found] == [("8-8-8", 1), ("4-4-8", None), ("2-2-8", None)]


def test_an_incomplete_key_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected"):
        Ledger(tmp_path / "x.json", ["bits", "layers"]).find(bits="2-2-8")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": []}', "nonsense"])
def test_a_file_of_something_else_is_named(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="x.json: not a results file"):
        Ledger(path, ["bits"])
    assert path.read_text() == text


def test_a_run_names_commit_command_and_versions():
    run = describe_run()
    assert run["command"].startswith("python benchmarks/") and "torch" in run["packages"]
    assert isinstance(run["flags"], list) and run["date"].count("-") == 2


def test_markdown():
    assert markdown(["a", "b"], [[1, None]]) == "| a | b |\n| --- | --- |\n| 1 |  |"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_benchmark_is_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert resumable(lambda: os.kill(os.getpid(), number) or time.sleep(60) or 0)() == 130
    said = capsys.readouterr().err
    assert said == "interrupted: the same command goes on with what its results file lacks\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_a_user_can_mend_is_one_line_and_the_rest_is_not_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(error: Exception) -> int:
        raise error

    assert resumable(fails)(FileNotFoundError("no such folder")) == 2
    assert capsys.readouterr().err == "no such folder\n"
    assert resumable(lambda: 1)() == 1
    with pytest.raises(KeyError):
        resumable(fails)(KeyError("a defect"))


def test_a_folder_is_told_by_its_files(tmp_path):
    for name, content in (("config.json", "{}"), ("model.safetensors", "numbers"), ("notes.txt", "x")):
        (tmp_path / name).write_text(content)
    whole, checkpoint = fingerprint(tmp_path), fingerprint(tmp_path, *CHECKPOINT)
    assert whole != checkpoint and fingerprint(tmp_path / "nowhere") is None
    assert fingerprint(tmp_path, "config.json", "*.bin") is None
    fingerprint.cache_clear()
    (tmp_path / "notes.txt").write_text("y")
    assert fingerprint(tmp_path) != whole and fingerprint(tmp_path, *CHECKPOINT) == checkpoint
    ledger = Ledger(tmp_path / "x.json", ["teacher", "data", "seed"])
    ledger.add({"teacher": "t", "data": "d", "seed": 1, "files": "a"})
    require_same_files(ledger, ledger.rows, "a")
    with pytest.raises(ValueError, match="rows of t, d were made of other files .fingerprint a, these have b.*--out"):
        require_same_files(ledger, ledger.rows, "b")
