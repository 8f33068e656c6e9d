"""Smaller students: fewer layers, copied from the teacher's as a layer map says, or a shape of their own."""

import copy
import re
from collections.abc import Sequence
from typing import Any

from dqbart.notation import Layers
from dqbart.student.maps import MAPS, mapped_layers
from dqbart.student.shape import student_config

# model_type -> (module list, config field that counts it), encoder first. ALBERT's layers are one, run many times, so
# there is no list to take some of.
Stacks = list[tuple[str | None, str]]
_BART: Stacks = [("encoder.layers", "encoder_layers"), ("decoder.layers", "decoder_layers")]
_BERT = "encoder.layer"
STACKS: dict[str, Stacks] = {
    "bart": _BART, "mbart": _BART,
    "bert": [(_BERT, "num_hidden_layers")], "roberta": [(_BERT, "num_hidden_layers")],
    "xlm-roberta": [(_BERT, "num_hidden_layers")], "distilbert": [("transformer.layer", "n_layers")],
    "albert": [(None, "num_hidden_layers")],
}  # fmt: skip


def stack_maps(config: Any, layers: Layers, kind: str | Sequence[int] = "spread") -> dict[str, list[int]]:
    """Layer map per stack, keyed by its config field, as `mapped_layers` makes it. Raises `ValueError` where layers or
    map don't fit the model.
    """
    stacks = STACKS.get(config.model_type)
    if stacks is None:
        raise ValueError(
            f"architecture {config.model_type!r} is not supported here: expected one of {', '.join(STACKS)}"
        )
    wanted = [layers.encoder] if layers.decoder is None else [layers.encoder, layers.decoder]
    if len(wanted) != len(stacks):
        raise ValueError(
            f"layers {layers.text!r}: a {config.model_type} model has {len(stacks)} stacks; "
            f"expected {'E-D, such as 6-3' if len(stacks) == 2 else 'one number'}"
        )
    if len(stacks) == 2 and not isinstance(kind, str):
        raise ValueError(
            f"layer map {list(kind)}: an encoder-decoder has two stacks; expected one of {', '.join(MAPS)}"
        )
    maps = {}
    for (_, field), count in zip(stacks, wanted, strict=True):
        try:
            maps[field] = mapped_layers(kind, getattr(config, field), count)
        except ValueError as error:
            where = f"{field.removesuffix('_layers')} " if len(stacks) == 2 else ""
            raise ValueError(f"{where}{error}") from None
    return maps


def make_student(
    teacher: Any, layers: Layers, kind: str | Sequence[int] = "spread", *, hidden_size: int | None = None,
    heads: int | None = None, intermediate_size: int | None = None,
) -> Any:  # fmt: skip
    """A float model of the teacher's class with fewer layers, initialised by copying, or with a shape of its own.

    Embeddings, positions, norms and heads are copied whole, layers by `stack_maps`. An encoder that is given a shape
    begins at random instead, but for what has the teacher's shape all the same. The student shares no tensor and no
    config object with the teacher. Raises `ValueError` as `stack_maps` and `student_config` do.
    """
    maps = stack_maps(teacher.config, layers, kind)
    if (hidden_size, heads, intermediate_size) == (None, None, None):
        config = copy.deepcopy(teacher.config)
        for field, mapping in maps.items():
            setattr(config, field, len(mapping))
    else:
        config = student_config(
            teacher.config, layers=layers.encoder, hidden_size=hidden_size, heads=heads,
            intermediate_size=intermediate_size,
        )  # fmt: skip
    config._attn_implementation = "eager"
    for name in ("encoder_layerdrop", "decoder_layerdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)  # a dropped layer would shift the alignment
    student = type(teacher)(config).to(dtype=teacher.dtype)
    source = teacher.state_dict()
    copied = {name: source[_teacher_name(name, teacher.config, maps)] for name in student.state_dict()}
    if (
        config.hidden_size != teacher.config.hidden_size
        or config.num_attention_heads != teacher.config.num_attention_heads
    ):
        copied = {}  # parts of the teacher's width mean nothing in another one
    fits = {name: tensor for name, tensor in copied.items() if tensor.shape == student.state_dict()[name].shape}
    student.load_state_dict(fits, strict=len(fits) == len(student.state_dict()))
    student.tie_weights()
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def _teacher_name(name: str, config: Any, maps: dict[str, list[int]]) -> str:
    for stack, field in STACKS[config.model_type]:
        match = re.fullmatch(rf"(.*\b{re.escape(stack)}\.)(\d+)(\..*)", name) if stack else None
        if match:
            return f"{match[1]}{maps[field][int(match[2])]}{match[3]}"
    return name
