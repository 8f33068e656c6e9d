"""One run and its two folders: what it is, whether it is done, whether it may go on.

A run is told by a fingerprint of everything that decides its result: the resolved recipe, the teacher with its
tokenizer, and the texts. The same command finds the same fingerprint and continues; another one is told so, and
touches nothing.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two runs apart
    fcntl = None  # type: ignore[assignment]

SECONDS = "seconds.json"
LOCK = "dqbart.lock"
FINISHED = "finished"  # in run.json of a folder that is kept after its run


@dataclass(frozen=True)
class Run:
    """`output`: the packed folder to be. `work`: checkpoints and all else. `finished`: report, if done before."""

    output: Path
    work: Path
    identity: dict[str, Any]
    finished: dict[str, Any] | None

    @classmethod
    def open(cls, output: Path, identity: dict[str, Any], overwrite: bool) -> "Run":
        """Start or continue a run. Raises `FileExistsError` if the folder belongs to something else, or another process
        is at work there.

        With `overwrite` a finished run is done again, and one that was stopped goes on; what is in `output` stays there
        until there is something to put in its place. In a distributed run every process calls this with the same
        arguments; only the first one looks and writes.
        """
        if os.path.ismount(output):
            raise FileExistsError(f"{output}: a mount point, which can't be replaced; expected a folder in it")
        work = output.with_name(output.name + ".training")
        identity = json.loads(json.dumps(identity))
        if int(os.environ.get("RANK", "0")) != 0:
            done = None if overwrite else _read(output / "report.json")
            return cls(output, work, identity, done)
        before = _read(work / "run.json")
        if overwrite:
            _check_ours(output)
            if before != identity:
                _check_ours(work)
        elif _holds_something(output):
            done = _read(output / "report.json")
            difference = _difference(done and done.get("run"), identity)
            if difference:
                raise FileExistsError(f"{output}: {difference}; choose another --out, or --overwrite to replace it")
            return cls(output, work, identity, done)
        elif _holds_something(work):
            difference = _difference(before and {k: v for k, v in before.items() if k != FINISHED}, identity)
            if difference:
                raise FileExistsError(f"{work}: {difference}; choose another --out, or --overwrite to start anew")
        work.mkdir(parents=True, exist_ok=True)
        _lock(work)
        for old in work.iterdir() if overwrite and before != identity else ():
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old, ignore_errors=True)
            elif old.name != LOCK:
                old.unlink()
        _write(work / "run.json", identity)
        return cls(output, work, identity, None)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds a block's seconds to the run's, an interrupted one's, too."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if int(os.environ.get("RANK", "0")) == 0:
                spent = self.seconds.get(part, 0.0) + time.perf_counter() - start
                _write(self.work / SECONDS, self.seconds | {part: round(spent, 1)})

    @property
    def seconds(self) -> dict[str, float]:
        """What each part has taken so far, in all processes that worked at this run."""
        return _read(self.work / SECONDS) or {}

    def finish(self, staged: Path, report: dict[str, Any]) -> None:
        """Put report.json into the staged folder, move it into place, and drop what is only for resuming."""
        from dqbart.packed.checkpoint import put_in_place

        report["run"] = self.identity
        _write(staged / "report.json", report)
        _check_ours(self.output)  # as `open` did, hours ago
        put_in_place(staged, self.output, self.work / "replaced")
        _write(self.work / "run.json", self.identity | {FINISHED: True})
        for checkpoints in (self.work / "checkpoints", *self.work.glob("stage-*/checkpoints")):
            shutil.rmtree(checkpoints, ignore_errors=True)
        if {file.name for file in self.work.iterdir()} <= {"run.json", SECONDS, LOCK}:
            shutil.rmtree(self.work)
        else:
            (self.work / LOCK).unlink(missing_ok=True)
        if self.work in _locked:
            _locked.pop(self.work).close()


def model_fingerprint(model: Any, tokenizer: Any = None) -> str:
    """A hash of class, configuration, vocabulary and every weight, so that a retrained teacher is another teacher."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for config in filter(None, (model.config, getattr(model, "generation_config", None))):
        settings = {k: v for k, v in config.to_dict().items() if not k.startswith("_") and "version" not in k}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    if tokenizer is not None:
        words = [sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map, tokenizer.padding_side]
        digest.update(json.dumps(words, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(dtype=_BYTES()).numpy())
    return digest.hexdigest()[:16]


def data_fingerprint(train: Any, dev: Any) -> str | None:
    """A hash of all texts, or None without data."""
    if train is None and dev is None:
        return None
    digest = hashlib.sha256()
    for examples in (train, dev):
        if examples is not None:
            values = [getattr(examples, f.name) for f in dataclasses.fields(examples) if f.name != "skipped"]
            digest.update(json.dumps(values, default=dataclasses.asdict).encode())
    return digest.hexdigest()[:16]


def _BYTES() -> Any:
    import torch

    return torch.uint8


def _difference(before: Any, now: dict[str, Any]) -> str:
    """What sets two identities apart, in words; empty if nothing does."""
    if not isinstance(before, dict):
        return "exists and was not written by a finished dqbart run"
    if before == now:
        return ""
    if before.get("subnetwork"):
        return "a sub-network that was extracted from another folder"
    old, new = before.get("recipe", {}), now["recipe"]
    unknown = sorted(old.keys() ^ new.keys())
    if unknown:
        has = "a" if unknown[0] in old else "no"
        return f"made by another version of dqbart, whose recipes have {has} {unknown[0]!r}"
    for key in new:
        if old[key] != new[key]:
            return f"made with another recipe ({key} {old[key]!r}, now {new[key]!r})"
    names = {"teacher": "teacher", "student": "student to begin with", "data": "data set", "pooling": "pooling"}
    other = next((names[key] for key in names if before.get(key) != now.get(key)), "version of dqbart")
    return f"made with another {other}"


def _holds_something(folder: Path) -> bool:
    return folder.exists() and any(file.name != LOCK for file in folder.iterdir())


_locked: dict[Path, Any] = {}  # lock files by folder, each opened once: closing any other handle would free the lock


def _lock(work: Path) -> None:
    """Raises `FileExistsError` if another process has the folder; else none gets it until this one ends or is done.

    A lock of fcntl's kind: it dies with its process, however that ends, where flock's would live on in the data
    loader's workers.
    """
    if fcntl is None:
        return
    if work not in _locked or not (work / LOCK).exists():
        _locked[work] = open(work / LOCK, "w")  # noqa: SIM115
    try:
        fcntl.lockf(_locked[work], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        _locked.pop(work).close()
        raise FileExistsError(
            f"{work}: another process is at work there; wait for it, stop it, or choose another --out"
        ) from None
    except OSError:
        pass  # a file system without locks


def _check_ours(folder: Path) -> None:
    """Raises `FileExistsError` for a folder with something in it that no run has written."""
    report, run = (_read(folder / name) for name in ("report.json", "run.json"))
    if _holds_something(folder) and not isinstance((report or {}).get("run"), dict) and "recipe" not in (run or {}):
        raise FileExistsError(
            f"{folder}: not written by dqbart, so --overwrite does not touch it; choose another --out"
        )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(path: Path, value: Any) -> None:
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)
