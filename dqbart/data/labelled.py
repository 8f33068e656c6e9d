"""Labelled texts: one text or a pair, with a class or a number, to be read, encoded and padded.

Columns are guessed by the names of public sets, as `dqbart.data.columns` does for sources and targets: a known couple
of columns is a pair, otherwise there is one text. Guessing a pair from any two text columns, as the transformers
examples do, was rejected: a title or a user name would become half of the input. What labels mean is said in
`dqbart.data.labels`.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dqbart.data.batches import Collator, TokenRows, lengths_line, progress_bar
from dqbart.data.columns import VARIANT_OF, check_column, column_kinds, column_names, read_text, read_value
from dqbart.data.labels import SCORE_NAMES, ClassName, Kind, Label, Labels, read_labels

if TYPE_CHECKING:
    import torch

# Columns that belong together; in order of preference, as all names here.
PAIR_NAMES = (
    ("sentence1", "sentence2"), ("sentence_1", "sentence_2"), ("sentence_a", "sentence_b"), ("premise", "hypothesis"),
    ("question1", "question2"), ("text1", "text2"), ("text_1", "text_2"), ("text_a", "text_b"), ("claim", "evidence"),
    ("query", "passage"), ("query", "document"), ("question", "sentence"), ("question", "passage"), ("s1", "s2"),
)  # fmt: skip
TEXT_NAMES = (
    "sentence", "text", "content", "review", "review_body", "utterance", "tweet", "comment", "document", "query",
    "question", "body", "headline", "title", "sentence1", "premise", "question1",
)  # fmt: skip
LABEL_NAMES = (
    "label", "labels", "class", "intent", "category", "sentiment", "emotion", "topic", "target", "is_duplicate",
    "gold_label", "entailment_judgment", "stars", "rating", "polarity", *SCORE_NAMES, "label_text", "coarse_label",
)  # fmt: skip

_CHUNK = 1000  # texts per tokenizer call
_SHOWN = 5  # classes in a line


@dataclass(frozen=True)
class LabelColumns:
    """Columns in use; `a.b` is key b of the dict in column a. `str()` is a line to print."""

    text: str
    pair: str | None = None
    label: str | None = None
    guessed: bool = False

    def __str__(self) -> str:
        pair = f", pair {self.pair!r}" if self.pair else ""
        label = f", label {self.label!r}" if self.label else ", no label"
        how = " (guessed; change with --source-column, --pair-column, --target-column)" if self.guessed else ""
        return f"columns: text {self.text!r}{pair}{label}{how}"


@dataclass(frozen=True)
class Labelled:
    """Labelled texts: lists of one length, `None` where the data has no such column. `str()` is a line to print.

    Labels are class ids, with `names` in id order, or for regression numbers, without. `skipped` counts rows left out
    because a text of theirs was empty. `origins`: the texts that augmented ones were made of. `hidden`: there are no
    labels because all are -1.
    """

    texts: list[str]
    pairs: list[str] | None = None
    labels: Labels | None = None
    names: list[str] | None = None
    kind: Kind | None = None
    skipped: int = 0
    origins: list[str] | None = None
    hidden: bool = False

    @property
    def sources(self) -> list[str]:
        """What `hold_out` goes by: pairs that share their first text, and variants of one text, stay together."""
        return self.texts if self.origins is None else self.origins

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Iterable[int]) -> "Labelled":
        """The examples at `indices`, in that order."""
        chosen = list(indices)
        labels: Any = None if self.labels is None else [self.labels[i] for i in chosen]
        pairs = None if self.pairs is None else [self.pairs[i] for i in chosen]
        origins = None if self.origins is None else [self.origins[i] for i in chosen]
        return Labelled([self.texts[i] for i in chosen], pairs, labels, self.names, self.kind, 0, origins, self.hidden)

    def __str__(self) -> str:
        parts = [f"{len(self):,} {'texts' if self.pairs is None else 'pairs'}"]
        if self.skipped:
            parts.append(f"{self.skipped:,} with empty texts left out")
        if self.labels is None:
            parts.append("no labels (all are -1: hidden)" if self.hidden else "no labels")
        elif self.names is None:
            low, high = min(self.labels), max(self.labels)
            parts.append(f"regression, labels {low:g} to {high:g}, mean {math.fsum(self.labels) / len(self):.4g}")
        else:
            counts = Counter(self.labels).most_common()
            shown = ", ".join(f"{self.names[int(i)]} {n:,}" for i, n in counts[:_SHOWN])
            parts.append(f"classification, {len(self.names)} classes: {shown}{', ...' if counts[_SHOWN:] else ''}")
        return "; ".join(parts)


def guess_label_columns(
    rows: Sequence[dict[str, Any]], text: str | None = None, pair: str | None = None, label: str | None = None
) -> LabelColumns:
    """Find the columns in `rows`, keeping the names that are given; "" for `pair` or `label` says there is none.

    Raises `ValueError` for a name that isn't there, one given twice, and where no text column can be told.
    """
    kinds = column_kinds(rows)
    given = {"--source-column": text, "--pair-column": pair, "--target-column": label}
    for flag, name in given.items():
        if name:
            check_column(name, flag, kinds)
    twice = next((name for name, count in Counter(filter(None, given.values())).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"column {twice!r} is given more than once; text, pair and label must differ")
    taken = {text, pair}
    lower = {name.lower(): name for name in reversed(kinds) if name not in taken}
    found_label = next((lower[name] for name in LABEL_NAMES if name in lower), None) if label is None else label

    texts = [name for name, kind in kinds.items() if kind is str and name != found_label]
    lower = {name.lower(): name for name in reversed(texts)}
    couples = [(lower[a], lower[b]) for a, b in PAIR_NAMES if a in lower and b in lower]
    couples = [(a, b) for a, b in couples if text in (None, a) and pair in (None, b)]
    if couples:
        found_text, found_pair = couples[0]
    else:
        found_text, found_pair = text or "", pair or ""
    if not found_text:
        others = [name for name in texts if name != pair]
        known = [lower[name] for name in TEXT_NAMES if lower.get(name) in others]
        if not known and len(others) != 1:
            raise ValueError(f"no text column recognised among {column_names(kinds)}; give --source-column")
        found_text = (known or others)[0]
    return LabelColumns(found_text, found_pair or None, found_label or None, None in given.values())


def read_labelled(
    rows: Sequence[dict[str, Any]],
    columns: LabelColumns,
    names: Sequence[str] | None = None,
    kind: Kind | None = None,
) -> Labelled:
    """The texts of `columns` and their labels, in the order of the rows; rows with an empty text are left out.

    `names`: of the classes in id order, of a teacher or the training split; without them they come from these rows,
    numbers by size and others by alphabet, a `ClassLabel`'s as `datasets` has them. A label is matched with the names,
    else taken as an id, unless names are numbers themselves. `kind` None: classification where `names` are given; else
    regression for numbers with a fraction, or any numbers in a column called score. Where no row has a label (hub sets
    write -1), there are none.

    Raises `ValueError`, with the row, for anything else than text, a missing label, labels of mixed kinds, one that is
    not among the names or no number; and if no row is left, or one class alone.
    """
    texts: list[str] = []
    pairs: list[str] = []
    labels: dict[int, Label | None] = {}  # by row number
    origins: list[str] = []
    for number, row in enumerate(rows, 1):
        text = read_text(row, columns.text, number)
        pair = read_text(row, columns.pair, number) if columns.pair else ""
        if text and (pair or not columns.pair):
            texts.append(text)
            pairs.append(pair)
            origins.append(str(row.get(VARIANT_OF) or text))
            labels[number] = _read_label(row, columns.label, number) if columns.label else None
    if not texts:
        raise ValueError(f"{columns}: all {len(rows)} rows are empty there")
    kind, known, found = read_labels(columns.label or "", labels, names, kind)
    return Labelled(
        texts, pairs if columns.pair else None, found, known, kind, len(rows) - len(texts),
        origins if any(VARIANT_OF in row for row in rows) else None,
        found is None and any(label is not None for label in labels.values()),
    )  # fmt: skip


def _read_label(row: dict[str, Any], name: str, number: int) -> Label | None:
    value = read_value(row, name)
    if hasattr(value, "item"):  # NumPy's numbers
        value = value.item()
    if isinstance(value, str):
        return value if isinstance(value, ClassName) else value.strip() or None
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, bool | int | float):
        raise ValueError(f"row {number}: column {name!r} holds {value!r:.60}, expected one label, a text or a number")
    return value


@dataclass(frozen=True)
class EncodedLabelled:
    """A map-style data set of `{"input_ids", "attention_mask", "token_type_ids", "labels"}`.

    All but the label, an int or a float, are lists; token types are there where the tokenizer makes them. Trainer
    groups by the length of `input_ids`. `cut` counts examples that were longer than allowed. `str()` is a line to
    print.
    """

    rows: TokenRows
    types: TokenRows | None
    labels: Labels | None
    cut: int
    pairs: bool

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self.rows[index]
        item: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if self.types is not None:
            item["token_type_ids"] = self.types[index]
        if self.labels is not None:
            item["labels"] = self.labels[index]
        return item

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __str__(self) -> str:
        return f"{len(self):,} examples; {lengths_line('pair' if self.pairs else 'text', self.rows, self.cut)}"


def encode_labelled(tokenizer: Any, labelled: Labelled, max_length: int, *, progress: bool = True) -> EncodedLabelled:
    """Tokenize texts, pairs together, cut to `max_length` tokens with the special ones; of a pair the longer text.

    Raises `ValueError` for no texts, and a limit without room for text.
    """
    if not len(labelled):
        raise ValueError("no texts to encode; expected at least one")
    sides = 1 if labelled.pairs is None else 2
    special = tokenizer.num_special_tokens_to_add(pair=sides == 2)
    if max_length < special + sides:
        raise ValueError(f"max_length {max_length!r}: expected at least {special + sides}, {special} of them special")
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    lengths: list[int] = []
    cut = 0
    with progress_bar(len(labelled), "texts to tokens", unit="text", enabled=progress) as bar:
        for start in range(0, len(labelled), _CHUNK):
            chunk = [side[start : start + _CHUNK] for side in (labelled.texts, labelled.pairs) if side is not None]
            encoded = tokenizer(*chunk, truncation="longest_first", max_length=max_length)
            rows = encoded["input_ids"]
            if encoded.encodings:
                cut += sum(bool(row.overflowing) for row in encoded.encodings)
            else:  # a tokenizer written in Python does not say; one that fills the limit counts
                cut += sum(len(row) == max_length for row in rows)
            ids.append(np.fromiter((i for row in rows for i in row), np.int32))
            if "token_type_ids" in encoded:
                types.append(np.fromiter((i for row in encoded["token_type_ids"] for i in row), np.int8))
            lengths += map(len, rows)
            bar.update(len(rows))
    lengths_R = np.asarray(lengths)
    return EncodedLabelled(
        TokenRows(np.concatenate(ids), lengths_R), TokenRows(np.concatenate(types), lengths_R) if types else None,
        labelled.labels, cut, sides == 2,
    )  # fmt: skip


@dataclass(frozen=True)
class LabelCollator(Collator):
    """Pads items of `EncodedLabelled` on the right.

    Gives int64 `input_ids`, `attention_mask` and `token_type_ids` `[B, L]`, and `labels` `[B]`, int64 for class ids,
    float32 for numbers, from which transformers' heads choose their loss.
    """

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, "torch.Tensor"]:
        import torch

        batch = {
            key: self._pad([item[key] for item in items], self.pad_token_id if key == "input_ids" else 0)
            for key in items[0]
            if key != "labels"
        }
        if "labels" in items[0]:
            labels = [item["labels"] for item in items]
            batch["labels"] = torch.tensor(labels, dtype=torch.float32 if isinstance(labels[0], float) else torch.int64)
        return batch
