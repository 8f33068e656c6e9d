"""One run and its two folders: what it is, whether it is done, whether it may go on.

A run is told by a fingerprint of everything that decides its result: the resolved recipe, the teacher's weights and
the texts. The same command finds the same fingerprint and continues; another one is told so, and touches nothing.
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

SECONDS = "seconds.json"


@dataclass(frozen=True)
class Run:
    """`output`: the packed folder to be. `work`: checkpoints and all else. `finished`: report, if done before."""

    output: Path
    work: Path
    identity: dict[str, Any]
    finished: dict[str, Any] | None

    @classmethod
    def open(cls, output: Path, identity: dict[str, Any], overwrite: bool) -> "Run":
        """Start or continue a run. Raises `FileExistsError` if the folder belongs to something else.

        In a distributed run every process calls this with the same arguments; only the first one looks and writes.
        """
        work = output.with_name(output.name + ".training")
        identity = json.loads(json.dumps(identity))
        if int(os.environ.get("RANK", "0")) != 0:
            done = None if overwrite else _read(output / "report.json")
            return cls(output, work, identity, done)
        if overwrite:
            for folder in (output, work):
                _remove_ours(folder)
        done = _read(output / "report.json")
        if output.exists() and any(output.iterdir()):
            difference = _difference(done.get("run") if done else None, identity)
            if difference and not overwrite:
                raise FileExistsError(f"{output}: {difference}; choose another --out, or --overwrite to replace it")
            if not difference:
                return cls(output, work, identity, done)
        before = _read(work / "run.json")
        if work.exists() and any(work.iterdir()) and not overwrite:
            difference = _difference(before, identity)
            if difference:
                raise FileExistsError(f"{work}: {difference}; choose another --out, or --overwrite to start anew")
        work.mkdir(parents=True, exist_ok=True)
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
        report["run"] = self.identity
        _write(staged / "report.json", report)
        if self.output.exists():
            self.output.rmdir()  # empty, or `open` would have refused
        os.replace(staged, self.output)
        for checkpoints in (self.work / "checkpoints", *self.work.glob("stage-*/checkpoints")):
            shutil.rmtree(checkpoints, ignore_errors=True)
        if {file.name for file in self.work.iterdir()} <= {"run.json", SECONDS}:
            shutil.rmtree(self.work)


def teacher_fingerprint(model: Any) -> str:
    """A hash of the architecture and of every weight, so that a retrained teacher is another teacher."""
    digest = hashlib.sha256(type(model).__name__.encode())
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
    names = {"teacher": "teacher", "student": "student to begin with", "data": "data set"}
    return f"made with another {next(names[key] for key in names if before.get(key) != now.get(key))}"


def _remove_ours(folder: Path) -> None:
    """Delete a folder of ours; refuse anything that no run has written."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not any((folder / name).exists() for name in ("run.json", "report.json")):
        raise FileExistsError(
            f"{folder}: not written by dqbart, so --overwrite does not touch it; choose another --out"
        )
    shutil.rmtree(folder)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def _write(path: Path, value: Any) -> None:
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)
