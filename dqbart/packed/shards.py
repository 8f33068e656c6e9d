"""safetensors files, read with suspicion and written with care.

A file is 8 bytes of header length, a JSON header (name -> dtype, shape, byte range) and the tensors' bytes. We write
it ourselves because the library orders its metadata at random, and saving twice should give the same bytes; and
because plain writes and fsync report a full disk as `OSError` before anything is renamed into place. We parse headers
ourselves because sizes have to be bounded, and every defect named, before a tensor is allocated.

Each shard's metadata holds the sha256 of every tensor of the model, so one flipped bit is found and named. A tensor is
held to it as it is read: what was read is what was checked, whoever writes to the file meanwhile.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dqbart.packed.json_file import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "I32": torch.int32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "U8": torch.uint8, "I8": torch.int8, "BOOL": torch.bool, "F64": torch.float64, "I16": torch.int16,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # what the safetensors library accepts
DIGESTS = "dqbart_sha256"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in its file: bytes [begin, end) counted from the start of the file."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int
    sha256: str | None  # of these bytes; None where the file doesn't say


@dataclass(frozen=True)
class Shard:
    file: Path
    size: int  # of the file, in bytes
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def metadata(tensors: Mapping[str, Tensor], format_version: int) -> dict[str, str]:
    """What goes into each shard's metadata."""
    digests = {name: hashlib.sha256(_raw(tensor)).hexdigest() for name, tensor in sorted(tensors.items())}
    return {"format": "pt", "dqbart_format": str(format_version), DIGESTS: json.dumps(digests, separators=(",", ":"))}


def write_shard(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous CPU tensors; same input, same bytes. Raises `OSError` where the disk does."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps every tensor aligned
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name in order:
        tensor = tensors[name]
        begin, position = position, position + tensor.numel() * tensor.element_size()
        entry = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, position]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            out.write(_raw(tensors[name]))
        out.flush()
        os.fsync(out.fileno())


def read_shard(file: Path) -> Shard:
    """Parse and check one header. Raises `ValueError` naming the file, what was found and what was expected."""
    if file.suffix != ".safetensors":
        raise ValueError(f"{file}: expected a .safetensors file; other formats are not read")
    size = file.stat().st_size
    with open(file, "rb") as source:
        length = int.from_bytes(source.read(8), "little")
        if size < 8 or not 2 <= length <= min(LONGEST_HEADER, size - 8):
            raise ValueError(f"{file}: truncated or damaged: a header of {length} bytes in a file of {size}")
        text = source.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: damaged header ({error})") from None
    if not isinstance(header, dict):
        raise ValueError(f"{file}: damaged header: expected an object, found {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{file}: damaged header: __metadata__ is not text")
    digests = _digests(metadata)
    tensors = {name: _tensor_info(file, name, entry, 8 + length, digests.get(name)) for name, entry in header.items()}
    position = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            raise ValueError(f"{file}: tensor {name}: starts at byte {info.begin}, expected {position}")
        position = info.end
    if position != size:
        raise ValueError(f"{file}: truncated or damaged: {size} bytes, expected {position}")
    return Shard(file, size, tensors, metadata)


def _digests(metadata: dict[str, str]) -> dict[str, str]:
    try:
        found = json.loads(metadata.get(DIGESTS, "{}"))
    except (ValueError, RecursionError):
        return {}
    return {name: str(digest) for name, digest in found.items()} if isinstance(found, dict) else {}


def _tensor_info(file: Path, name: str, entry: Any, start: int, sha256: str | None) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        sound = all(type(side) is int and 0 <= side < 2**40 for side in [*shape, begin, end]) and len(shape) <= 8
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound or math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"{file}: tensor {name}: damaged header entry {json.dumps(entry)[:200]}")
    return TensorInfo(file, name, dtype, tuple(shape), start + begin, start + end, sha256)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} stands there twice")
        found[key] = value
    return found


def shard_files(folder: Path) -> list[Path]:
    """The weight files of a folder: one, or those that its index lists.

    Raises `FileNotFoundError` if there are none, `ValueError` for an index that leads elsewhere.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(f"{folder}: no {SINGLE} and no {INDEX} in it; other weight formats are not read")
    try:
        names = sorted(set(read_json(index, dict)["weight_map"].values()), key=str)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: damaged: expected a JSON object with 'weight_map' ({error})") from None
    files = []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: shard name {name!r}: expected the plain name of a .safetensors file")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: missing, though {INDEX} lists it")
        files.append(folder / name)
    return files


def merge(shards: Iterable[Shard]) -> dict[str, TensorInfo]:
    """All tensors by name. Raises `ValueError` for one that stands in two files, or files of two folders."""
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in shard.tensors.items():
            if name in tensors:
                raise ValueError(f"{info.file}: tensor {name}: duplicate, it is in {tensors[name].file.name} too")
            if info.file.parent != next(iter(tensors.values()), info).file.parent:
                raise ValueError(f"{info.file}: outside the folder of the other shards")
            tensors[name] = info
    return tensors


def weights_digest(folder: Path) -> str:
    """One digest of all weights, from what the first header says of them. Raises as `shard_files` and `read_shard`."""
    first = read_shard(shard_files(folder)[0])
    return hashlib.sha256(first.metadata.get(DIGESTS, "").encode()).hexdigest()


def read_tensor(info: TensorInfo) -> Tensor:
    """A copy of one tensor. Raises `ValueError` naming file and tensor where its sha256 is another."""
    data = bytearray(info.end - info.begin)
    with open(info.file, "rb") as source:
        source.seek(info.begin)
        source.readinto(data)
    if info.sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != info.sha256:
        raise ValueError(
            f"{info.file}: tensor {info.name}: sha256 {found[:16]}..., expected {info.sha256[:16]}...; "
            "the file is damaged, fetch or save it again"
        )
    return (
        torch.frombuffer(data, dtype=info.dtype).view(info.shape) if data else torch.empty(info.shape, dtype=info.dtype)
    )


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without copying."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")  # type: ignore[arg-type]
