"""The study of a real checkpoint: what it reads, its probe, its table and its goals, without a checkpoint."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_embeddings import SENTENCES, meets, probe, read, sentences, table, times


def row(
    bits: str, layers: str = "6", steps: int = 0, spearman: float = 90.0, right: float = 92.0, **more: Any
) -> dict[str, Any]:
    return dict(model="m", bits=bits, layers=layers, steps=steps, seed=28, sentences=9, learning_rate=None,
                spearman=spearman, probe=right, file_bytes=2**20) | more  # fmt: skip


def test_goals_and_table() -> None:
    rows = [
        row("2-2-8", steps=1500, spearman=86.5, one_ms=2.0, one_x=4.0, batch_ms=10.0, batch_x=2.5),
        row("32-32-32"), row("8-8-8", spearman=89.6), row("8-8-8", "3", 1500, spearman=80.0),
        row("4-4-8", right=90.9),
    ]  # fmt: skip
    assert [meets(r, rows) for r in (rows[0], rows[2], rows[4])] == [True, True, False]
    other = [row("32-32-32", model="n", spearman=70.0), row("8-8-8", model="n", spearman=70.0)]
    assert meets(other[1], rows + other) and not meets(other[1], rows)  # each held to its own original
    title, _, *lines = table(rows + other).split("\n\nn\n\n")[0].splitlines()
    assert title == "m"
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        ["| 32-32-32", "6"], ["| 8-8-8", "6"], ["| 4-4-8", "6"], ["| 2-2-8", "6"], ["| 8-8-8", "3"]
    ]  # fmt: skip
    assert lines[5] == "| 2-2-8 | 6 | 1500, seed 28 | 86.50 (-3.50) | 92.00 (+0.00) | 1.0 | 4.0 x | 2.5 x |"
    assert table([]).count("\n") == 1


def test_the_probe_finds_what_is_there() -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 300)
    vectors = np.eye(3)[labels] + 0.1 * draw.standard_normal((300, 3))
    parts = [(vectors[a:b], labels[a:b].tolist()) for a, b in ((0, 200), (200, 250), (250, 300))]
    assert probe(*parts) == 100
    shuffled = [(x, draw.permutation(y).tolist()) for x, y in parts]
    assert probe(*shuffled) < 70


def test_sentences_are_different_and_of_every_set(tmp_path: Path) -> None:
    for number, (name, field) in enumerate(SENTENCES.items()):
        (tmp_path / name).mkdir()
        rows = [{field: f"Set {number} has sentence {i} here. And there is one more."} for i in range(30)]
        with gzip.open(tmp_path / name / "train.jsonl.gz", "wt") as file:
            file.write("".join(json.dumps(r) + "\n" for r in rows))
    found = sentences(tmp_path, 60)
    assert len(found) == len(set(found)) == 60 and found == sentences(tmp_path, 60)
    assert all(sum(f"Set {n} " in text for text in found) >= 9 for n in range(1, len(SENTENCES)))
    with pytest.raises(
        FileNotFoundError, match="no test.jsonl or test.jsonl.gz; --data is the folder of all data sets"
    ):
        list(read(tmp_path / "wikisplit", "test"))


def test_encoders_take_turns() -> None:
    class Counts:
        def __init__(self) -> None:
            self.calls: list[int] = []

        def encode(self, texts: list[str], batch_size: int) -> None:
            self.calls.append(len(texts))

    ours, original = Counts(), Counts()
    found = times(ours, original, ["text"] * 40, rounds=3)
    assert ours.calls == original.calls == [1] * 4 + [32] * 4
    assert found.keys() == {f"{key}_{unit}" for key in ("one", "batch", "original_one", "original_batch")
                            for unit in ("ms", "x") if unit == "ms" or not key.startswith("original")}  # fmt: skip
    assert all(value > 0 for value in found.values())
