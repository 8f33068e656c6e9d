"""The native CPU library: found, loaded and called. numpy in, numpy out; no torch, nothing of dqbart.

`setup.py` compiles `src/` into `libdqbart_cpu` beside this file. Without it everything else of dqbart works; `reason()`
says why it is not there. The environment variable DQBART_ISA forces an instruction set that the processor has.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqbart_kernels.sizes import complete

VARIABLE = "DQBART_ISA"
EARLY_STOPPING = {False: 0, True: 1, "never": 2}

I8 = NDArray[np.int8]
U8 = NDArray[np.uint8]
I32 = NDArray[np.int32]
F32 = NDArray[np.float32]
OnToken = Callable[[int, int], bool]

_library: ctypes.CDLL | None = None


class _Options(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int32)
        for name in (
            "num_beams", "num_return_sequences", "max_length", "min_length", "no_repeat_ngram_size", "early_stopping",
            "do_sample", "top_k", "start_token", "forced_bos_token", "forced_eos_token",
            "begin_suppress_at",
        )
    ] + [
        (name, ctypes.c_float) for name in ("repetition_penalty", "temperature", "top_p")
    ] + [("length_penalty", ctypes.c_double)] + [("seed", ctypes.c_uint64)]  # fmt: skip


_ON_TOKEN = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_int32, ctypes.c_int32)


def reason() -> str | None:
    """Why the library can't be used, in a line; None if it can."""
    try:
        _load()
    except OSError as error:
        return str(error)
    return None


def instruction_sets() -> list[str]:
    """What this processor can run, best first."""
    return str(_load().dq_instruction_sets().decode()).split()


def chosen_instruction_set() -> str:
    """The best one, or what DQBART_ISA says. Raises `ValueError` for one that is not there."""
    names = instruction_sets()
    wanted = os.environ.get(VARIABLE) or names[0]
    if wanted not in names:
        raise ValueError(f"{VARIABLE} {wanted!r}: expected one of {', '.join(names)}")
    return wanted


def _load() -> ctypes.CDLL:
    global _library
    if _library is None:
        folder = Path(__file__).resolve().parent
        found = sorted(folder.glob("libdqbart_cpu*.so")) + sorted(folder.glob("libdqbart_cpu*.dylib"))
        if not found:
            raise OSError("the native library was not built: install a C++ compiler (g++), then dqbart again")
        library = ctypes.CDLL(str(found[0]))
        for name in ("dq_error", "dq_instruction_sets", "dq_model_instruction_set"):
            getattr(library, name).restype = ctypes.c_char_p
        library.dq_model_new.restype = ctypes.c_void_p
        library.dq_packed_bytes.restype = ctypes.c_int64
        _library = library
    return _library


def _check(status: int) -> None:
    if status:
        message = _load().dq_error().decode()
        raise (MemoryError if message == "out of memory" else ValueError)(message)


def _pointer(array: NDArray[Any] | None, dtype: Any, shape: tuple[int, ...] | None = None) -> ctypes.c_void_p:
    """The address of a C-contiguous array of this dtype and shape. Raises `TypeError` for anything else."""
    if array is None:
        return ctypes.c_void_p()
    if not isinstance(array, np.ndarray) or array.dtype != dtype or not array.flags.c_contiguous:
        raise TypeError(
            f"expected a contiguous array of {np.dtype(dtype).name}, found {getattr(array, 'dtype', array)!r}"
        )
    if shape is not None and array.shape != shape:
        raise TypeError(f"expected shape {shape}, found {array.shape}")
    return ctypes.c_void_p(array.ctypes.data)


def _ragged(sources: Sequence[I32]) -> tuple[I32, I32]:
    """Token rows one after the other, and where each starts."""
    rows = [np.ascontiguousarray(row, np.int32) for row in sources]
    if any(row.ndim != 1 for row in rows) or not rows:
        raise ValueError("sources: expected one row of token ids each, at least one")
    starts = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=starts[1:])
    return np.concatenate(rows), starts


class Model:
    """A transformer in native memory: BART and mBART, or an encoder. Filled once, then used by any number of threads.

    `sizes`: see `dqbart_kernels.sizes`.
    Raises `ValueError` with the name and what was expected for whatever doesn't fit.
    """

    def __init__(self, sizes: dict[str, int], embed_scale: float, eps: float) -> None:
        sizes = complete(sizes)
        library = _load()
        ints = np.array(list(sizes.values()), np.int32)
        floats = np.array([embed_scale, eps], np.float32)
        isa = chosen_instruction_set().encode()
        self._ready = False
        self._handle = ctypes.c_void_p(
            library.dq_model_new(_pointer(ints, np.int32), len(ints), _pointer(floats, np.float32), isa)
        )
        if not self._handle:
            _check(1)
        self.sizes = sizes
        self.instruction_set: str = library.dq_model_instruction_set(self._handle).decode()

    def __del__(self) -> None:
        if _library is not None and getattr(self, "_handle", None):
            _library.dq_model_free(self._handle)

    def set_matrix(
        self, name: str, bits: int, shape: tuple[int, int], planar: U8, scale: F32, bias: F32 | None
    ) -> None:
        """`planar`: planar32 bytes [N, row bytes]; `scale`, `bias`: [N]."""
        n, k = shape
        _check(
            _load().dq_set_matrix(
                self._handle, name.encode(), bits, n, k, _pointer(planar, np.uint8), ctypes.c_int64(planar.size),
                _pointer(scale, np.float32, (n,)), _pointer(bias, np.float32, (n,)),
            )
        )  # fmt: skip

    def set_vector(self, name: str, values: F32) -> None:
        _check(
            _load().dq_set_vector(
                self._handle, name.encode(), _pointer(values, np.float32), ctypes.c_int64(values.size)
            )
        )

    def finish(self) -> None:
        """Everything was set. Raises `ValueError` naming what is missing."""
        _check(_load().dq_finish(self._handle))
        self._ready = True

    def encode(self, sources: Sequence[I32], threads: int, types: Sequence[I32] | None = None) -> list[F32]:
        """Last hidden states of the encoder, [length, d] per source. `types`: token types, zeros where not given."""
        tokens, starts = self._sources(sources, threads)
        types_T = None if types is None else _ragged(types)[0]
        if types_T is not None and [len(row) for row in types or ()] != [len(row) for row in sources]:
            raise ValueError("token types: expected as many as there are tokens in each source")
        hidden = np.empty((len(tokens), self.sizes["d"]), np.float32)
        _check(
            _load().dq_encode(
                self._handle, threads, _pointer(tokens, np.int32), _pointer(types_T, np.int32),
                _pointer(starts, np.int32), len(sources), _pointer(hidden, np.float32),
            )
        )  # fmt: skip
        return [hidden[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]

    def logits(self, sources: Sequence[I32], decoder_tokens: I32, threads: int) -> F32:
        """[items, length, vocabulary] for given decoder tokens [items, length], step by step as in generation."""
        tokens, starts = self._sources(sources, threads)
        items, length = decoder_tokens.shape
        if items != len(sources):
            raise ValueError(f"{items} rows of decoder tokens for {len(sources)} sources")
        out = np.empty((items, length, self.sizes["vocabulary"]), np.float32)
        _check(
            _load().dq_logits(
                self._handle, threads, _pointer(tokens, np.int32), _pointer(starts, np.int32), items,
                _pointer(decoder_tokens, np.int32), length, _pointer(out, np.float32),
            )
        )  # fmt: skip
        return out

    def generate(
        self,
        sources: Sequence[I32],
        *,
        threads: int,
        start_token: int,
        max_length: int,
        eos: Sequence[int] = (),
        num_beams: int = 1,
        num_return_sequences: int = 1,
        min_length: int = 0,
        no_repeat_ngram_size: int = 0,
        early_stopping: bool | str = False,
        length_penalty: float = 1.0,
        repetition_penalty: float = 1.0,
        forced_bos_token: int | None = None,
        forced_eos_token: int | None = None,
        bad_words: Sequence[Sequence[int]] = (),
        suppress: Sequence[int] = (),
        begin_suppress: Sequence[int] = (),
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        on_token: OnToken | None = None,
    ) -> tuple[list[I32], F32, bool]:
        """Token ids per sequence from the start token on, scores of beam search, and whether it ran to its end.

        Where fewer texts than `num_return_sequences` could be written, the others are a start token of score -1e9.
        `on_token(sequence, token)` is called as tokens are chosen, without beams; a true answer stops. Lengths count
        the start token. The interpreter's lock is released meanwhile.
        """
        tokens, starts = self._sources(sources, threads)
        options = _Options(
            num_beams, num_return_sequences, max_length, min_length, no_repeat_ngram_size,
            EARLY_STOPPING[early_stopping], do_sample, top_k, start_token,
            -1 if forced_bos_token is None else forced_bos_token, -1 if forced_eos_token is None else forced_eos_token,
            1 if forced_bos_token is None else 2, repetition_penalty, temperature, top_p, length_penalty, seed,
        )  # fmt: skip
        if not (temperature > 0 and 0 < top_p <= 1 and repetition_penalty > 0):
            raise ValueError(
                f"temperature {temperature!r}, top_p {top_p!r}, repetition_penalty {repetition_penalty!r}: expected "
                "above 0, and top_p at most 1"
            )
        rows = [list(eos), list(suppress), list(begin_suppress), *map(list, bad_words)]
        lists = np.array([i for row in rows for i in (len(row), *row)], np.int32)
        count = len(sources) * num_return_sequences
        ids = np.zeros((count, max(0, max_length)), np.int32)
        lengths, scores, stopped = np.zeros(count, np.int32), np.zeros(count, np.float32), np.zeros(1, np.int32)
        failure: list[BaseException] = []

        def call(sequence: int, token: int) -> bool:
            try:
                return bool(on_token(sequence, token))  # type: ignore[misc]
            except BaseException as error:  # it can't pass through native code: stop, and raise it there
                failure.append(error)
                return True

        _check(
            _load().dq_generate(
                self._handle, threads, _pointer(tokens, np.int32), _pointer(starts, np.int32), len(sources),
                ctypes.byref(options), _pointer(lists, np.int32), len(lists),
                _ON_TOKEN(call) if on_token else _ON_TOKEN(), _pointer(ids, np.int32), _pointer(lengths, np.int32),
                _pointer(scores, np.float32), _pointer(stopped, np.int32),
            )
        )  # fmt: skip
        if failure:
            raise failure[0]
        return [row[:n] for row, n in zip(ids, lengths, strict=True)], scores, not stopped[0]

    def _sources(self, sources: Sequence[I32], threads: int) -> tuple[I32, I32]:
        if not self._ready:
            raise ValueError("the model is not finished: call finish() after setting everything")
        if not 1 <= threads <= 1024:
            raise ValueError(f"threads {threads!r}: expected 1 to 1024")
        return _ragged(sources)
