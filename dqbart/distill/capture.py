"""Take attention maps out of a forward pass, whatever the model family.

`output_attentions` gives nothing under sdpa and would not give queries and keys at all; our attention function
(`dqbart.quant.attention`) reports every call instead. Calls are kept in call order, since `layer_idx` is missing
on some families and repeated on others, and grouped by what they are: encoder, decoder or cross attention.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from dqbart.quant.attention import AttentionRecord, listening

Keep = Callable[[AttentionRecord], Any]
Kind = Literal["encoder_attention", "decoder_attention", "cross_attention"]


def attention_kinds(model: Any) -> dict[int, Kind]:
    """`id(module)` -> kind, for every module of the model."""
    kinds: dict[int, Kind] = {}
    for name, module in model.named_modules():
        if "encoder_attn" in name:
            kinds[id(module)] = "cross_attention"
        else:
            kinds[id(module)] = "decoder_attention" if "decoder" in name.split(".") else "encoder_attention"
    return kinds


@contextmanager
def capture_attention(
    model: Any, wanted: set[str], keep: Keep = lambda r: r.probabilities
) -> Iterator[dict[str, list[Any]]]:
    """Collect `keep(record)` of the wanted kinds during the block, in call order.

    The model must use our attention (`dqbart.quant.attention.use_attention`). Replays by activation
    checkpointing run under autograd's backward, after the block, so they are not seen twice.
    """
    kinds = attention_kinds(model)
    found: dict[str, list[Any]] = {kind: [] for kind in wanted}

    def listen(record: AttentionRecord) -> None:
        kind = kinds.get(id(record.module))
        if kind in found:
            found[kind].append(keep(record))

    if not wanted:
        yield found
        return
    with listening(listen):
        yield found


def forward_with_attention(
    model: Any,
    inputs: dict[str, Tensor],
    kinds: set[str],
    *,
    hidden: bool,
    modules_of: Any = None,
    keep: Keep = lambda r: r.probabilities,
) -> tuple[Any, dict[str, list[Any]]]:
    """Run a model; returns its output and the captured attention maps, or what else `keep` takes of a record.

    `modules_of`: the bare model, where `model` is a wrapper (DistributedDataParallel) around it.
    Raises `ValueError` for a model that does not use our attention.
    """
    with capture_attention(model if modules_of is None else modules_of, kinds, keep) as maps:
        cache = {"use_cache": False} if "decoder_input_ids" in inputs else {}
        output = model(**inputs, output_hidden_states=hidden, **cache)
    if not all(maps.values()):
        raise ValueError("no attention was seen: call dqbart.quant.attention.use_attention(model) first")
    return output, maps


@contextmanager
def without_logits(model: Any, wanted: bool = True) -> Iterator[list[Tensor]]:
    """During the block `model` makes empty logits [B, 0, V], if it has a language head; what that would have taken is
    put into the list.
    """
    taken: list[Tensor] = []

    def take(head: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        taken.append(inputs[0])
        return (inputs[0][:, :0],)

    head = model.get_output_embeddings() if wanted else None
    hook = None if head is None else head.register_forward_pre_hook(take)
    try:
        yield taken
    finally:
        if hook is not None:
            hook.remove()


def autocast(enabled: bool, device: torch.device) -> Any:
    """bf16 autocast for what runs beside the student's forward, which is all that Trainer wraps."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
