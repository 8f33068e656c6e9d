"""What one file holds, as rows: csv, tsv, json lines, parquet, plain text."""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from dqbart.data.labels import with_class_names

Row = dict[str, Any]

SUFFIXES = (
    ".csv",
    ".csv.gz",
    ".tsv",
    ".tsv.gz",
    ".jsonl",
    ".jsonl.gz",
    ".json",
    ".json.gz",
    ".parquet",
    ".txt",
    ".txt.gz",
)


def suffix_of(path: Path) -> str:
    """The known ending of a file name, or an empty string."""
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(s)), "")


def read_file(path: Path) -> list[Row]:
    """All rows of a file. Raises as `load_rows` says."""
    suffix = suffix_of(path)
    if not suffix:
        raise ValueError(f"{path}: unknown kind of file {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    if suffix == ".parquet":
        return checked(_parquet(path), str(path))
    lines = _lines(path)
    try:
        if suffix.startswith(".json"):
            rows = list(_json_rows(path, lines))
        elif suffix.startswith(".txt"):
            rows = list(_text_rows(lines))
        else:
            rows = list(_table_rows(path, lines, "\t" if suffix.startswith(".tsv") else ","))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error})") from None
    return checked(rows, str(path))


def _lines(path: Path) -> Iterator[str]:
    r"""Lines ending in \n only: U+2028 and friends are text, and may stand inside a JSON string."""
    with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} line {number}: not UTF-8 ({error.reason}); save it as UTF-8") from None
            yield text.removeprefix("\ufeff") if number == 1 else text


def _json_rows(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    """One object a line; a `.json` file may also be one list of objects, by itself or as "data" of an object."""
    if path.name.lower().endswith((".json", ".json.gz")):
        lines = list(lines)
        if _is_document(lines):
            yield from _document_rows(path, "".join(lines))
            return
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _object(path, _json(path, line.rstrip("\r\n"), number), number)


def _is_document(lines: list[str]) -> bool:
    """Whether the first line is no object by itself, or all that there is."""
    filled = [line for line in lines if line.strip()]
    try:
        return bool(filled) and (len(filled) == 1 or not isinstance(json.loads(filled[0]), dict))
    except (ValueError, RecursionError):
        return True


def _document_rows(path: Path, text: str) -> Iterator[Row]:
    value = _json(path, text)
    data = value.get("data") if isinstance(value, dict) else value  # SQuAD has "data", and pandas with orient="table"
    if isinstance(data, list) and (data is value or all(isinstance(row, dict) for row in data)):
        yield from (_object(path, row) for row in data)
    elif isinstance(value, dict) and "\n" in text.strip():
        raise ValueError(
            f"{path}: valid JSON, but one object with {', '.join(map(repr, value))[:80]}; expected one object a line, "
            'a list of objects, or {"data": [objects]}'
        )
    else:
        yield _object(path, value)


def _json(path: Path, text: str, number: int = 1) -> Any:
    """The value of a text that begins in line `number`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path} line {number + error.lineno - 1}"
        raise ValueError(f"{place}: invalid JSON, {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"{path} line {number}: JSON is nested too deeply") from None


def _object(path: Path, value: Any, number: int = 1) -> Row:
    if not isinstance(value, dict):
        raise ValueError(
            f'{path} line {number}: expected an object such as {{"source": "..."}}, found {type(value).__name__}'
        )
    return value


def _text_rows(lines: Iterator[str]) -> Iterator[Row]:
    """A text a line; blank lines part documents, as BERT's authors have it."""
    for number, (blank, group) in enumerate(groupby(map(str.strip, lines), lambda line: not line)):
        if not blank:
            yield from ({"text": text, "doc": number} for text in group)


def _table_rows(path: Path, lines: Iterable[str], delimiter: str) -> Iterator[Row]:
    """csv and tsv, first line the column names, quoted as spreadsheets and pandas write them.

    Strict: a stray quote is reported, where the usual leniency swallows the lines up to the next
    one. Quotes of a tsv may be text instead, as in GLUE's files.
    """
    mend = "a field with quotes in it must be quoted and its quotes doubled"
    quoting: Any = csv.QUOTE_MINIMAL
    if delimiter == "\t":
        lines = list(lines)
        quoting = csv.QUOTE_NONE if _quotes_are_text(lines) else quoting
        mend += ", or every line must have as many tabs as the first, which makes quotes text"
    csv.field_size_limit(2**31 - 1)  # the module's default refuses fields above 131,072 characters
    reader = csv.reader(lines, delimiter=delimiter, strict=True, quoting=quoting)
    names: list[str] | None = None
    while True:
        number = reader.line_num + 1  # where the row starts; a quoted field may span lines
        try:
            fields = next(reader, None)
        except csv.Error as error:
            if "new-line character" in str(error):
                raise ValueError(
                    f"{path} line {number}: a lone carriage return (\\r) ends a line; save the file with \\n, or quote "
                    "the field that it is in"
                ) from None
            raise ValueError(f"{path} line {number}: {error}; {mend}") from None
        if fields is None:
            return
        if not fields:
            continue
        if names is None:
            names = fields
            other = next((mark for mark in ";\t|," if mark in names[0]), None) if len(names) == 1 else None
            if other is not None:
                raise ValueError(
                    f"{path}: one column, {names[0]!r}: it seems to be divided by {other!r}, expected {delimiter!r}; "
                    "save it as csv with commas, as .tsv with tabs, or as .jsonl"
                )
            if len(set(names)) < len(names):
                raise ValueError(f"{path} line {number}: two columns have the same name, in {names}")
        elif len(fields) != len(names):
            raise ValueError(
                f"{path} line {number}: {len(fields)} fields, but the first line names {len(names)}: {names}"
            )
        else:
            yield dict(zip(names, fields, strict=True))


_QUOTED = re.compile(r'"(?:[^"]|"")*"')


def _quotes_are_text(lines: list[str]) -> bool:
    """Of tsv: whether tabs alone divide fields, and some field that begins with a quote is not quoted as a whole."""
    rows = [line.rstrip("\r\n").split("\t") for line in lines if line.strip()]
    bare = any(field.startswith('"') and not _QUOTED.fullmatch(field) for row in rows for field in row)
    return bare and len({len(row) for row in rows}) == 1


def _parquet(path: Path) -> list[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(f"{path}: parquet needs pyarrow; pip install 'dqbart[parquet]'") from None
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({one_line(error)})") from None
    written_by_datasets = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    return with_class_names(table.to_pylist(), written_by_datasets.get("info", {}).get("features") or {})


def one_line(error: Exception) -> str:
    """The beginning of its message."""
    return " ".join(str(error).split())[:300]


def checked(rows: list[Any], name: str) -> list[Row]:
    """The rows. Raises `ValueError` where there are none, or they are no dicts."""
    if not rows:
        raise ValueError(f"{name}: there are no rows in it")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{name}: row {number} is {type(row).__name__}, expected a dict")
    return rows
