"""What a column of labels means: classes with names and ids, or numbers.

A label may be a name, an id, a star count or a boolean, and csv makes texts of them all; the model knows only ids. So
the names in id order are part of the data: taken from a teacher or from the training split, they map every other split
the same way, and a label outside them is an error with its row. Numbering the classes of each file by itself, in sorted
order as the transformers examples do, was rejected: a dev set that lacks a class, or a teacher with another order, then
scores near chance and says nothing.
"""

import math
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal

Kind = Literal["classification", "regression"]
Label = str | bool | int | float
Labels = list[int] | list[float]

SCORE_NAMES = ("score", "similarity_score", "similarity", "relatedness_score")  # columns whose numbers are no classes

_NUMBER = re.compile(r"-?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")  # "007" is a name
_BOOLEANS = {"false": 0, "true": 1}
_SHOWN = 5  # names in a message
_NO_LABEL = "hub sets write -1 for no label, so leave such rows out"


class ClassName(str):
    """A class by the name that its data set has for it; `names`: of all its classes, in the data's id order."""

    names: Sequence[str]


def _data_classes(names: Sequence[str]) -> list[ClassName]:
    """The classes of a data set's column, in id order."""
    found = [ClassName(name) for name in names]
    for name in found:
        name.names = names
    return found


def with_class_names(rows: list[dict[str, Any]], features: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Ids of a `ClassLabel` as names: a teacher may have the same classes in another order. -1, no label, stays.

    `features`: as `datasets` writes them, columns inside of others included.
    """
    for column, feature in features.items():
        if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel" and feature.get("names"):
            classes = _data_classes(feature["names"])
            rows = [row | {column: _class_of(row.get(column), classes)} for row in rows]
        elif isinstance(feature, Mapping) and "_type" not in feature:
            inner = with_class_names([row.get(column) or {} for row in rows], feature)
            rows = [row | {column: row.get(column) and new} for row, new in zip(rows, inner, strict=True)]
    return rows


def _class_of(value: Any, classes: list[ClassName]) -> Any:
    return classes[value] if isinstance(value, int) and 0 <= value < len(classes) else value


def unnamed(names: Sequence[str]) -> bool:
    """Whether they are what transformers calls classes that nobody named."""
    return list(names) == [f"LABEL_{i}" for i in range(len(names))]


def check_names(names: Sequence[str] | None, kind: Kind | None) -> None:
    """Raise `ValueError` for a kind that doesn't exist, and names that can't be those of its classes."""
    if kind not in ("classification", "regression", None):
        raise ValueError(f"kind {kind!r}: expected 'classification' or 'regression'")
    if names is None:
        return
    if kind == "regression":
        raise ValueError(f"names {_shorten(names)}: regression has none; leave them out")
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise ValueError(f"names {_shorten(names) or 'of length 0'}: expected a list of different texts, in id order")


def read_labels(
    column: str, values: Mapping[int, Label | None], names: Sequence[str] | None = None, kind: Kind | None = None
) -> tuple[Kind | None, list[str] | None, Labels | None]:
    """`(kind, names, labels)` of `values`, the column's by row number, as `read_labelled` says and raises."""
    check_names(names, kind)
    kind = kind or ("classification" if names else None)
    labels = _all_or_none(column, values)
    numbers = {row: number for row, value in labels.items() if (number := _number(value)) is not None}
    hidden = len(numbers) == len(labels) and set(numbers.values()) == {-1} and "-1" not in (names or ())
    if not labels or hidden:
        return kind, None if names is None else list(names), None
    if kind is None:
        fractions = not all(isinstance(number, int) for number in numbers.values())
        scores = fractions or column.rpartition(".")[2].lower() in SCORE_NAMES
        kind = "regression" if scores and len(numbers) == len(labels) else "classification"
    if kind == "regression":
        for row, value in labels.items():
            if not math.isfinite(numbers.get(row, math.nan)):
                raise ValueError(f"row {row}: column {column!r} holds {value!r:.60}, expected a finite number")
        return kind, None, [float(number) for number in numbers.values()]
    known = list(names) if names else _class_names(column, labels, numbers)
    ids: dict[Label, int] = {}
    for row, value in labels.items():
        if value not in ids:
            ids[value] = _class_id(column, row, value, known)
    return kind, known, [ids[value] for value in labels.values()]


def _all_or_none(column: str, values: Mapping[int, Label | None]) -> dict[int, Label]:
    """The labels, of one kind, for all rows or for none."""
    labels = {row: value for row, value in values.items() if value is not None}
    if labels and len(labels) < len(values):
        row = next(row for row, value in values.items() if value is None)
        raise ValueError(f"row {row}: column {column!r} is empty; expected a label in every row, or in none")
    kinds: dict[str, tuple[int, Label]] = {}
    for row, value in labels.items():
        kind = "text" if isinstance(value, str) else "a boolean" if isinstance(value, bool) else "a number"
        kinds.setdefault(kind, (row, value))
    if len(kinds) > 1:
        (first, (one, a)), (second, (two, b)) = list(kinds.items())[:2]
        if isinstance(b if a == -1 else a, ClassName):  # the other is -1: all other ids have become names
            raise ValueError(f"row {one if a == -1 else two}: column {column!r} holds -1, {_NO_LABEL}")
        raise ValueError(
            f"row {two}: column {column!r} holds {second}, {b!r:.60}, but row {one} has {first}, {a!r:.60}; "
            "expected one kind"
        )
    return labels


def _number(value: Label) -> int | float | None:
    """A label as a number, whole ones as int; `None` for names, booleans among them."""
    if isinstance(value, bool) or (isinstance(value, str) and not _NUMBER.fullmatch(value)):
        return None
    if isinstance(value, int):
        return value
    number = float(value)
    return int(number) if number.is_integer() else number


def _class_names(column: str, labels: Mapping[int, Label], numbers: Mapping[int, int | float]) -> list[str]:
    if len(numbers) == len(labels):
        for row, number in numbers.items():
            if not isinstance(number, int):
                raise ValueError(
                    f"row {row}: column {column!r} holds {labels[row]!r:.60}, expected names or whole numbers for "
                    "classification; numbers with a fraction are for regression"
                )
        different = sorted(set(numbers.values()))
        if different[0] == -1 and different[1:3] == [0, 1] and different[-1] > 1:
            row = next(row for row, number in numbers.items() if number == -1)
            raise ValueError(f"row {row}: column {column!r} holds -1, others up to {different[-1]}; {_NO_LABEL}")
        names = [str(number) for number in different]
    else:
        names = sorted({str(value) for value in labels.values()})
    if len(names) < 2:
        raise ValueError(
            f"column {column!r}: all {len(labels)} labels are {names[0]!r:.60}; expected 2 classes or more"
        )
    first = next(iter(labels.values()))
    return list(first.names) if isinstance(first, ClassName) else names


def _class_id(column: str, row: int, value: Label, names: Sequence[str]) -> int:
    """Id of a label: by its name, letter by letter or else in any case; by number, unless names are numbers."""
    text, number = str(value), _number(value)
    for name in (text, str(number)):
        if name in names:
            return names.index(name)
    folded = [name.casefold() for name in names]
    if folded.count(text.casefold()) == 1:
        return folded.index(text.casefold())
    by_id = not any(isinstance(_number(name), int) for name in names)
    if isinstance(value, ClassName) and (number is not None or unnamed(names)):
        number = value.names.index(value)  # one side has no names, so ids are all there is to go by
    else:
        number = _BOOLEANS.get(text.casefold(), number)
    if by_id and isinstance(number, int) and 0 <= number < len(names):
        return number
    close = get_close_matches(text, names, n=1)
    if isinstance(value, ClassName):
        hint = "; classes go by their names: name them alike, in the data or as id2label in the model's config.json"
    else:
        hint = f", nor an id from 0 to {len(names) - 1}" if by_id else ""
    raise ValueError(
        f"row {row}: label {value!r:.60} in column {column!r} is none of the {len(names)} known: {_shorten(names)}"
        f"{hint}{f'; did you mean {close[0]!r}?' if close else ''}"
    )


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(f"{name!r:.60}" for name in names[:_SHOWN]) + (", ..." if names[_SHOWN:] else "")
