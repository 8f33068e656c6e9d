"""What a decode step and a prefill of the GPU engine launch, read and compute: counted, with or without a GPU.

Launches are counted by taking their place: while `recorded` is open, whoever launches a kernel leaves a `Launch` here,
and nothing runs unless asked. On the device "meta", where tensors have shapes and no memory, a whole mBART is counted
in a second. A phase is a kernel and the first matrix among its arguments, or else the first vector, over all layers.

Bytes and operations are those that no engine can avoid (notes on GPU kernels: floors): weights once, the int8 keys and
values of all sources, shared by beams, and of the hypotheses' own past; and the integer products. What is handed from
phase to phase is not in them.

Shape suffixes: B sources, S their tokens, R rows (hypotheses).
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from dqbart_kernels.gpu.model import Model
from latency_models import Shape
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import KernelInterface

BANDWIDTH, RATE = (
    4.3e12,
    1979e12,
)  # of an H200: bytes a second that are reached, int8 operations a second that are promised


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, to be repeated by calling it."""

    phase: str
    kernel: Any
    grid: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.options)


@dataclass
class Recording:
    launches: list[Launch] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # torch's own operators that launch something

    @property
    def nodes(self) -> int:
        """Of the graph that would be captured."""
        return len(self.launches) + len(self.others)

    def phases(self) -> dict[str, list[Launch]]:
        found: dict[str, list[Launch]] = {}
        for launch in self.launches:
            found.setdefault(launch.phase, []).append(launch)
        return found


class _Others(TorchDispatchMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording, self.launching = recording, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not (self.launching or views or name.startswith(("empty", "new_empty"))):
            self.recording.others.append(name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def recorded(model: Model, execute: bool) -> Iterator[Recording]:
    """Every launch inside, in order; `execute`: which is made, too."""
    matrices, vectors = _names(model)
    recording = Recording()
    others = _Others(recording)
    launch = KernelInterface.__getitem__

    def instead(kernel: Any, grid: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> None:
            known = (names[id(x)] for names in (matrices, vectors) for x in arguments if id(x) in names)
            found = next(known, "")
            phase = f"{kernel.fn.__name__.strip('_')} {found}".strip()
            recording.launches.append(Launch(phase, kernel, grid, arguments, options))
            if execute:
                others.launching = True
                launch(kernel, grid)(*arguments, **options)
                others.launching = False

        return call

    KernelInterface.__getitem__ = instead  # type: ignore[method-assign]
    try:
        with others:
            yield recording
    finally:
        KernelInterface.__getitem__ = launch  # type: ignore[method-assign]


def _names(model: Model) -> list[dict[int, str]]:
    """The model's matrices and its vectors by identity, layers taken together."""
    vectors = {id(vector): name.removesuffix(".weight") for name, vector in model._vectors.items()}
    matrices = {id(linear.weight.packed_NW): name for name, linear in model._linear.items()}
    matrices[id(model.vocabulary.packed_NW)] = "vocabulary"
    return [{key: re.sub(r"\.layers\.\d+", "", name) for key, name in one.items()} for one in (matrices, vectors)]


def shapes_only(shape: Shape, layers: str, bits: str) -> Model:
    """The engine's model of a configuration, on the device meta."""
    import transformers

    from dqbart.engines.native import FAMILIES, _seq2seq, native_name
    from dqbart.notation import Bits
    from dqbart.packed.layout import FIELD_BITS, words_per_row

    cls = getattr(transformers, shape.architecture)
    depth = dict(zip(("encoder_layers", "decoder_layers"), map(int, layers.split("-")), strict=True))
    with torch.device("meta"):
        skeleton = cls(cls.config_class(**shape.config, **depth))
    model = Model(*_seq2seq(skeleton), device="meta")
    family, wanted = FAMILIES[skeleton.config.model_type], Bits(bits)
    for name, tensor in {**dict(skeleton.named_parameters()), **dict(skeleton.named_buffers())}.items():
        module, _, leaf = name.rpartition(".")
        known = native_name(family, module)
        kind = type(skeleton.get_submodule(module)).__name__
        if leaf == "weight" and (kind == "Linear" or known == "shared"):
            field_bits = FIELD_BITS[wanted.embeddings if known == "shared" else wanted.weights]
            n, k = tensor.shape
            packed = np.zeros((n, 4 * words_per_row(k, field_bits)), np.uint8)
            model.set_matrix(str(known), field_bits, (n, k), packed, np.ones(n, np.float32), None)
        elif kind != "Linear" and (known or name == "final_logits_bias"):
            values = np.zeros(tensor.numel(), np.float32)
            model.set_vector(f"{known}.{leaf}" if known else name, values)
    model.finish()
    return model


@dataclass
class Session:
    """A model at one size of call: what its prefill and its step run, outside of any graph."""

    model: Model
    batch: Any
    loop: Any
    beams: int
    tokens: int

    @classmethod
    def of(cls, model: Model, batch: int, beams: int, source: int, tokens: int) -> "Session":
        """Sources of exactly `source` tokens, and room for `tokens` steps. Raises `ValueError` out of range."""
        lengths = torch.full((batch,), source, dtype=torch.int32)
        ids = torch.randint(4, model.sizes["vocabulary"], (batch, source), dtype=torch.int32)
        on_paper = model.device.type == "meta"
        with recorded(model, execute=False) if on_paper else contextlib.nullcontext():
            made = model._batch(ids, lengths, None, decoder=True)
        return cls(model, made, model._loop(made, beams, beams, tokens, 1, None), beams, tokens)

    def prefill(self) -> None:
        self.batch.launches()

    def step(self) -> None:
        self.model._step(self.batch, self.loop, self.beams)

    def restart(self) -> None:
        """Before the first step, with nothing that could end before the last."""
        state, search = self.loop.state, self.loop.search
        rows = torch.arange(len(state.history_RT), dtype=torch.int32, device=self.model.device)
        state.step.zero_()
        state.tokens_TR[0].fill_(2)
        state.history_RT.copy_(rows[:, None].expand_as(state.history_RT))
        search.start(len(search.done_B), self.tokens + 1, ())


@dataclass(frozen=True)
class Work:
    """Bytes and integer operations that can't be avoided."""

    bytes: int
    operations: int

    def floor_us(self, bandwidth: float = BANDWIDTH, rate: float = RATE) -> float:
        return max(self.bytes / bandwidth, self.operations / rate) * 1e6


def work_of_step(model: Model, batch: int, beams: int, source: int, past: float) -> Work:
    """`past`: tokens that each hypothesis wrote before."""
    sizes, rows = model.sizes, batch * beams
    d, layers = sizes["d"], sizes["decoder_layers"]
    one_key = d + 4 * sizes["heads"]  # int8 codes, and a scale for each head
    linears = [x.weight for name, x in model._linear.items() if name.startswith("decoder") and "_attn.kv" not in name]
    weights = [*linears, model.vocabulary]
    keys = 2 * layers * one_key * (batch * source + rows * past)
    return Work(
        sum(w.packed_NW.nbytes + 8 * w.n for w in weights) + round(keys),  # each row has a scale and a bias
        2 * rows * sum(w.n * w.k for w in weights) + round(4 * layers * rows * d * (source + past)),
    )


def work_of_prefill(model: Model, batch: int, source: int) -> Work:
    """The encoder, and cross-attention's keys and values."""
    sizes = model.sizes
    d = sizes["d"]
    weights = [x.weight for name, x in model._linear.items() if name.startswith("encoder") or "encoder_attn.kv" in name]
    keys = 2 * sizes["decoder_layers"] * batch * source * (d + 4 * sizes["heads"])
    attention = 4 * sizes["encoder_steps"] * batch * source * source * d
    return Work(
        sum(w.packed_NW.nbytes + 8 * w.n for w in weights) + keys,
        2 * batch * source * sum(w.n * w.k for w in weights) + attention,
    )
