"""The sizes that say which transformer a model is: what both native engines are made from."""

ACTIVATIONS = {"gelu": 1, "gelu_new": 2}
SIZES = (
    "d", "heads", "encoder_layers", "decoder_layers", "encoder_ffn", "decoder_ffn", "vocabulary",
    "encoder_positions", "decoder_positions", "position_offset", "pre_norm", "embedding_norm",
    "head_bias", "embedding_d", "embedding_map", "encoder_steps", "activation", "token_types",
)  # fmt: skip
DEFAULTS = dict.fromkeys(
    ("decoder_layers", "decoder_ffn", "decoder_positions", "position_offset", "pre_norm", "head_bias",
     "embedding_map", "token_types"), 0,
) | {"embedding_norm": 1, "activation": ACTIVATIONS["gelu"]}  # fmt: skip


def complete(sizes: dict[str, int]) -> dict[str, int]:
    """All of `SIZES`, as `Config` in cpu/src/model.h explains them; embedding_d and encoder_steps are by default d and
    encoder_layers. Raises `ValueError` for unknown or missing ones.
    """
    given = {"embedding_d": sizes.get("d", 0), "encoder_steps": sizes.get("encoder_layers", 0)} | sizes
    sizes = DEFAULTS | given
    if unknown := sizes.keys() - set(SIZES):
        raise ValueError(f"sizes: {sorted(unknown)[0]!r} is none of {', '.join(SIZES)}")
    if missing := [name for name in SIZES if name not in sizes]:
        raise ValueError(f"sizes: {missing[0]!r} is missing")
    return {name: int(sizes[name]) for name in SIZES}
