"""Tuned launches: one table per GPU, configs/<its name>.json, which benchmarks/tune.py measures and writes.

    {"format": 1, "gpu": "NVIDIA H200", "kernels": {"int8_matmul": {"n768 k768 bits2 m16": {"bm": 16, "bn": 16, ...}}}}

Problem: the best cut of a launch is found by trying, and a request can't wait for that. Method: tables are measured
ahead of time and only read here, once a process; m is the smallest of `BUCKETS` that holds the rows, and where no table
has a size the caller's own rule decides. Rejected: `triton.autotune`, which tries within the first request of a size.

The fields are those of the caller's dataclass. A table that can't be read as such is refused, with file and key.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

T = TypeVar("T")
FORMAT = 1
FOLDER = Path(__file__).with_name("configs")
BUCKETS = (1, 4, 16, 64, 256, 1024, 4096)  # rows; more than the last are looked up as the last
KEY = re.compile(rf"n[1-9]\d* k[1-9]\d* bits[1248] m({'|'.join(map(str, BUCKETS))})")
_EMPTY: Mapping[str, Any] = MappingProxyType({})


def bucket(m: int) -> int:
    """The rows that stand for m rows in a table."""
    return next((rows for rows in BUCKETS if m <= rows), BUCKETS[-1])


def key(n: int, k: int, bits: int, m: int) -> str:
    return f"n{n} k{k} bits{bits} m{bucket(m)}"


def path_of(gpu: str, folder: Path | None = None) -> Path:
    """Where the table of a GPU of this name is, or would be."""
    return (folder or FOLDER) / (re.sub(r"[^\w.-]+", "_", gpu) + ".json")


@functools.cache
def read(path: Path, kernel: str, kind: type[T]) -> Mapping[str, T]:
    """A kernel's launches by key; none where there is no file. Raises `ValueError` naming the file and the key."""
    if not path.exists():
        return _EMPTY
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["format"]
        entries = dict(content["kernels"].get(kernel, {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a table of tuned launches ({error!r}); {_mend(path)}") from None
    if found != FORMAT:
        raise ValueError(f"{path}: format {found!r}, this version reads {FORMAT}; {_mend(path)}")
    return MappingProxyType({name: _entry(path, kernel, name, fields, kind) for name, fields in entries.items()})


def _entry(path: Path, kernel: str, name: str, fields: Any, kind: type[T]) -> T:
    where = f"{path}: {kernel} {name!r}"
    if not KEY.fullmatch(name):
        raise ValueError(f"{where}: expected a key like {key(768, 768, 2, 16)!r}, m one of {BUCKETS}; {_mend(path)}")
    wanted = {field.name: field.type for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(fields, dict) or set(fields) != set(wanted):
        raise ValueError(f"{where}: {fields!r}, expected the fields {', '.join(wanted)}; {_mend(path)}")
    for field, value in fields.items():
        if type(value) is not wanted[field] or (wanted[field] is int and value < 1):
            expected = "true or false" if wanted[field] is bool else "a whole number from 1 on"
            raise ValueError(f"{where}: {field} {value!r}, expected {expected}; {_mend(path)}")
    return kind(**fields)


def _mend(path: Path) -> str:
    return f"remove {path.name}, or make it again: python benchmarks/tune.py"


def find(gpu: str | None, kernel: str, kind: type[T], n: int, k: int, bits: int, m: int) -> T | None:
    """What is tuned for this launch on a GPU of this name (None: no GPU), or None. Raises as `read`."""
    if gpu is None:
        return None
    found: Mapping[str, T] = read(path_of(gpu), kernel, kind)  # type: ignore[arg-type]  # functools.cache knows no T
    return found.get(key(n, k, bits, m))
