"""Documents to one flat array of token ids that knows where words and sentences start.

A text is tokenized whole, also where it is cut into sentences afterwards: byte-level tokenizers write a word after a
space in another way than at the start of a text, and sentences tokenized one by one would all start like texts. Where
words start is kept (a byte per token), for asking the tokenizer again in every epoch would cost more than the masking.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import regex

from dqbart.data.batches import progress_bar
from dqbart.data.sentences import split_sentences

_CHUNK = 1000  # texts per tokenizer call
# Where a part of a text starts: at white space, which belongs to what follows; at characters of scripts written without
# spaces, and behind them. Some tokenizers take a whole line, or all that stands between spaces, for one word.
_PART = regex.compile(r"(?<=\S)(?:\s|[{0}])|(?<=[{0}]\p{{M}}*)[^\s\p{{M}}]".format(
    r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
))  # fmt: skip


@dataclass(frozen=True)
class DocumentTokens:
    """All documents' tokens, one after the other; the starts are 1 where a word or a sentence starts, else 0.

    `documents` are first token and one past the last; documents without tokens are left out.
    """

    ids_T: np.ndarray
    word_starts_T: np.ndarray | None
    sentence_starts_T: np.ndarray | None
    documents: list[tuple[int, int]]

    @classmethod
    def of(
        cls, tokenizer: Any, documents: Sequence[Sequence[str]], *, words: bool, sentences: bool, progress: bool
    ) -> "DocumentTokens":
        """Tokenize without special tokens. Raises `ValueError` for starts that the tokenizer can't tell."""
        texts = [text for document in documents for text in document]
        if (words or sentences) and not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} is written in Python and doesn't say where its tokens stand in the text, "
                "which the masking of words and pairs of sentences need; use single tokens and one segment"
            )
        parts: list[np.ndarray] = [np.empty(0, np.int32)]
        word_parts, sentence_parts = [np.empty(0, np.int8)], [np.empty(0, np.int8)]
        lengths: list[int] = []
        with progress_bar(len(texts), "texts to tokens", unit="text", enabled=progress) as bar:
            for start in range(0, len(texts), _CHUNK):
                chunk = texts[start : start + _CHUNK]
                # A "[MASK]" that somebody wrote stays text, where the vocabulary can spell it.
                encoded = tokenizer(chunk, add_special_tokens=False, split_special_tokens=True, verbose=False)
                rows = encoded["input_ids"]
                lengths += map(len, rows)
                parts.append(np.fromiter((i for row in rows for i in row), np.int32, sum(map(len, rows))))
                if words or sentences:
                    for text, encoding in zip(chunk, encoded.encodings, strict=True):
                        if words:
                            word_parts.append(_word_starts(text, encoding))
                        if sentences:
                            sentence_parts.append(_sentence_starts(text, encoding))
                bar.update(len(chunk))
        text_ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        borders = text_ends[np.concatenate([[0], np.cumsum([len(d) for d in documents], dtype=np.int64)])].tolist()
        return cls(
            np.concatenate(parts),
            np.concatenate(word_parts) if words else None,
            np.concatenate(sentence_parts) if sentences else None,
            [(start, end) for start, end in zip(borders, borders[1:], strict=False) if end > start],
        )

    def sentence_lengths(self, start: int, end: int) -> list[int]:
        """Tokens of every sentence between two tokens."""
        assert self.sentence_starts_T is not None
        borders = np.flatnonzero(self.sentence_starts_T[start:end])
        return np.diff(borders, append=end - start).tolist()


def _word_starts(text: str, encoding: Any) -> np.ndarray:
    """1 where another word of the tokenizer's, or another part of the text, starts."""
    parts = np.zeros(len(text) + 1, np.int64)
    parts[[match.start() for match in _PART.finditer(text)]] = 1
    part_T = np.cumsum(parts)[np.asarray([start for start, _ in encoding.offsets], np.int64)]
    word_T = np.asarray([-1 if word is None else word for word in encoding.word_ids], np.int64)
    return _changes(part_T) | _changes(word_T)


def _sentence_starts(text: str, encoding: Any) -> np.ndarray:
    """1 where another sentence starts; the white space before it belongs to it."""
    ends, end = [], 0
    for sentence in split_sentences(text):
        end = text.index(sentence, end) + len(sentence)
        ends.append(end)
    return _changes(np.searchsorted(ends[:-1], [start for start, _ in encoding.offsets], side="right"))


def _changes(values_T: np.ndarray) -> np.ndarray:
    """1 where a value differs from the one before it, and at the first."""
    return np.diff(values_T, prepend=-2).astype(bool).astype(np.int8)
