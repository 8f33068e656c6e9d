"""Importance and rewiring: the published scores, batch by batch, and moves that change no output."""

from typing import Any

import pytest
import torch
from test_width import HEADS, KINDS, classifier, labelled
from tiny_models import tiny_encoder, token_batch
from torch import Tensor

from dqbart.quant.attention import use_attention
from dqbart.quant.layers import prepare
from dqbart.quant.narrow import layer_names, layers_of
from dqbart.student.importance import importance, rewire
from dqbart.student.width import subnetwork


def plainly(model: Any, batches: list[dict[str, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """The published sums, from gradients of weights; see below for a head's."""
    names, layers = layer_names(model.config), layers_of(model)
    heads, neurons = [torch.zeros(4) for _ in layers], [torch.zeros(48) for _ in layers]
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for i, layer in enumerate(layers):
            out, up, down = (layer.get_submodule(n) for n in (names.out, names.up, names.down))
            # y = sum over heads of W_h c_h: the derivative by a factor on c_h is that by a factor on W_h.
            heads[i] += (out.weight * out.weight.grad).sum(0).view(4, -1).sum(1).abs() / len(batches)
            rows = (up.weight * up.weight.grad).sum(1) + up.bias * up.bias.grad
            neurons[i] += (rows.abs() + (down.weight * down.weight.grad).sum(0).abs()) / len(batches)
    model.zero_grad()
    return [h.detach() for h in heads], [n.detach() for n in neurons]


@pytest.mark.parametrize("kind", HEADS)
def test_scores_are_the_published_sums(kind: str) -> None:
    model, batches = classifier(kind), [labelled([9, 5]), labelled([7, 4, 12], 1)]
    found = importance(model, batches)
    heads, neurons = plainly(model, batches)
    torch.testing.assert_close(found.heads, heads)
    torch.testing.assert_close(found.neurons, neurons)
    assert min(s.min() for s in (*found.heads, *found.neurons)) >= 0 and found.heads[0].max() > 0


def test_every_batch_counts_by_itself() -> None:
    """The released code adds gradients up over batches before it takes their absolute value."""
    model, first, second = classifier(), labelled([9, 5]), labelled([7, 4, 12], 1)
    alone, both = [importance(model, [batch]) for batch in (first, second)], importance(model, [first, second])
    for field in ("heads", "neurons"):
        means = [(a + b) / 2 for a, b in zip(*(getattr(one, field) for one in alone), strict=True)]
        torch.testing.assert_close(getattr(both, field), means)
    again = importance(model, [first, first, first])
    torch.testing.assert_close(again.heads, alone[0].heads)


def test_importance_leaves_the_model_alone() -> None:
    model = classifier().train()
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    model.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        scores = importance(model, [labelled([9, 5])])
    assert model.training and torch.equal(model.classifier.weight.grad, torch.ones_like(model.classifier.weight))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    torch.testing.assert_close(scores.heads, importance(classifier(), [labelled([9, 5])]).heads)  # no dropout
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name != "classifier.weight")


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_that_says_nothing_goes_last(kind: str) -> None:
    model = classifier(kind)
    value = layers_of(model)[1].get_submodule(layer_names(model.config).projections[2])
    with torch.no_grad():
        value.weight[8:16], value.bias[8:16] = 0, 0
    found = importance(model, [labelled([9, 5])])
    assert found.heads[1][1] == 0 and found.head_order[1][-1] == 1
    up = layers_of(model)[0].get_submodule(layer_names(model.config).up)
    down = layers_of(model)[0].get_submodule(layer_names(model.config).down)
    with torch.no_grad():
        up.weight[7], up.bias[7], down.weight[:, 7] = 0, 0, 0
    found = importance(model, [labelled([9, 5])])
    assert found.neurons[0][7] == 0 and found.neuron_order[0][-1] == 7


def test_orders_fall_and_ties_stay() -> None:
    found = importance(classifier(), [labelled([9, 5])])
    for scores, order in zip(found.heads + found.neurons, found.head_order + found.neuron_order, strict=True):
        assert (scores[order].diff() <= 0).all() and sorted(order.tolist()) == list(range(len(scores)))
    same = type(found)([torch.ones(5)], [torch.zeros(3)])
    assert same.head_order[0].tolist() == [0, 1, 2, 3, 4] and same.neuron_order[0].tolist() == [0, 1, 2]


def test_importance_of_another_loss_and_of_none() -> None:
    model = classifier()
    bare = token_batch([9, 5])
    with pytest.raises(ValueError, match="a batch of input_ids, attention_mask gives no loss: add labels"):
        importance(model, [bare])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="no batches"):
        importance(model, [])
    found = importance(model.bert, [bare], lambda base, batch: base(**batch).last_hidden_state[:, 0].sum().square())
    assert len(found.heads) == 3 and found.heads[2].max() > 0


def shuffled(model: Any) -> tuple[list[Tensor], list[Tensor]]:
    generator, layers = torch.Generator().manual_seed(5), len(layers_of(model))
    neurons = getattr(model.config, layer_names(model.config).neurons)
    return [torch.randperm(4, generator=generator) for _ in range(layers)], [
        torch.randperm(neurons, generator=generator) for _ in range(layers)
    ]


@pytest.mark.parametrize("bits", [None, "8-8-8"])
@pytest.mark.parametrize("kind", KINDS)
def test_rewiring_changes_nothing_at_full_width(kind: str, bits: str | None) -> None:
    model, batch = tiny_encoder(kind), token_batch([9, 5, 12])
    use_attention(model)
    if bits:
        prepare(model, bits)
    with torch.no_grad():
        before = model(**batch, output_hidden_states=True)
        rewire(model, *shuffled(model))
        after = model(**batch, output_hidden_states=True)
    moved = [not torch.equal(order, torch.arange(len(order))) for order in shuffled(model)[0]]
    assert any(moved)
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.hidden_states, before.hidden_states, rtol=1e-4, atol=1e-4)
    assert torch.equal(after.logits.argmax(-1), before.logits.argmax(-1))


def test_rewiring_moves_scores_to_the_front_and_back() -> None:
    model, batches = classifier(), [labelled([9, 5]), labelled([7, 4, 12], 1)]
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = importance(model, batches)
    rewire(model, found.head_order, found.neuron_order)
    sorted_scores = importance(model, batches)
    torch.testing.assert_close(sorted_scores.heads, [s.sort(descending=True).values for s in found.heads])
    torch.testing.assert_close(sorted_scores.neurons, [s.sort(descending=True).values for s in found.neurons])
    assert not torch.equal(whole["bert.encoder.layer.0.intermediate.dense.bias"],
                           model.state_dict()["bert.encoder.layer.0.intermediate.dense.bias"])  # fmt: skip
    rewire(model, [o.argsort() for o in found.head_order], [o.argsort() for o in found.neuron_order])
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())


def test_the_best_heads_make_the_best_sub_network() -> None:
    """A model whose heads 0 and 1 of 4 are mute keeps its output at half of its heads, once rewired."""
    model, batch = classifier(), labelled([9, 5])
    for layer in layers_of(model):
        with torch.no_grad():
            layer.attention.self.value.weight[:16], layer.attention.self.value.bias[:16] = 0, 0
            layer.intermediate.dense.weight[:24], layer.intermediate.dense.bias[:24] = 0, 0
    with torch.no_grad():
        whole, cut = model(**batch).logits, subnetwork(model, 0.5)(**batch).logits
        assert (whole - cut).abs().max() > 0.1
        found = importance(model, [batch])
        rewire(model, found.head_order, found.neuron_order)
        torch.testing.assert_close(subnetwork(model, 0.5)(**batch).logits, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("heads", "neurons", "message"),
    [
        ([[0, 1, 2, 3]] * 2, [range(48)] * 3, "head_order for 2 layers: expected one for each of 3"),
        ([[0, 1, 2, 3]] * 3, [range(48)] * 4, "neuron_order for 4 layers"),
        ([[0, 1, 2, 3]] * 2 + [[0, 1, 2, 2]], [range(48)] * 3, "head_order of layer 2: expected each of 0 to 3 once"),
        ([[0, 1, 2, 3]] * 3, [range(48), range(47), range(48)], "neuron_order of layer 1: expected each of 0 to 47"),
    ],
)
def test_orders_that_are_none(heads: Any, neurons: Any, message: str) -> None:
    model = classifier()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        rewire(model, [torch.tensor(o).flip(0) for o in heads], [torch.tensor(list(o)) for o in neurons])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
