"""Where measurements are kept: one JSON file a benchmark, one row a case, written as each row comes.

Problem: a full run takes hours, is interrupted, and goes on another day or on another machine. Method: rows are found
again by their key, a rerun measures only what is missing, and every row points to the run that made it: command,
commit, versions, processor. Rejected: a file per run (tables would have to choose) and CSV (rows differ in fields).
"""

import functools
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from dqbart.evaluation.environment import environment

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CHECKPOINT = ("config.json", "*.safetensors")  # what decides what a teacher says
RESULTS = Path(__file__).resolve().parent / "results"
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "asimddp", "i8mm")


class Ledger:
    """Rows of `path`, each a flat dict found by its values of `keys`.

    Raises `ValueError` naming the file if it holds something else.
    """

    def __init__(self, path: str | Path, keys: Iterable[str]) -> None:
        self.path, self.keys = Path(path), tuple(keys)
        self._own: dict[str, Any] | None = None
        self._read()

    def _read(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        if self.path.exists():
            try:
                content = json.loads(self.path.read_text(encoding="utf-8"))
                self.runs, self.rows = content["runs"], content["rows"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}: not a results file ({error!r}); expected JSON with 'runs' and 'rows'; move it away"
                ) from None

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The row with this key, or None. Every key must be given."""
        if set(key) != set(self.keys):
            raise ValueError(f"key {sorted(key)}: expected {sorted(self.keys)}")
        return next((row for row in self.rows if all(row.get(k) == v for k, v in key.items())), None)

    @property
    def own(self) -> dict[str, Any]:
        """This process, as `runs` has it."""
        if self._own is None:
            self._own = describe_run() | {"id": uuid4().hex[:8]}  # told from the same command's other runs
        return self._own

    def add(self, row: dict[str, Any], run: dict[str, Any] | None = None) -> None:
        """Store `row` in place of one with the same key; the file is whole after every call, and may be shared.

        `run`: what made the row, if that is not this process.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path.parent):
            self._read()  # what others have added
            self._store(row, run or self.own)

    def _store(self, row: dict[str, Any], run: dict[str, Any]) -> None:
        old = self.find(**{key: row[key] for key in self.keys})
        if run not in self.runs:
            self.runs.append(run)
        row = row | {"run": self.runs.index(run)}
        if old is None:
            self.rows.append(row)
        else:
            self.rows[self.rows.index(old)] = row
        self._drop_unused_runs()
        partial = self.path.with_name(self.path.name + ".partial")
        lines = {name: ",\n".join("  " + json.dumps(item) for item in getattr(self, name)) for name in ("runs", "rows")}
        partial.write_text(
            '{{\n "runs": [\n{runs}\n ],\n "rows": [\n{rows}\n ]\n}}\n'.format(**lines), encoding="utf-8"
        )
        os.replace(partial, self.path)

    def _drop_unused_runs(self) -> None:
        used = sorted({row["run"] for row in self.rows})
        place = {old: new for new, old in enumerate(used)}
        self.runs = [self.runs[old] for old in used]
        self.rows = [row | {"run": place[row["run"]]} for row in self.rows]


@functools.cache
def fingerprint(folder: Path, *patterns: str) -> str | None:
    """Hash of a folder's files, of all of them without patterns, read once; None where a pattern finds none."""
    found = [sorted(file for file in folder.glob(pattern) if file.is_file()) for pattern in patterns or ("*",)]
    if not all(found):
        return None
    hashed = hashlib.sha256()
    for file in sum(found, []):
        hashed.update(file.name.encode() + file.read_bytes())
    return hashed.hexdigest()[:16]


def require_same_files(ledger: Ledger, rows: Iterable[dict[str, Any]], files: str) -> None:
    """Names of folders say little: raises `ValueError` where one of `rows` was made of other `files`."""
    other = next((row for row in rows if row["files"] != files), None)
    if other is not None:
        known = ", ".join(str(other[name]) for name in ledger.keys[:2])
        raise ValueError(
            f"{ledger.path}: its rows of {known} were made of other files (fingerprint {other['files']}, these have "
            f"{files}); give another --out, or move it away"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time, where the system has such locks."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@functools.cache
def device_name(device: str) -> str:
    """What a time was measured on, for a row's key: "cpu" or "cuda" by name, so that another machine measures anew."""
    machine = environment()
    return str(machine["gpu"] if device == "cuda" else f"{machine['processor']} ({machine['instructions']})")


def _without_place(argument: str) -> str:
    """A path from the root says nothing to others: its last name stays."""
    return f".../{Path(argument).name}" if argument.startswith("/") else argument


def describe_run() -> dict[str, Any]:
    """Command, commit, date, versions and processor flags of this process."""
    script = Path(sys.argv[0]).name
    return {
        "command": shlex.join(["python", f"benchmarks/{script}", *map(_without_place, sys.argv[1:])]),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "flags": _flags(),
        **environment(),
    }


def _commit() -> str | None:
    """Short hash, with + where files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    except OSError:  # no git here
        return None
    if found.returncode:
        return None
    dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return found.stdout.strip() + ("+" if dirty else "")


def _flags() -> list[str]:
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.exists() else set()
    return [flag for flag in FLAGS if flag in words]


def resumable(main: Callable[..., int]) -> Callable[..., int]:
    """A benchmark whose Ctrl-C, or a batch system's SIGTERM, is one line and exit code 130, and what its user can mend
    (`ValueError`, `OSError`) one line and 2. Rows are in their files by then.
    """

    @functools.wraps(main)
    def guarded(*words: Any) -> int:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return main(*words)
        except KeyboardInterrupt:
            print("interrupted: the same command goes on with what its results file lacks", file=sys.stderr)
            return 130
        except (ValueError, OSError) as error:
            print(error, file=sys.stderr)
            return 2
        finally:
            signal.signal(signal.SIGTERM, before)

    return guarded


def markdown(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table; None becomes an empty cell."""
    header = list(header)
    lines = [header, ["---"] * len(header), *([("" if c is None else str(c)) for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
