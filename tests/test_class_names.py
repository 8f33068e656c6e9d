"""Classes of `datasets` go by their names, which another checkpoint may have in another order."""

from pathlib import Path
from typing import Any

import pytest
from test_labelled import COLUMNS, refused

from dqbart.data.files import load_rows
from dqbart.data.labelled import guess_label_columns, read_labelled

datasets = pytest.importorskip("datasets")


def test_every_source_gives_names(tmp_path: Path) -> None:
    """From objects, streams and what `datasets` leaves in parquet; -1, a hidden label, stays."""
    label = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label, "gold": {"label": label}})
    rows = [{"text": t, "label": i, "gold": g} for t, i, g in (("a", 1, {"label": 0}), ("b", 0, None), ("c", -1, None))]
    dataset = datasets.Dataset.from_list(rows, features)
    dataset.to_parquet(tmp_path / "a.parquet")
    named = [
        {"text": "a", "label": "yes", "gold": {"label": "no"}},
        {"text": "b", "label": "no", "gold": None},
        {"text": "c", "label": -1, "gold": None},
    ]
    assert load_rows(dataset) == load_rows(dataset.to_iterable_dataset()) == load_rows(tmp_path / "a.parquet") == named
    assert load_rows({"train": dataset}) == named and dataset[0] == rows[0]


def class_labels(*names: str) -> list[dict[str, Any]]:
    """Rows of a `datasets.Dataset` with every class once, in its id order."""
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=[*names])}
    columns = {"text": [*names], "label": list(range(len(names)))}
    return load_rows(datasets.Dataset.from_dict(columns, datasets.Features(features)))


@pytest.mark.parametrize(
    ("data", "names", "ids"),
    [
        (["entailment", "neutral", "contradiction"], ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], [2, 1, 0]),
        (["entailment", "contradiction"], ["LABEL_0", "LABEL_1", "LABEL_2"], [0, 1]),  # nobody named the teacher's
        (["1", "2"], ["bad", "good"], [0, 1]),  # nor these: names that are numbers name nothing
        (["True", "False"], ["other", "spam"], [1, 0]),
        (["1 star", "2 stars"], None, [0, 1]),
        (["b", "a"], None, [0, 1]),  # new classes are in the data's order
        (["10", "9"], None, [0, 1]),
    ],
)
def test_names_become_the_teacher_s_ids(data: list[str], names: list[str] | None, ids: list[int]) -> None:
    found = read_labelled(class_labels(*data), COLUMNS, names, "classification")
    assert (found.labels, found.names) == (ids, names or data)
    assert names or all(type(name) is str for name in found.names or ())  # they are written into config.json


def test_classes_refused() -> None:
    words = "row 1: label 'neg' in column 'label' is none of the 2 known: 'Negative', 'Positive'; classes go by their"
    rows = class_labels("neg", "pos")
    refused(words, read_labelled, rows, COLUMNS, ["Negative", "Positive"])
    for unlabelled, row in (([*rows, {"text": "x", "label": -1}], 3), ([{"text": "x", "label": -1}, *rows], 1)):
        refused(f"row {row}: column 'label' holds -1, hub sets write -1 for no", read_labelled, unlabelled, COLUMNS)
    refused("all 1 labels are 'neg'; expected 2 classes or more", read_labelled, rows[:1], COLUMNS)
    assert guess_label_columns([{"utterance": "x", "topic_id": rows[0]["label"]}]).text == "utterance"  # no text, that
