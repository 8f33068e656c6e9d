"""One token of each row from softmax(scores / temperature), cut to the `top_k` best, then to those that hold `top_p`.

Every row draws from a stream of its own (SplitMix64), so what it says depends on its seed, not on its batch; the same
seeds give the CPU engine's samples (cpu/src/scores.cpp). In torch, since a sort of the vocabulary dwarfs the launches.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def _signed(number: int) -> int:
    """The int64 of the same bits."""
    return number - (1 << 64) if number >> 63 else number


_STREAM, _STEP = _signed(0xD1342543DE82EF95), _signed(0x9E3779B97F4A7C15)
_MIX = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))


@dataclass(frozen=True)
class Sampling:
    """`top_k` 0 and `top_p` 1 cut nothing. Raises `ValueError` for what is out of range."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and 0 < self.top_p <= 1 and self.top_k >= 0):
            raise ValueError(
                f"temperature {self.temperature!r}, top_k {self.top_k!r}, top_p {self.top_p!r}: expected above 0, at "
                "least 0, and above 0 to 1"
            )

    def numbers(self, device: torch.device) -> Tensor:
        """float64 [3], where a captured step reads them."""
        found = [self.temperature, self.top_k, float(np.float32(self.top_p))]
        return torch.tensor(found, dtype=torch.float64, device=device)


def streams(seed: int, rows: int) -> Tensor:
    """int64 [R]: where each row's stream starts."""
    return torch.arange(1, rows + 1) * _STREAM + _signed(seed % (1 << 64))


def uniform(state_R: Tensor) -> Tensor:
    """The next float64 [R] in [0, 1) of each stream, which moves on in place."""
    z = state_R.add_(_STEP)
    for shift, factor in _MIX:
        z = (z ^ _shifted(z, shift)) * factor
    return _shifted(z ^ _shifted(z, 31), 11).double() * 2.0**-53


def _shifted(z: Tensor, count: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (z >> count) & ((1 << (64 - count)) - 1)


def sample(scores_RV: Tensor, state_R: Tensor, numbers_3: Tensor) -> tuple[Tensor, Tensor]:
    """A token int32 [R, 1] of each row, and the row's best score fp32 [R, 1]: NaN if one is. `numbers_3`: those of a
    `Sampling`, on the scores' device.
    """
    temperature, top_k, top_p = numbers_3[0].float(), numbers_3[1].long(), numbers_3[2]
    scores, tokens = (scores_RV / temperature).sort(stable=True, dim=1, descending=True)
    last_R1 = scores.index_select(1, (top_k - 1).clamp(0, scores.shape[1] - 1)[None])
    scores = scores.masked_fill((scores < last_R1) & (top_k > 0), -torch.inf)
    weights = (scores.double() - scores[:, :1].double()).exp()
    mass = weights.cumsum(1)
    total = mass[:, -1:]
    kept = (weights > 0) & (mass - weights < top_p * total)
    total = torch.where(top_p < 1, torch.where(kept, mass, 0).amax(1, keepdim=True), total)
    place = (kept & (mass <= uniform(state_R)[:, None] * total)).sum(1)
    place = torch.minimum(place, kept.sum(1) - 1).clamp(min=0)[:, None]
    return tokens.gather(1, place).int(), scores[:, :1]
