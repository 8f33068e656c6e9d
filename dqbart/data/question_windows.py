"""Questions to windows of token ids, labelled with the first and last token of the answer.

A context longer than the model is cut into overlapping windows, each with the whole question in front, so one question
gives several features. A window that does not hold the whole answer is labelled with its CLS position, and so are all
of a question without an answer (Devlin et al. 2019, section 4.3). The tokenizer's character offsets turn answers into
tokens, and predictions back into text, exactly. Searching the answer's own tokens in the context's was rejected: it
fails where a token crosses the edge of an answer. Offsets cost 8 bytes a token, and rule out slow tokenizers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from dqbart.data.batches import Collator, TokenRows, progress_bar
from dqbart.data.questions import Question

if TYPE_CHECKING:
    import torch

_CHUNK = 1000  # questions per tokenizer call


@dataclass(frozen=True)
class EncodedQuestions:
    """A map-style data set of features (F of them), one window each; windows of a question follow each other.

    Items are dicts: lists `input_ids`, `attention_mask`, `token_type_ids` where the tokenizer makes them, and numbers
    `start_positions`, `end_positions`. `question_F` is the index of a feature's question, `cls_F` its CLS position,
    `first_F` the position of its first context token; `char_starts[f]` and `char_ends[f]` are the characters of the
    context that its context tokens come from. `cut` counts questions cut short, `unseen` answers that no window holds
    whole. `str()` is a line to print.
    """

    input_ids: TokenRows
    token_types: TokenRows | None
    char_starts: TokenRows
    char_ends: TokenRows
    first_F: np.ndarray
    cls_F: np.ndarray
    question_F: np.ndarray
    start_F: np.ndarray
    end_F: np.ndarray
    questions: int
    cut: int
    unseen: int

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self.input_ids[index]
        item = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if self.token_types is not None:
            item["token_type_ids"] = self.token_types[index]
        return item | {"start_positions": int(self.start_F[index]), "end_positions": int(self.end_F[index])}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __str__(self) -> str:
        lengths_F = self.input_ids.lengths_R
        parts = [
            f"{self.questions:,} questions in {len(self):,} windows",
            f"tokens mean {lengths_F.mean():.1f}, longest {lengths_F.max()}",
            f"{self.cut:,} questions cut short",
        ]
        if self.unseen:
            parts.append(f"{self.unseen:,} answers in no window")
        return "; ".join(parts)


def encode_questions(
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    max_length: int = 384,
    stride: int = 128,
    max_question_length: int = 64,
    progress: bool = True,
) -> EncodedQuestions:
    """Windows of at most `max_length` tokens, special ones included; neighbours share `stride` context tokens.

    A question of more than `max_question_length` tokens is cut at its end; otherwise it stands whole in every window.
    Labels are those of the first answer. Raises `ValueError` for a tokenizer without offsets or without a CLS token, no
    questions, and lengths that leave no room for the context.
    """
    name = type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{name} gives no character offsets, which answers need; load a fast tokenizer")
    if tokenizer.cls_token_id not in tokenizer("a", "b")["input_ids"]:
        raise ValueError(f"{name} puts no CLS token, which stands for 'no answer'; use an encoder's tokenizer")
    if not questions:
        raise ValueError("no questions to encode; expected at least one")
    special = tokenizer.num_special_tokens_to_add(pair=True)
    least = special + max_question_length + stride + 1
    if stride < 0 or max_question_length < 1 or max_length < least:
        raise ValueError(
            f"max_length {max_length}, stride {stride}, max_question_length {max_question_length}: expected at least 0 "
            f"and 1 for the last two, and for max_length both of them, {special} special tokens and 1, together {least}"
        )
    if max_length > tokenizer.model_max_length:
        raise ValueError(f"max_length {max_length}: {name} allows at most {tokenizer.model_max_length}; give no more")
    parts: dict[str, list[np.ndarray]] = {key: [] for key in ("ids", "types", "starts", "ends")}
    columns: list[tuple[int, ...]] = []
    cut = unseen = 0
    with progress_bar(len(questions), "questions to tokens", unit="question", enabled=progress) as bar:
        for begin in range(0, len(questions), _CHUNK):
            chunk = list(questions[begin : begin + _CHUNK])
            asked = _cut_questions(tokenizer, [question.question.strip() for question in chunk], max_question_length)
            cut += sum(short != question.question.strip() for short, question in zip(asked, chunk, strict=True))
            encoded = tokenizer(
                asked, [question.context for question in chunk], truncation="only_second", max_length=max_length,
                stride=stride, return_overflowing_tokens=True,
            )  # fmt: skip
            pairs = zip(encoded["overflow_to_sample_mapping"], encoded.encodings, strict=True)
            for index, group in groupby(pairs, key=lambda pair: pair[0]):
                windows = [_Window.of(encoding, tokenizer.cls_token_id) for _, encoding in group]
                labels = _labels(windows, chunk[index])
                unseen += bool(chunk[index].answers) and not any(labels)
                for window, label in zip(windows, labels, strict=True):
                    start, end = label or (window.cls, window.cls)
                    columns.append((window.first, window.cls, begin + index, start, end))
                    parts["ids"].append(window.ids)
                    parts["starts"].append(window.chars_N2[:, 0])
                    parts["ends"].append(window.chars_N2[:, 1])
                if "token_type_ids" in encoded:
                    parts["types"] += [window.types for window in windows]
            bar.update(len(chunk))
    first_F, cls_F, question_F, start_F, end_F = np.asarray(columns, np.int32).T
    return EncodedQuestions(
        _rows(parts["ids"]), _rows(parts["types"]) if parts["types"] else None, _rows(parts["starts"]),
        _rows(parts["ends"]), first_F, cls_F, question_F, start_F, end_F, len(questions), cut, unseen,
    )  # fmt: skip


def _rows(parts: list[np.ndarray]) -> TokenRows:
    return TokenRows(np.concatenate(parts), np.asarray([len(part) for part in parts]))


def _cut_questions(tokenizer: Any, texts: list[str], most: int) -> list[str]:
    """The texts, those of more than `most` tokens cut after as many."""
    texts = list(texts)
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)
    for index, encoding in enumerate(encoded.encodings):
        while len(encoding.ids) > most:  # again where the shorter text falls into more tokens, as subwords may
            end = min(encoding.offsets[most][0], len(texts[index]) - 1)  # a space's offset may begin after it
            texts[index] = texts[index][:end]
            encoding = tokenizer(texts[index], add_special_tokens=False, verbose=False).encodings[0]
    return texts


@dataclass(frozen=True)
class _Window:
    ids: np.ndarray
    types: np.ndarray
    cls: int
    first: int  # position of the first context token
    chars_N2: np.ndarray  # of its N context tokens

    @classmethod
    def of(cls, encoding: Any, cls_token_id: int) -> "_Window":
        sides = encoding.sequence_ids
        count = sides.count(1)
        first = sides.index(1) if count else 0
        chars_L2 = np.asarray(encoding.offsets, np.int32)
        ids, types = np.asarray(encoding.ids, np.int32), np.asarray(encoding.type_ids, np.int32)
        return cls(ids, types, encoding.ids.index(cls_token_id), first, chars_L2[first : first + count])


def _labels(windows: Sequence[_Window], question: Question) -> list[tuple[int, int] | None]:
    """Token positions (first, last) of the first answer in each window, None where it is not whole.

    Whole means: its outermost tokens among those of all windows. Comparing characters instead would lose answers whose
    first or last character the tokenizer drops.
    """
    if not question.answers:
        return [None] * len(windows)
    start, end = question.starts[0], question.starts[0] + len(question.answers[0])
    touched: list[tuple[int, int, int, int] | None] = []  # first and last token; first and last character
    for window in windows:
        inside_T = np.flatnonzero((window.chars_N2[:, 0] < end) & (window.chars_N2[:, 1] > start))
        if not len(inside_T):
            touched.append(None)
            continue
        first, last = int(inside_T[0]), int(inside_T[-1])
        left, right = int(window.chars_N2[first, 0]), int(window.chars_N2[last, 1])
        touched.append((window.first + first, window.first + last, left, right))
    found = [part for part in touched if part]
    edges = (min((part[2] for part in found), default=0), max((part[3] for part in found), default=0))
    return [part[:2] if part and part[2:] == edges else None for part in touched]


@dataclass(frozen=True)
class QuestionCollator(Collator):
    """Pads items of `EncodedQuestions` on the right.

    Gives int64 `input_ids`, `attention_mask` and, where items have them, `token_type_ids` `[B, L]`, and
    `start_positions`, `end_positions` `[B]`.
    """

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, "torch.Tensor"]:
        import torch

        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "token_type_ids": 0}
        batch = {key: self._pad([item[key] for item in items], fill[key]) for key in items[0] if key in fill}
        for key in ("start_positions", "end_positions"):
            batch[key] = torch.tensor([item[key] for item in items], dtype=torch.int64)
        return batch
