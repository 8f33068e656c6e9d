"""Rows from wherever the user keeps them: a file, a folder, a hub data set or Python objects.

Every source becomes one form, a list of dicts. For text that is enough (160,000 sentence pairs take
about 100 MB) and it keeps reading deterministic. Letting `datasets` read local files too was
rejected: it writes an Arrow copy of them into a cache, and its message about a bad line names
neither the file nor the line.
"""

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from dqbart.data.labels import ClassName, data_classes

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
SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "development", "eval", "evaluation"),
    "test": ("test",),
}

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.+-]+)?")
_SHARD = re.compile(r"-\d+-of-\d+$")


def load_rows(data: Any, *, split: str = "train") -> list[Row]:
    """All rows of `data` as dicts, in order.

    `data` is a path to a csv, tsv, json-lines (or one json array) or parquet file, text ones also
    gzipped; a text file, whose lines become rows with `text` and `doc`, the number of the paragraph that
    blank lines set apart; a folder of files named after their split (`train.jsonl`, `validation.csv`,
    `test.en-de.tsv`, numbered shards); a hub name, `owner/name` or `owner/name:configuration`; a
    `datasets.Dataset`, whose classes come by name; an iterable of dicts; or a dict from split names to one of these.
    `split` picks from what has splits, and means nothing for one file or one list. Of a folder, a hub data set or a
    dict it is found under its other names, too: `dev`, `val`, `validation_matched`.

    Raises `FileNotFoundError` where there is nothing to read, `ValueError` where it can't be
    understood: one line with the file, and the line number where there is one.
    """
    if isinstance(data, str | Path):
        path = _path(data)
        if path.is_dir():
            files = _split_files(path)
            chosen = files.get(_known(split))
            if not chosen:
                raise FileNotFoundError(
                    f"data {str(data)!r}: no {split} file in this folder, only "
                    f"{', '.join(files) or 'others'}; expected {split} with one of {', '.join(SUFFIXES)}"
                )
            return [row for file in chosen for row in _read(file)]
        if path.exists():
            return _read(path)
        data = _hub(str(data))
    if isinstance(data, Mapping):
        name = find_split(data, split)
        if name is None:
            raise ValueError(f"data has no split {split!r}; it has {', '.join(map(repr, data)) or 'none'}")
        if name != split:
            print(f"{split}: split {name!r} of the data", file=sys.stderr, flush=True)
        return load_rows(data[name])
    features: Any = getattr(data, "features", None)
    if hasattr(data, "to_list"):  # datasets.Dataset, several times quicker than iterating it
        data = data.to_list()
    if not isinstance(data, Iterable) or isinstance(data, bytes):
        raise ValueError(
            f"data is {type(data).__name__}; expected a path, a hub name, a datasets.Dataset or a list of dicts"
        )
    rows = _checked(list(data), "data")
    return _with_class_names(rows, features.to_dict()) if hasattr(features, "to_dict") else rows


def list_splits(data: Any) -> list[str]:
    """The split names of `data`; `["train"]` where it has no splits.

    Raises as `load_rows` does.
    """
    if isinstance(data, Mapping):
        return list(data)
    if isinstance(data, str | Path):
        path = _path(data)
        if path.is_dir():
            return list(_split_files(path))
        if not path.exists():
            return list(_hub(str(data)))
    return ["train"]


def find_split(names: Iterable[str], split: str) -> str | None:
    """The one of `names` that is meant by `split`, train, validation or test: what is called so, else the first with
    another spelling, else the first that begins with one. None where there is none.
    """
    names = list(names)
    if split in names:
        return split
    known = next((name for name, spellings in SPLIT_NAMES.items() if split in spellings), None)
    alike = [name for name in names if known is not None and _split_of(name) == known]
    return min(alike, key=lambda name: name.lower() not in SPLIT_NAMES[known or ""], default=None)


def _path(data: str | Path) -> Path:
    if not str(data):  # Path("") is the current folder
        raise FileNotFoundError(f"data {data!r}: no such file or folder; expected a path or a hub name")
    return Path(data).expanduser()


def _split_of(name: str) -> str | None:
    """Train, validation or test, by how a name begins: `dev`, `validation_matched`, `test.en-de`."""
    for split, spellings in SPLIT_NAMES.items():
        if re.match(rf"({'|'.join(spellings)})([-_.]|$)", name, re.IGNORECASE):
            return split
    return None


def _known(split: str) -> str:
    for name, spellings in SPLIT_NAMES.items():
        if split in spellings:
            return name
    raise ValueError(f"split {split!r}: expected one of {', '.join(SPLIT_NAMES)}")


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """Data files by split. Two files of one split are an error, unless they are numbered shards."""
    found: dict[str, list[Path]] = {}
    files = [file for file in sorted(folder.iterdir()) if _suffix(file)]
    for name in SPLIT_NAMES:
        matches = [file for file in files if _split_of(file.name.removesuffix(_suffix(file))) == name]
        if len(matches) > 1 and not all(_SHARD.search(f.name.removesuffix(_suffix(f))) for f in matches):
            raise ValueError(
                f"data {str(folder)!r}: several {name} files "
                f"({', '.join(f.name for f in matches)}); give the path of one of them"
            )
        if matches:
            found[name] = matches
    return found


def _suffix(path: Path) -> str:
    """The known ending of a file name, or an empty string."""
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(s)), "")


def _read(path: Path) -> list[Row]:
    suffix = _suffix(path)
    if not suffix:
        raise ValueError(f"{path}: unknown kind of file {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    if suffix == ".parquet":
        return _checked(_parquet(path), str(path))
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
    return _checked(rows, str(path))


def _lines(path: Path) -> Iterator[str]:
    r"""Lines ending in \n only: U+2028 and friends are text, and may stand inside a JSON string."""
    with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} line {number}: not UTF-8 ({error.reason}); save it as UTF-8") from None
            yield text.removeprefix("\ufeff") if number == 1 else text


def _json_rows(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    """One object a line; a `.json` file may also be a single array of objects."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        is_array = line.lstrip().startswith("[") and path.name.lower().endswith((".json", ".json.gz"))
        text = "\n" * (number - 1) + line + "".join(lines) if is_array else line
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            line_number = error.lineno if is_array else number
            raise ValueError(f"{path} line {line_number}: invalid JSON, {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise ValueError(f"{path} line {number}: JSON is nested too deeply") from None
        for row in value if is_array else [value]:
            if not isinstance(row, dict):
                raise ValueError(
                    f'{path} line {number}: expected an object such as {{"source": "..."}}, found {type(row).__name__}'
                )
            yield row


def _text_rows(lines: Iterator[str]) -> Iterator[Row]:
    """A text a line; blank lines part documents, as BERT's authors have it."""
    for number, (blank, group) in enumerate(groupby(map(str.strip, lines), lambda line: not line)):
        if not blank:
            yield from ({"text": text, "doc": number} for text in group)


def _table_rows(path: Path, lines: Iterator[str], delimiter: str) -> Iterator[Row]:
    """csv and tsv, first line the column names, quoted as spreadsheets and pandas write them.

    Strict: a stray quote is reported, where the usual leniency swallows the lines up to the next
    one.
    """
    csv.field_size_limit(2**31 - 1)  # the module's default refuses fields above 131,072 characters
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        number = reader.line_num + 1  # where the row starts; a quoted field may span lines
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{path} line {number}: {error}; a field with quotes in it must be quoted and its quotes doubled"
            ) from None
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


def _parquet(path: Path) -> list[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(f"{path}: parquet needs pyarrow; pip install 'dqbart[parquet]'") from None
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({_one_line(error)})") from None
    written_by_datasets = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    return _with_class_names(table.to_pylist(), written_by_datasets.get("info", {}).get("features") or {})


def _hub_name(data: str) -> tuple[str, str | None]:
    if _suffix(Path(data)) or not _HUB_NAME.fullmatch(data):
        raise FileNotFoundError(f"data {data!r}: no such file or folder")
    name, _, configuration = data.partition(":")
    return name, configuration or None


def _hub(data: str) -> Any:
    """All splits of a hub data set, by their names."""
    return _ask_hub("load_dataset", *_hub_name(data))


def _ask_hub(function: str, name: str, configuration: str | None, **arguments: Any) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"data {name!r}: no such file or folder, and hub data sets need: pip install 'dqbart[hub]'"
        ) from None
    try:
        return getattr(datasets, function)(name, configuration, **arguments)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"data {name!r}: no such file or folder, and no such hub data set ({_one_line(error)})"
        ) from None
    # What `datasets` raises for no network, a missing configuration or split, and script data sets.
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"data {name!r}: no such file or folder, and as a hub data set it can't be read "
            f"({_one_line(error)}); a configuration is given as owner/name:configuration"
        ) from None


def _with_class_names(rows: list[Row], features: Mapping[str, Any]) -> list[Row]:
    """Ids of a `ClassLabel` as names: a teacher may have the same classes in another order. -1, no label, stays.

    `features`: as `datasets` writes them, columns inside of others included.
    """
    for column, feature in features.items():
        if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel" and feature.get("names"):
            classes = data_classes(feature["names"])
            rows = [row | {column: _class_of(row.get(column), classes)} for row in rows]
        elif isinstance(feature, Mapping) and "_type" not in feature:
            inner = _with_class_names([row.get(column) or {} for row in rows], feature)
            rows = [row | {column: row.get(column) and new} for row, new in zip(rows, inner, strict=True)]
    return rows


def _class_of(value: Any, classes: list[ClassName]) -> Any:
    return classes[value] if isinstance(value, int) and 0 <= value < len(classes) else value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _checked(rows: list[Any], name: str) -> list[Row]:
    if not rows:
        raise ValueError(f"{name}: there are no rows in it")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{name}: row {number} is {type(row).__name__}, expected a dict")
    return rows
