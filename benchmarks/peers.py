"""Peers: what people run such models with today, each in a virtual environment of its own.

    python benchmarks/peers.py list [--envs DIR]
    python benchmarks/peers.py install [PEER ...] [--envs DIR]

Problem: optimum-onnx needs transformers 4.57, we need 5; a benchmark that asks its reader to sort that out is not run.
Method: `install` makes one environment per peer with pinned versions, tries its imports, and only then marks it as
usable; `list` says which are and why the others aren't. Each peer is then a child process that loads one model and
answers requests (peer_runner.py has the protocol). Rejected: extras of our own package, which can't hold versions
that exclude each other.

The last line is JSON: {peer: null, or why it can't be used}.
"""

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import venv
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dqbart"
ENVS = CACHE / "envs"
RUNNER = Path(__file__).with_name("peer_runner.py")
MARK = "installed.json"


@dataclass(frozen=True)
class Environment:
    """`steps`: what pip installs, in turn; `probe`: imports that must then work."""

    steps: tuple[tuple[str, ...], ...]
    probe: str

    def pins(self) -> list[list[str]]:
        return [list(step) for step in self.steps]


TORCH = ("torch==2.13.0",)  # first and by itself: a CPU build that is at hand is then the one that is used
ENVIRONMENTS = {
    "ctranslate2": Environment(
        (TORCH, ("ctranslate2==4.8.5", "transformers==5.23.0")), "import ctranslate2, torch, transformers"
    ),
    "onnxruntime": Environment(
        (TORCH, ("optimum-onnx==0.1.0", "optimum==2.1.0", "transformers==4.57.6", "onnx==1.23.2",
                 "onnxruntime==1.31.1")),
        "from optimum.onnxruntime import ORTModelForSeq2SeqLM, ORTQuantizer",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class System:
    """One row of the tables: a library, in one of its variants, at some bits.

    `environment`: a key of ENVIRONMENTS, None for this Python. `command`: set for a program of the user's own that
    speaks the protocol; else peer_runner.py is run with `library` and `variant`.
    """

    name: str
    bits: str
    library: str
    variant: str
    environment: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    command: tuple[str, ...] = ()

    @property
    def is_peer(self) -> bool:
        return self.library != "dqbart"

    @property
    def conversion(self) -> str | None:
        """The variant that peer_runner.py converts the float model to; None if the library reads that itself."""
        if self.library == "dqbart":
            return self.bits
        return self.variant if self.environment else None

    def unusable(self, device: str, envs: Path) -> str | None:
        """Why it can't run here, or None."""
        if device not in self.devices:
            return f"not measured on {device}"
        return None if self.environment is None else unusable(self.environment, envs)

    def call(self, model: Path, threads: int, device: str, envs: Path) -> list[str]:
        """The child's command line."""
        own = [str(python_of(self.environment, envs)), str(RUNNER), self.library, self.variant]
        options = ["--model", str(model), "--threads", str(threads), "--device", device]
        return [*(self.command or own), *options]


_DEVICES = {"cpu": ("cpu",), "triton": ("cuda",)}  # of dqbart's engines


def systems(bits: Iterable[str], commands: Mapping[str, tuple[str, ...]]) -> list[System]:
    """All systems: transformers, the peers, every engine of dqbart at each of `bits`, and the user's own programs."""
    from dqbart.engines import ENGINES

    return [
        System("transformers-fp32", "32-32-32", "transformers", "float32"),
        System("transformers-fp16", "16-16-16", "transformers", "float16", devices=("cuda",)),
        System("transformers-bf16", "16-16-16", "transformers", "bfloat16"),
        System("transformers-compiled", "32-32-32", "transformers", "compiled"),
        System("ctranslate2-float32", "32-32-32", "ctranslate2", "float32", "ctranslate2", ("cpu",)),
        System("ctranslate2-int8", "8-8-8", "ctranslate2", "int8", "ctranslate2", ("cpu",)),
        System("onnxruntime-int8", "8-8-8", "onnxruntime", "int8", "onnxruntime", ("cpu",)),
        *(System(name, "", "own", name, command=command) for name, command in commands.items()),
        *(
            System(f"dqbart-{engine}", one, "dqbart", engine, devices=_DEVICES.get(engine, ("cpu", "cuda")))
            for engine in ENGINES
            for one in bits
        ),
    ]


def python_of(environment: str | None, envs: Path) -> Path:
    if environment is None:
        return Path(sys.executable)
    return envs / environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def unusable(name: str, envs: Path) -> str | None:
    """Why the environment can't be used, with the command that mends it; None if it can."""
    mend = f"python benchmarks/peers.py install {name}" + ("" if envs == ENVS else " --envs DIR")
    folder = envs / name
    if not python_of(name, envs).exists():
        return f"not installed: {mend}"
    mark = folder / MARK
    if not mark.exists():
        return f"half installed: {mend}"
    if json.loads(mark.read_text()) != ENVIRONMENTS[name].pins():
        return f"other versions installed: {mend}"
    return None


def install(name: str, envs: Path) -> None:
    """Make the environment anew. Raises `ValueError` with pip's or Python's last line if it doesn't work."""
    folder, environment = envs / name, ENVIRONMENTS[name]
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
        raise ValueError(f"{folder}: exists and is no virtual environment; choose another place with --envs")
    print(f"{name}: making {folder}", file=sys.stderr)
    venv.create(folder, clear=True, with_pip=True, symlinks=os.name != "nt")
    python = str(python_of(name, envs))
    for step in environment.steps:
        print(f"{name}: pip install {' '.join(step)}", file=sys.stderr)
        run([python, "-m", "pip", "install", "--quiet", *step])
    run([python, "-c", environment.probe])
    (folder / MARK).write_text(json.dumps(environment.pins()))


def run(command: list[str], **extra: str) -> None:
    """Run to its end, with `extra` in the environment. Raises `ValueError` with its last line if it fails."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env={**os.environ, **extra}
    )
    if done.returncode:
        words = " ".join(Path(word).name for word in command[:4])
        raise ValueError(f"{words} ended with {done.returncode}: {last_line(done.stderr or done.stdout)}")


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip()[:200] if lines else "it said nothing"


class PeerFailed(Exception):
    """A peer gave no answer; the message says why, in one line."""


class Child:
    """A process that speaks the protocol of peer_runner.py. `ready` is what it said once its model was loaded.

    `log`: where its stderr goes. Raises `PeerFailed` if it ends, talks nonsense or says that it failed, and
    `TimeoutError` if it is silent for `timeout` seconds; unless it said so itself it is then dead.
    """

    def __init__(self, command: list[str], log: Path, timeout: float, extra: Mapping[str, str]) -> None:
        self.log = log
        with log.open("w") as errors:
            try:
                # In a session of its own: Ctrl-C reaches the parent alone, which then ends its children in order.
                self.process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                    env={**os.environ, **extra}, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise PeerFailed(f"{command[0]}: {error.strerror}") from None
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.ready = self._receive(timeout)
        except BaseException:
            self.close(kill=True)
            raise

    @property
    def dead(self) -> bool:
        return self.process.poll() is not None

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The answer to one request."""
        assert self.process.stdin
        with suppress(OSError):  # it has ended: that is what receiving finds, with the reason
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self._receive(timeout)

    def hang_up(self) -> None:
        """Close its input: it ends once it has answered what it was asked."""
        assert self.process.stdin
        with suppress(OSError):
            self.process.stdin.close()

    def close(self, *, kill: bool = False) -> None:
        """End it: politely, then with its whole session. Nothing happens to one that has ended."""
        self.hang_up()
        try:
            self.process.wait(0 if kill else 10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def _receive(self, timeout: float) -> dict[str, Any]:
        try:
            line = self.lines.get(timeout=timeout)
        except queue.Empty:
            self.close(kill=True)
            raise TimeoutError(f"timed out: no answer in {timeout:g} s") from None
        if line is None:
            raise PeerFailed(self._end())
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            self.close(kill=True)
            raise PeerFailed(f"answered with something else than a JSON object: {line.strip()[:80]!r}")
        if "error" in message:
            raise PeerFailed(f"failed: {message['error']}")
        return message

    def _end(self) -> str:
        try:
            code = self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.close(kill=True)
            return "closed its output"
        if code < 0:
            name = signal.Signals(-code).name
            return f"killed by {name}" + (", as where memory runs out" if -code == signal.SIGKILL else "")
        return f"ended with {code}: {last_line(self.log.read_text())}"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, help in (("list", "say which are usable"), ("install", "make environments with pinned versions")):
        one = verbs.add_parser(verb, help=help)
        one.add_argument("--envs", type=Path, default=ENVS, help=f"where the environments are, default {ENVS}")
    verbs.choices["install"].add_argument("peers", nargs="*", metavar="PEER", help=", ".join(ENVIRONMENTS))
    args = parser.parse_args(words)
    args.envs = args.envs.absolute()
    try:
        if args.verb == "install":
            unknown = [name for name in args.peers if name not in ENVIRONMENTS]
            if unknown:
                raise ValueError(f"peer {unknown[0]!r}: expected {', '.join(ENVIRONMENTS)}")
            for name in args.peers or ENVIRONMENTS:
                install(name, args.envs)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command makes the environment anew", file=sys.stderr)
        return 130
    found = {name: unusable(name, args.envs) for name in ENVIRONMENTS}
    for name, reason in found.items():
        pins = ", ".join(pin for step in ENVIRONMENTS[name].steps for pin in step)
        print(f"{name:12} {reason or f'usable: {pins}'}")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
