"""One vector per text: how an encoder's hidden states become one, and the files that say so.

An encoder's config.json does not tell whether its vectors are means or first tokens, or where texts were cut. The
sentence-transformers library keeps that in four small files beside the checkpoint: modules.json lists the steps, and
most of them have a file of their own. Here the steps are one value, `Pooling`, and `pool` carries it out. Steps that
the value can't hold are refused, since dropping one would change every vector. Files are written as version 2.0 of the
library wrote them, which later versions still read. Rejected: the library itself as a dependency, for four JSON files.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from dqbart.packed.json_file import read_json

T = TypeVar("T")
Mode = Literal["mean", "cls", "max"]
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
MODULES = "modules.json"
_POOLING = "1_Pooling"
_LIMITS = "sentence_bert_config.json"
_SETTINGS = "config_sentence_transformers.json"
_FLAGS: dict[Mode, str] = {
    "mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens",
}  # fmt: skip
_OTHER_FLAG = "pooling_mode_mean_sqrt_len_tokens"


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """What is done to hidden states, and to texts before. Raises `ValueError` for a field of the wrong kind.

    `mode`: mean over a text's tokens, its first token, or the maximum of each feature. `normalize`: to length 1.
    `max_seq_length`: tokens, special ones included, None for what tokenizer and model allow. `lowercase`: of texts,
    before the tokenizer. `prompts`: name to prefix of texts, `default_prompt_name` the one used unless told otherwise.
    `similarity`: of two vectors, None for cosine.
    """

    mode: Mode = "mean"
    normalize: bool = False
    max_seq_length: int | None = None
    lowercase: bool = False
    prompts: dict[str, str] = field(default_factory=dict, hash=False)
    default_prompt_name: str | None = None
    similarity: Similarity | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"pooling mode {self.mode!r}: expected one of {', '.join(get_args(Mode))}")
        length = self.max_seq_length
        if length is not None and (type(length) is not int or length < 1):
            raise ValueError(f"max_seq_length {length!r}: expected a whole number of at least 1, or none")
        for name, value in (("normalize", self.normalize), ("do_lower_case", self.lowercase)):
            if type(value) is not bool:
                raise ValueError(f"{name} {value!r}: expected true or false")
        texts = self.prompts.items() if isinstance(self.prompts, dict) else [(None, None)]
        if not all(isinstance(name, str) and isinstance(text, str) for name, text in texts):
            raise ValueError(f"prompts {self.prompts!r}: expected texts by name")
        if self.default_prompt_name is not None and self.default_prompt_name not in list(self.prompts):
            known = ", ".join(self.prompts) or "none"
            raise ValueError(f"default_prompt_name {self.default_prompt_name!r}: expected one of the prompts ({known})")
        if self.similarity not in (None, *get_args(Similarity)):
            known = ", ".join(get_args(Similarity))
            raise ValueError(f"similarity_fn_name {self.similarity!r}: expected one of {known}, or none")


def pool(hidden_BLD: Tensor, mask_BL: Tensor, pooling: Pooling) -> Tensor:
    """Vectors [B, D], at least fp32, of last hidden states and a mask that is 1 on tokens; differentiable.

    What stands at padding has no effect, not even NaN, whichever side it is on. A row without tokens gives zeros.
    Raises `ValueError` for shapes that don't fit.
    """
    if hidden_BLD.dim() != 3 or mask_BL.shape != hidden_BLD.shape[:2]:
        found = f"{list(hidden_BLD.shape)} and mask {list(mask_BL.shape)}"
        raise ValueError(f"hidden states {found}: expected [batch, length, width] and [batch, length]")
    hidden_BLD = hidden_BLD.to(torch.promote_types(hidden_BLD.dtype, torch.float32))
    real_BL = mask_BL.bool()
    if pooling.mode == "cls":
        real_BL = real_BL & (real_BL.cumsum(1) == 1)  # the first token alone, so that the mean below is it
    real_BL1 = real_BL[..., None]
    if pooling.mode == "max" and hidden_BLD.shape[1]:
        vector_BD = hidden_BLD.masked_fill(~real_BL1, -torch.inf).amax(1).masked_fill(~real_BL1.any(1), 0)
    else:
        vector_BD = hidden_BLD.masked_fill(~real_BL1, 0).sum(1) / real_BL1.sum(1).clamp_min(1)
    return torch.nn.functional.normalize(vector_BD, dim=-1) if pooling.normalize else vector_BD


def sentence_folder(name: Any) -> Path | None:
    """Where the settings of a sentence-transformers checkpoint lie, local folder or hub id; None if it is none."""
    if not isinstance(name, str | Path):
        return None
    if Path(name).exists():
        return Path(name) if (Path(name) / MODULES).is_file() else None
    from huggingface_hub import file_exists, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        if not file_exists(str(name), MODULES):
            return None
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*/config.json"]))
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError):
        return None  # whoever loads the weights says what is wrong


def read_pooling(folder: str | Path) -> Pooling | None:
    """The pooling of a sentence-transformers folder, packed or not; None for a folder without modules.json.

    Raises `ValueError` or `FileNotFoundError`, one line with the file, for steps or settings that `Pooling` can't hold.
    """
    folder = Path(folder)
    file = folder / MODULES
    if not file.is_file():
        return None
    steps = _read(file, list)
    if not all(
        isinstance(s, dict) and isinstance(s.get("type"), str) and isinstance(s.get("path"), str) for s in steps
    ):
        raise ValueError(f"{file}: expected a list of modules, each with a type and a path")
    types = [step["type"] for step in steps]
    names = [name.rpartition(".")[2] if name.startswith("sentence_transformers.") else name for name in types]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(
            f"{file}: modules {', '.join(names) or 'none'}: expected Transformer, Pooling and, if anything, Normalize; "
            "without modules.json the folder is read as a plain encoder"
        )
    if steps[0]["path"]:
        raise ValueError(
            f"{file}: the encoder is in {steps[0]['path']!r}: expected it in the folder itself; "
            "load the model with sentence-transformers and save it again"
        )
    if steps[1]["path"] in ("", "..") or Path(steps[1]["path"]).name != steps[1]["path"]:
        raise ValueError(f"{file}: pooling in {steps[1]['path']!r}: expected a folder in this one")
    mode = _read_mode(folder / steps[1]["path"] / "config.json")
    limits, settings = (_read(f, dict) if f.is_file() else {} for f in (folder / _LIMITS, folder / _SETTINGS))
    for name, content, key, expected in (
        (_LIMITS, limits, "transformer_task", "feature-extraction"),
        (_LIMITS, limits, "processing_kwargs", {}),
        (_SETTINGS, settings, "model_type", "SentenceTransformer"),
    ):
        if content.get(key) not in (None, expected):
            raise ValueError(f"{folder / name}: {key} {content[key]!r}: expected {expected!r}")
    try:
        return Pooling(
            mode=mode,
            normalize=len(steps) == 3,
            max_seq_length=limits.get("max_seq_length"),
            lowercase=limits.get("do_lower_case", False),
            prompts=settings.get("prompts", {}),
            default_prompt_name=settings.get("default_prompt_name"),
            similarity=settings.get("similarity_fn_name"),
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def write_pooling(folder: str | Path, pooling: Pooling) -> None:
    """Make a checkpoint's folder, float or packed, one that `read_pooling` and sentence-transformers read.

    Replaces these files where they are there. Raises `FileNotFoundError` for a folder without config.json.
    """
    from transformers import AutoConfig

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json in it; save the encoder there first")
    width = AutoConfig.from_pretrained(folder, local_files_only=True).hidden_size
    flags = {flag: mode == pooling.mode for mode, flag in _FLAGS.items()}
    steps = [("", "Transformer"), (_POOLING, "Pooling"), *([("2_Normalize", "Normalize")] if pooling.normalize else [])]
    contents: dict[str, Any] = {
        f"{_POOLING}/config.json": {"word_embedding_dimension": width} | flags | {_OTHER_FLAG: False},
        _LIMITS: {"max_seq_length": pooling.max_seq_length, "do_lower_case": pooling.lowercase},
        _SETTINGS: {
            "prompts": pooling.prompts,
            "default_prompt_name": pooling.default_prompt_name,
            "similarity_fn_name": pooling.similarity,
        },
        MODULES: [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
            for i, (path, name) in enumerate(steps)
        ],  # last: with it the folder is one of these
    }
    (folder / _POOLING).mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_mode(file: Path) -> Mode:
    """The one mode that a pooling step's file names, in either spelling of the library; mean if it names none."""
    settings = _read(file, dict)
    modes = settings.get("pooling_mode")
    if modes is None:
        by_flag = {flag: mode for mode, flag in _FLAGS.items()}
        flags = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value]
        modes = [by_flag.get(flag, flag) for flag in flags] or ["mean"]
    modes = modes if isinstance(modes, list) else [modes]
    if len(modes) != 1 or modes[0] not in get_args(Mode):
        found = " and ".join(map(str, modes))
        raise ValueError(f"{file}: pooling {found}: expected one of {', '.join(get_args(Mode))}")
    if settings.get("include_prompt", True) is not True:
        raise ValueError(f"{file}: include_prompt false: expected true, prompts are part of their texts here")
    return modes[0]


def _read(file: Path, kind: type[T]) -> T:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file, but {MODULES} asks for it")
    return read_json(file, kind)
