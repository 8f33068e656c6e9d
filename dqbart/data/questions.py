"""Questions about a text whose answer stands in it: SQuAD's json files, or rows, to `Question` values.

An answer is a span of characters: a text and its start. Where the two disagree (starts that count bytes, texts edited
later) the text is believed if it stands elsewhere in the context, and that is counted; otherwise the row is refused.
Believing the start, as is usual, trains on spans that are no answers, in silence.
"""

import ast
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqbart.data.files import load_rows
from dqbart.data.formats import Row

_NEARBY = 100  # characters within which one of several places is taken to be the answer's


@dataclass(frozen=True, slots=True)
class Question:
    """`answers[i]` stands in `context` at character `starts[i]`; no answers: the question can't be answered from it.

    Raises `ValueError` for an empty question or context, and an answer that does not stand at its start.
    """

    id: str
    question: str
    context: str
    answers: tuple[str, ...] = ()
    starts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, text in (("question", self.question), ("context", self.context)):
            if not isinstance(text, str) or not text.strip():
                found = "empty" if isinstance(text, str) else type(text).__name__
                raise ValueError(f"question {self.id!r}: its {name} is {found}; expected text")
            try:
                text.encode()
            except UnicodeEncodeError as error:  # JSON's \ud800 makes one; tokenizers can't take it
                raise ValueError(
                    f"question {self.id!r}: its {name} has half a surrogate pair at character {error.start}; replace it"
                ) from None
        if len(self.answers) != len(self.starts):
            raise ValueError(f"question {self.id!r}: {len(self.answers)} answers but {len(self.starts)} starts")
        for answer, start in zip(self.answers, self.starts, strict=True):
            if not answer.strip() or start < 0 or not self.context.startswith(answer, start):
                raise ValueError(
                    f"question {self.id!r}: answer {answer[:60]!r} does not stand in its context at character {start}"
                )


@dataclass(frozen=True)
class Questions(Sequence[Question]):
    """What `read_questions` found; `repaired` answers were moved to where their text stands.

    `str()` is a line to print.
    """

    items: list[Question]
    repaired: int = 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    @property
    def sources(self) -> list[str]:
        """What `hold_out` goes by: questions on one context stay together."""
        return [question.context for question in self.items]

    def select(self, indices: Iterable[int]) -> "Questions":
        """The questions at `indices`, in that order."""
        return Questions([self.items[i] for i in indices])

    def __str__(self) -> str:
        without = sum(not question.answers for question in self.items)
        moved = f"; {self.repaired:,} answers moved to where their text stands" if self.repaired else ""
        return f"{len(self):,} questions, {without:,} of them without an answer{moved}"


def read_questions(data: Any, split: str = "train") -> Questions:
    """All questions of `data` in order: SQuAD's own json (v1.1, v2.0), or flat rows as the hub's `squad` has them.

    `data` is what `dqbart.data.files.load_rows` takes. Flat rows have `question`, `context` and `answers`, a dict
    `{"text": [...], "answer_start": [...]}` or a list of `{"text", "answer_start"}` (in csv as JSON or as Python prints
    it; empty for none), and may have `id` and `is_impossible`. Starts count characters. An answer that stands elsewhere
    (in one place only, or in several and the nearest at most 100 characters off) is moved there and counted.

    Raises as `load_rows` does, and `ValueError` with file, row and field for anything that does not fit.
    """
    name = str(data) if isinstance(data, str | Path) else "data"
    items: list[Question] = []
    repaired = 0
    for where, row in _flat_rows(load_rows(data, split=split), name):
        try:
            question, moved = _question(row, str(len(items) + 1))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        items.append(question)
        repaired += moved
    if not items:
        raise ValueError(f"{name}: there are no questions in it")
    return Questions(items, repaired)


def _flat_rows(rows: Sequence[Row], name: str) -> Iterator[tuple[str, Row]]:
    """(place to name in an error, flat row); SQuAD's articles and paragraphs are opened."""
    for number, row in enumerate(rows, 1):
        if "data" not in row and "paragraphs" not in row:
            yield f"{name}: row {number}", row
            continue
        articles = _dicts(row, "data", f"{name}:") if "data" in row else [(f"{name}: article {number}", row)]
        for article_place, article in articles:
            for place, paragraph in _dicts(article, "paragraphs", article_place):
                for question_place, question in _dicts(paragraph, "qas", place):
                    yield question_place, question | {"context": paragraph.get("context")}


_ONE = {"data": "article", "paragraphs": "paragraph", "qas": "question"}


def _dicts(row: Row, field: str, where: str) -> Iterator[tuple[str, Row]]:
    values = row.get(field)
    if not isinstance(values, list):
        raise ValueError(
            f"{where.removesuffix(':')}: field {field!r} is {type(values).__name__}, expected a list as in SQuAD's json"
        )
    for number, value in enumerate(values, 1):
        place = f"{where} {_ONE[field]} {number}"
        if not isinstance(value, dict):
            raise ValueError(f"{place}: {type(value).__name__}, expected an object")
        yield place, value


def _question(row: Row, number: str) -> tuple[Question, int]:
    """The question of a flat row, and how many of its answers were moved."""
    for field in ("question", "context"):
        if not isinstance(row.get(field), str):
            raise ValueError(
                f"field {field!r} is {type(row.get(field)).__name__}, expected text; the row has {list(row)}"
            )
    identity = number if row.get("id") is None else str(row["id"])
    pairs = _answers(row)
    flag = str(row.get("is_impossible")).lower()  # csv has it as text
    if flag not in ("true", "false", "none", ""):
        raise ValueError(f"field 'is_impossible' is {row['is_impossible']!r}, expected true or false")
    if flag in ("true", "false") and (flag == "true") is bool(pairs):
        raise ValueError(
            f"field 'is_impossible' is {flag}, but there are {len(pairs)} answers; one of the two is wrong"
        )
    starts = []
    for text, start in pairs:
        place = _find(row["context"], text, start)
        if place is None:
            raise ValueError(
                f"field 'answers': {text[:60]!r} does not stand in the context at character {start} or near it; "
                "correct answer_start, or leave the row out"
            )
        starts.append(place)
    moved = sum(place != start for place, (_, start) in zip(starts, pairs, strict=True))
    return Question(identity, row["question"], row["context"], tuple(text for text, _ in pairs), tuple(starts)), moved


def _answers(row: Row) -> list[tuple[str, int]]:
    """(text, start) pairs of a row, from any of their forms."""
    if "answers" not in row:
        raise ValueError(f"field 'answers' is missing; the row has {list(row)}")
    given = value = row["answers"]
    if isinstance(value, str):
        value = given = value.strip()
        for parse in (json.loads, ast.literal_eval):  # the second: what csv writers make of a dict
            try:
                value = parse(given)
                break
            except (ValueError, SyntaxError, RecursionError):
                continue
    wrong = ValueError(f"field 'answers' is {given!r:.80}, expected {{'text': [...], 'answer_start': [...]}}")
    if not value:
        return []
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise wrong
        pairs = list(zip(texts, starts, strict=True))
    elif isinstance(value, list) and all(isinstance(answer, dict) for answer in value):
        pairs = [(answer.get("text"), answer.get("answer_start")) for answer in value]
    else:
        raise wrong
    for text, start in pairs:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"field 'answers': text {text!r:.60}, expected a text that is not empty")
        if not isinstance(start, int) or isinstance(start, bool):
            raise ValueError(f"field 'answers': answer_start {start!r:.60}, expected a whole number")
    return pairs


def _find(context: str, text: str, start: int) -> int | None:
    """Where `text` stands in `context`: at `start`, else at the only or the nearest place."""
    if start >= 0 and context.startswith(text, start):
        return start
    places = [match.start() for match in re.finditer(re.escape(text), context)]
    nearest = min(places, key=lambda place: abs(place - start), default=None)
    if nearest is not None and len(places) > 1 and abs(nearest - start) > _NEARBY:
        return None
    return nearest
