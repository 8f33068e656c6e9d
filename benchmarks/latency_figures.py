"""What times and answers that were taken side by side come to: a ratio, and in how many rows two systems agree.

Problem: a median of one system over a median of another holds the noise of both. Method: the ratio of each round, then
their median. Rejected: the shortest times, which on a shared machine are those of the luckiest moment.
"""

import math
import statistics
from collections.abc import Mapping
from operator import mul

from latency_tables import REFERENCE, Row
from peers import System

ORACLE = "dqbart-torch"  # whose ids other dqbart engines should give, as peers those of REFERENCE


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times as fast the second is: taken round by round, the warm-up left out, then the median."""
    return round(statistics.median(a / b for a, b in zip(slow[1:], fast[1:], strict=True)), 4)


def agreement(system: System, answers: Mapping[System, Row]) -> int | None:
    """Rows in which `system` gives what its reference gives: the same ids, or vectors of cosine above 0.999."""

    def is_reference(other: System) -> bool:
        return (other.name, other.bits) == (ORACLE, system.bits) if not system.is_peer else other.name == REFERENCE

    reference = next((answers[other] for other in answers if is_reference(other) and other != system), None)
    if reference is None:
        return None
    mine = answers[system]
    if "vectors" in reference:
        return sum(cosine(a, b) > 0.999 for a, b in zip(mine["vectors"], reference["vectors"], strict=True))
    return sum(a == b for a, b in zip(mine["ids"], reference["ids"], strict=True))


def cosine(a: list[float], b: list[float]) -> float:
    return sum(map(mul, a, b)) / (math.hypot(*a) * math.hypot(*b))
