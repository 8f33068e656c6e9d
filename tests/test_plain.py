"""Plain text to documents, and documents to blocks of tokens."""

import gzip
import json
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer, SentencePieceUnigramTokenizer
from tokenizers import Tokenizer as InnerTokenizer
from tokenizers import models as inner_models
from transformers import (
    AlbertTokenizer,
    BertTokenizer,
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    XLMRobertaTokenizer,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from dqbart.data.blocks import MIN_TOKENS, EncodedBlocks, encode_blocks, encode_pairs_of_segments
from dqbart.data.files import load_rows
from dqbart.data.plain import read_texts
from dqbart.data.tokens import DocumentTokens

BOOKS = Path(__file__).parents[2] / "shared" / "data" / "text-books"
needs_books = pytest.mark.skipif(not BOOKS.is_dir(), reason="shared/data/text-books is not here")

LINES = ["the cat's house, unbelievable! Yes. the dog sat.", "我喜欢猫和GPT4很好 中国 人", "แมว ดี"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@cache
def bert() -> Any:
    """Words w0 to w99 are one token each; other words are spelt, `c ##a ##t`."""
    signs = [*LETTERS, *(f"##{sign}" for sign in LETTERS + "0123456789"), *".,!?'", "我", "喜", "猫"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *signs, *(f"w{i}" for i in range(100))]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


@cache
def roberta() -> Any:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(LINES * 3, vocab_size=320, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    model = json.loads(bpe.to_str())["model"]
    return RobertaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


@cache
def unigram(kind: Any) -> Any:
    inner = SentencePieceUnigramTokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    inner.train_from_iterator(LINES * 3, vocab_size=90, special_tokens=special, unk_token="<unk>")
    pieces = [(piece, score) for piece, score in json.loads(inner.to_str())["model"]["vocab"]]
    if kind is AlbertTokenizer:
        pieces = [(word, 0.0) for word in ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")] + pieces[5:]
    return kind(vocab=pieces)


TOKENIZERS = {
    "bert": bert,
    "roberta": roberta,
    "xlm-roberta": lambda: unigram(XLMRobertaTokenizer),
    "albert": lambda: unigram(AlbertTokenizer),
}


def numbered(counts: list[int]) -> list[list[str]]:
    """Documents of so many tokens each, no token twice within a hundred; one text holds up to five of them."""
    words = iter(f"w{i % 100}" for i in range(sum(counts)))
    return [[" ".join(next(words) for _ in range(min(5, n - i))) for i in range(0, n, 5)] for n in counts]


def text_of(tokenizer: Any, document: list[str]) -> list[int]:
    return [i for text in document for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


# --- files and rows


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "A.TXT"])
def test_blank_lines_part_documents(tmp_path: Path, name: str) -> None:
    content = "\ufeff\n \none\u2028still one \r\n two\r\n\r\n\t\n中文\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    texts = read_texts(tmp_path / name)
    assert texts.documents == [["one\u2028still one", "two"], ["中文"]]
    assert str(texts).startswith("2 documents, 3 texts; text column 'text', documents by 'doc' (guessed")
    assert [row["text"] for row in load_rows(tmp_path / name)] == [
        "one\u2028still one",
        "two",
        "中文",
    ]  # for other tasks
    assert read_texts(str(tmp_path / name), "validation") == texts  # one file has no splits


def test_rows_of_one_document_stand_together(tmp_path: Path) -> None:
    rows = [
        {"doc": "A", "text": "1"}, {"doc": "A", "text": ""}, {"doc": "A", "text": "2"}, {"doc": "B", "text": "3"},
        {"doc": "A", "text": "4"}, {"doc": None, "text": "5"}, {"doc": None, "text": "6"}, {"doc": 7, "text": " "},
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = read_texts(tmp_path / "a.jsonl")
    assert texts.documents == [["1", "2"], ["3"], ["4"], ["5"], ["6"]]
    assert texts.skipped == 2 and len(texts) == 5
    assert str(texts) == (
        "5 documents, 6 texts; text column 'text', documents by 'doc' (guessed; change with --source-column); "
        "2 empty rows left out"
    )


@pytest.mark.parametrize(
    ("row", "text", "document"),
    [
        ({"text": "x"}, "text", None),
        ({"Title": "t", "Content": "x"}, "Content", "Title"),
        ({"document": 3, "text": "x"}, "text", "document"),
        ({"document": "x", "id": 3}, "document", "id"),  # the text itself is not its name
        ({"summary": "s", "document": "x"}, "document", None),
        ({"label": 1, "utterance": "x"}, "utterance", None),  # the only text
        ({"meta": {"title": "t"}, "sentence": "x"}, "sentence", None),
    ],
)
def test_columns_are_guessed(row: dict[str, Any], text: str, document: str | None) -> None:
    texts = read_texts([row, row])
    assert (texts.text_column, texts.document_column, texts.guessed) == (text, document, True)
    assert texts.documents == ([["x", "x"]] if document else [["x"], ["x"]])


def test_columns_can_be_given() -> None:
    rows = [{"meta": {"title": "t"}, "text": "no", "b": "x"}, {"meta": {"title": "t"}, "text": "no", "b": "y"}]
    texts = read_texts(rows, column="b", document_column="meta.title")
    assert texts.documents == [["x", "y"]] and not texts.guessed
    assert "(guessed" not in str(texts)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.txt", b" \n\n", "a.txt: there are no rows in it"),
        ("a.txt", b"one\n\xff\n", "a.txt line 2: not UTF-8"),
        ("a.txt.gz", b"one\n", "a.txt.gz: not a whole gzip file"),
        ("a.txt.gz", gzip.compress(b"one\n" * 50, mtime=0)[:-9], "a.txt.gz: not a whole gzip file"),
        ("a.md", b"one\n", "a.md: unknown kind of file '.md'"),
        ("a.jsonl", b'{"text": 3}\n', "no source column recognised among 'text'; give --source-column"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', "row 2: column 'text' holds int, expected text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "row 1: column 'text' has half a surrogate pair"),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', None),
        ("a.csv", b"text,doc\n,1\n ,2\n", "no source column recognised|all 2 rows are empty there"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, words: str | None) -> None:
    (tmp_path / name).write_bytes(content)
    if words is None:
        assert read_texts(tmp_path / name).documents == [["x"]]
        return
    with pytest.raises(ValueError, match=words) as error:
        read_texts(tmp_path / name)
    assert "\n" not in str(error.value)


def test_bad_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_texts(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="column 'body' .* which has 'text', 'doc'"):
        read_texts(tmp_path / "a.txt", column="body")
    rows = [{"text": "x", "doc": "d"}]
    with pytest.raises(ValueError, match="column 'texts' .* which has 'text', 'doc'; did you mean 'text'?"):
        read_texts(rows, column="texts")
    for wrong in ("docs", "text"):
        with pytest.raises(ValueError, match=f"document column '{wrong}': expected one of 'text', 'doc', but not the"):
            read_texts(rows, document_column=wrong)
    with pytest.raises(ValueError, match="column 'text': all 1 rows are empty there"):
        read_texts([{"text": " "}], column="text")


# --- blocks


@pytest.mark.parametrize("max_length", [10, 11, 32, 500])
def test_blocks_never_cross_a_document(max_length: int) -> None:
    draw = np.random.default_rng(max_length)
    documents = numbered([int(n) for n in draw.integers(0, 80, 60)])
    room = max_length - 2
    blocks = encode_blocks(bert(), documents, max_length, progress=False)
    rows = iter(blocks)
    for document in documents:
        ids = text_of(bert(), document)
        while ids and (len(ids) >= MIN_TOKENS or len(ids) == len(text_of(bert(), document))):
            item = next(rows)
            assert item["input_ids"] == [2, *ids[:room], 3]
            assert item["attention_mask"] == [1] * len(item["input_ids"])
            ids = ids[room:]
    assert next(rows, None) is None
    assert blocks.rows[0] == blocks[0]["input_ids"][1:-1] and blocks.rows._flat_T.dtype == np.int32
    assert blocks.counts_V.sum() == blocks.rows.lengths_R.sum()


def test_ends_below_eight_tokens_are_dropped_and_short_documents_kept() -> None:
    blocks = encode_blocks(bert(), numbered([27, 28, 3, 0, 20]), 22, progress=False)
    assert [len(item["input_ids"]) - 2 for item in blocks] == [20, 20, 8, 3, 20]
    assert str(blocks) == ("5 blocks, text tokens mean 14.2, longest 20; 1 ends of documents below 8 tokens dropped")
    with pytest.raises(ValueError, match="blocks of one segment can't be swapped; make them with encode_pairs"):
        blocks.item(0, swap=True)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_special_tokens_are_the_tokenizers_own(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    item = encode_blocks(tokenizer, [[LINES[0]]], 500, progress=False)[0]
    assert item == {key: value for key, value in tokenizer(LINES[0]).items() if key in item}
    assert item.keys() == {"input_ids", "attention_mask"}

    pair = encode_pairs_of_segments(tokenizer, [["The cat sat here. The dog"]], 500, progress=False)[0]
    expected = tokenizer("The cat sat here.", " The dog", return_token_type_ids=True)
    assert pair["input_ids"] == expected["input_ids"]
    assert pair["attention_mask"] == expected["attention_mask"]
    if any(expected["token_type_ids"]):  # ALBERT's too, which its tokenizer keeps to itself
        assert kind in ("bert", "albert") and pair["token_type_ids"] == expected["token_type_ids"]
    else:
        assert kind in ("roberta", "xlm-roberta") and "token_type_ids" not in pair


def test_trainers_grouping_by_length_reads_the_blocks() -> None:
    blocks = encode_blocks(bert(), numbered([9, 30, 12, 55]), 22, progress=False)
    sampler = LengthGroupedSampler(2, blocks)  # type: ignore[arg-type]
    assert sampler.lengths == [len(item["input_ids"]) for item in blocks]
    assert sorted(sampler) == list(range(len(blocks)))
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_special_tokens_in_a_text_stay_text() -> None:
    ids = encode_blocks(bert(), [["[MASK] [SEP] cat"]], 30, progress=False).rows[0]
    assert not {2, 3, 4} & set(ids) and bert()("[MASK]", add_special_tokens=False)["input_ids"] == [4]


def words_of(tokenizer: Any, text: str) -> list[str]:
    blocks = encode_blocks(tokenizer, [[text]], 500, words=True, progress=False)
    item = blocks[0]
    assert item["word_starts"][0] == item["word_starts"][-1] == 1  # special tokens
    assert len(item["word_starts"]) == len(item["input_ids"])
    words: list[list[int]] = []
    for token, start in zip(blocks.rows[0], item["word_starts"][1:-1], strict=True):
        words += [[]] * start
        words[-1] = [*words[-1], token]
    return [tokenizer.decode(word).strip().replace(" ##", "").replace("##", "") for word in words]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_words(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    words = words_of(tokenizer, "the cat sat, the dog sat.")
    if kind in ("bert", "roberta"):
        assert words == ["the", "cat", "sat", ",", "the", "dog", "sat", "."]
    else:  # as their models' authors have it: what stands between spaces
        assert words == ["the", "cat", "sat,", "the", "dog", "sat."]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_chinese_characters_are_words(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    if kind == "roberta":  # the one trained on three lines merges bytes of neighbouring characters
        tokenizer = RobertaTokenizer(vocab=tokenizer.get_vocab(), merges=[])
    text = "我喜猫" if kind == "bert" else "我喜欢猫和很好 中国 人"
    blocks = encode_blocks(tokenizer, [[text]], 500, words=True, progress=False)
    starts, offsets = blocks.starts, tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert starts is not None
    spans = offsets["offset_mapping"]
    firsts = [i for i, start in enumerate(starts[0]) if start]
    for begin, end in zip(firsts, [*firsts[1:], len(spans)], strict=True):
        covered = text[spans[begin][0] : spans[end - 1][1]].strip()
        # One character, in however many pieces of bytes it comes; or one token of several characters.
        assert len(covered) == 1 or end - begin == 1
    assert len(firsts) > 2 and (kind != "roberta" or len(spans) > 3 * len(firsts))


def test_words_of_a_tokenizer_that_takes_a_line_for_one() -> None:
    inner = InnerTokenizer(inner_models.BPE(vocab={"<m>": 0, " ": 1, "a": 2, "b": 3}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, mask_token="<m>")
    encoding = tokenizer("ab a", add_special_tokens=False).encodings[0]
    assert set(encoding.word_ids) == {0}
    tokens = DocumentTokens.of(tokenizer, [["ab a", "b"]], words=True, sentences=False, progress=False)
    assert tokens.ids_T.tolist() == [2, 3, 1, 2, 3]
    assert tokens.word_starts_T is not None and tokens.word_starts_T.tolist() == [1, 0, 1, 0, 1]


def test_what_cannot_be_encoded() -> None:
    with pytest.raises(ValueError, match="max_length 9: expected at least 10, 2 special tokens and 8 of text"):
        encode_blocks(bert(), [["cat"]], 9, progress=False)
    with pytest.raises(ValueError, match="max_length 11: expected at least 12, 4 special tokens and 8 of text"):
        encode_pairs_of_segments(roberta(), [["cat"]], 11, progress=False)
    for documents in ([], [[]], [[""], [" "]]):
        with pytest.raises(ValueError, match="no text to train on is left of 0 documents"):
            encode_blocks(bert(), documents, 32, progress=False)
    slow = ByT5Tokenizer()
    assert len(encode_blocks(slow, [["some text"]], 32, progress=False)) == 1
    with pytest.raises(ValueError, match="ByT5Tokenizer is written in Python and doesn't say where its tokens"):
        encode_blocks(slow, [["some text"]], 32, words=True, progress=False)
    inner = InnerTokenizer(inner_models.BPE(vocab={"a": 0}, merges=[]))
    bare = PreTrainedTokenizerFast(tokenizer_object=inner)
    assert encode_blocks(bare, [["aaa"]], 32, progress=False)[0]["input_ids"] == [0, 0, 0]
    with pytest.raises(ValueError, match=r"makes \[0, 0\] of 2 texts 'a', with no special token between two"):
        encode_pairs_of_segments(bare, [["a. A."]], 32, progress=False)


@needs_books
def test_real_books() -> None:
    texts = read_texts(BOOKS, "test")
    rows = [json.loads(line) for line in gzip.open(BOOKS / "test.jsonl.gz", "rt", encoding="utf-8")]
    assert [[row["text"] for row in group] for _, group in groupby(rows, lambda row: row["doc"])] == texts.documents
    documents = [document[:3] for document in texts.documents]
    blocks: EncodedBlocks = encode_blocks(bert(), documents, 128, words=True, progress=False)
    assert blocks.rows.lengths_R.max() == 126 and len(blocks) > len(documents)
    assert blocks.starts is not None
    for row, starts in zip(blocks.rows, blocks.starts, strict=True):
        pieces = bert().convert_ids_to_tokens(row)
        assert all(piece.startswith("##") != bool(start) for piece, start in zip(pieces[1:], starts[1:], strict=True))
