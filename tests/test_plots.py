"""The report's plots: drawn for odd values too, and what lies on the line is what nothing beats."""

import itertools
import random
from typing import Any

import pytest

from dqbart.evaluation import plots
from dqbart.evaluation.plots import Bar, Point

PNG = b"\x89PNG\r\n"


def point(**changes: Any) -> Point:
    known = dict(task="t", bits="2-2-8", layers="6-6", metric="BLEU", score=19.0, teacher_score=20.0, file_bytes=10)
    return Point(**known | changes)


def test_nothing_beats_what_lies_on_the_pareto_line() -> None:
    draw = random.Random(0)
    for _ in range(50):
        pairs = [(draw.randint(1, 6), draw.randint(1, 6)) for _ in range(draw.randint(1, 9))]
        front = plots.pareto(pairs)

        def beaten(pair: tuple[int, int], pairs: list[tuple[int, int]] = pairs) -> bool:
            return any(s <= pair[0] and q >= pair[1] and (s, q) != pair for s, q in pairs)

        assert set(front) == {pair for pair in pairs if not beaten(pair)}
        assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(front))


def test_layers_are_ordered_by_number() -> None:
    assert sorted(["12-3", "6-6", "6-3", "3-1", "12-12"], key=plots.layer_order) == [
        "3-1",
        "6-3",
        "6-6",
        "12-3",
        "12-12",
    ]


@pytest.mark.parametrize("points", [
    [point()],
    [point(bits=b, layers=n, variant=v, interval=(18.0, 19.5), teacher_bytes=100, task=t)
     for b in ("8-8-8", "1-1-8") for n in ("12-12", "3-1") for v in ("", "paper numerics") for t in ("$x_$", "b")],
    [point(score=0.0, teacher_score=0.0)],
    [point(), point(score=1.0, layers="3-1"), point(score=0.5, layers="3-1", bits="1-1-8")],  # far below: at the edge
    [point(bits=f"{w}-{e}-8", layers=f"{n}-{n}") for w in (1, 2, 3, 4, 8) for e in (1, 2) for n in range(1, 11)],
])  # fmt: skip
def test_points_can_be_drawn(points: list[Point]) -> None:
    assert plots.size_quality(points).startswith(PNG) and plots.score_grid(points).startswith(PNG)


def test_bars_can_be_drawn() -> None:
    bars = [Bar("a", 12.0, True), Bar("b $", None, note="not installed")]
    assert plots.latency([("greedy", bars), ("none", [Bar("c", None)])]).startswith(PNG)
    assert plots.sensitivity([("2", [("encoder.0", 1.0), ("decoder.0.encoder_attn", -0.2)])], "BLEU").startswith(PNG)
    assert [plots.time_text(t) for t in (0.123, 9.94, 99.6, 999.7, 1234.0, 45678.0)] == [
        "0.12 ms", "9.9 ms", "100 ms", "1000 ms", "1.23 s", "45.7 s"
    ]  # fmt: skip
