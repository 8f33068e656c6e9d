"""Extractive question answering, the data: SQuAD files and rows, windows, labels, batches."""

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import word_tokenizer
from tokenizers import pre_tokenizers
from transformers import BertTokenizerFast, DistilBertTokenizerFast, RobertaTokenizerFast
from transformers.trainer_pt_utils import LengthGroupedSampler

from dqbart.data.question_windows import EncodedQuestions, QuestionCollator, encode_questions
from dqbart.data.questions import Question, read_questions

PARIS = "Paris is the capital of France. It lies on the river Seine."
BEIJING = "北京是中华人民共和国的首都，人口超过2100万。"
FRANCE = Question("1", "What is Paris the capital of?", PARIS, ("France",), (24,))


def tokenizer_for(kind: str) -> Any:
    if kind == "roberta":  # bytes without merges: an emoji is four tokens with the same characters
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters]
        return RobertaTokenizerFast(vocab={word: i for i, word in enumerate(words)}, merges=[])
    characters = sorted({*"abcdefghijklmnopqrstuvwxyz0123456789.,?!'", *BEIJING.lower()})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "paris", "is", "the", "capital", "of", "fran", "##ce"]
    vocabulary = {word: i for i, word in enumerate([*words, *characters, *(f"##{c}" for c in characters)])}
    return (DistilBertTokenizerFast if kind == "distilbert" else BertTokenizerFast)(vocab=vocabulary)


def encode(tokenizer: Any, questions: Any, max_length: int = 64, stride: int = 16, most: int = 20) -> EncodedQuestions:
    return encode_questions(
        tokenizer, questions, max_length=max_length, stride=stride, max_question_length=most, progress=False
    )


def windows_of(encoded: EncodedQuestions, question: int = 0) -> list[int]:
    return np.flatnonzero(encoded.question_F == question).tolist()


def labelled_text(encoded: EncodedQuestions, f: int, context: str) -> str | None:
    """The characters of a window's labels; None where they are CLS."""
    start, end = int(encoded.start_F[f]), int(encoded.end_F[f])
    if start == end == encoded.cls_F[f]:
        return None
    first = int(encoded.first_F[f])
    return context[encoded.char_starts[f][start - first] : encoded.char_ends[f][end - first]]


# Reading


def official(version: str = "v2.0", **changes: Any) -> dict[str, Any]:
    asked = {"id": "a", "question": "Of what?", "answers": [{"text": "France", "answer_start": 24}]}
    second = {"id": "b", "question": "Who?", "answers": [], "plausible_answers": [{"text": "It", "answer_start": 32}]}
    if version == "v2.0":
        asked["is_impossible"], second["is_impossible"] = False, True
    qas = [asked | changes, *([second] if version == "v2.0" else [])]
    return {"version": version, "data": [{"title": "Paris", "paragraphs": [{"context": PARIS, "qas": qas}]}]}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["dev-v2.0.json", "dev.json.gz"])
def test_official_json(tmp_path: Path, name: str, indent: int | None) -> None:
    text = json.dumps(official(), indent=indent).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else b"\xef\xbb\xbf" + text)
    found = read_questions(tmp_path / name)
    assert list(found) == [Question("a", "Of what?", PARIS, ("France",), (24,)), Question("b", "Who?", PARIS)]
    assert found[0].context is found[1].context  # one copy of a paragraph
    assert str(found) == "2 questions, 1 of them without an answer"


def test_official_json_in_a_folder_and_version_1(tmp_path: Path) -> None:
    (tmp_path / "train-v1.1.json").write_text(json.dumps(official("1.1"), indent=2))
    (tmp_path / "dev-v1.1.json").write_text(json.dumps(official("1.1", id="dev")))
    assert [q.id for q in read_questions(str(tmp_path))] == ["a"]
    assert [q.id for q in read_questions(tmp_path, "validation")] == ["dev"]


def test_articles_one_a_line(tmp_path: Path) -> None:
    article = official()["data"][0]
    (tmp_path / "x.jsonl").write_text(f"{json.dumps(article)}\n{json.dumps(article)}\n")
    assert [q.id for q in read_questions(tmp_path / "x.jsonl")] == ["a", "b", "a", "b"]


FLAT = {"text": ["France", "capital of France"], "answer_start": [24, 13]}


def test_flat_rows(tmp_path: Path) -> None:
    row = {"id": "a", "title": "Paris", "context": PARIS, "question": "Of what?", "answers": FLAT}
    expected = Question("a", "Of what?", PARIS, ("France", "capital of France"), (24, 13))
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    (tmp_path / "one.json").write_text(json.dumps(row))  # one row, or SQuAD's own form: both are one object
    assert list(read_questions(tmp_path / "x.jsonl")) == list(read_questions(tmp_path / "one.json")) == [expected]
    pairs = [{"text": "France", "answer_start": 24}]
    rows = [row, {k: v for k, v in row.items() if k != "id"} | {"answers": pairs}, row | {"answers": {}, "id": 7}]
    found = read_questions({"train": rows})
    assert [q.id for q in found] == ["a", "2", "7"] and [len(q.answers) for q in found] == [2, 1, 0]


def test_flat_rows_of_a_table(tmp_path: Path) -> None:
    answers = [json.dumps(FLAT), str(FLAT), "", "[]"]
    with (tmp_path / "x.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "context", "question", "answers", "is_impossible"])
        for number, cell in enumerate(answers):
            writer.writerow([number, PARIS, "Of what?", cell, str(number > 1)])
    assert [q.starts for q in read_questions(tmp_path / "x.csv")] == [(24, 13), (24, 13), (), ()]


def one(context: str, text: Any, start: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"context": context, "question": "q", "answers": {"text": [text], "answer_start": [start]}} | more]


@pytest.mark.parametrize(
    ("context", "text", "given", "starts"),
    [
        ("ääää Paris", "Paris", 9, 5),  # counted in bytes
        ("a b a b", "b", 2, 2),
        ("a b a b", "b", 5, 6),  # nearest
        ("x" * 500 + " y", "y", 0, 501),  # far, but the only place
        ("(a) b", "(a)", -1, 0),  # no pattern
        ("好的北京", "北京", 1, 2),
    ],
)
def test_answers_are_found(context: str, text: str, given: int, starts: int) -> None:
    found = read_questions(one(context, text, given))
    assert found[0].starts == (starts,) and found.repaired == (given != starts)
    assert ("1 answers moved" in str(found)) == (given != starts)


BAD_ROWS = [
    (one("a b", "c", 0), "data: row 1: field 'answers': 'c' does not stand in the context at character 0 or near"),
    (one("b" + "a" * 300 + "b", "b", 150), "'b' does not stand in the context at character 150"),
    (one("a", "a", "0"), "row 1: field 'answers': answer_start '0', expected a whole number"),
    (one("a", "a", True), "answer_start True, expected a whole number"),
    (one("a", " ", 0), "field 'answers': text ' ', expected a text that is not empty"),
    (one("a", None, 0), "text None, expected a text"),
    (one("a", "a", 0, is_impossible=True), "'is_impossible' is true, but there are 1 answers"),
    (one("a", "a", 0, is_impossible=False, answers=[]), "'is_impossible' is false, but there are 0 answers"),
    (one("a", "a", 0, is_impossible="perhaps"), "'is_impossible' is 'perhaps', expected true or false"),
    (one("a", "a", 0, answers="{'text': array(['a'])}"), "field 'answers' is .*expected {'text'"),
    (one("a", "a", 0, answers={"text": ["a"]}), "field 'answers' is {'text': \\['a'\\]}, expected"),
    (one("a", "a", 0, answers={"text": ["a"], "answer_start": []}), "field 'answers' is"),
    (one("a", "a", 0, answers=["a"]), "field 'answers' is \\['a'\\], expected"),
    (one("a", "a", 0, question=None), "row 1: field 'question' is NoneType, expected text; the row has \\['context'"),
    (one("a", "a", 0, question=" \n"), "row 1: question '1': its question is empty"),
    (one("\t", "a", 0, answers=[]), "row 1: question '1': its context is empty"),
    (one("a \ud800", "a", 0), "context has half a surrogate pair at character 2"),
    ([{"context": "a", "question": "q"}], "row 1: field 'answers' is missing; the row has \\['context', 'question'\\]"),
    ([{"paragraphs": [{"context": "a", "qas": [1]}]}], "article 1 paragraph 1 question 1: int, expected an object"),
    ([{"paragraphs": [{"context": "a"}]}], "article 1 paragraph 1: field 'qas' is NoneType, expected a list"),
    ([{"data": {}}], "data: field 'data' is dict, expected a list"),
    ([{"data": []}], "data: there are no questions in it"),
]


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS)
def test_bad_rows(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_questions(rows)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("data: ")


def test_bad_official_files(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps(official(answers=[{"text": "Rome", "answer_start": 24}])))
    with pytest.raises(
        ValueError, match=re.escape(f"{file}: article 1 paragraph 1 question 1: field 'answers': 'Rome'")
    ):
        read_questions(file)
    file.write_text('{"data": [')
    with pytest.raises(ValueError, match=f"{re.escape(str(file))} line 1: invalid JSON"):
        read_questions(file)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_questions(tmp_path / "y.json")


def test_a_question_checks_itself() -> None:
    for arguments, message in [
        (("1", "", PARIS), "its question is empty"),
        (("1", "q", 3), "its context is int"),
        (("1", "q", PARIS, ("France",), (23,)), "'France' does not stand in its context at character 23"),
        (("1", "q", PARIS, ("France",), (-35,)), "at character -35"),
        (("1", "q", PARIS, ("France",)), "1 answers but 0 starts"),
    ]:
        with pytest.raises(ValueError, match=message):
            Question(*arguments)  # type: ignore[arg-type]


# Windows and labels

KINDS = ("bert", "roberta", "distilbert")


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_the_answer(kind: str) -> None:
    tokenizer = tokenizer_for(kind)
    encoded = encode(tokenizer, [FRANCE, Question("2", "Who?", PARIS)], max_length=120, most=40)
    f = windows_of(encoded)[0]
    assert labelled_text(encoded, f, PARIS) == "France"
    assert all(labelled_text(encoded, f, PARIS) is None for f in windows_of(encoded, 1))
    item = encoded[f]
    assert ("token_type_ids" in item) == (kind == "bert")
    answer = item["input_ids"][item["start_positions"] : item["end_positions"] + 1]
    assert tokenizer.decode(answer).strip().lower() == "france"
    # What the tokenizer itself makes of the pair.
    whole = tokenizer(FRANCE.question, PARIS)
    assert item | {"start_positions": 0, "end_positions": 0} == dict(whole) | {"start_positions": 0, "end_positions": 0}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [0, 5, 16])
def test_windows_cover_a_long_context_with_the_question_in_each(kind: str, stride: int) -> None:
    tokenizer, context = tokenizer_for(kind), f"{PARIS} " * 20 + "zebra!"
    question = Question("1", " the capital? ", context, ("zebra",), (len(context) - 6,))
    encoded = encode(tokenizer, [FRANCE, question, FRANCE], max_length=48, stride=stride)
    asked = tokenizer("the capital?")["input_ids"]
    fs = windows_of(encoded, 1)
    assert fs == list(range(fs[0], fs[-1] + 1)) and len(fs) > 5
    covered: set[int] = set()
    for f in fs:
        ids = encoded.input_ids[f]
        assert len(ids) <= 48 and ids[: len(asked)] == asked and ids[-1] == tokenizer.sep_token_id
        starts, ends = encoded.char_starts[f], encoded.char_ends[f]
        assert len(starts) == len(ids) - int(encoded.first_F[f]) - 1
        covered.update(c for a, b in zip(starts, ends, strict=True) for c in range(a, b))
    assert covered >= {i for i, c in enumerate(context) if not c.isspace()}
    for left, right in zip(fs, fs[1:], strict=False):
        shared = encoded.char_starts[left][-stride:] if stride else []
        assert encoded.char_starts[right][:stride] == shared
    found = [labelled_text(encoded, f, context) for f in fs]
    assert found[-1] == "zebra" and set(found) <= {None, "zebra"} and encoded.unseen == 0


def test_an_answer_across_windows_is_labelled_only_where_it_is_whole() -> None:
    tokenizer = tokenizer_for("bert")
    context = " ".join("abcdefghijklmnopqrstuvwxyz")
    question = Question("1", "q?", context, ("k l m",), (context.index("k l m"),))
    # 8 special and question tokens at most: windows of 12 - 5 = 7 context tokens, sharing 2.
    encoded = encode(tokenizer, [question], max_length=12, stride=2, most=6)
    windows = [context[encoded.char_starts[f][0] : encoded.char_ends[f][-1]] for f in windows_of(encoded)]
    assert windows == ["a b c d e f g", "f g h i j k l", "k l m n o p q", "p q r s t u v", "u v w x y z"]
    assert [labelled_text(encoded, f, context) for f in range(5)] == [None, None, "k l m", None, None]
    long = Question("1", "q?", context, ("j k l m n o p q r",), (context.index("j"),))
    lost = encode(tokenizer, [long], max_length=12, stride=2, most=6)
    assert lost.unseen == 1 and {labelled_text(lost, f, context) for f in range(5)} == {None}
    assert "1 answers in no window" in str(lost) and "1 questions in 5 windows" in str(lost)


def test_labels_where_the_tokenizer_drops_characters() -> None:
    """A zero-width space at the edge of an answer belongs to no token; half a word to a whole one."""
    tokenizer, context = tokenizer_for("bert"), "it is \u200bparis\u200b here"
    question = Question("1", "q", context, ("\u200bparis\u200b",), (6,))
    assert labelled_text(encode(tokenizer, [question]), 0, context) == "paris"
    part = Question("1", "q", context, ("ari",), (8,))
    assert labelled_text(encode(tokenizer, [part]), 0, context) == "paris"
    nothing = encode(tokenizer, [Question("1", "q", context, ("\u200b",), (6,))])
    assert labelled_text(nothing, 0, context) is None and nothing.unseen == 1


def test_a_label_on_characters_of_several_tokens() -> None:
    context = "🙂 née 🙃 Ω"
    question = Question("1", "q", context, ("née 🙃",), (2,))
    encoded = encode(tokenizer_for("roberta"), [question])
    assert labelled_text(encoded, 0, context) == "née 🙃"


def test_chinese_needs_no_spaces() -> None:
    question = Question("1", "哪里是首都？", BEIJING, ("中华人民共和国",), (3,))
    for kind in KINDS:
        encoded = encode(tokenizer_for(kind), [question], max_length=96, most=40)
        texts = {labelled_text(encoded, f, BEIJING) for f in range(len(encoded))}
        assert texts - {None} == {"中华人民共和国"}


@pytest.mark.parametrize("kind", KINDS)
def test_long_questions_are_cut_and_counted(kind: str) -> None:
    tokenizer = tokenizer_for(kind)
    long = "what 🙂 is the capital 🙃🙃🙃 " * 30
    encoded = encode(tokenizer, [FRANCE, Question("2", long, PARIS)], most=30)
    assert encoded.cut == 1 and "1 questions cut short" in str(encoded)
    for f in windows_of(encoded, 1):
        length = int(encoded.first_F[f]) - tokenizer.num_special_tokens_to_add(pair=True) + 1
        asked = tokenizer.decode(encoded.input_ids[f][1 : 1 + length], skip_special_tokens=True)
        assert 26 <= length <= 30 and asked.startswith("what") and "\ufffd" not in asked


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [1, 18, 19, 20])
def test_questions_are_cut_at_any_token(kind: str, most: int) -> None:
    """Byte tokens of spaces have offsets that begin after the space: cut there, nothing would be cut, for ever."""
    tokenizer = tokenizer_for(kind)
    encoded = encode(tokenizer, [Question("1", "ab " * 30, "x")], most=most)
    length = int(encoded.first_F[0]) - tokenizer.num_special_tokens_to_add(pair=True) + 1
    assert encoded.cut == 1 and most - 1 <= length <= most


def test_what_can_not_be_encoded() -> None:
    bert = tokenizer_for("bert")
    with pytest.raises(ValueError, match="no questions to encode"):
        encode(bert, [])
    with pytest.raises(ValueError, match="max_length 39, stride 16, .*: expected .*together 40$"):
        encode(bert, [FRANCE], max_length=39)
    encode(bert, [FRANCE], max_length=40)
    for stride, most in ((-1, 20), (16, 0)):
        with pytest.raises(ValueError, match="expected at least 0 and 1"):
            encode(bert, [FRANCE], stride=stride, most=most)
    bert.model_max_length = 63
    with pytest.raises(ValueError, match="max_length 64: BertTokenizer.* allows at most 63"):
        encode(bert, [FRANCE])
    with pytest.raises(ValueError, match="puts no CLS token"):
        encode(word_tokenizer(), [FRANCE])


def test_slow_tokenizers_are_refused() -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(ValueError, match="^ByT5Tokenizer gives no character offsets.*fast tokenizer$"):
        encode(ByT5Tokenizer(), [FRANCE])


@pytest.mark.parametrize("kind", KINDS)
def test_batches(kind: str) -> None:
    tokenizer = tokenizer_for(kind)
    encoded = encode(tokenizer, [Question("0", "a?", "b", ("b",), (0,)), FRANCE], max_length=100, most=40)
    short, long = encoded[0], encoded[1]
    batch = QuestionCollator(tokenizer.pad_token_id, multiple_of=8)([short, long])
    assert set(batch) == set(short) and all(value.dtype == torch.int64 for value in batch.values())
    width = -(-len(long["input_ids"]) // 8) * 8
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, width)
    assert batch["input_ids"][0, len(short["input_ids"]) :].unique().tolist() == [tokenizer.pad_token_id]
    assert batch["attention_mask"].sum(1).tolist() == [len(short["input_ids"]), len(long["input_ids"])]
    assert batch["start_positions"].tolist() == [short["start_positions"], long["start_positions"]]
    assert batch["end_positions"].shape == (2,)
    if kind == "bert":
        assert batch["token_type_ids"][0].sum() == 2  # "b" and the separator after it
    assert sorted(LengthGroupedSampler(2, encoded)) == list(range(len(encoded))) and list(encoded)[1] == long
