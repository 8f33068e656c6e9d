"""benchmarks/engines.py: the same words from both engines, and where they run."""

import json
from pathlib import Path
from typing import Any

import engines
import pytest
import torch

import dqbart

ENGINES = ["cpu", *(["triton"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_write_the_same(
    engine: str, teacher_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    recipe = dqbart.Recipe(bits="2-2-8", layers="2-1", epochs=0)
    dqbart.compress(teacher_folder, data=pairs_file, recipe=recipe, output=tmp_path / "packed")
    words = [tmp_path / "packed", "--data", pairs_file, "--split", "train", "--inputs", 6, "--settings", 2]
    monkeypatch.setattr("sys.argv", ["engines.py", *map(str, words), "--engine", engine])
    assert engines.main() == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["ok"] and found["engine"] == engine and len(found["rows"]) == 2
    assert all(row["inputs"] == 6 and row["worse_than_a_tie"] == 0 for row in found["rows"])
    assert ("max_logit_difference" in found["rows"][0]) == (engine == "cpu")
