"""Which part of the data trains, and which selects and scores: named splits, and what is held out."""

from pathlib import Path
from typing import Any

import pytest
from conftest import bert_tokenizer, sentences, write
from tiny_models import tiny_encoder

import dqbart
from dqbart.data.columns import Examples, sample
from dqbart.data.files import find_split, list_splits, load_rows
from dqbart.data.splits import read_split, train_and_dev
from dqbart.recipe import Recipe
from dqbart.tasks.run import evaluate
from dqbart.tasks.text import PlainText

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
    train, dev = train_and_dev(read, data, None, RECIPE, lambda e: None, lambda e: e.targets is not None)
    assert train is not None and dev is not None and (len(train), dev.sources[0], len(dev)) == (40, "v 0", 5)
    said = capsys.readouterr().err
    if kind != "folder":  # where files say by their names what is read
        assert f"validation: split '{name}' of the data\n" in said and "data: split test, extra left out\n" in said
        assert load_rows(data, split="validation") == pairs(5, "v")
    dev = train_and_dev(read, data, pairs(2), RECIPE, lambda e: None, lambda e: True)[1]
    assert dev is not None and len(dev) == 2 and list_splits(data)[0] == "train"
    assert kind == "folder" or f"split {name}, test, extra left out" in capsys.readouterr().err


def plain_text() -> PlainText:
    return PlainText(Recipe(task="text"), bert_tokenizer(), tiny_encoder("bert"))


def test_the_end_of_one_document_is_held_out(tmp_path: Path, capsys: Any) -> None:
    lines = [f"{i} {text}" for i, text in enumerate(sentences(60))]
    (tmp_path / "one.txt").write_text("\n".join(lines))
    train, dev = plain_text().read(tmp_path / "one.txt", None)
    assert train.documents == [lines[:54]] and dev.documents == [[line] for line in lines[54:]]
    assert "too few documents to hold any out: the last 6 texts are held out" in capsys.readouterr().err
    rows = [{"text": line, "doc": 0 if i < 52 else i} for i, line in enumerate(lines[:58])]  # the end of many
    train, dev = plain_text().read(rows, None)
    assert train.documents == [lines[:52], [lines[52]]] and dev.documents == [[line] for line in lines[53:58]]
    many = [f"{i} {text}" for i, text in enumerate(sentences(9000))]  # no tenth of a large corpus
    train, dev = plain_text().read([{"text": line, "doc": 1} for line in many], None)
    assert (len(train.documents[0]), len(dev)) == (8500, 500)


def test_nothing_can_be_held_out(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "few.txt").write_text("the cat\n" * 9)
    train, dev = plain_text().read(tmp_path / "few.txt", None)
    assert len(train.documents[0]) == 9 and dev is None
    said = "few.txt: too little to hold anything out, so there will be no score; give --dev-data\n"
    assert capsys.readouterr().err.endswith(said)


def test_held_out_documents_are_scored_by_their_texts() -> None:
    """As those of a validation file: a sample of 20 is 20 texts, not 20 books."""
    books = [{"text": f"{i} {text}", "doc": i // 30} for i, text in enumerate(sentences(900))]
    train, dev = plain_text().read(books, None)
    assert (len(train), len(dev)) == (27, 90)
    assert sum(map(len, sample(dev, 20).documents)) == 20
    assert plain_text().read({"train": books, "dev": books[:90]}, None)[1].documents == [
        [r["text"]] for r in books[:90]
    ]


def test_dev_data_that_are_given_have_to_be_scored(classifier: Path, bert: Path, tmp_path: Path, capsys: Any) -> None:
    rows = [{"sentence": text, "label": "dog" if "dog" in text else "other"} for text in sentences(40)]
    texts = write(tmp_path / "texts.jsonl", [{"sentence": row["sentence"]} for row in rows])
    for method, data in (("dq", rows), ("prediction", texts), ("prediction", None)):
        recipe = Recipe(bits="8-8-8", method=method, epochs=0 if data is None else 1)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"data 'texts.jsonl': no target column to score .*; give --target-column"):
            dqbart.compress(classifier, data, dev_data=texts, recipe=recipe, output=tmp_path / "out")
    hidden = write(tmp_path / "hidden.jsonl", [row | {"label": -1} for row in rows])
    said = r"data 'hidden.jsonl': all labels are -1, which is how sets hide those of a test split; give a split or a f"
    for given in (dict(dev_data=hidden), dict(data=hidden)):
        with pytest.raises(ValueError, match=said):
            dqbart.compress(classifier, **dict(data=rows) | given, recipe=Recipe(epochs=1), output=tmp_path / "out")
    with pytest.raises(ValueError, match=said):
        evaluate(str(classifier), hidden)
    assert "columns" in (err := capsys.readouterr().err) and "no labels (all are -1: hidden)" in err
    sentence = Recipe(bits="8-8-8", method="sentence", task="sentences", epochs=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no pairs of sentences with similarities .*; give --pair-column and --target"):
        dqbart.compress(bert, texts, dev_data=rows, recipe=sentence, output=tmp_path / "out")
    general = Recipe(bits="8-8-8", method="minilm2", task="text", epochs=0)  # type: ignore[arg-type]
    dqbart.compress(bert, texts, dev_data=texts, recipe=general, output=tmp_path / "general")  # labels would not help
    assert "dev data 'texts.jsonl': not scored; method 'minilm2' looks at inner layers alone" in capsys.readouterr().err
