"""Float students: what a run with bits 32-32-32 leaves, a transformers checkpoint and nothing of ours in it.

Nothing is packed there, so anything that reads checkpoints reads it, dqbart's next run included: as its teacher (a
teacher assistant) or as what its student starts as. recipe.yaml beside the weights tells it from other people's.
"""

import json
from pathlib import Path
from typing import Any

import torch

from dqbart.quant.sharing import share_again


def save_plain(model: Any, folder: str | Path, *, recipe: str, tokenizer: Any = None) -> Path:
    """Write a float model, its tokenizer and recipe.yaml. Raises `FileExistsError` for a folder in use."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: exists and is not empty; choose another folder")
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return folder


def is_plain(folder: str | Path) -> bool:
    """Whether `save_plain` wrote this folder."""
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file() or not (folder / "config.json").is_file():
        return False
    try:
        return "quantization_config" not in json.loads((folder / "config.json").read_bytes())
    except ValueError:
        return False  # the reader of packed folders says what is wrong


def load_plain(folder: str | Path, device: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a plain folder, of the class that it names, in eval mode. Raises `ValueError` for no such class."""
    from dqbart.packed.verify import model_class

    folder = Path(folder)
    config = json.loads((folder / "config.json").read_bytes())
    model = model_class(folder, config).from_pretrained(str(folder), dtype=dtype, local_files_only=True).eval()
    model = share_again(model)
    return model if device is None else model.to(device)
