"""Layers with fewer heads than their width has room for, in transformers' own classes.

Problem: BERT, RoBERTa and DistilBERT work out a head's size as hidden_size / num_attention_heads, so no config says
"width 768, 3 heads of 64", which is what pruning heads leaves behind. Method: the config keeps the whole model's
number and one more field, `attention_heads_kept`, says how many are left; `narrow` cuts a model to what its config
says. Their forward passes reshape to [..., -1, head size], so nothing else has to know. Rejected: 3 as
num_attention_heads (heads of 256), heads of zeros (neither smaller nor faster), a subclass for each of the classes.

Every layer keeps the same number of heads, as in DynaBERT (arXiv 2004.04037).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

FIELD = "attention_heads_kept"


@dataclass(frozen=True)
class LayerNames:
    """Where a family keeps its layers, and in each of them the linear modules. `neurons`: the config's field."""

    stack: str
    projections: tuple[str, str, str]
    out: str
    up: str
    down: str
    neurons: str


_BERT = LayerNames(
    "encoder.layer", ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output.dense", "intermediate.dense", "output.dense", "intermediate_size",
)  # fmt: skip
_DISTILBERT = LayerNames(
    "transformer.layer", ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    "attention.out_lin", "ffn.lin1", "ffn.lin2", "hidden_dim",
)  # fmt: skip
NAMES = {"bert": _BERT, "roberta": _BERT, "xlm-roberta": _BERT, "distilbert": _DISTILBERT}


def layer_names(config: Any) -> LayerNames:
    """Raises `ValueError` for a model whose heads and neurons are not taken apart here."""
    names = NAMES.get(config.model_type)
    if names is None:
        raise ValueError(f"architecture {config.model_type!r}: width is elastic for {', '.join(NAMES)}")
    if getattr(config, "add_cross_attention", False):
        raise ValueError("add_cross_attention True: width is elastic for encoders, which have no cross-attention")
    return names


def layers_of(model: Any) -> list[nn.Module]:
    """The encoder layers. Raises `ValueError` as `layer_names` does, and for a packed model."""
    names = layer_names(model.config)
    layers = list(model.base_model.get_submodule(names.stack))
    if not all(isinstance(layer.get_submodule(names.out), nn.Linear) for layer in layers):
        raise ValueError("the model is packed: heads and neurons are taken from a float or fake-quantized one")
    return layers


def head_size(config: Any) -> int:
    return int(config.hidden_size) // int(config.num_attention_heads)


def heads_of(config: Any) -> int:
    """How many heads each layer has. Raises `ValueError` where `attention_heads_kept` is no such number."""
    kept, whole = getattr(config, FIELD, None), int(config.num_attention_heads)
    if kept is None:
        return whole
    if type(kept) is not int or not 1 <= kept <= whole:
        raise ValueError(f"{FIELD} {kept!r}: expected 1 to {whole}, the model's num_attention_heads")
    return kept


def set_heads(config: Any, heads: int) -> None:
    """Write the number of heads down; nothing is written for all of them."""
    if heads != config.num_attention_heads:
        setattr(config, FIELD, heads)
    elif hasattr(config, FIELD):
        delattr(config, FIELD)


def narrow(model: Any) -> None:
    """Cut every layer, in place, to the first heads and neurons that `model.config` leaves it.

    What is as small already stays as it is; tensors may be on the meta device. Raises `ValueError` as `layers_of` and
    `heads_of` do.
    """
    names, heads = layer_names(model.config), heads_of(model.config)
    inside, neurons = heads * head_size(model.config), getattr(model.config, names.neurons)
    for layer in layers_of(model):
        for name, rows, columns in _shapes(names, inside, neurons, model.config.hidden_size):
            _cut(layer.get_submodule(name), rows, columns)
        attention: Any = layer.get_submodule(names.projections[0].rpartition(".")[0])
        for field, value in (("num_attention_heads", heads), ("n_heads", heads), ("all_head_size", inside)):
            if hasattr(attention, field):
                setattr(attention, field, value)


def _shapes(names: LayerNames, inside: int, neurons: int, width: int) -> Iterator[tuple[str, int, int]]:
    yield from ((name, inside, width) for name in names.projections)
    yield from ((names.out, width, inside), (names.up, neurons, width), (names.down, width, neurons))


@torch.no_grad()
def _cut(linear: Any, rows: int, columns: int) -> None:
    if linear.weight.shape == (rows, columns):
        return
    pieces = {"weight": linear.weight[:rows, :columns]}
    if linear.bias is not None:
        pieces["bias"] = linear.bias[:rows]
    for name, piece in pieces.items():
        whole = getattr(linear, name)
        copied = piece.clone(memory_format=torch.contiguous_format)
        setattr(linear, name, nn.Parameter(copied, requires_grad=whole.requires_grad))
    linear.out_features, linear.in_features = rows, columns
