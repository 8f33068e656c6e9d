"""Launches recorded once and replayed: on CUDA a captured graph, elsewhere the function itself.

A step of a small model is a hundred launches of a few microseconds each; asked for one by one from Python they take
longer than they run. A graph is bound to the memory it was captured with, so its inputs are buffers that the caller
fills, and what it returns is written anew by every replay.
"""

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
MOST = 32  # of each kind that are kept


@functools.cache
def _side(device: torch.device) -> Any:
    """The stream of all captures on a device: memory that one frees goes to the next of the same stream."""
    return torch.cuda.Stream(device)


class _Turn:
    def __init__(self) -> None:
        self.lock, self.busy, self.last = threading.RLock(), False, None


@functools.cache
def _turn_of(device: torch.device) -> _Turn:
    return _Turn()


@contextlib.contextmanager
def turn(device: torch.device) -> Iterator[None]:
    """Whoever uses a device's scratch, or buffers of a graph: one after the other, on whatever thread and stream.

    Raises `ValueError` inside another turn of the same thread.
    """
    mine, on_gpu = _turn_of(device), device.type == "cuda"
    with mine.lock, torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
        if mine.busy:
            raise ValueError(f"called by a streamer of another call on {device}: wait until that one has ended")
        mine.busy = True
        try:
            if mine.last is not None:
                torch.cuda.current_stream().wait_event(mine.last)
            yield
        finally:
            mine.busy, mine.last = False, torch.cuda.current_stream().record_event() if on_gpu else None


class Recorded(Generic[T]):
    """`run` captured on `device`, after one run that compiles its kernels. Graphs of one `pool` never run at once."""

    def __init__(self, run: Callable[[], T], device: torch.device, pool: Any = None) -> None:
        self._run: Callable[[], T] | None = run
        if device.type != "cuda":
            return
        current, side = torch.cuda.current_stream(device), _side(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            run()
        current.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # other threads may go on with their own work meanwhile
        try:
            with torch.cuda.graph(self._graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                self._result = run()
        finally:
            torch.cuda.set_stream(current)  # where a capture fails at its end, torch stays on the other one
        self._run = None  # it may hold what holds this graph

    def __call__(self) -> T:
        if self._run is not None:
            return self._run()
        self._graph.replay()
        return self._result


class Kept(Generic[T]):
    """The last things that were made for a key; the one that was not used for longest goes first."""

    def __init__(self) -> None:
        self._items: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self._items:
            while len(self._items) >= MOST:
                self._items.popitem(last=False)
            self._items[key] = make()
        self._items.move_to_end(key)
        return self._items[key]

    def __len__(self) -> int:
        return len(self._items)
