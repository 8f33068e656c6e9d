"""Float students: what a run with bits 32-32-32 leaves, a transformers checkpoint and nothing of ours in it.

Nothing is packed there, so anything that reads checkpoints reads it, dqbart's next run included: as its teacher (a
teacher assistant) or as what its student starts as. recipe.yaml beside the weights tells it from other people's.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from dqbart.packed.json_file import read_json
from dqbart.quant.narrow import FIELD, narrow
from dqbart.quant.sharing import share_again


def save_plain(model: Any, folder: str | Path, *, recipe: str, tokenizer: Any = None) -> Path:
    """Write a float model, its tokenizer and recipe.yaml. Raises `FileExistsError` for a folder in use."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: exists and is not empty; choose another folder")
    write_float(model, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return folder


def write_float(model: Any, folder: Path) -> None:
    """The files of transformers' `save_pretrained`, weights as readable as config.json, not by their owner alone."""
    model.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", file)


def is_plain(folder: str | Path) -> bool:
    """Whether `save_plain` wrote this folder."""
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file() or not (folder / "config.json").is_file():
        return False
    try:
        return "quantization_config" not in read_json(folder / "config.json", dict)
    except ValueError:
        return False  # the reader of packed folders says what is wrong


def load_plain(folder: str | Path, device: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a plain folder, of the class that it names, in eval mode; a sub-network, too, whose config
    transformers' own `from_pretrained` can't follow (dqbart/quant/narrow.py).

    Raises `FileNotFoundError` for no folder, `ValueError` for no such class and for tensors that don't fit.
    """
    from dqbart.packed.verify import model_class

    folder = Path(folder)
    config = json.loads((folder / "config.json").read_bytes())
    cls = model_class(folder, config)
    if config.get(FIELD) is None:
        model = cls.from_pretrained(str(folder), dtype=dtype, local_files_only=True)
    else:
        model = _load_narrow(cls, folder).to(dtype)
    model = share_again(model.eval())
    return model if device is None else model.to(device)


def _load_narrow(cls: Any, folder: Path) -> Any:
    from huggingface_hub import load_torch_model

    model = cls(cls.config_class.from_pretrained(folder))
    narrow(model)
    try:
        missing, unexpected = load_torch_model(model, folder, strict=False)
    except RuntimeError as error:  # torch lists the shapes that don't fit, one a line
        raise ValueError(f"{folder}: {' '.join(str(error).split())}") from None
    if unexpected or set(missing) - set(model.all_tied_weights_keys):
        raise ValueError(f"{folder}: tensors {sorted([*missing, *unexpected])[:3]} don't fit config.json")
    model.tie_weights()
    return model
