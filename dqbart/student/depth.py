"""Fewer layers: which teacher layer each student layer is copied from, and learns from.

DQ-BART uses one map for both. No single rounding rule gives its published 6-layer map, so the tables are
written out; a one-layer student takes the teacher's last layer. For 12 layers DQ-BART's map was never released:
Shleifer & Rush (arXiv 2010.13002) gives all but the one-layer row. Every other depth takes evenly spaced layers
from first to last, `round(i * (N - 1) / (K - 1))`, halves to even.
"""

import copy
import re
from collections.abc import Sequence
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

# model_type -> (module list, config field that counts it), encoder first. ALBERT's layers are one, run many times.
_BART, _BERT = [("encoder.layers", "encoder_layers"), ("decoder.layers", "decoder_layers")], "encoder.layer"
STACKS: dict[str, list[tuple[str, str]]] = {"bart": _BART, "mbart": _BART} | {
    "bert": [(_BERT, "num_hidden_layers")], "roberta": [(_BERT, "num_hidden_layers")],
    "xlm-roberta": [(_BERT, "num_hidden_layers")], "distilbert": [("transformer.layer", "n_layers")],
}  # fmt: skip
MAPS = ("spread", "uniform", "top", "bottom")


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


def mapped_layers(kind: str | Sequence[int], teacher_layers: int, student_layers: int) -> list[int]:
    """Teacher layer, counted from 0, that each student layer is held to, by name or as given.

    "spread" is `layer_map`. TinyBERT's (arXiv 1909.10351): "uniform" takes the last of each N / M teacher layers, "top"
    the upper M, "bottom" the lower M. Raises `ValueError` for a map that doesn't fit these depths.
    """
    layer_map(teacher_layers, student_layers)  # the depths themselves
    if not isinstance(kind, str):
        given = list(kind)
        if len(given) != student_layers or any(not 0 <= layer < teacher_layers for layer in given):
            raise ValueError(
                f"layer map {given}: expected {student_layers} teacher layers, each from 0 to {teacher_layers - 1}"
            )
        return given
    if kind not in MAPS:
        raise ValueError(f"layer map {kind!r}: expected one of {', '.join(MAPS)}, or a list of teacher layers")
    each, left = divmod(teacher_layers, student_layers)
    if kind == "uniform" and left:
        fit = [count for count in range(1, teacher_layers + 1) if teacher_layers % count == 0]
        raise ValueError(
            f"layer map 'uniform': {student_layers} student layers don't divide the teacher's {teacher_layers}; "
            f"expected one of {fit} layers, or the map 'spread'"
        )
    return {
        "spread": layer_map(teacher_layers, student_layers),
        "uniform": [i * each + each - 1 for i in range(student_layers)],
        "top": list(range(teacher_layers - student_layers, teacher_layers)),
        "bottom": list(range(student_layers)),
    }[kind]


def kept_layers(layers: int, depth: float) -> list[int]:
    """The layers that DynaBERT (arXiv 2004.04037) keeps at a depth multiplier: floor(i / depth), as released. The
    article's rule differs: it keeps the last layer, too. Raises `ValueError` for a depth outside (0, 1].
    """
    if not 0 < depth <= 1 or round(layers * depth) < 1:
        raise ValueError(f"depth {depth!r} of {layers} layers: expected above 0 to 1, and to leave a layer")
    return [int(i / depth) for i in range(round(layers * depth))]


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
    for name in ("encoder_layerdrop", "decoder_layerdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)  # a dropped layer would shift the alignment
    for field, mapping in maps.items():
        setattr(config, field, len(mapping))
    student = type(teacher)(config).to(dtype=teacher.dtype)
    source = teacher.state_dict()
    student.load_state_dict({name: source[_teacher_name(name, teacher.config, maps)] for name in student.state_dict()})
    student.tie_weights()
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def _teacher_name(name: str, config: Any, maps: dict[str, list[int]]) -> str:
    for stack, field in STACKS[config.model_type]:
        match = re.fullmatch(rf"(.*\b{re.escape(stack)}\.)(\d+)(\..*)", name)
        if match:
            return f"{match[1]}{maps[field][int(match[2])]}{match[3]}"
    return name
