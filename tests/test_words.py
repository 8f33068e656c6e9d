"""Words of a text, in any script: where they are, what they look like, which tokens are whole ones."""

import unicodedata
from collections.abc import Sequence

import pytest
from masking_tokenizers import TOKENIZERS

from dqbart.data.words import PieceWords, find_words, match_case, stop_words


def words_of(text: str, offsets: Sequence[tuple[int, int]] | None = None) -> list[str]:
    if offsets is None:
        offsets = [(i, i + 1) for i in range(len(text))]
    return [text[word.start : word.end] for word in find_words(text, offsets)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("  \n\t", []),
        ("3.14 + 42 = ? 🙂 _", []),
        ("The cat, the DOG!", ["The", "cat", "the", "DOG"]),
        ("covid19 19covid a_b x2y B2B mp3s", []),
        ("don't John’s l'eau", ["don", "t", "John", "s", "l", "eau"]),
        ("well-known (hello)end", ["well", "known", "hello", "end"]),
        ("naïve " + unicodedata.normalize("NFD", "naïve"), ["naïve", unicodedata.normalize("NFD", "naïve")]),
        ("हिन्दी में می\u200cخواهم", ["हिन्दी", "में", "می\u200cخواهم"]),
        ("한국어 텍스트", ["한국어", "텍스트"]),
        ("我用Python3写Java。2023年", ["我", "用", "写", "Java", "年"]),
        ("中\u3000国、人", ["中", "国", "人"]),
        ("時々コーヒー", list("時々コーヒー")),
    ],
)
def test_words_are_runs_of_letters(text: str, expected: list[str]) -> None:
    assert words_of(text) == expected


def test_without_spaces_the_pieces_are_words() -> None:
    text = "我喜欢北京。你好"
    assert words_of(text, [(0, 1), (1, 3), (3, 5), (5, 6), (6, 8)]) == ["我", "喜欢", "北京", "你好"]
    assert words_of(text, [(0, 1), (1, 3), (3, 6), (6, 8)]) == ["我", "喜欢", "你好"]  # "北京。" is more than letters
    assert words_of("สวัสดีครับ", [(0, 6), (6, 10)]) == ["สวัสดี", "ครับ"]
    # a lone "▁" over the first character, bytes of one character: one word, one mask
    (word,) = find_words("我们", [(0, 1), (0, 2)])
    assert word[:4] == (0, 2, 0, 2) and word.whole and not word.spaced
    assert [w[:4] for w in find_words("我们人", [(0, 2), (1, 3)])] == [(0, 3, 0, 2)]
    assert [w[:4] for w in find_words("我们", [(0, 1), (0, 1), (1, 2), (1, 2)])] == [(0, 1, 0, 2), (1, 2, 2, 4)]


def test_a_spaced_word_is_whole_if_it_is_one_token() -> None:
    text = "a cats (dog) x"
    found = find_words(text, [(0, 1), (1, 5), (5, 6), (7, 11), (11, 12), (12, 14)])  # " cat" covers its space
    assert [(text[w.start : w.end], w.whole, w.first, w.last) for w in found] == [
        ("a", True, 0, 1),
        ("cats", False, 1, 3),
        ("dog", False, 3, 4),
        ("x", True, 5, 6),
    ]  # fmt: skip  ("dog)" is one token, but more than the word)


@pytest.mark.parametrize(
    ("word", "like", "expected"),
    [
        ("Dog", "cat", "dog"),
        ("dog", "Cat", "Dog"),
        ("dog", "CAT", "DOG"),
        ("dog", "A", "Dog"),
        ("dog", "iPhone", "dog"),
        ("USA", "Cat", "USA"),
        ("国", "我", "国"),
        ("élan", "Été", "Élan"),
        ("", "Cat", ""),
    ],
)
def test_match_case(word: str, like: str, expected: str) -> None:
    assert match_case(word, like) == expected


@pytest.mark.parametrize(
    ("kind", "words", "others"),
    [
        ("bert", {"cat": "cat", "un": "un", "中": "中"}, ["##s", "##ing", "##中", "[MASK]", "[UNK]", ".", "1", "。"]),
        ("roberta", {"Ġcat": "cat", "Ġhouse": "house"}, ["the", "c", "Ġ", "<mask>", ".", "å"]),
        (
            "xlm-roberta",
            {"▁cat": "cat", "▁我": "我", "喜欢": "喜欢", "▁北京": "北京"},
            ["house", "s", "▁", "<s>", "人。"],
        ),
    ],
)
def test_which_pieces_are_words(kind: str, words: dict[str, str], others: list[str]) -> None:
    tokenizer = TOKENIZERS[kind]()
    pieces = PieceWords(tokenizer)
    for piece, text in words.items():
        found = pieces[tokenizer.convert_tokens_to_ids(piece)]
        assert found is not None and found.text == text and found.spaced == text.isascii()
    for piece in others:
        assert pieces[tokenizer.convert_tokens_to_ids(piece)] is None, piece
    assert pieces[len(tokenizer)] is None and pieces[10**6] is None  # a model's vocabulary may be padded


def test_a_special_token_of_letters_is_no_word() -> None:
    from transformers import BertTokenizer

    vocabulary = {piece: i for i, piece in enumerate(["[UNK]", "[PAD]", "[CLS]", "[SEP]", "blank", "cat", "a"])}
    pieces = PieceWords(BertTokenizer(vocab=vocabulary, mask_token="blank"))
    assert pieces[4] is None and pieces[5] == ("cat", True)


def test_pieces_that_mark_the_end_of_words() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: i for i, piece in enumerate(["a</w>", "c", "a", "t</w>", "ca", "cat</w>"])}
    inner = Tokenizer(models.BPE(vocabulary, [("c", "a"), ("ca", "t</w>")], end_of_word_suffix="</w>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    pieces = PieceWords(PreTrainedTokenizerFast(tokenizer_object=inner))
    assert [pieces[i] for i in range(6)] == [("a", True), None, None, ("t", True), None, ("cat", True)]


def test_stop_words() -> None:
    assert {"the", "don", "t", "s", "not"} <= stop_words("en") and "cat" not in stop_words("en")
    assert all(word == word.lower() for word in stop_words("en"))
    assert stop_words("de") == frozenset()
