"""Plain text as documents: lists of consecutive texts that belong together.

Pre-training and task-agnostic distillation need no labels, but they need to know where one text goes on in the next:
blocks are filled with the text of one document, and sentence order means something within one document only. A text
file says it by blank lines (the form that BERT's authors introduced), a table by a column that names the document.
A table without such a column gives one document per row: gluing the rows of a shuffled set of sentences together would
teach that unrelated sentences follow each other, and nothing would show it.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from dqbart.data.columns import column_kinds, column_names, guess_columns, read_text, read_value
from dqbart.data.files import load_rows

TEXT_NAMES = (
    "text", "content", "sentence", "paragraph", "passage", "body", "article", "document", "abstract", "context",
    "source", "input", "question",
)  # fmt: skip
DOCUMENT_NAMES = ("doc", "doc_id", "docid", "document", "document_id", "book", "title", "id")


@dataclass(frozen=True)
class PlainTexts:
    """Documents, each a list of texts in reading order, none empty. `str()` is a line to print.

    `document_column` is None where every row is a document; `skipped` counts rows without text.
    """

    documents: list[list[str]]
    text_column: str
    document_column: str | None = None
    guessed: bool = False
    skipped: int = 0

    @property
    def sources(self) -> list[str]:
        """What `hold_out` goes by: documents with the same beginning stay together."""
        return [texts[0] for texts in self.documents]

    def __len__(self) -> int:
        return len(self.documents)

    def select(self, indices: Iterable[int]) -> "PlainTexts":
        """The documents at `indices`, in that order."""
        chosen = [self.documents[i] for i in indices]
        return dataclasses.replace(self, documents=chosen, skipped=0)

    def apart(self) -> "PlainTexts":
        """Every text by itself, so that a part of them is a fair sample, and no more than was asked for."""
        return dataclasses.replace(self, documents=[[text] for texts in self.documents for text in texts])

    def __str__(self) -> str:
        line = f"{len(self):,} documents, {sum(map(len, self.documents)):,} texts"
        grouped = f"documents by {self.document_column!r}" if self.document_column else "every row is a document"
        line += f"; text column {self.text_column!r}, {grouped}"
        line += " (guessed; change with --source-column)" if self.guessed else ""
        return line + (f"; {self.skipped:,} empty rows left out" if self.skipped else "")


def read_texts(
    data: Any, split: str = "train", column: str | None = None, document_column: str | None = None
) -> PlainTexts:
    """The documents of `data`, whatever `load_rows` reads.

    Rows have their text in `column`; consecutive rows with the same value in `document_column` are one document. Both
    columns are guessed where not given.

    Raises `FileNotFoundError` and `ValueError` as `load_rows` and `guess_columns` do: one line, with the place.
    """
    rows = load_rows(data, split=split)
    text = _text_column(rows, column)
    document = _document_column(rows, text, document_column)
    texts = [read_text(row, text, number) for number, row in enumerate(rows, 1)]
    # A missing name, and every row where there is no such column, is a document of its own.
    names = [read_value(row, document) if document else None for row in rows]
    keys = [("row", number) if name is None else ("name", name) for number, name in enumerate(names)]
    documents = [
        kept for _, group in groupby(zip(keys, texts, strict=True), lambda pair: pair[0])
        if (kept := [text for _, text in group if text])
    ]  # fmt: skip
    if not documents:
        raise ValueError(f"column {text!r}: all {len(rows)} rows are empty there")
    guessed = column is None or (document is not None and document_column is None)
    return PlainTexts(documents, text, document, guessed, sum(not text for text in texts))


def hold_out_end(texts: PlainTexts, count: int) -> tuple[PlainTexts, PlainTexts]:
    """Split off the last `count` texts: (rest, held out). Where documents are too few to spare one, the neighbours of
    texts taken here and there would be trained on.
    """
    left = sum(map(len, texts.documents)) - count
    rest, held = [], []
    for document in texts.documents:
        rest.append(document[: max(0, left)])
        held.append(document[max(0, left) :])
        left -= len(document)
    first, second = ([part for part in parts if part] for parts in (rest, held))
    return dataclasses.replace(texts, documents=first), dataclasses.replace(texts, documents=second, skipped=0)


def _text_column(rows: Sequence[dict[str, Any]], column: str | None) -> str:
    """The column given, or the best of `TEXT_NAMES`; the rest, errors too, is `guess_columns`'s."""
    kinds = column_kinds(rows)
    lower = {name.lower(): name for name in reversed(kinds) if kinds[name] is str}
    return guess_columns(rows, column or next((lower[name] for name in TEXT_NAMES if name in lower), None)).source


def _document_column(rows: Sequence[dict[str, Any]], text: str, column: str | None) -> str | None:
    kinds = column_kinds(rows)
    if column is None:
        lower = {name.lower(): name for name in reversed(kinds) if name != text}
        return next((lower[name] for name in DOCUMENT_NAMES if name in lower), None)
    if column not in kinds or column == text:
        raise ValueError(f"document column {column!r}: expected one of {column_names(kinds)}, but not the text's")
    return column
