"""Is this folder what it says it is? Structure, digests and contents, before anything is built from it.

`check_files` runs at every load (headers against the model that config.json describes, sha256 of every tensor,
scales, padding); `verify` adds what costs a pass over all codes. The first defect raises, naming file, tensor, what
was found and what was expected.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dqbart.packed import shards
from dqbart.packed.json_file import read_json
from dqbart.packed.layout import as_bytes, check
from dqbart.packed.shards import Shard, TensorInfo
from dqbart.packed.skeleton import expected_tensors, swap_modules
from dqbart.packed.spec import PackedSpec
from dqbart.quant.sharing import shared_parts

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
# quantization_config says which attention there is; transformers would fetch code from the hub for the other two.
_NOT_OURS = ("quantization_config", "attn_implementation", "_attn_implementation")
MOST = 1024  # of layers, and of heads
_LAYERS = frozenset(
    "encoder_layers decoder_layers num_hidden_layers n_layers num_hidden_groups inner_group_num".split()
)
_HEADS = frozenset("encoder_attention_heads decoder_attention_heads num_attention_heads n_heads".split())


@dataclass(frozen=True)
class VerifyReport:
    """What was checked. `weight_bytes` is the sum of the files' sizes."""

    folder: str
    architecture: str
    files: int
    tensors: int
    packed_modules: int
    weight_bytes: int
    dqbart_version: str


def verify(folder: str | Path) -> VerifyReport:
    """Check a packed folder completely, without keeping a model.

    Raises `FileNotFoundError` for what is not there, `ValueError` for the first thing that is wrong.
    """
    folder = Path(folder)
    config = read_config(folder)
    spec = read_spec(folder, config)
    found = [shards.read_shard(file) for file in shards.shard_files(folder)]
    model = build_skeleton(folder, config, spec)
    check_files(found, expected_tensors(model, spec), spec, everything=True)
    return VerifyReport(
        folder=str(folder),
        architecture=type(model).__name__,
        files=len(found),
        tensors=sum(len(shard.tensors) for shard in found),
        packed_modules=len(spec.modules),
        weight_bytes=sum(shard.size for shard in found),
        dqbart_version=spec.dqbart_version,
    )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a packed folder. Raises like `verify`."""
    file = folder / CONFIG
    if not file.is_file():
        what = f"no {CONFIG} in it" if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"{folder}: {what}; expected a folder that dqbart wrote")
    config = read_json(file, dict)
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "dqbart":
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ValueError(f"{file}: quant_method {method!r}: expected 'dqbart'; make the folder with dqbart compress")
    for name in (_LAYERS | _HEADS) & config.keys():
        least = 1 if name in _HEADS else 0
        if type(config[name]) is not int or not least <= config[name] <= MOST:
            raise ValueError(f"{file}: {name} {config[name]!r}: expected a whole number from {least} to {MOST}")
    return config  # type: ignore[no-any-return]


def read_spec(folder: Path, config: dict[str, Any]) -> PackedSpec:
    """The validated quantization_config. Raises `ValueError` naming file and field."""
    try:
        return PackedSpec.from_dict(config["quantization_config"])
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: quantization_config: {error}") from None


def model_class(folder: Path, config: dict[str, Any]) -> Any:
    """transformers' class that config.json names. Raises `ValueError` if there is no such class."""
    import transformers

    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(f"{folder / CONFIG}: architectures {names!r}: expected one model class of transformers")
    kind = config.get("model_type")
    expected = found.config_class.model_type  # type: ignore[attr-defined]
    if kind != expected:
        raise ValueError(f"{folder / CONFIG}: model_type {kind!r}: {name} expects {expected!r}")
    return found


def read_generation_config(folder: Path, vocabulary: int) -> Any:
    """transformers' `GenerationConfig` of a folder, checked; None if it has none. Raises `ValueError`."""
    from transformers import GenerationConfig

    file = folder / GENERATION_CONFIG
    if not file.is_file():
        return None
    values = read_json(file, dict)
    defaults = GenerationConfig._get_default_generation_params()
    for name, value in values.items():
        if not _fits(name, value, defaults.get(name), vocabulary):
            raise ValueError(f"{file}: {name} {value!r}: not a value that generate takes")
    try:
        return GenerationConfig.from_dict(values)
    except Exception as error:  # it refuses combinations with errors of many kinds
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from None


def _fits(name: str, value: Any, default: Any, vocabulary: int) -> bool:
    """Whether a generation setting has a sound type, and token ids lie in the vocabulary."""
    if value is None or name == "early_stopping" and value in (True, False, "never"):
        return True
    if name.endswith(("_token_id", "_tokens", "_ids")) and not name.startswith(("num_", "max_", "min_")):
        values = value if isinstance(value, list) else [value]
        flat = [item for part in values for item in (part if isinstance(part, list) else [part])]
        return all(type(item) is int and 0 <= item < vocabulary for item in flat)
    if isinstance(default, bool) or name.startswith("output_"):
        return isinstance(value, bool)
    if isinstance(default, int) or name in ("max_new_tokens", "min_new_tokens"):
        low = 1 if name in ("num_beams", "num_return_sequences") else 0
        return type(value) is int and low <= value < 2**31
    return not isinstance(default, float) or (isinstance(value, int | float) and not isinstance(value, bool))


def model_config(folder: Path, config: dict[str, Any]) -> Any:
    """transformers' configuration object, what the file leaves out filled in. Raises `ValueError`."""
    cls = model_class(folder, config)
    values = {key: value for key, value in config.items() if key not in _NOT_OURS}
    try:
        settings = cls.config_class.from_dict(values)
        shared_parts(settings)
    except Exception as error:  # a wrong value upsets it in any way it likes
        raise ValueError(f"{folder / CONFIG}: {' '.join(str(error).split()) or repr(error)}") from None
    if settings.is_encoder_decoder != cls.config_class().is_encoder_decoder:
        found = settings.is_encoder_decoder
        raise ValueError(f"{folder / CONFIG}: is_encoder_decoder {found!r}: not what {cls.__name__} is")
    return settings


def build_skeleton(folder: Path, config: dict[str, Any], spec: PackedSpec) -> Any:
    """The packed model without data, on the meta device."""
    cls, settings = model_class(folder, config), model_config(folder, config)
    try:
        with torch.device("meta"):
            model = cls(settings)
        swap_modules(model, spec)
    except Exception as error:  # a wrong value in config.json upsets a model's constructor in any way it likes
        raise ValueError(f"{folder / CONFIG}: {' '.join(str(error).split()) or repr(error)}") from None
    return model


def check_files(
    found: Iterable[Shard],
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    spec: PackedSpec,
    *,
    prefix: str = "",
    everything: bool = False,
) -> None:
    """Hold shards to what the model expects. `prefix`: the part of a larger checkpoint that is wanted ("model.").

    `everything` also looks at every code and float. Raises `ValueError` naming file, tensor, found and expected.
    """
    for name, info in check_headers(found, expected, spec, prefix).items():
        read_checked(name, info, spec, everything)


def check_headers(
    found: Iterable[Shard],
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    spec: PackedSpec,
    prefix: str = "",
) -> dict[str, TensorInfo]:
    """What `check_files` does without the tensors, and where these are, by their names in the model."""
    found = list(found)
    for shard in found:
        for key, value in (("format", "pt"), ("dqbart_format", str(spec.format_version))):
            if shard.metadata.get(key) != value:
                raise ValueError(f"{shard.file}: {key} {shard.metadata.get(key)!r}: expected {value!r}")
    tensors = {n.removeprefix(prefix): t for n, t in shards.merge(found).items() if n.startswith(prefix)}
    folder = found[0].file.parent if found else Path()
    for name, (dtype, shape) in expected.items():
        info = tensors.get(name)
        if info is None:
            raise ValueError(f"{folder}: tensor {prefix}{name}: missing, expected {dtype} {list(shape)}")
        if (info.dtype, info.shape) != (dtype, shape):
            raise ValueError(
                f"{info.file}: tensor {prefix}{name}: found {info.dtype} {list(info.shape)}, "
                f"expected {dtype} {list(shape)}"
            )
    for name, info in tensors.items():
        if name not in expected:
            raise ValueError(f"{info.file}: tensor {prefix}{name}: the model has no such tensor")
        if info.sha256 is None:
            raise ValueError(f"{info.file}: damaged header: no sha256 for each tensor in {shards.DIGESTS}")
    return tensors


def read_checked(name: str, info: TensorInfo, spec: PackedSpec, everything: bool = False) -> Tensor:
    """The tensor that the model calls `name`, its digest and contents checked as `check_files` does."""
    tensor = shards.read_tensor(info)
    try:
        _check_content(name, tensor, spec, everything)
    except ValueError as error:
        raise ValueError(f"{info.file}: tensor {info.name}: {error}") from None
    return tensor


def _check_content(name: str, tensor: Tensor, spec: PackedSpec, everything: bool) -> None:
    module, _, leaf = name.rpartition(".")
    entry = spec.modules.get(module)
    if entry is not None and leaf == "weight_scale":
        if not (tensor.isfinite() & (tensor >= 0)).all():
            raise ValueError("scales that are negative, infinite or NaN; expected finite ones of at least 0")
    elif entry is not None and leaf == "weight":
        check(as_bytes(tensor), entry.bits, entry.shape[1], entry.layout, padding_only=not everything)
    elif everything and tensor.is_floating_point() and not tensor.isfinite().all():
        raise ValueError("infinite or NaN values")


def state_of(folder: Path) -> list[tuple[str, int, int, int]]:
    """What tells a model's files from those that a later save puts in their place."""
    names = sorted([CONFIG, GENERATION_CONFIG, shards.INDEX, *(file.name for file in folder.glob("*.safetensors"))])
    found = [(name, (folder / name).stat()) for name in names if (folder / name).exists()]
    return [(name, file.st_ino, file.st_mtime_ns, file.st_size) for name, file in found]


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Raises `ValueError` where another model took the folder's place in the block, whatever else was raised there."""
    before = state_of(folder)
    try:
        yield
    finally:
        require_state(folder, before)


def require_state(folder: Path, before: list[tuple[str, int, int, int]]) -> None:
    """Raises `ValueError` where the folder is no longer what `state_of` said."""
    if state_of(folder) != before:
        raise ValueError(f"{folder}: changed while it was read, as by a save over it; load it again")
