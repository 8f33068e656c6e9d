"""The checkpoint that comes in: loaded whole, in fp32, with its tokenizer, or refused in one line."""

from pathlib import Path
from typing import Any

SUPPORTED = ("bart", "mbart")


def load_teacher(teacher: Any, tokenizer: Any, device: str | None) -> tuple[Any, Any]:
    """`(model in eval mode, tokenizer)` from a path, a hub id or objects.

    Raises `ValueError` for an architecture that can't be compressed, a packed model, a device that isn't there or
    a model object without tokenizer, `FileNotFoundError` for a folder without a checkpoint.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

    if isinstance(teacher, str | Path):
        if not Path(teacher).exists() and (str(teacher).count("/") > 1 or str(teacher).startswith((".", "/", "~"))):
            raise FileNotFoundError(
                f"teacher {str(teacher)!r}: no such folder; expected a checkpoint folder or a hub id"
            )
        if Path(teacher).exists() and not (Path(teacher) / "config.json").is_file():
            raise FileNotFoundError(
                f"teacher {str(teacher)!r}: no config.json there; expected a transformers checkpoint"
            )
        try:
            config = AutoConfig.from_pretrained(teacher)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"teacher {str(teacher)!r}: neither a folder here nor loadable from the hub ({_first_line(error)})"
            ) from None
        _check_config(config, str(teacher))
        try:
            model = AutoModelForSeq2SeqLM.from_pretrained(teacher, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(teacher) if tokenizer is None else tokenizer
        except OSError as error:
            raise FileNotFoundError(f"teacher {str(teacher)!r}: {_first_line(error)}") from None
    else:
        model = teacher
        _check_config(getattr(model, "config", None), type(model).__name__)
        model = model.float()
    if isinstance(tokenizer, str | Path):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    if tokenizer is None:
        raise ValueError("tokenizer is missing: a teacher given as an object needs tokenizer=... beside it")
    return model.to(choose_device(device)).eval(), tokenizer


def choose_device(device: str | None) -> str:
    """The device asked for, else CUDA where there is one, else the CPU; `LOCAL_RANK` picks the GPU."""
    import os

    import torch

    if device is None:
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise ValueError(
            f"device {device!r}: expected 'cpu'{' or cuda' if torch.cuda.is_available() else ', no GPU is here'}"
        )
    return device


def _check_config(config: Any, name: str) -> None:
    model_type = getattr(config, "model_type", None)
    if model_type not in SUPPORTED:
        raise ValueError(
            f"teacher {name!r}: architecture {model_type!r} is not supported; expected {' or '.join(SUPPORTED)}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"teacher {name!r} is quantized already; give the full-precision checkpoint")


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split())[:200]
