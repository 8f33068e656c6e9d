"""Rows from wherever the user keeps them: a file, a folder, a hub data set or Python objects.

Every source becomes one form, a list of dicts. For text that is enough (160,000 sentence pairs take
about 100 MB) and it keeps reading deterministic. Letting `datasets` read local files too was
rejected: it writes an Arrow copy of them into a cache, and its message about a bad line names
neither the file nor the line.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dqbart.data.formats import SUFFIXES, Row, checked, one_line, read_file, suffix_of
from dqbart.data.labels import with_class_names

SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "development", "eval", "evaluation"),
    "test": ("test",),
}

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.+-]+)?")
_SHARD = re.compile(r"-\d+-of-\d+$")


def load_rows(data: Any, *, split: str = "train") -> list[Row]:
    """All rows of `data` as dicts, in order.

    `data` is a path to a csv, tsv (quoted like csv, or with quotes as text, as GLUE has it), json-lines (or one json
    list) or parquet file, text ones also gzipped; a text file, whose lines become rows with `text` and `doc`, the
    number of the paragraph that blank lines set apart; a folder of files named after their split (`train.jsonl`,
    `validation.csv`, `test.en-de.tsv`, numbered shards); a hub name, `owner/name` or `owner/name:configuration`; a
    `datasets.Dataset`, whose classes come by name; an iterable of dicts; or a dict from split names to one of these.
    `split` picks from what has splits, and means nothing for one file or one list. It is found under its other names,
    too: `dev`, `val`, `validation_matched`.

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
            return [row for file in chosen for row in read_file(file)]
        if path.exists():
            return read_file(path)
        data = _hub(*_hub_name(str(data)))
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
    rows = checked(list(data), "data")
    return with_class_names(rows, features.to_dict()) if hasattr(features, "to_dict") else rows


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
            return list(_hub(*_hub_name(str(data))))
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
    files = [file for file in sorted(folder.iterdir()) if suffix_of(file)]
    for name in SPLIT_NAMES:
        matches = [file for file in files if _split_of(file.name.removesuffix(suffix_of(file))) == name]
        stems = {_SHARD.sub("", file.name.removesuffix(suffix_of(file))) for file in matches}
        shards = all(_SHARD.search(file.name.removesuffix(suffix_of(file))) for file in matches)
        if len(matches) > 1 and not (shards and len(stems) == 1):
            raise ValueError(
                f"data {str(folder)!r}: several {name} files "
                f"({', '.join(f.name for f in matches)}); give the path of one of them"
            )
        if matches:
            found[name] = matches
    return found


def _hub_name(data: str) -> tuple[str, str | None]:
    if suffix_of(Path(data)) or not _HUB_NAME.fullmatch(data):
        raise FileNotFoundError(f"data {data!r}: no such file or folder")
    name, _, configuration = data.partition(":")
    return name, configuration or None


def _hub(name: str, configuration: str | None, **arguments: Any) -> Any:
    """All splits of a hub data set, by their names."""
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"data {name!r}: no such file or folder, and hub data sets need: pip install 'dqbart[hub]'"
        ) from None
    try:
        return datasets.load_dataset(name, configuration, **arguments)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"data {name!r}: no such file or folder, and no such hub data set ({one_line(error)})"
        ) from None
    # What `datasets` raises for no network, a missing configuration or split, and script data sets.
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"data {name!r}: no such file or folder, and as a hub data set it can't be read "
            f"({one_line(error)}); a configuration is given as owner/name:configuration"
        ) from None
