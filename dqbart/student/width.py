"""Sub-networks: the first heads, the first neurons and some layers of a model, as a model or as a view of it.

DynaBERT (arXiv 2004.04037) trains one set of weights so that every such slice of it works, then hands out slices
("train once, deploy many"). Both uses are here and share one definition, the slices of `Shared.tensors`: training runs
a sub-network on the whole model's parameters, so that gradients add up in those; `subnetwork` copies the same slices
into a model of its own. Rejected: setting a multiplier on every module, with linear layers that slice themselves
(forked modules in every family), and zeroing what is left out (full cost at any width).
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dqbart.quant.narrow import heads_of, layer_names, layers_of, narrow, set_heads
from dqbart.student.maps import kept_layers


def width_sizes(config: Any, width: float) -> tuple[int, int]:
    """Heads and feed-forward neurons per layer at a width multiplier, rounded to whole ones.

    Raises `ValueError` for a width outside (0, 1], one that leaves no head or no neuron, and an unsupported family.
    """
    heads, neurons = heads_of(config), getattr(config, layer_names(config).neurons)
    if not 0 < width <= 1 or round(heads * width) < 1 or round(neurons * width) < 1:
        raise ValueError(
            f"width {width!r} of {heads} heads and {neurons} neurons: expected 1/{min(heads, neurons)} to 1, "
            "to leave one of each"
        )
    return round(heads * width), round(neurons * width)


class Shared:
    """A sub-network of `model` without weights of its own: calling it runs slices of the model's parameters.

    `kept`: the model's layers that it has, `dqbart.student.depth.kept_layers`. Fake-quantized models work as float
    ones do: codes and scales are made of the slice, as in the model that `subnetwork` copies. The forward pass is in
    the model's mode. Gradient checkpointing doesn't work with it. Raises `ValueError` as `width_sizes` and
    `kept_layers` do.
    """

    def __init__(self, model: Any, width: float = 1.0, depth: float = 1.0) -> None:
        self.model = model
        heads, neurons = width_sizes(model.config, width)
        self.kept = kept_layers(len(layers_of(model)), depth)
        named = [*model.named_parameters(), *model.named_buffers()]
        empty = {id(tensor): _empty_like(tensor) for _, tensor in named}
        name_of = {id(empty[id(tensor)]): name for name, tensor in named}
        # A copy of everything but the tensors; tied ones stay tied, quantizers and settings come along.
        self.blank = copy.deepcopy(model, empty)
        vars(self.blank).pop("forward", None)  # accelerate's autocast
        names, config = layer_names(model.config), self.blank.config
        config.num_hidden_layers = len(self.kept)
        set_heads(config, heads)
        setattr(config, names.neurons, neurons)
        parent, _, leaf = names.stack.rpartition(".")
        stack = nn.ModuleList([layers_of(self.blank)[i] for i in self.kept])
        setattr(self.blank.base_model.get_submodule(parent), leaf, stack)
        for i, layer in enumerate(stack):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    setattr(module, "layer_idx", i)  # noqa: B010 - a plain number, in the way of torch's types
        self.sources = {name: name_of[id(tensor)] for name, tensor in _tensors(self.blank).items()}
        narrow(self.blank)

    def tensors(self) -> dict[str, Tensor]:
        """The sub-network's parameters and buffers by its own names: slices of the model's, or the model's whole."""
        whole = _tensors(self.model)
        pieces = {}
        for name, piece in _tensors(self.blank).items():
            tensor = whole[self.sources[name]]
            if tensor.shape != piece.shape:  # contiguous, so that every sum over it has the order that a copy has
                tensor = tensor[tuple(slice(0, side) for side in piece.shape)].contiguous()
            pieces[name] = tensor
        return pieces

    def __call__(self, **inputs: Any) -> Any:
        self.blank.train(self.model.training)
        for module in self.blank.modules():
            if hasattr(module, "quantized_weight"):
                module.quantized_weight.clear()  # a fused optimizer may have changed the slice since, and not said so
        return functional_call(self.blank, self.tensors(), kwargs=inputs)


def subnetwork(model: Any, width: float = 1.0, depth: float = 1.0) -> Any:
    """An independent model of the same class: the first heads and neurons of the layers that the depth keeps.

    It gives to the bit what `Shared(model, width, depth)` gives. A fake-quantized model's sub-networks are
    fake-quantized, ready for `dqbart.packed.checkpoint.save_packed`; a float one's `save_pretrained` writes what
    `dqbart.packed.plain.load_plain` reads. Raises `ValueError` as `Shared` does.
    """
    shared = Shared(model, width, depth)
    pieces, made = shared.tensors(), {}
    for name, tensor in pieces.items():
        module, _, leaf = name.rpartition(".")
        holder = shared.blank.get_submodule(module)
        place: Any = holder._parameters if leaf in holder._parameters else holder._buffers
        if id(tensor) not in made:  # tied ones stay tied
            own = tensor.detach().clone()
            made[id(tensor)] = nn.Parameter(own, place[leaf].requires_grad) if leaf in holder._parameters else own
        place[leaf] = made[id(tensor)]
    return shared.blank.train(model.training)


def _empty_like(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _tensors(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers under all of their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
