"""Fewer layers: which teacher layer each student layer is copied from, and learns from.

DQ-BART uses one map for both. No single rounding rule gives its published 6-layer map, so the tables are
written out; a one-layer student takes the teacher's last layer. For 12 layers DQ-BART's map was never released:
Shleifer & Rush (arXiv 2010.13002) gives all but the one-layer row. Every other depth takes evenly spaced layers
from first to last, `round(i * (N - 1) / (K - 1))`, halves to even.
"""

import copy
import re
from typing import Any

from dqbart.recipe import Layers

# TABLES[N][K]: student layer i <- teacher layer TABLES[N][K][i], counted from 0.
TABLES: dict[int, dict[int, list[int]]] = {
    6: {1: [5], 2: [0, 5], 3: [0, 2, 5], 4: [0, 2, 3, 5], 5: [0, 1, 3, 4, 5]},
    12: {
        1: [11], 2: [0, 6], 3: [0, 6, 11], 4: [0, 4, 8, 11], 6: [0, 2, 4, 7, 9, 11],
        9: [0, 1, 2, 4, 5, 7, 9, 10, 11],
    },
}  # fmt: skip

# model_type -> (module list, config field that counts it), encoder first.
STACKS: dict[str, list[tuple[str, str]]] = {
    "bart": [("encoder.layers", "encoder_layers"), ("decoder.layers", "decoder_layers")],
    "mbart": [("encoder.layers", "encoder_layers"), ("decoder.layers", "decoder_layers")],
}


def layer_map(teacher_layers: int, student_layers: int) -> list[int]:
    """Teacher layer for each student layer. Raises `ValueError` if the student is deeper or empty."""
    if not 1 <= student_layers <= teacher_layers:
        raise ValueError(
            f"layers {student_layers!r}: the teacher's stack has {teacher_layers}; expected 1 to {teacher_layers}"
        )
    if student_layers == teacher_layers:
        return list(range(teacher_layers))
    table = TABLES.get(teacher_layers, {})
    if student_layers in table:
        return list(table[student_layers])
    if student_layers == 1:
        return [teacher_layers - 1]
    return [round(i * (teacher_layers - 1) / (student_layers - 1)) for i in range(student_layers)]


def stack_maps(config: Any, layers: Layers) -> dict[str, list[int]]:
    """Layer map per stack, keyed by its config field; raises `ValueError` where layers don't fit the model."""
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
    maps = {}
    for (_, field), count in zip(stacks, wanted, strict=True):
        try:
            maps[field] = layer_map(getattr(config, field), count)
        except ValueError as error:
            raise ValueError(f"{field.removesuffix('_layers')} {error}") from None
    return maps


def make_student(teacher: Any, layers: Layers) -> Any:
    """A float model of the teacher's class with fewer layers, initialised by copying.

    Embeddings, positions, norms and heads are copied whole, layers by `stack_maps`. The student shares no
    tensor and no config object with the teacher. Raises `ValueError` as `stack_maps` does.
    """
    maps = stack_maps(teacher.config, layers)
    config = copy.deepcopy(teacher.config)
    config._attn_implementation = "eager"
    config.encoder_layerdrop = config.decoder_layerdrop = 0.0  # a dropped layer would shift the alignment
    for field, mapping in maps.items():
        setattr(config, field, len(mapping))
    student = type(teacher)(config).to(dtype=teacher.dtype)
    source = teacher.state_dict()
    student.load_state_dict({name: source[_teacher_name(name, teacher.config, maps)] for name in student.state_dict()})
    student.tie_weights()
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def _teacher_name(name: str, config: Any, maps: dict[str, list[int]]) -> str:
    for stack, field in STACKS[config.model_type]:
        match = re.fullmatch(rf"(.*\b{re.escape(stack)}\.)(\d+)(\..*)", name)
        if match:
            return f"{match[1]}{maps[field][int(match[2])]}{match[3]}"
    return name
