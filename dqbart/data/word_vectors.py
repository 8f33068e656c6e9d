"""Words of similar meaning, by the cosine of word vectors: from a text file, or from a model's embedding matrix.

Problem: a word that the tokenizer splits can't be guessed by a masked language model in one mask. TinyBERT (arXiv
1909.10351, section 3.2 and algorithm 1) takes the word's nearest neighbours in GloVe instead. Not everybody has vectors
of their language at hand, so the model's own input embeddings serve as well: the mean of a word's pieces is its vector,
and whole-word pieces are its neighbours. Rejected: products of many words at once, quicker, whose rounding would make a
word's neighbours depend on its company.

Shape suffixes: V words, D width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dqbart.data.words import PieceWords

_SPARE = 16  # the word's other spellings and its parts may be among its nearest


class WordVectors:
    """Words and their vectors [V, D]; finds the nearest of a word by cosine."""

    def __init__(self, words: Sequence[str], vectors_VD: np.ndarray) -> None:
        self.words = list(words)
        norms_V1 = np.linalg.norm(vectors_VD, axis=1, keepdims=True)
        self._unit_VD = vectors_VD / np.maximum(norms_V1, 1e-12)  # a zero vector is near to nothing
        self._row = {word: row for row, word in reversed(list(enumerate(self.words)))}  # the first of doubles counts
        self._found: dict[tuple[str, int], list[str]] = {}

    def neighbours(self, word: str, count: int) -> list[str]:
        """At most `count` words, nearest first, without `word` in any case; none if it has no vector."""
        key = (word, count)
        if key not in self._found:
            self._found[key] = self._search(word, count)
        return self._found[key]

    def _search(self, word: str, count: int) -> list[str]:
        vector_D = self._vector(word)
        if vector_D is None or not self.words:
            return []
        scores_V = self._unit_VD @ vector_D
        take = min(count + _SPARE, len(self.words))
        nearest = np.argpartition(-scores_V, take - 1)[:take]
        names = [self.words[row] for row in sorted(nearest, key=lambda row: (-scores_V[row], row))]
        return [name for name in names if not self._same(name.lower(), word.lower())][:count]

    def _vector(self, word: str) -> np.ndarray | None:
        row = self._row.get(word, self._row.get(word.lower()))
        return None if row is None else self._unit_VD[row]

    def _same(self, name: str, word: str) -> bool:
        """Whether `name`, though near, says nothing new; both lower-cased."""
        return name == word


class EmbeddingVectors(WordVectors):
    """Vectors of whole-word pieces from a model's input embeddings; any word's is the mean of its pieces'.

    A word with an unknown piece has none. Parts of a word are not its neighbours: of "embeddings", "em" would be the
    nearest. Raises `ValueError` where the tokenizer has more pieces than the matrix has rows.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._table_PD = model.get_input_embeddings().weight.detach().float().cpu().numpy()
        if len(tokenizer) > len(self._table_PD):
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} pieces, the model {len(self._table_PD)} embeddings; "
                "expected the model's own tokenizer"
            )
        pieces = PieceWords(tokenizer)
        found = [(piece, pieces[piece]) for piece in range(len(tokenizer))]
        words = {piece: word.text for piece, word in found if word is not None and word.spaced}
        super().__init__(list(words.values()), self._table_PD[list(words)])

    def _vector(self, word: str) -> np.ndarray | None:
        spellings = self._tokenizer([f" {word}", f" {word.lower()}"], add_special_tokens=False)["input_ids"]
        ids = min(spellings, key=len)  # "HELLO" may be in letters, "hello" whole
        return None if not ids or self._tokenizer.unk_token_id in ids else self._table_PD[ids].mean(0)

    def _same(self, name: str, word: str) -> bool:
        return name in word


def read_word_vectors(path: str | Path, *, limit: int = 100_000) -> WordVectors:
    """The first `limit` words of a text file: a word and its numbers on each line, separated by single spaces.

    That is GloVe's format, and word2vec's and fastText's with their first line, "words width", which is passed over.
    The first word's line sets the width, so later words may hold spaces. Raises `FileNotFoundError`, and `ValueError`
    with file and line for what is not UTF-8, not numbers, not finite or of another width.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"word vectors {str(path)!r}: no such file; expected one such as glove.6B.300d.txt")
    words: list[str] = []
    vectors: list[np.ndarray] = []
    width = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if len(words) == limit:
                break
            try:
                fields = line.decode("utf-8").rstrip("\r\n ").split(" ")
                if number == 1 and len(fields) == 2 and all(field.isdigit() for field in fields):
                    continue
                width = width or len(fields) - 1
                word, vector_D = " ".join(fields[:-width]), np.array(fields[-width:], np.float32)
            except ValueError as error:
                raise ValueError(f"{path} line {number}: {error}; expected UTF-8, a word and its numbers") from None
            if not word or len(vector_D) != width or not np.isfinite(vector_D).all():
                raise ValueError(f"{path} line {number}: expected a word and {width or 'its'} finite numbers")
            words.append(word)
            vectors.append(vector_D)
    if not words:
        raise ValueError(f"{path}: no word vectors; expected a word and its numbers on each line")
    return WordVectors(words, np.stack(vectors))
