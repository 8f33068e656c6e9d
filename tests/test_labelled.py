"""Labelled texts: columns guessed, labels to ids or numbers, texts to batches."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, sentences, word_tokenizer
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from dqbart.data.columns import Examples, hold_out
from dqbart.data.files import load_rows
from dqbart.data.labelled import (
    EncodedLabelled,
    LabelCollator,
    LabelColumns,
    Labelled,
    encode_labelled,
    guess_label_columns,
    read_labelled,
)

DATA = Path(os.environ.get("DQBART_DATA", Path(__file__).parents[2] / "shared" / "data"))
COLUMNS = LabelColumns("text", label="label")


def labelled(*labels: Any, **options: Any) -> Labelled:
    """Texts a, b, ... with these labels, as read from rows."""
    rows = [{"text": chr(97 + i), "label": label} for i, label in enumerate(labels)]
    return read_labelled(rows, options.pop("columns", COLUMNS), **options)


def refused(words: str, call: Any, *args: Any, **options: Any) -> None:
    with pytest.raises(ValueError) as caught:
        call(*args, **options)
    assert words in str(caught.value) and "\n" not in str(caught.value), caught.value


# --- columns


@pytest.mark.parametrize(
    ("row", "text", "pair", "label"),
    [
        ({"sentence": "a", "label": 1, "paradigm": "island", "pair": 8}, "sentence", None, "label"),
        ({"sentence1": "a", "sentence2": "b", "label": 0.5, "part": "images"}, "sentence1", "sentence2", "label"),
        ({"premise": "a", "hypothesis": "b", "label": 2, "idx": 0}, "premise", "hypothesis", "label"),
        ({"question1": "a", "question2": "b", "is_duplicate": "0"}, "question1", "question2", "is_duplicate"),
        ({"question": "a", "sentence": "b", "label": 1}, "question", "sentence", "label"),
        ({"title": "a", "content": "b", "label": 1}, "content", None, "label"),
        ({"Text": "a", "Intent": "b"}, "Text", None, "Intent"),
        ({"text": "a", "label": 3, "label_text": "card"}, "text", None, "label"),
        ({"sentence_A": "a", "sentence_B": "b", "similarity": 3.5}, "sentence_A", "sentence_B", "similarity"),
        ({"review_body": "a", "stars": 5, "product_id": "x"}, "review_body", None, "stars"),
        ({"anything": "a", "label": "b"}, "anything", None, "label"),
        ({"text": "a", "doc": "b"}, "text", None, None),
        ({"pair": {"sentence1": "a"}, "text": "b", "label": None}, "text", None, "label"),
        ({"label": "a", "text": ""}, "text", None, "label"),
    ],
)  # fmt: skip
def test_columns_of_public_sets(row: dict[str, Any], text: str, pair: str | None, label: str | None) -> None:
    rows = [row, {name: value or "text" for name, value in row.items()}]
    assert guess_label_columns(rows) == LabelColumns(text, pair, label, guessed=True)


def test_given_columns_win() -> None:
    row = {"sentence1": "a", "sentence2": "b", "note": "c", "label": 1, "score": 0.5, "id": "x"}
    guess = lambda **given: guess_label_columns([row], **given)  # noqa: E731
    assert guess(label="score").label == "score"
    assert (guess(text="note").text, guess(text="note").pair) == ("note", None)
    assert guess(text="sentence2").pair is None  # only sentence1 goes before another
    assert guess(text="sentence1").pair == "sentence2" and guess(pair="sentence2").text == "sentence1"
    assert guess(text="sentence2", pair="sentence1") == LabelColumns("sentence2", "sentence1", "label", True)
    assert guess(text="note", pair="id", label="score") == LabelColumns("note", "id", "score", False)
    assert guess(pair="", label="") == LabelColumns("sentence1", None, None, True)
    assert guess(text="score").label == "label" and guess(text="label").label == "score"
    assert guess_label_columns([{"a": {"b": "x"}, "label": 1}]).text == "a.b"


def test_column_errors_and_line() -> None:
    row = {"one": "a", "two": "b", "label": 1}
    refused("no text column recognised among 'one', 'two', 'label'; give --source-column", guess_label_columns, [row])
    refused("column 'labl' (--target-column) is not in the data", guess_label_columns, [row], label="labl")
    refused("did you mean 'label'?", guess_label_columns, [row], label="labl")
    refused("column 'x' (--pair-column)", guess_label_columns, [row], text="one", pair="x")
    refused("column 'one' is given more than once", guess_label_columns, [row], text="one", pair="one")
    refused("column 'one' is given more than once", guess_label_columns, [row], text="one", label="one")
    line = str(guess_label_columns([row], text="one", pair="two"))
    assert line.startswith("columns: text 'one', pair 'two', label 'label' (guessed; change with --source-column, ")
    assert str(LabelColumns("a")) == "columns: text 'a', no label"


# --- labels without known names


@pytest.mark.parametrize(
    ("labels", "names", "ids"),
    [
        (["pos", "neg", " pos "], ["neg", "pos"], [1, 0, 1]),
        ([2, 0, 1], ["0", "1", "2"], [2, 0, 1]),
        ([5, 1, 3, 10], ["1", "3", "5", "10"], [2, 0, 1, 3]),  # by size, not by alphabet
        (["10", "9", "-1"], ["-1", "9", "10"], [2, 1, 0]),  # csv
        ([1, -1, 1], ["-1", "1"], [1, 0, 1]),
        ([1.0, 0.0], ["0", "1"], [1, 0]),  # pandas writes ids so where one was missing
        (["1.0", "0.0"], ["0", "1"], [1, 0]),
        ([True, False], ["False", "True"], [1, 0]),
        (["007", "7", "x"], ["007", "7", "x"], [0, 1, 2]),
        (["007", "008"], ["007", "008"], [0, 1]),  # a code, no number
        (["1", "2", "many"], ["1", "2", "many"], [0, 1, 2]),
        (["été", "中文", "nan"], ["nan", "été", "中文"], [1, 2, 0]),
        (["²", "٣"], ["²", "٣"], [0, 1]),  # digits to Python, no numbers here
        ([np.int64(3), 4], ["3", "4"], [0, 1]),
        ([np.bool_(True), False], ["False", "True"], [1, 0]),
    ],
)
def test_classes(labels: list[Any], names: list[str], ids: list[int]) -> None:
    for kind in (None, "classification"):
        found = labelled(*labels, kind=kind)
        assert (found.kind, found.names, found.labels) == ("classification", names, ids)
        assert all(type(i) is int for i in found.labels or ["none"])


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [([0, 2.5], [0.0, 2.5]), (["1", "2.50"], [1.0, 2.5]), (["-.5", "1e-3"], [-0.5, 0.001]), ([4.0, 0.1], [4.0, 0.1])],
)
def test_numbers(labels: list[Any], numbers: list[float]) -> None:
    for kind in (None, "regression"):
        found = labelled(*labels, kind=kind)
        assert (found.kind, found.names, found.labels) == ("regression", None, numbers)
        assert all(type(x) is float for x in found.labels or ["none"])


def test_whole_numbers_are_classes_but_for_scores() -> None:
    assert labelled(1, 2, 5).kind == "classification"
    assert labelled(1, 2, 5, kind="regression").labels == [1.0, 2.0, 5.0]
    rows = [{"text": "a", "Score": 1}, {"text": "b", "Score": "2"}]
    assert read_labelled([rows[0], rows[0]], LabelColumns("text", label="Score")).labels == [1.0, 1.0]
    rows = [{"text": "a", "score": "good"}, {"text": "b", "score": "2"}]
    assert read_labelled(rows, LabelColumns("text", label="score")).names == ["2", "good"]
    rows = [{"text": "a", "score": 1}, {"text": "b", "score": 2}]
    assert read_labelled(rows, LabelColumns("text", label="score"), kind="classification").names == ["1", "2"]
    assert read_labelled(rows, LabelColumns("text", label="score"), names=["1", "2"]).labels == [0, 1]


def test_rows_without_labels() -> None:
    for missing in (None, "", "  ", float("nan"), -1, "-1"):
        found = labelled(missing, missing)
        assert (found.labels, found.names, found.kind) == (None, None, None) and "no labels" in str(found)
        found = labelled(missing, missing, names=["x", "y"])
        assert (found.labels, found.names, found.kind) == (None, ["x", "y"], "classification")
        assert labelled(missing, missing, kind="regression").labels is None
    assert labelled(-1, -1, names=["-1", "1"]).labels == [0, 0]
    assert labelled("good", "-1", "good").names == ["-1", "good"]  # a name like any other
    assert labelled(-1, 0, 1).labels == [0, 1, 2]
    assert labelled("a", columns=LabelColumns("text")).labels is None
    rows: list[dict[str, Any]] = [{"text": " ", "label": [1]}, {"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    rows.append({"text": None, "label": None})  # labels of rows that are left out don't count
    assert read_labelled(rows[1:], COLUMNS) == Labelled(["a", "b"], None, [0, 1], ["x", "y"], "classification", 1)


@pytest.mark.parametrize(
    ("labels", "options", "words"),
    [
        (["x", None, "y"], {}, "row 2: column 'label' is empty; expected a label in every row, or in none"),
        ([0.5, float("nan")], {}, "row 2: column 'label' is empty"),
        ([1, "x"], {}, "row 2: column 'label' holds text, 'x', but row 1 has a number, 1; expected one kind"),
        ([True, 1], {}, "row 2: column 'label' holds a number, 1, but row 1 has a boolean, True"),
        ([[0, 1], [1, 0]], {}, "row 1: column 'label' holds [0, 1], expected one label"),
        ([{"a": 1}], {}, "row 1: column 'label' holds {'a': 1}, expected one label"),
        (["x", "x"], {}, "column 'label': all 2 labels are 'x'; expected 2 classes or more"),
        ([1, 2.5], {"kind": "classification"}, "row 2: column 'label' holds 2.5, expected names or whole numbers"),
        ([1.5, "2"], {}, "row 2: column 'label' holds text, '2', but row 1 has a number"),
        (["1.5", "good"], {"kind": "regression"}, "row 2: column 'label' holds 'good', expected a finite number"),
        ([1.5, float("inf")], {}, "row 2: column 'label' holds inf, expected a finite number"),
        (["1.5", "1e999"], {}, "row 2: column 'label' holds '1e999', expected a finite number"),
        ([True, False], {"kind": "regression"}, "row 1: column 'label' holds True, expected a finite number"),
        ([0, 1, 2, -1], {}, "row 4: column 'label' holds -1, others up to 2; hub sets write -1 for no label, so leave"),
        ([1], {"kind": "ranking"}, "kind 'ranking': expected 'classification' or 'regression'"),
        ([1], {"names": []}, "names of length 0: expected a list of different texts"),
        ([1], {"names": ["a", "a"]}, "names 'a', 'a': expected a list of different texts"),
        ([1], {"names": ["a", "b"], "kind": "regression"}, "names 'a', 'b': regression has none"),
    ],
)
def test_labels_refused(labels: list[Any], options: dict[str, Any], words: str) -> None:
    refused(words, labelled, *labels, **options)


def test_texts_refused() -> None:
    refused("row 2: column 'text' holds int, expected text", read_labelled, [{"text": "a"}, {"text": 3}], COLUMNS)
    refused("half a surrogate pair", read_labelled, [{"text": "\ud800", "label": 1}], COLUMNS)
    refused("all 1 rows are empty there", read_labelled, [{"text": " ", "label": 1}], COLUMNS)
    pair = LabelColumns("text", "other", "label")
    refused("all 1 rows are empty there", read_labelled, [{"text": "a", "label": 1}], pair)


# --- labels with known names


@pytest.mark.parametrize(
    ("names", "labels", "ids"),
    [
        (["positive", "negative"], ["negative", "positive"], [1, 0]),  # the teacher's order, not the alphabet's
        (["NEGATIVE", "POSITIVE"], ["positive", "Negative"], [1, 0]),
        (["a", "A"], ["A", "a"], [1, 0]),
        (["positive", "negative"], [1, 0, 1], [1, 0, 1]),
        (["positive", "negative"], ["1", "0.0"], [1, 0]),
        (["positive", "negative"], [True, False], [1, 0]),
        (["positive", "negative"], ["true", "False"], [1, 0]),
        (["False", "True"], [True, True], [1, 1]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], [2, 0], [2, 0]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["LABEL_2", "label_0"], [2, 0]),
        (["1", "2", "3"], [1, 3], [0, 2]),  # stars: names that are numbers are no ids
        (["-1", "1"], ["1", "-1"], [1, 0]),
        (["x"], ["x"], [0]),
        (["oos", "a", "b"], ["b"], [2]),  # one class of them is fine, and keeps its id
    ],
)
def test_known_names(names: list[str], labels: list[Any], ids: list[int]) -> None:
    for kind in (None, "classification"):
        found = labelled(*labels, names=names, kind=kind)
        assert (found.labels, found.names, found.kind) == (ids, names, "classification")


@pytest.mark.parametrize(
    ("names", "label", "words"),
    [
        (["yes", "no"], "maybe", "row 1: label 'maybe' in column 'label' is none of the 2 known: 'yes', 'no', "),
        (["yes", "no"], 2, "row 1: label 2 in column 'label' is none of the 2 known: 'yes', 'no', nor an id from"),
        (["yes", "no"], 0.5, "row 1: label 0.5"),
        (["yes", "no", "-1 "], -1, "row 1: label -1"),
        (["entailment", "neutral"], "entailement", "did you mean 'entailment'?"),
        (["1", "2", "3"], 0, "label 0 in column 'label' is none of the 3 known: '1', '2', '3'"),
        (["LABEL_0", "LABEL_1"], "positive", "known: 'LABEL_0', 'LABEL_1', nor an id from 0 to 1"),
        (["a", "A"], "ä", "label 'ä'"),
        ([f"intent_{i}" for i in range(151)], "x" * 500, "'intent_3', 'intent_4', ..., nor an id from 0 to 150"),
    ],
)  # fmt: skip
def test_unknown_labels(names: list[str], label: Any, words: str) -> None:
    refused(words, labelled, label, *([0] if label == -1 else []), names=names)
    with pytest.raises(ValueError) as caught:
        labelled(label, *([0] if label == -1 else []), names=names)
    assert len(str(caught.value)) < 300
    assert "nor an id" in str(caught.value) or "1" in names  # ids are offered only where they are taken


def test_what_is_printed() -> None:
    assert str(labelled("x", "y", "x")) == "3 texts; classification, 2 classes: x 2, y 1"
    assert str(labelled(0, 2.5)) == "2 texts; regression, labels 0 to 2.5, mean 1.25"
    rows = [{"text": "a", "other": "b"}, {"text": "a", "other": ""}]
    assert str(read_labelled(rows, LabelColumns("text", "other"))) == "1 pairs; 1 with empty texts left out; no labels"
    assert str(labelled(*"abcdefg")).endswith("7 classes: a 1, b 1, c 1, d 1, e 1, ...")


def test_hold_out_serves_both() -> None:
    rows = [{"text": f"t{i % 40}", "other": f"o{i}", "label": i % 3} for i in range(120)]
    examples = read_labelled(rows, LabelColumns("text", "other", "label"))
    rest, held = hold_out(examples, 30)
    assert isinstance(held, Labelled) and len(held) == 30 and len(rest) == 90
    assert not set(rest.texts) & set(held.texts)  # equal first texts stay together
    assert held.names == ["0", "1", "2"] and held.kind == "classification" and held.skipped == 0
    for part in (rest, held):
        for text, pair, label in zip(part.texts, part.pairs or [], part.labels or [], strict=True):
            assert {"text": text, "other": pair, "label": label} in rows
    assert hold_out(Examples(examples.texts), 30)[1].sources == held.sources
    assert examples.select([]).labels == [] and labelled(None).select([0]) == Labelled(["a"])


# --- encoding


def bert_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[CLS]", "[PAD]", "[SEP]", "[UNK]", *WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def test_encoding_is_the_tokenizer_s_own() -> None:
    texts = sentences(2100)  # more than two chunks
    texts[7] = "unheard été 中文"
    pairs = sentences(2100, seed=1)
    tokenizer = bert_tokenizer()
    for side in (None, pairs):
        encoded = encode_labelled(tokenizer, Labelled(texts, side, [i % 2 for i in range(2100)]), 64, progress=False)
        assert len(encoded) == 2100 and encoded.cut == 0
        for i in (0, 7, 999, 1000, 2099):
            want = dict(tokenizer(texts[i], *([side[i]] if side else [])))
            assert encoded[i] == want | {"labels": i % 2}
        assert [item["labels"] for item in encoded][:3] == [0, 1, 0]
    assert set(encoded[0]["token_type_ids"]) == {0, 1} and encoded.types is not None
    plain = word_tokenizer()
    plain.model_input_names = ["input_ids", "attention_mask"]
    item = encode_labelled(plain, Labelled(texts), 64, progress=False)[0]
    assert item.keys() == {"input_ids", "attention_mask"}


def test_the_longer_text_of_a_pair_is_cut() -> None:
    tokenizer = bert_tokenizer()
    long, short = " ".join(["dog"] * 20), "cat house"
    for texts in ((long, short), (short, long)):
        examples = Labelled([texts[0], "a"], [texts[1], "a"], [0.5, 1.0])
        encoded = encode_labelled(tokenizer, examples, 10, progress=False)
        ids = encoded[0]["input_ids"]
        assert len(ids) == 10 and encoded.cut == 1 and ids.count(tokenizer.convert_tokens_to_ids("dog")) == 5
        assert ids.count(tokenizer.convert_tokens_to_ids("cat")) == 1
        assert str(encoded) == "2 examples; pair tokens mean 7.5, longest 10, 50.0 % cut"
    encoded = encode_labelled(tokenizer, Labelled([long, short]), 4, progress=False)
    assert [len(item["input_ids"]) for item in encoded] == [4, 4] and encoded.cut == 1  # exactly full is not cut
    assert "text tokens mean 4.0, longest 4, 50.0 % cut" in str(encoded)


def test_encoding_refused() -> None:
    tokenizer = bert_tokenizer()
    refused("no texts to encode", encode_labelled, tokenizer, Labelled([]), 10)
    refused("max_length 2: expected at least 3, 2 of them special", encode_labelled, tokenizer, Labelled(["a"]), 2)
    refused("max_length 4: expected at least 5, 3 of", encode_labelled, tokenizer, Labelled(["a"], ["b"]), 4)


def test_collator() -> None:
    encoded = encode_labelled(
        bert_tokenizer(), Labelled(["dog", "a big dog"], ["cat", "cat"], [1, 0]), 20, progress=False
    )
    batch = LabelCollator(1)([encoded[0], encoded[1]])
    assert batch["input_ids"].shape == (2, 7) and batch["input_ids"][0, 5:].tolist() == [1, 1]
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0] * 2, [1] * 7]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1]]
    assert batch["labels"].tolist() == [1, 0]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    numbers = EncodedLabelled(encoded.rows, None, [0.0, 2.5], 0, True)
    batch = LabelCollator(1, multiple_of=8)([numbers[0], numbers[1]])
    assert batch.keys() == {"input_ids", "attention_mask", "labels"} and batch["input_ids"].shape == (2, 8)
    assert batch["labels"].dtype == torch.float32 and batch["labels"].shape == (2,)
    assert "labels" not in LabelCollator(1)([EncodedLabelled(encoded.rows, None, None, 0, False)[0]])


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_trainer_learns_from_it(kind: str, tmp_path: Path) -> None:
    """Through transformers' own Trainer, length grouping included: whether a text has a dog, as a class or a number."""
    texts = sentences(200)
    has_dog = ["dog" in text.split() for text in texts]
    labels: Any = [int(x) for x in has_dog] if kind == "classification" else [float(x) for x in has_dog]
    encoded = encode_labelled(bert_tokenizer(), Labelled(texts, None, labels), 16, progress=False)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=4 + len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, pad_token_id=1, num_labels=2 if kind == "classification" else 1,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=90, per_device_train_batch_size=16, learning_rate=5e-3, report_to=[],
        train_sampling_strategy="group_by_length", remove_unused_columns=False, save_strategy="no", use_cpu=True,
        logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    Trainer(model=model, args=arguments, train_dataset=encoded, data_collator=LabelCollator(1)).train()
    batch = LabelCollator(1)(list(encoded))
    with torch.no_grad():
        assert model.eval()(**batch).loss < 0.1


# --- real data


@pytest.mark.parametrize(
    ("name", "columns", "classes", "line"),
    [
        ("rt-polarity", ("sentence", None), 2, "8,660 texts; classification, 2 classes: 1 4,346, 0 4,314"),
        ("clinc150", ("sentence", None), 151, "15,066 texts; classification, 151 classes: translate 100"),
        ("banking77", ("sentence", None), 77, "8,952 texts; classification, 77 classes: "),
        ("stsb-free", ("sentence1", "sentence2"), None, "999 pairs; regression, labels 0 to 5, mean 2.572"),
    ],
)
def test_real_sets(name: str, columns: tuple[str, str | None], classes: int | None, line: str) -> None:
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not here; DQBART_DATA names the folder of data sets")
    rows = load_rows(DATA / name)
    guessed = guess_label_columns(rows)
    assert (guessed.text, guessed.pair, guessed.label) == (*columns, "label")
    train = read_labelled(rows, guessed)
    assert str(train).startswith(line) and (train.names is None) == (classes is None)
    test_rows = load_rows(DATA / name, split="test")
    test = read_labelled(test_rows, guessed, train.names, train.kind)
    assert test.names == train.names and len(test) == len(test_rows)
    for i in random.Random(0).sample(range(len(test)), 50):
        label = (test.labels or [])[i]
        assert (train.names[int(label)] if train.names else str(label)) == str(test_rows[i]["label"])
