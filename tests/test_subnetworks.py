"""DynaBERT's parts, trained at once and one by one: a small run, its table, a rerun, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import subnetworks
from conftest import write
from ledger import Ledger


@pytest.fixture(scope="module")
def split(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [json.loads(line) for line in labelled.read_text().splitlines()]
    folder = tmp_path_factory.mktemp("split") / "animals"
    folder.mkdir()
    for name, part in (("train", rows[:200]), ("validation", rows[200:250]), ("test", rows[250:])):
        write(folder / f"{name}.jsonl", part)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["subnetworks.py", *map(str, words)])
    return subnetworks.main()


def test_a_quick_run_and_its_rerun(
    classifier: Path, split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = (classifier, "--data", split, "--work", tmp_path / "work", "--out", tmp_path / "out.json", "--quick")
    assert run(monkeypatch, *words) == 0
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]) == {"rows": 6}
    rows = {(r["how"], r["width"]): r for r in Ledger(tmp_path / "out.json", subnetworks.KEYS).rows}
    assert {how for how, _ in rows} == {"untrained", "alone", "dynabert"}
    assert rows["untrained", 1.0]["score"] > 80  # the teacher in another order
    assert rows["alone", 0.5]["parameters"] == rows["dynabert", 0.5]["parameters"] < rows["alone", 1.0]["parameters"]
    logs = [(tmp_path / "work" / "2-28" / name / "metrics.jsonl").read_text() for name in ("alone-1-1", "alone-0.5-1")]
    assert all('"step": 2' in log and '"step": 3' not in log for log in logs)  # as many as its only stage
    monkeypatch.setattr(subnetworks.Study, "row", lambda *a: pytest.fail("measured again"))
    assert run(monkeypatch, *words) == 0 and capsys.readouterr().out == out


def test_a_path_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert run(monkeypatch, tmp_path / "no", "--data", tmp_path, "--quick") == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("no such folder; expected a checkpoint folder or a hub id")


def test_table() -> None:
    study = dict(teacher="t", data="d", steps=1500, learning_rate=None, widths="0.5 1", depths="0.5")
    rows = [
        study | dict(how=how, width=width, depth=0.5, parameters=1_500_000, score=score, seed=seed)
        for how, width, score, seed in (
            ("untrained", 0.5, 50.0, 1), ("alone", 0.5, 80.0, 1), ("alone", 0.5, 82.0, 2), ("dynabert", 0.5, 80.0, 1),
            ("untrained", 1.0, 60.0, 1),
        )
    ]  # fmt: skip
    rows += [row | {"data": "another", "score": 0.0} for row in rows]  # which counts for nothing in the first
    title, _, *lines = subnetworks.table(rows).splitlines()
    assert title == "t on d, 1,500 steps a stage, widths 0.5 1, depths 0.5:"
    assert lines[2] == "| 1 | 0.5 | 1.50 | 60.0 |  |  |"
    assert lines[3] == "| 0.5 | 0.5 | 1.50 | 50.0 | 81.0 ± 1.4 | 80.0 (-1.0) |"
