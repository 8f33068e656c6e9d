"""Which part of the data trains, and which selects and scores: named splits, and what is held out."""

from pathlib import Path
from typing import Any

import pytest
from conftest import write

from dqbart.data.columns import Examples
from dqbart.data.files import find_split, list_splits, load_rows
from dqbart.data.splits import read_split, train_and_dev
from dqbart.recipe import Recipe

RECIPE = Recipe(source_column="source")


def pairs(count: int, name: str = "s") -> list[dict[str, Any]]:
    return [{"source": f"{name} {i}", "target": "t"} for i in range(count)]


def read(data: Any, split: str) -> Examples:
    return read_split(data, RECIPE, split)


@pytest.mark.parametrize(
    ("names", "split", "found"),
    [
        (["train", "dev"], "validation", "dev"),
        (["train", "Eval"], "validation", "Eval"),
        (["validation_matched", "validation_mismatched"], "validation", "validation_matched"),
        (["validation_matched", "val"], "validation", "val"),  # a whole name before a beginning
        (["dev", "validation"], "validation", "validation"),
        (["test_matched", "testing"], "test", "test_matched"),
        (["validation_mismatched", "validation"], "validation_mismatched", "validation_mismatched"),
        (["validation_matched"], "validation_mismatched", None),
        (["training", "devices", "evaluator", "unsupervised"], "train", None),
        (["training", "devices", "evaluator", "unsupervised"], "validation", None),
        (["unsupervised"], "unsupervised", "unsupervised"),
        ([], "train", None),
    ],
)
def test_a_split_by_its_other_names(names: list[str], split: str, found: str | None) -> None:
    assert find_split(names, split) == found


@pytest.mark.parametrize("name", ["dev", "valid", "val", "validation_matched", "eval"])
@pytest.mark.parametrize("kind", ["folder", "dict", "DatasetDict"])
def test_another_name_of_validation_is_used(kind: str, name: str, tmp_path: Path, capsys: Any) -> None:
    data: Any = {"train": pairs(40), name: pairs(5, "v"), "test": pairs(3), "extra": pairs(3)}
    if kind == "folder":
        for split, rows in data.items():
            write(tmp_path / f"{split}.jsonl", rows)
        data = tmp_path
    elif kind == "DatasetDict":
        datasets = pytest.importorskip("datasets")
        data = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in data.items()})
    train, dev = train_and_dev(read, data, None, RECIPE, 4, lambda e: e.targets is not None)
    assert train is not None and dev is not None and (len(train), dev.sources[0], len(dev)) == (40, "v 0", 5)
    said = capsys.readouterr().err
    if kind != "folder":  # where files say by their names what is read
        assert f"validation: split '{name}' of the data\n" in said and "data: split test, extra left out\n" in said
        assert load_rows(data, split="validation") == pairs(5, "v")
    dev = train_and_dev(read, data, pairs(2), RECIPE, 4, lambda e: True)[1]
    assert dev is not None and len(dev) == 2 and list_splits(data)[0] == "train"
    assert kind == "folder" or f"split {name}, test, extra left out" in capsys.readouterr().err
