"""What a packed model says about itself: the validated form of `quantization_config` in config.json.

Everything in it comes from a file that anyone may have written, so every field is checked, by type and by value,
before something is built from it. Named fields, never positions; an unknown field is refused, since an older
reader can't know what a newer writer meant by it.
"""

import dataclasses
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, TypeVar

import torch

from dqbart.packed.layout import LAYOUTS, words_per_row
from dqbart.quant.quantizers import SCHEMES, PaperQuantizer, Quantizer

T = TypeVar("T")

QUANT_METHOD = "dqbart"
FORMAT_VERSION = 1
FLOAT_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LARGEST_SIDE = 2**31 - 1


def dqbart_version() -> str:
    try:
        return version("dqbart")
    except PackageNotFoundError:  # run from a source tree that was not installed
        return "source"


@dataclass(frozen=True, kw_only=True)
class ModuleSpec:
    """One quantized module. `shape` is [out_features, in_features] or [tokens, width].

    `tied_to` names the module that stores the matrix; such a module has no layout of its own and repeats the
    owner's bits and shape.
    """

    kind: Literal["linear", "embedding"]
    bits: int
    scheme: str
    shape: tuple[int, int]
    layout: str = "planar32"
    granularity: Literal["row", "tensor"] = "row"
    tied_to: str | None = None

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, ("linear", "embedding"))
        _one_of("bits", self.bits, tuple(SCHEMES))
        _one_of("scheme", self.scheme, (SCHEMES[self.bits],))
        _one_of("layout", self.layout, LAYOUTS)
        _one_of("granularity", self.granularity, ("row", "tensor") if self.kind == "linear" else ("row",))
        if not isinstance(self.tied_to, str | None):
            raise ValueError(f"tied_to {self.tied_to!r}: expected a module name or null")
        shape = self.shape
        if (
            not isinstance(shape, list | tuple)
            or len(shape) != 2
            or not all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in shape)
        ):
            raise ValueError(f"shape {shape!r}: expected two integers from 1 to {LARGEST_SIDE}")
        object.__setattr__(self, "shape", tuple(shape))
        words_per_row(self.shape[1], self.bits, self.layout)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Of the stored int32 tensor."""
        return self.shape[0], words_per_row(self.shape[1], self.bits, self.layout)

    @property
    def scale_shape(self) -> tuple[int, int]:
        return (self.shape[0], 1) if self.granularity == "row" else (1, 1)


@dataclass(frozen=True, kw_only=True)
class PackedSpec:
    """All of `quantization_config`. Raises `ValueError` naming the field, what was found and what is allowed."""

    modules: dict[str, ModuleSpec]
    numerics: Literal["integer", "paper"] = "integer"
    activation_bits: Literal[8, 32] = 8
    probability_bits: Literal[8, 16] = 16
    float_dtype: str = "float16"  # positions, norms, biases
    matrix_dtype: str = "float32"  # weight matrices that were left in float
    format_version: int = FORMAT_VERSION
    dqbart_version: str = field(default_factory=dqbart_version)

    def __post_init__(self) -> None:
        _one_of("format_version", self.format_version, (FORMAT_VERSION,))
        _one_of("numerics", self.numerics, ("integer", "paper"))
        _one_of("activation_bits", self.activation_bits, (8, 32))
        _one_of("probability_bits", self.probability_bits, (8, 16))
        _one_of("float_dtype", self.float_dtype, tuple(FLOAT_DTYPES))
        _one_of("matrix_dtype", self.matrix_dtype, tuple(FLOAT_DTYPES))
        if not isinstance(self.dqbart_version, str):
            raise ValueError(f"dqbart_version {self.dqbart_version!r}: expected text")
        for name, module in self.modules.items():
            owner = self.modules.get(module.tied_to) if module.tied_to is not None else None
            if module.tied_to is not None and (
                owner is None
                or owner.tied_to is not None
                or (owner.bits, owner.shape) != (module.bits, module.shape)
                or owner.granularity != "row"
            ):
                raise ValueError(f"modules.{name}: tied_to {module.tied_to!r}, which stores no matrix like it")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PackedSpec":
        """Read `quantization_config`. Raises `ValueError` for any key or value that this version doesn't know."""
        values = dict(values)
        if values.pop("quant_method", None) != QUANT_METHOD:
            raise ValueError(f"quant_method: expected {QUANT_METHOD!r}")
        # First, because whatever else looks odd is odd because of it.
        _one_of("format_version", values.get("format_version"), (FORMAT_VERSION,))
        modules = values.pop("modules", None)
        if not isinstance(modules, dict):
            raise ValueError(f"modules {modules!r}: expected an object of module names")
        return _build(cls, values | {"modules": {name: _module(name, entry) for name, entry in modules.items()}})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` is the exact inverse. Defaults of modules are left out."""
        values: dict[str, Any] = {"quant_method": QUANT_METHOD}
        for f in dataclasses.fields(self):
            if f.name != "modules":
                values[f.name] = getattr(self, f.name)
        values["modules"] = {name: _compact(module) for name, module in self.modules.items()}
        return values

    def with_storage(self, storage: str) -> "PackedSpec":
        """The same with every ternary matrix in layout `storage`; the others stay planar32."""
        _one_of("storage", storage, LAYOUTS)
        modules = {
            name: dataclasses.replace(m, layout=storage if m.bits == 2 and m.tied_to is None else "planar32")
            for name, m in self.modules.items()
        }
        return dataclasses.replace(self, modules=modules)

    def inside(self, prefix: str) -> "PackedSpec":
        """What remains for the part of the model under `prefix` ("model."), names shortened."""
        modules = {
            name.removeprefix(prefix): dataclasses.replace(
                m, tied_to=None if m.tied_to is None else m.tied_to.removeprefix(prefix)
            )
            for name, m in self.modules.items()
            if name.startswith(prefix)
        }
        return dataclasses.replace(self, modules=modules)

    def weight_quantizer(self, module: ModuleSpec) -> Quantizer:
        """What made a module's codes."""
        kind = Quantizer if self.numerics == "integer" else PaperQuantizer
        return kind(module.bits, module.granularity)

    def input_quantizer(self) -> Quantizer | None:
        """How linear layers quantize their inputs, or None."""
        if self.activation_bits == 32:
            return None
        return Quantizer(8) if self.numerics == "integer" else PaperQuantizer(8, "tensor")


def _module(name: str, entry: Any) -> ModuleSpec:
    if not isinstance(entry, dict):
        raise ValueError(f"modules.{name} {entry!r}: expected an object")
    try:
        return _build(ModuleSpec, entry)
    except ValueError as error:
        raise ValueError(f"modules.{name}: {error}") from None


def _build(cls: type[T], values: dict[str, Any]) -> T:
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ValueError(f"unknown field {key!r}: known are {', '.join(known)}")
    for key, f in known.items():
        if key not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{key} is missing")
    return cls(**values)


def _compact(module: ModuleSpec) -> dict[str, Any]:
    entry = {f.name: getattr(module, f.name) for f in dataclasses.fields(module)}
    entry["shape"] = list(module.shape)
    defaults = {"layout": "planar32", "granularity": "row", "tied_to": None}
    return {key: value for key, value in entry.items() if key not in defaults or value != defaults[key]}


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed or type(value) is not type(allowed[0]):
        raise ValueError(f"{name} {value!r}: expected {' or '.join(map(repr, allowed))}")
