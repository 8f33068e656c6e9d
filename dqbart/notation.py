"""The two words of the papers' notation: bits as `W-E-A`, layers as `E-D` (DQ-BART, arXiv 2203.11239)."""

import re
from dataclasses import dataclass, field
from typing import Any

WEIGHT_BITS = (1, 2, 3, 4, 8, 32)
ACTIVATION_BITS = (8, 32)


@dataclass(frozen=True)
class Bits:
    """Bit widths as `W-E-A`: linear weights, embeddings (with the tied lm_head), activations.

    Two bits are ternary {-1, 0, 1}; 32 means "left in float". `Bits("2-2-8").weights == 2`.
    Raises `ValueError` for anything else than three allowed numbers joined by dashes.
    """

    text: str
    weights: int = field(init=False, compare=False, repr=False)
    embeddings: int = field(init=False, compare=False, repr=False)
    activations: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        match = re.fullmatch(r"(\d+)-(\d+)-(\d+)", self.text) if isinstance(self.text, str) else None
        numbers = tuple(int(n) for n in match.groups()) if match else ()
        if not numbers or not {numbers[0], numbers[1]} <= set(WEIGHT_BITS) or numbers[2] not in ACTIVATION_BITS:
            raise ValueError(
                f"bits {self.text!r}: expected W-E-A, such as 2-2-8, with weights and embeddings in "
                f"{WEIGHT_BITS} and activations in {ACTIVATION_BITS}"
            )
        if numbers == (32, 32, 8):
            raise ValueError(f"bits {self.text!r}: 8-bit activations need quantized weights; expected such as 8-8-8")
        object.__setattr__(self, "text", "{}-{}-{}".format(*numbers))
        for name, value in zip(("weights", "embeddings", "activations"), numbers, strict=True):
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        return self.text

    @property
    def quantized(self) -> bool:
        return self.text != "32-32-32"


@dataclass(frozen=True)
class Layers:
    """Number of layers kept: `E-D` for encoder-decoders (`6-3`), one number (`6`) for encoders."""

    text: str
    encoder: int = field(init=False, compare=False, repr=False)
    decoder: int | None = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(self.text))
        numbers = [int(n) for n in match.groups() if n is not None] if match else [0]
        if min(numbers) < 1:
            raise ValueError(
                f"layers {self.text!r}: expected E-D, such as 6-3, or one number for an encoder; at least 1 each"
            )
        object.__setattr__(self, "text", "-".join(map(str, numbers)))
        object.__setattr__(self, "encoder", numbers[0])
        object.__setattr__(self, "decoder", numbers[1] if len(numbers) == 2 else None)

    @classmethod
    def of(cls, config: Any) -> "Layers":
        """How many a model of this transformers config has."""
        if config.is_encoder_decoder:
            return cls(f"{config.encoder_layers}-{config.decoder_layers}")
        return cls(str(config.num_hidden_layers))

    def __str__(self) -> str:
        return self.text
