"""Documents to blocks of token ids, one segment each or two.

A block holds as much consecutive text of one document as fits, so that a batch is hardly padded and attention reaches
as far as the student will be used; it never reaches into the next document. Special tokens are put around a block when
it is asked for, which lets the two segments of a pair change places.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dqbart.data.batches import TokenRows
from dqbart.data.tokens import DocumentTokens

MIN_TOKENS = 8  # of text: what is left of a document below that is not worth a block


@dataclass(frozen=True)
class Frame:
    """The special tokens that a tokenizer puts before, between and behind one or two segments.

    `types` are the token types of special tokens and segments in turn, None where all are 0. They are the template's:
    transformers' ALBERT tokenizer has them there but leaves them out of what it returns.
    """

    specials: tuple[list[int], ...]
    types: tuple[int, ...] | None

    @classmethod
    def of(cls, tokenizer: Any, segments: int) -> "Frame":
        """Read off what `tokenizer` makes of single letters. Raises `ValueError` if it parts two texts by nothing."""
        probe = tokenizer(*["a"] * segments, return_special_tokens_mask=True, return_token_type_ids=True)
        ids, types = probe["input_ids"], probe["token_type_ids"]
        mask = "".join(map(str, probe["special_tokens_mask"]))
        found = re.fullmatch("(1*)0+(1*)" if segments == 1 else "(1*)0+(1+)0+(1*)", mask)
        if found is None:
            raise ValueError(
                f"{type(tokenizer).__name__} makes {ids} of {segments} texts 'a', with no special token between two; "
                "give it a post-processor that adds one"
            )
        groups = range(1, segments + 2)
        starts = [place for group in groups for place in found.span(group)][:-1]
        return cls(
            tuple(ids[slice(*found.span(group))] for group in groups),
            tuple(types[min(i, len(types) - 1)] for i in starts) if any(types) else None,
        )

    def around(self, segments: Sequence[list[int]], filler: int | None = None) -> list[int]:
        """Segments with special tokens around and between them; or with `filler` in the place of each."""
        return [token for part in self._parts(segments, filler) for token in part]

    def token_types(self, segments: Sequence[list[int]]) -> list[int]:
        """Token types, one per token of `around(segments)`."""
        assert self.types is not None
        return [kind for part, kind in zip(self._parts(segments), self.types, strict=True) for _ in part]

    def _parts(self, segments: Sequence[list[int]], filler: int | None = None) -> list[list[int]]:
        specials = [special if filler is None else [filler] * len(special) for special in self.specials]
        pairs = zip(specials, segments, strict=False)
        return [part for pair in pairs for part in pair] + specials[-1:]


@dataclass(frozen=True)
class EncodedBlocks:
    """A map-style data set of `{"input_ids", "attention_mask"}`, each a list; `str()` is a line to print.

    Pairs have `token_type_ids` where the tokenizer's template has token types; models without them, such as DistilBERT,
    must not be given them. Blocks made with `words=True` have `word_starts`: 1 where a token starts a word or is
    special, else 0.

    `rows` are the text's tokens, without special ones; `cuts_R` is where the second segment of a row starts; `counts_V`
    how often each token occurs in `rows`; `dropped` says what was left out.
    """

    rows: TokenRows
    starts: TokenRows | None
    cuts_R: np.ndarray | None
    counts_V: np.ndarray
    frame: Frame
    dropped: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.item(index)

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return (self[i] for i in range(len(self)))

    def item(self, index: int, *, swap: bool = False) -> dict[str, list[int]]:
        """Item `index`; with `swap` its second segment stands first. Raises `ValueError` if there is no second one."""
        segments = self._segments(self.rows, index, swap)
        ids = self.frame.around(segments)
        item = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if self.frame.types is not None:
            item["token_type_ids"] = self.frame.token_types(segments)
        if self.starts is not None:
            item["word_starts"] = self.frame.around(self._segments(self.starts, index, swap), filler=1)
        return item

    def _segments(self, rows: TokenRows, index: int, swap: bool) -> list[list[int]]:
        row = rows[index]
        if self.cuts_R is None:
            if swap:
                raise ValueError("blocks of one segment can't be swapped; make them with encode_pairs_of_segments")
            return [row]
        cut = int(self.cuts_R[index])
        return [row[cut:], row[:cut]] if swap else [row[:cut], row[cut:]]

    def __str__(self) -> str:
        mean, longest = self.rows.lengths_R.mean(), self.rows.lengths_R.max()
        kind = "blocks" if self.cuts_R is None else "pairs of segments"
        return f"{len(self):,} {kind}, text tokens mean {mean:.1f}, longest {longest}; {self.dropped}"


def encode_blocks(
    tokenizer: Any,
    documents: Sequence[Sequence[str]],
    max_length: int,
    *,
    words: bool = False,
    progress: bool = True,
) -> EncodedBlocks:
    """Cut the documents into blocks of `max_length` tokens, special ones included.

    The rest of a document is a shorter block, and dropped if it has fewer than 8 tokens of text; a document that is
    short altogether is kept. Raises `ValueError` for a `max_length` without room for 8 tokens of text, for no text, and
    for `words` with a tokenizer that doesn't say where words are.
    """
    frame = Frame.of(tokenizer, segments=1)
    room = _room(max_length, frame)
    tokens = DocumentTokens.of(tokenizer, documents, words=words, sentences=False, progress=progress)
    kept_T = np.ones(len(tokens.ids_T), bool)
    lengths: list[int] = []
    dropped = 0
    for start, end in tokens.documents:
        full, rest = divmod(end - start, room)
        lengths += [room] * full
        if rest and (rest >= MIN_TOKENS or not full):
            lengths.append(rest)
        elif rest:
            kept_T[end - rest : end] = False
            dropped += 1
    said = f"{dropped:,} ends of documents below {MIN_TOKENS} tokens dropped"
    return _blocks(tokens, kept_T, lengths, None, frame, said)


def encode_pairs_of_segments(
    tokenizer: Any,
    documents: Sequence[Sequence[str]],
    max_length: int,
    *,
    words: bool = False,
    seed: int = 28,
    progress: bool = True,
) -> EncodedBlocks:
    """Cut the documents into pairs of consecutive segments, up to `max_length` tokens with special ones.

    A pair is as many sentences as fit, parted at a random one of the borders between them (BERT's and ALBERT's data,
    TinyBERT's general stage); both halves always come from one place of one document. A sentence longer than half the
    room is cut. Left out and counted: documents of fewer than two sentences, and what remains of a document if it is
    one sentence or fewer than 8 tokens. Raises `ValueError` as `encode_blocks` does, and if no document gives a pair.
    """
    frame = Frame.of(tokenizer, segments=2)
    room = _room(max_length, frame)
    tokens = DocumentTokens.of(tokenizer, documents, words=words, sentences=True, progress=progress)
    draw = np.random.default_rng(seed)
    kept_T = np.ones(len(tokens.ids_T), bool)
    lengths: list[int] = []
    cuts: list[int] = []
    short, ends = 0, 0
    for start, end in tokens.documents:
        sentences = tokens.sentence_lengths(start, end)
        if len(sentences) < 2:
            kept_T[start:end] = False
            short += 1
            continue
        for chunk in _chunks(sentences, room):
            if len(chunk) < 2 or sum(chunk) < MIN_TOKENS:
                kept_T[start : start + sum(chunk)] = False
                ends += 1
            else:
                lengths.append(sum(chunk))
                cuts.append(sum(chunk[: draw.integers(1, len(chunk))]))
            start += sum(chunk)
    said = f"left out: {short:,} documents of fewer than two sentences, {ends:,} ends of documents"
    return _blocks(tokens, kept_T, lengths, np.asarray(cuts), frame, said)


def _chunks(sentences: list[int], room: int) -> Iterator[list[int]]:
    """Lengths of sentences, grouped to at most `room`; only the last group may have less than two."""
    chunk: list[int] = []
    half = room // 2
    for sentence in sentences:
        for piece in [half] * (sentence // half) + [sentence % half] * (sentence % half > 0):
            if sum(chunk) + piece > room:
                yield chunk
                chunk = []
            chunk.append(piece)
    yield chunk


def _room(max_length: int, frame: Frame) -> int:
    special = sum(map(len, frame.specials))
    if max_length < special + MIN_TOKENS:
        raise ValueError(
            f"max_length {max_length!r}: expected at least {special + MIN_TOKENS}, {special} special tokens and "
            f"{MIN_TOKENS} of text"
        )
    return max_length - special


def _blocks(
    tokens: DocumentTokens, kept_T: np.ndarray, lengths: list[int], cuts_R: np.ndarray | None, frame: Frame, said: str
) -> EncodedBlocks:
    if not lengths:
        raise ValueError(f"no text to train on is left of {len(tokens.documents)} documents; {said}")
    ids_T, lengths_R = tokens.ids_T[kept_T], np.asarray(lengths)
    starts = None if tokens.word_starts_T is None else TokenRows(tokens.word_starts_T[kept_T], lengths_R)
    return EncodedBlocks(TokenRows(ids_T, lengths_R), starts, cuts_R, np.bincount(ids_T), frame, said)
