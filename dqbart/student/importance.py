"""Which heads and neurons matter, and the order that puts them first.

DynaBERT (arXiv 2004.04037) keeps a prefix of heads and neurons at every width, so those that the loss would miss most
are moved to the front, once, before training. A head's score is |dL/dm|, m a factor of 1 on what it computes; that of
a neuron |sum w1 g1 + b1 gb1| + |sum w2 g2|, over its row of the first matrix, its bias and its column of the second.
Both of these sums are derivatives by a factor too, before and behind the activation, so all scores are gradients of
three short vectors per layer and no weight's gradient is made. Each batch counts by itself: the released code never
clears gradients, so that its first batches count over and over, and opposite signs cancel.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dqbart.quant.narrow import head_size, heads_of, layer_names, layers_of

Loss = Callable[[Any, dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Importance:
    """Scores per layer, fp32, on CPU: `heads` [H] and `neurons` [N] each; larger is more important."""

    heads: list[Tensor]
    neurons: list[Tensor]

    @property
    def head_order(self) -> list[Tensor]:
        """Heads by falling score; equal ones stay in their order."""
        return [scores.argsort(descending=True, stable=True) for scores in self.heads]

    @property
    def neuron_order(self) -> list[Tensor]:
        return [scores.argsort(descending=True, stable=True) for scores in self.neurons]


def own_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The model's own loss of the labels in the batch. Raises `ValueError` if there is none."""
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError(f"a batch of {', '.join(batch)} gives no loss: add labels, or give a loss of your own")
    return loss


def importance(model: Any, batches: Iterable[dict[str, Tensor]], loss: Loss = own_loss) -> Importance:
    """Mean over batches of each head's and neuron's score, in eval mode.

    `batches`: what `loss(model, batch)` takes, by default the model's inputs with labels; DynaBERT uses the dev set.
    The model's own gradients are neither read nor written. Raises `ValueError` for no batch, and for other families.
    """
    sums: list[Tensor] = []
    count, mode = 0, model.training
    model.eval()
    try:
        with torch.enable_grad(), _factors(model) as factors:
            for batch in batches:
                batch = {name: value.to(model.device) for name, value in batch.items()}
                found = torch.autograd.grad(loss(model, batch), factors)
                absolute = [gradient.abs().float() for gradient in found]
                sums = [a + b for a, b in zip(sums, absolute, strict=True)] if sums else absolute
                count += 1
    finally:
        model.train(mode)
    if not count:
        raise ValueError("no batches: importance is measured on at least one, of the dev set")
    means = [total.cpu() / count for total in sums]
    heads, before, behind = means[0::3], means[1::3], means[2::3]
    return Importance(heads, [a + b for a, b in zip(before, behind, strict=True)])


@contextmanager
def _factors(model: Any) -> Iterator[list[Tensor]]:
    """Three vectors of ones per layer, in use during the block: on heads, and on neurons before and behind the GELU."""
    names, size = layer_names(model.config), head_size(model.config)
    factors: list[Tensor] = []
    hooks: list[Any] = []
    for layer in layers_of(model):
        out, up, down = (layer.get_submodule(name) for name in (names.out, names.up, names.down))
        neurons = getattr(model.config, names.neurons)
        for count in (heads_of(model.config), neurons, neurons):
            factors.append(torch.ones(count, dtype=model.dtype, device=model.device, requires_grad=True))
        head_H, before_N, behind_N = factors[-3:]
        hooks += [
            out.register_forward_pre_hook(lambda _, x, m=head_H: (x[0] * m.repeat_interleave(size),)),
            up.register_forward_hook(lambda _, x, y, m=before_N: y * m),
            down.register_forward_pre_hook(lambda _, x, m=behind_N: (x[0] * m,)),
        ]
    try:
        yield factors
    finally:
        for hook in hooks:
            hook.remove()


def rewire(model: Any, head_order: list[Tensor], neuron_order: list[Tensor]) -> None:
    """Put heads and neurons into a new order, in place: `order[i]` is the one that comes to place i. One per layer.

    Rows of q, k, v and of the first feed-forward matrix move with their biases, columns of the attention's output and
    of the second matrix: the model computes what it did. Raises `ValueError`, nothing changed, for anything that is
    not a permutation of each layer's.
    """
    names, layers, size = layer_names(model.config), layers_of(model), head_size(model.config)
    neurons = getattr(model.config, names.neurons)
    for what, orders, count in (("head", head_order, heads_of(model.config)), ("neuron", neuron_order, neurons)):
        if len(orders) != len(layers):
            raise ValueError(f"{what}_order for {len(orders)} layers: expected one for each of {len(layers)}")
        for i, order in enumerate(orders):
            if not torch.equal(order.cpu().sort().values, torch.arange(count)):
                raise ValueError(f"{what}_order of layer {i}: expected each of 0 to {count - 1} once, as int64")
    for layer, heads_H, neurons_N in zip(layers, head_order, neuron_order, strict=True):
        rows = (heads_H.unsqueeze(1) * size + torch.arange(size, device=heads_H.device)).flatten()
        for name in names.projections:
            _reorder(layer.get_submodule(name), rows, 0)
        _reorder(layer.get_submodule(names.out), rows, 1)
        _reorder(layer.get_submodule(names.up), neurons_N, 0)
        _reorder(layer.get_submodule(names.down), neurons_N, 1)


@torch.no_grad()
def _reorder(linear: Any, order: Tensor, dim: int) -> None:
    order = order.to(linear.weight.device)
    linear.weight.copy_(linear.weight.index_select(dim, order))
    if dim == 0 and isinstance(linear.bias, nn.Parameter):
        linear.bias.copy_(linear.bias[order])
