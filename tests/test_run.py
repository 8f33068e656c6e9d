"""A run's two folders: what goes on, what is replaced and when, and what is never touched."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dqbart.run import Run

IDENTITY: dict[str, Any] = {"recipe": {"bits": "2-2-8"}, "teacher": "a", "data": None}


def finished(output: Path, identity: dict[str, Any] = IDENTITY) -> None:
    run = Run.open(output, identity, overwrite=False)
    staged = run.work / "packed"
    staged.mkdir()
    (staged / "model").write_text("old")
    run.finish(staged, {})


def replaced(run: Run) -> None:
    staged = run.work / "packed"
    staged.mkdir()
    (staged / "model").write_text("new")
    run.finish(staged, {})


def test_overwriting_goes_on_and_the_old_folder_stays_until_there_is_a_new_one(tmp_path: Path) -> None:
    output = tmp_path / "out"
    finished(output)
    (tmp_path / "out.training").mkdir(exist_ok=True)
    first = Run.open(output, IDENTITY, overwrite=True)  # done before: done again
    assert first.finished is None and (output / "model").read_text() == "old"
    (first.work / "checkpoints").mkdir()
    again = Run.open(output, IDENTITY, overwrite=True)  # stopped: goes on
    assert (again.work / "checkpoints").is_dir() and (output / "model").read_text() == "old"
    other = Run.open(output, IDENTITY | {"teacher": "b"}, overwrite=True)
    assert not (other.work / "checkpoints").exists()
    replaced(other)
    assert (output / "model").read_text() == "new"
    assert json.loads((output / "report.json").read_text())["run"]["teacher"] == "b"


def stop_at(output: Path, when: str, how: Any) -> Any:
    """`os.replace` that ends in `how()` before or after one of the two renames of `Run.finish`."""
    replace = os.replace

    def stopping(source: Any, target: Any) -> None:
        which = {output: "old", output.with_name("out.training") / "packed": "new"}.get(Path(source))
        if when == f"{which}, before":
            how()
        replace(source, target)
        if when == f"{which}, after":
            how()

    return stopping


@pytest.mark.parametrize("when", ["old, after", "new, before", "new, after"])
@pytest.mark.parametrize("killed", [False, True])
def test_a_run_stopped_in_its_last_moment_loses_nothing(
    tmp_path: Path, when: str, killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, new = tmp_path / "out", IDENTITY | {"teacher": "b"}
    finished(output)
    run = Run.open(output, new, overwrite=True)
    if killed:
        child = os.fork()
        if not child:
            os.replace = stop_at(output, when, lambda: os._exit(9))
            replaced(run)
        assert os.waitpid(child, 0)[1] == 9 << 8
    else:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", stop_at(output, when, lambda: signal.raise_signal(signal.SIGINT)))
            replaced(run)
        assert (output / "model").read_text() in ("old", "new") and (output / "report.json").exists()
    shutil.rmtree(run.work / "packed", ignore_errors=True)  # as pack does
    for overwrite in (when != "new, after", False):
        again = Run.open(output, new, overwrite)
        if again.finished is None:
            replaced(again)
    assert (output / "model").read_text() == "new" and Run.open(output, new, False).finished is not None
    if when != "new, after":
        assert os.listdir(tmp_path) == ["out"]


AT_WORK = """
import json, os, sys, time
from pathlib import Path
from dqbart.run import Run
run = Run.open(Path(sys.argv[1]), json.loads(sys.argv[2]), overwrite=False)
child = os.fork()  # as a data loader's workers are, which notice late that their parent is gone
if child:
    (run.work / "checkpoints").mkdir()
    print(child, flush=True)
time.sleep(300)
"""


@pytest.mark.skipif(importlib.util.find_spec("fcntl") is None, reason="no locks here")
def test_a_second_process_is_kept_out_until_the_first_one_ends(tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-c", AT_WORK, output, json.dumps(IDENTITY)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    worker = int(first.stdout.readline())
    try:
        for identity, overwrite in ((IDENTITY, False), (IDENTITY, True), (IDENTITY | {"teacher": "b"}, True)):
            with pytest.raises(FileExistsError, match="out.training: another process is at work there; wait for it"):
                Run.open(output, identity, overwrite)
        assert (tmp_path / "out.training" / "checkpoints").is_dir()
        first.kill()
        first.wait()
        os.kill(worker, 0)  # still there
        run = Run.open(output, IDENTITY, overwrite=False)
        assert (run.work / "checkpoints").is_dir()
    finally:
        first.kill()
        os.kill(worker, signal.SIGKILL)
    again = subprocess.run(command, capture_output=True, text=True)
    assert "another process is at work there" in again.stderr
    (run.work / "targets").mkdir()
    replaced(run)
    assert {file.name for file in run.work.iterdir()} == {"run.json", "targets"}
    code = "import json, sys; from pathlib import Path; from dqbart.run import Run;"
    code += "Run.open(Path(sys.argv[1]), json.loads(sys.argv[2]), overwrite=True)"
    subprocess.run([sys.executable, "-c", code, output, json.dumps(IDENTITY)], check=True)


def test_a_run_killed_before_its_first_word_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "out.training").mkdir()
    (tmp_path / "out.training" / "dqbart.lock").touch()
    finished(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_finished_run_left_is_no_beginning(tmp_path: Path) -> None:
    output = tmp_path / "out"
    run = Run.open(output, IDENTITY, overwrite=False)
    (run.work / "targets").mkdir()
    replaced(run)
    assert (run.work / "targets").is_dir()
    Run.open(output, IDENTITY, overwrite=True)
    assert not (run.work / "targets").exists()


def test_a_deleted_result_is_made_again_beside_what_is_left(tmp_path: Path) -> None:
    output = tmp_path / "out"
    run = Run.open(output, IDENTITY, overwrite=False)
    (run.work / "targets").mkdir()
    replaced(run)
    os.rename(output, tmp_path / "elsewhere")
    assert Run.open(output, IDENTITY, overwrite=False).finished is None and (run.work / "targets").is_dir()
    with pytest.raises(FileExistsError, match="another teacher"):
        Run.open(output, IDENTITY | {"teacher": "b"}, overwrite=False)


@pytest.mark.parametrize("report", ['{"pytest": 1}', "[1]", "half a", '{"run": 3}', "\udcff"])
def test_a_report_of_something_else_makes_no_folder_ours(tmp_path: Path, report: str) -> None:
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "report.json").write_bytes(report.encode("utf-8", "surrogateescape"))
    (thesis / "thesis.tex").write_text("years")
    for overwrite, words in ((True, "not written by dqbart"), (False, "was not written by a finished dqbart run")):
        with pytest.raises(FileExistsError, match=words):
            Run.open(thesis, IDENTITY, overwrite=overwrite)
    assert (thesis / "thesis.tex").read_text() == "years"


def test_files_that_came_meanwhile_are_not_deleted(tmp_path: Path) -> None:
    output = tmp_path / "out"
    run = Run.open(output, IDENTITY, overwrite=False)
    output.mkdir()
    (output / "thesis.tex").write_text("years")
    with pytest.raises(FileExistsError, match="not written by dqbart"):
        replaced(run)
    assert (output / "thesis.tex").read_text() == "years" and (run.work / "packed" / "model").exists()


def test_a_mount_point_is_refused_before_anything_is_done() -> None:
    with pytest.raises(FileExistsError, match="a mount point, which can't be replaced; expected a folder in it"):
        Run.open(Path("/proc"), IDENTITY, overwrite=True)
