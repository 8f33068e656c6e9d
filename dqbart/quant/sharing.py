"""Layers that share their attention or their feed-forward block: one matrix, one set of codes.

ALBERT (arXiv 1909.11942, section 4.5) shares everything, attention only, or the feed-forward block only. transformers
knows groups of whole layers; so attention-only and ffn-only sharing are a model with one group a layer whose layers
use blocks of the first. `config.dqbart_sharing` says which. A block is its linear layers and the LayerNorm behind
them; the parameter counts of ALBERT's table say so.

A sharing layer refers to the block without registering it. Registered twice, a block would be seen twice by whatever
walks the modules: transformers would hang two hooks on it and report its attention 2L times, and a packed model's
file would miss L - 1 copies of each tensor. So parameters, quantized codes and stored tensors exist once. Rejected:
transformers' ties, which go by the parameter's name, hold parameters only, and vanish with tie_word_embeddings=False.

A float checkpoint, though, is written with all copies (`keep_whole`): read by plain transformers it is an
ordinary model that says the same, where a file without them would be filled up with random layers.
"""

import re
from typing import Any

import torch
from torch import Tensor

FIELD = "dqbart_sharing"
PARTS: dict[str, tuple[str, ...]] = {
    "all": (),  # one group: transformers' own
    "attention": ("attention",),
    "ffn": ("ffn", "ffn_output", "full_layer_layer_norm"),
    "none": (),
}


def shared_parts(config: Any) -> tuple[str, ...]:
    """Names of the modules that every layer takes from the first; () for a config without `dqbart_sharing`.

    Raises `ValueError` for a value that is not known or doesn't fit the rest of the config.
    """
    sharing = getattr(config, FIELD, None)
    if sharing is None:
        return ()
    if config.model_type != "albert" or not isinstance(sharing, str) or sharing not in PARTS:
        raise ValueError(f"{FIELD} {sharing!r} in a {config.model_type} config: expected {_list()} in an albert one")
    groups = 1 if sharing == "all" else config.num_hidden_layers
    if (config.num_hidden_groups, config.inner_group_num) != (groups, 1):
        raise ValueError(
            f"{FIELD} {sharing!r} with num_hidden_groups {config.num_hidden_groups!r}, inner_group_num "
            f"{config.inner_group_num!r}: expected {groups} and 1"
        )
    return PARTS[sharing]


def check_sharing(sharing: str) -> None:
    """Raises `ValueError` for anything but the four."""
    if not isinstance(sharing, str) or sharing not in PARTS:
        raise ValueError(f"sharing {sharing!r}: expected {_list()}")


def _list() -> str:
    return " or ".join(map(repr, PARTS))


def places(config: Any, name: str) -> list[str]:
    """Every name under which a module or tensor of the first layer is used: its own, then those in other layers."""
    for part in shared_parts(config):
        if found := re.fullmatch(rf"(.*\balbert_layer_groups\.)0(\.albert_layers\.0\.{part}\b.*)", name):
            return [f"{found[1]}{i}{found[2]}" for i in range(config.num_hidden_groups)]
    return [name]


def tie_layers(model: Any) -> None:
    """Let the layers of `model`, in place, use the first one's blocks as its config says; if not at all, do nothing.

    Raises as `shared_parts`.
    """
    for first, layer, part in _pairs(model):
        layer._modules.pop(part, None)
        object.__setattr__(layer, part, getattr(first, part))  # torch's own would register it


def is_tied(model: Any) -> bool:
    """Whether a model's layers are shared as its config says."""
    return all(getattr(layer, part) is getattr(first, part) for first, layer, part in _pairs(model))


def share_again(model: Any) -> Any:
    """Share, in place, the layers of a float model that `from_pretrained` gave a copy each; returns the model.

    Does nothing to a model whose config has no `dqbart_sharing`, or that shares already. Raises `ValueError` if the
    copies differ.
    """
    if not is_tied(model):
        require_equal(model)
        tie_layers(model)
        keep_whole(model)
    return model


def require_tied(model: Any) -> None:
    """Raises `ValueError` where they are not."""
    if not is_tied(model):
        raise ValueError(
            f"{FIELD} {getattr(model.config, FIELD)!r}, but each layer has a copy: "
            "call dqbart.quant.sharing.share_again(model) after from_pretrained"
        )


def require_equal(model: Any) -> None:
    """Raises `ValueError` where copies that the config says are shared differ."""
    for first, layer, part in _pairs(model):
        for name, tensor in getattr(layer, part).state_dict().items():
            if not torch.equal(tensor, getattr(first, part).state_dict()[name]):
                raise ValueError(
                    f"{FIELD} {getattr(model.config, FIELD)!r}, but {part} differs between layers ({name}): they were "
                    "trained apart; delete the field from config.json to keep them apart"
                )


def keep_whole(model: Any) -> None:
    """Have `state_dict` of a float model hold a copy for every layer, and `load_state_dict` accept them."""
    if shared_parts(model.config):
        encoder = model.base_model.encoder
        encoder.register_state_dict_post_hook(_add_copies)
        encoder.register_load_state_dict_pre_hook(_drop_copies)


def _pairs(model: Any) -> list[tuple[Any, Any, str]]:
    """First layer, another one, and the name of a module that they share."""
    parts = shared_parts(model.config)
    if not parts:
        return []
    first, *others = [group.albert_layers[0] for group in model.base_model.encoder.albert_layer_groups]
    return [(first, layer, part) for layer in others for part in parts]


def _add_copies(encoder: Any, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        for place in places(encoder.config, name)[1:]:
            state[place] = state[name].clone()  # a storage of its own, or safetensors refuses it


def _drop_copies(
    encoder: Any, state: dict[str, Tensor], prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any,
    errors: list[str],
) -> None:  # fmt: skip
    for name in [name for name in state if name.startswith(prefix)]:
        for place in places(encoder.config, name)[1:]:
            if place in state and not torch.equal(state.pop(place), state[name]):
                errors.append(f"{place}: differs from {name}, and the model's layers share it")
