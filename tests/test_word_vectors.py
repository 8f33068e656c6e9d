"""Word vectors, of a file or of a model's own embeddings."""

from pathlib import Path

import pytest
import torch
from masking_tokenizers import ENGLISH, bert_tokenizer
from tiny_models import tiny_encoder

from dqbart.data.word_vectors import EmbeddingVectors, read_word_vectors

TABLE = "cat 1 0 0\nDog 9 1 0\nriver 0 1 0\nnew york 0 .9 .2\nnull 0 0 0\ncats -1 0 0\ncat 0 0 1\n"


def vectors_file(tmp_path: Path, text: str | bytes) -> Path:
    file = tmp_path / "vectors.txt"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def test_neighbours_by_cosine(tmp_path: Path) -> None:
    vectors = read_word_vectors(vectors_file(tmp_path, TABLE))
    assert vectors.neighbours("cat", 1) == ["Dog"] == vectors.neighbours("CAT", 1)  # the first "cat" counts
    assert vectors.neighbours("cat", 99) == ["Dog", "river", "new york", "null", "cats"]
    assert vectors.neighbours("river", 2) == ["new york", "Dog"]
    assert vectors.neighbours("dog", 3) == []  # no such word in any case that is looked up
    assert vectors.neighbours("Dog", 1) == ["cat"]
    assert vectors.neighbours("unheard", 3) == [] == vectors.neighbours("cat", 0)


@pytest.mark.parametrize("header", ["", "7 3\n", "7 3 \r\n"])
def test_a_header_and_other_line_ends_are_tolerated(header: str, tmp_path: Path) -> None:
    vectors = read_word_vectors(vectors_file(tmp_path, header + TABLE.replace("\n", " \r\n")))
    assert vectors.words == ["cat", "Dog", "river", "new york", "null", "cats", "cat"]


def test_only_the_first_words_are_read(tmp_path: Path) -> None:
    file = vectors_file(tmp_path, "3 2\na 1 2\nb 3 4\nc damaged")
    assert read_word_vectors(file, limit=2).words == ["a", "b"]
    with pytest.raises(ValueError, match=r"vectors\.txt line 4"):
        read_word_vectors(file)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "cat 1 2\ndog 1 x\n",
            "line 2: could not convert string to float: 'x'; expected UTF-8, a word and its numbers",
        ),
        ("cat 1 2\ndog 1\n", "line 2"),
        ("cat 1 2\n\ndog 1 2", "line 2"),
        ("cat 1 2\n1 2\n", "line 2: expected a word and 2 finite numbers"),
        ("cat 1 nan\n", "line 1: expected a word and 2 finite numbers"),
        ("cat 1 2\ndog 1 inf\n", "line 2: expected a word and 2 finite numbers"),
        ("cat\n", "line 1"),
        ("cat\t1\t2\n", "line 1"),
        (b"cat 1 2\nd\xff\xfe 1 2\n", "line 2: 'utf-8' codec"),
        ("", "no word vectors"),
        ("5 300\n", "no word vectors"),
    ],
)
def test_damaged_vectors_are_refused_with_their_line(text: str | bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        read_word_vectors(vectors_file(tmp_path, text))
    assert words in str(error.value) and "vectors.txt" in str(error.value) and "\n" not in str(error.value)


def test_missing_vectors_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.txt': no such file; expected"):
        read_word_vectors(tmp_path / "nowhere.txt")


def test_a_split_word_is_the_mean_of_its_pieces() -> None:
    tokenizer, model = bert_tokenizer(), tiny_encoder("bert")
    vectors = EmbeddingVectors(model, tokenizer)
    assert set(ENGLISH.split()) < set(vectors.words) and not {"##s", "[MASK]", ".", "中"} & set(vectors.words)
    table = model.get_input_embeddings().weight.detach()
    ids = tokenizer.convert_tokens_to_ids(["cat", "##s"])
    cosine = torch.cosine_similarity(table[ids].mean(0)[None], table).tolist()
    expected = sorted(vectors.words, key=lambda word: -cosine[tokenizer.convert_tokens_to_ids(word)])
    # "cat" is a part of the word, as are "a" and the letters; near, but no other word
    assert vectors.neighbours("Cats", 5) == [word for word in expected if word not in "cats"][:5]
    assert vectors.neighbours("xyz", 5) == []  # unknown


def test_vectors_need_the_model_s_own_tokenizer() -> None:
    model = tiny_encoder("bert")
    model.resize_token_embeddings(20)
    with pytest.raises(
        ValueError, match="the tokenizer has .. pieces, the model 20 embeddings; expected the model's own"
    ):
        EmbeddingVectors(model, bert_tokenizer())
