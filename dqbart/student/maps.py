"""Layer maps: which teacher layer each student layer is copied from, and learns from.

DQ-BART uses one map for both. No single rounding rule gives its published 6-layer map, so the tables are
written out; a one-layer student takes the teacher's last layer. For 12 layers DQ-BART's map was never released:
Shleifer & Rush (arXiv 2010.13002) gives all but the one-layer row. Every other depth takes evenly spaced layers
from first to last, `round(i * (N - 1) / (K - 1))`, halves to even.
"""

from collections.abc import Sequence

# TABLES[N][K]: student layer i <- teacher layer TABLES[N][K][i], counted from 0.
TABLES: dict[int, dict[int, list[int]]] = {
    6: {1: [5], 2: [0, 5], 3: [0, 2, 5], 4: [0, 2, 3, 5], 5: [0, 1, 3, 4, 5]},
    12: {
        1: [11], 2: [0, 6], 3: [0, 6, 11], 4: [0, 4, 8, 11], 6: [0, 2, 4, 7, 9, 11],
        9: [0, 1, 2, 4, 5, 7, 9, 10, 11],
    },
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


def stack_words(maps: dict[str, list[int]]) -> str:
    """Layer maps for people: `encoder [0, 5], decoder [5]`, or `[0, 5]` of a model with one stack."""
    if len(maps) == 1:
        return str(next(iter(maps.values())))
    return ", ".join(f"{field.removesuffix('_layers')} {mapping}" for field, mapping in maps.items())
