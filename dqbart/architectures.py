"""What transformers' configs leave to the modelling code, said once."""

from typing import Any


def first_position(config: Any) -> int:
    """Position of an encoder's first token: RoBERTa's count from behind the padding token's."""
    return int(config.pad_token_id) + 1 if config.model_type in ("roberta", "xlm-roberta") else 0
