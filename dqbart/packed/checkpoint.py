"""The folder: a student goes in, `save_packed` writes what `load_packed` and transformers can read.

A save is all or nothing. Everything is written into a hidden sibling of the folder, flushed to disk, and renamed into
place; whatever goes wrong before that removes the sibling and leaves an existing folder untouched. Floats are stored
as fp16 by default and evaluated as their stored values in fp32: give the student those values with `round_floats_`
before comparing the two.
"""

import copy
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dqbart.packed import hook, shards
from dqbart.packed.plain import is_plain
from dqbart.packed.skeleton import round_floats_, spec_of, stored_tensors, swap_modules
from dqbart.packed.spec import PackedSpec
from dqbart.packed.verify import build_skeleton, model_class, read_config, read_generation_config, read_spec

__all__ = ["check_generation_config", "load_packed", "put_in_place", "round_floats_", "save_packed", "size_table"]


def save_packed(
    model: Any,
    folder: str | Path,
    *,
    recipe: str | None = None,
    tokenizer: Any = None,
    generation_config: Any = None,
    storage: str | None = None,
    float_dtype: torch.dtype | None = None,
    matrix_dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Write a prepared (fake-quantized) or packed model as a folder, and return its path.

    `recipe`: text for recipe.yaml. `generation_config`: the model's own unless given. `storage`: "planar32", or
    "trits" for ternary matrices. `float_dtype`: of positions, norms and biases (fp16); `matrix_dtype`: of weight
    matrices left in float (fp32). None means the default, or for a packed model what it was loaded with.
    `overwrite` replaces a packed folder as a whole, and nothing else.
    Raises `FileExistsError` for a folder in use, `ValueError` for a model that doesn't fit, `OSError` for the disk.
    """
    folder = Path(os.path.realpath(folder))  # what a link points to is what is replaced
    _require_replaceable(folder, overwrite)
    spec, skeleton = _spec_and_skeleton(model, storage, float_dtype, matrix_dtype)
    tensors = stored_tensors(model, skeleton, spec)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.quantization_config = spec.to_dict()
    config.dtype = "float32" if not _is_packed(model) else str(model.dtype).removeprefix("torch.")
    if config.model_type in ("bart", "mbart"):
        config.normalize_before = config.model_type == "mbart"  # CTranslate2 asks for it, transformers 5 dropped it
    if generation_config is None and model.can_generate():
        generation_config = model.generation_config
    with _written_aside(folder) as aside:
        _write_weights(aside, tensors, spec, max_shard_size)
        config.save_pretrained(aside)
        if generation_config is not None:
            generation_config.save_pretrained(aside)
        if tokenizer is not None:
            try:
                tokenizer.save_pretrained(aside)
            except Exception as error:  # a full disk is a bare Exception in the tokenizers library
                raise OSError(f"tokenizer: {error}") from None
        if recipe is not None:
            (aside / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return folder


def load_packed(folder: str | Path, device: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    """The packed model of a folder, as transformers' own class, in eval mode on `device`.

    `dtype` is that of activations between products. Raises `FileNotFoundError` or `ValueError` naming the file and
    what is wrong with it.
    """
    folder = Path(folder)
    config = read_config(folder)
    shards.shard_files(folder)
    skeleton = build_skeleton(folder, config, read_spec(folder, config))  # or a wrong value would be torch's error
    read_generation_config(folder, skeleton.config.vocab_size)
    hook.install()
    cls = model_class(folder, config)
    # None: config.json has no say in the attention, or it could name code on the hub
    model = cls.from_pretrained(str(folder), dtype=dtype, local_files_only=True, attn_implementation=None)
    return model if device is None else model.to(device)


def check_generation_config(model: Any) -> None:
    """Raises `ValueError`, one line, for generation settings that `save_packed` or `load_packed` will refuse."""
    if not model.can_generate():
        return
    with tempfile.TemporaryDirectory() as scratch:
        try:
            model.generation_config.save_pretrained(scratch)
            read_generation_config(Path(scratch), model.config.vocab_size)
        except ValueError as error:
            reason = " ".join(str(error).replace(scratch + os.sep, "").split())
            raise ValueError(f"{reason}; correct it in the teacher's, or under generation in --config") from None


def size_table(folder: str | Path) -> list[tuple[str, int]]:
    """Bytes by group, from the files' headers: largest first, their sum is the size of all weight files."""
    folder = Path(folder)
    spec = PackedSpec(modules={}) if is_plain(folder) else read_spec(folder, read_config(folder))
    groups: dict[str, int] = {}
    for file in shards.shard_files(folder):
        shard = shards.read_shard(file)
        for name, info in shard.tensors.items():
            group = _group(name, spec)
            groups[group] = groups.get(group, 0) + info.end - info.begin
        content = sum(info.end - info.begin for info in shard.tensors.values())
        groups["header"] = groups.get("header", 0) + shard.size - content
    return sorted(groups.items(), key=lambda item: -item[1])


def _group(name: str, spec: PackedSpec) -> str:
    module, _, leaf = name.rpartition(".")
    if module in spec.modules and leaf != "bias":
        return "scales" if leaf == "weight_scale" else f"{spec.modules[module].kind} codes"
    if "norm" in module.lower():
        return "norm"
    if "position" in module:
        return "position"
    return "bias" if leaf in ("bias", "final_logits_bias") else "other floats"


def _is_packed(model: Any) -> bool:
    return isinstance(getattr(getattr(model, "config", None), "quantization_config", None), _config_type())


def _config_type() -> type:
    from dqbart.packed.plugin import DqbartConfig

    return DqbartConfig


def _spec_and_skeleton(
    model: Any, storage: str | None, float_dtype: torch.dtype | None, matrix_dtype: torch.dtype | None
) -> tuple[PackedSpec, Any]:
    """What to store, and a model with its modules swapped that says which tensors that is."""
    if _is_packed(model):
        spec = model.config.quantization_config.spec
        changes = {"float_dtype": float_dtype, "matrix_dtype": matrix_dtype}
        given = {k: str(v).removeprefix("torch.") for k, v in changes.items() if v is not None}
        spec = PackedSpec.from_dict(spec.to_dict() | given)
        return (spec if storage is None else spec.with_storage(storage)), model
    spec = spec_of(
        model,
        storage=storage or "planar32",
        float_dtype=float_dtype or torch.float16,
        matrix_dtype=matrix_dtype or torch.float32,
    )
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
    swap_modules(skeleton, spec)
    return spec, skeleton


def _write_weights(folder: Path, tensors: dict[str, torch.Tensor], spec: PackedSpec, max_shard_size: int | str) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    metadata = shards.metadata(tensors, spec.format_version)
    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in plan.filename_to_tensors.items():
        shards.write_shard(folder / file, {name: tensors[name] for name in names}, metadata)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": dict(sorted(plan.tensor_to_filename.items()))}
        (folder / shards.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _require_replaceable(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{folder}: exists and is not empty; choose another folder or overwrite it explicitly")
    try:
        read_config(folder)  # never delete what we did not write
    except (ValueError, OSError):
        raise FileExistsError(f"{folder}: exists and is no packed model, so it is not overwritten") from None


@contextmanager
def _written_aside(folder: Path) -> Iterator[Path]:
    """A hidden sibling to write into, renamed to `folder` at the end or removed on any failure."""
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        aside.mkdir(parents=True)
        yield aside
        _flush(aside)
        put_in_place(aside, folder, aside.with_suffix(".replaced"))
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        failure = OSError(f"{folder}: could not be written ({reason}); nothing was changed, mend that and try again")
        failure.errno = error.errno
        raise failure from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def put_in_place(staged: Path, folder: Path, replaced: Path) -> None:
    """Rename `staged` to `folder`. What was there waits under the name `replaced`: deleted once the new folder stands,
    put back if it doesn't. Raises `OSError`.
    """
    try:
        if folder.exists() and any(folder.iterdir()):
            shutil.rmtree(replaced, ignore_errors=True)  # of a process that was killed
            os.replace(folder, replaced)
        os.replace(staged, folder)
    finally:  # after Ctrl-C, too
        if not folder.exists() and replaced.exists():
            os.replace(replaced, folder)
        shutil.rmtree(replaced, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Have the small files on disk too; the weight files were flushed as they were written."""
    for file in folder.rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            with open(file, "rb+") as source:
                os.fsync(source.fileno())
