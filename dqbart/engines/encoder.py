"""Encoders through a native engine: transformers' own model, its stack of layers run by the engine.

The base model (`BertModel`, say) inside whatever class the folder names gets a subclass whose `forward` makes the last
hidden states natively; pooler and heads stay transformers' modules, in float, so every head class works and none is
copied. What the native pass does not know (attentions, embeddings as input, padding on the left) runs in the torch
engine, loaded when it is needed, and is said. Rejected: native classifiers, which would save microseconds.
"""

import logging
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqbart.architectures import first_position
from dqbart.engines.native import Runner, check_ids, check_runs, load_in_torch, open_native, read_again
from dqbart.packed import shards
from dqbart.packed.verify import build_skeleton, read_config, read_spec, unchanged

log = logging.getLogger("dqbart")


class NativeBase:
    """What the subclass of a base model adds: `runner`, and the same folder in the torch engine."""

    runner: Runner
    folder: Path
    _weights: str  # their digest
    config: Any
    _cast: Tensor  # holds nothing: `half()` and the like change its dtype, and so that of what comes out
    _said: set[str]
    _torch_base: list[Any] | None = None

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        *,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """As the base model's, for token ids and masks [B, L]. Hidden states of padding are zeros."""
        reason = self._unsupported(input_ids, attention_mask, token_type_ids, others)
        if reason is not None:
            if reason not in self._said:
                self._said.add(reason)
                log.warning("the torch engine runs: engine %s does not know %s", self.runner.name, reason)
            flags = ("output_attentions", "output_hidden_states")  # set on this model's config, not on that one's
            others |= {name: True for name in flags if getattr(self.config, name) and others.get(name) is None}
            given = others | {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
            given = {name: _floats_as(torch.float32, value) for name, value in given.items() if value is not None}
            found = self.torch_base(input_ids=input_ids, return_dict=return_dict, **given)
            return _floats_as(self.dtype, found)
        b, length = input_ids.shape
        lengths_B = torch.full((b,), length) if attention_mask is None else attention_mask.bool().sum(1)
        hidden_BLD = self.runner.hidden(input_ids, lengths_B, token_type_ids)
        output = self._output(hidden_BLD.to(self.dtype))
        return output.to_tuple() if return_dict is False else output

    def _apply(self, function: Any, recurse: bool = True) -> Any:
        """Of `nn.Module`: casts reach the heads; a move would part them from the layers, so it raises `ValueError`."""
        moved = function(self._cast).device
        if moved != self.device:
            raise ValueError(
                f"to({str(moved)!r}): engine {self.runner.name} stays on {self.device}; load with device= or engine="
            )
        return super()._apply(function, recurse)  # type: ignore[misc]

    def __reduce__(self) -> Any:
        """For copies and pickles, which the layers are not part of."""
        return _empty, (type(self).__mro__[2],), self.__dict__ | {"_torch_base": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        read_again(self.folder, self._weights, self.runner)

    @property
    def device(self) -> torch.device:
        return self._cast.device

    @property
    def dtype(self) -> torch.dtype:
        """Of what comes out: as heads are cast."""
        return self._cast.dtype

    @property
    def torch_base(self) -> Any:
        """The same base model in the torch engine. Raises as `load_in_torch` does."""
        if self._torch_base is None:
            found = load_in_torch(self.folder, self._weights, self.runner.device)
            self._torch_base = [found.base_model]  # in a list: no submodule of this one
        return self._torch_base[0]

    def _unsupported(self, ids: Any, mask: Any, types: Any, others: dict[str, Any]) -> str | None:
        """What the native pass can't do of this call, in words."""
        for name, value in others.items():
            if value is not None and value is not False:
                return f"the argument {name!r}"
        if self.config.output_attentions or self.config.output_hidden_states:
            return "output_attentions and output_hidden_states"
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or 0 in ids.shape:
            found = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"input_ids {found}: expected token ids [batch, length], neither of them 0")
        for name, given in (("attention_mask", mask), ("token_type_ids", types)):
            if given is not None and tuple(given.shape) != tuple(ids.shape):
                raise ValueError(f"{name} {list(given.shape)}: expected the shape of input_ids, {list(ids.shape)}")
        if mask is not None:
            lengths = mask.bool().sum(1)
            if (lengths == 0).any() or not torch.equal(
                mask.bool(), torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
            ):
                return "padding on the left or inside a text"
        check_ids(ids, self.config.vocab_size)
        if first_position(self.config):  # positions count what is not padding
            real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
            if (ids[real] == self.config.pad_token_id).any():
                return "padding tokens that are attended to"
        return None

    def _output(self, hidden_BLD: Tensor) -> Any:
        from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

        pooler = getattr(self, "pooler", None)
        if self.config.model_type == "distilbert":
            return BaseModelOutput(last_hidden_state=hidden_BLD)
        if pooler is None:
            return BaseModelOutputWithPooling(last_hidden_state=hidden_BLD)
        if self.config.model_type == "albert":
            pooled = self.pooler_activation(pooler(hidden_BLD[:, 0]))  # type: ignore[attr-defined]
        else:
            pooled = pooler(hidden_BLD)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_BLD, pooler_output=pooled)


def load_encoder(folder: str | Path, runner: Runner) -> Any:
    """transformers' model of a packed encoder folder, in eval mode, its layers with the engine.

    Raises `FileNotFoundError` or `ValueError`, one line, for a folder that doesn't fit.
    """
    folder = Path(folder).resolve()
    check_runs(runner, folder)
    with unchanged(folder):
        weights = shards.weights_digest(folder)
        config = read_config(folder)
        spec = read_spec(folder, config)
        model = build_skeleton(folder, config, spec)
        _, rest = open_native(folder, spec, model, runner.make)
        floats = {name: shards.read_tensor(info).float() for name, info in rest.items()}
    base = model.base_model
    for name in ("embeddings", "encoder", "transformer"):
        base._modules.pop(name, None)
    for name, tensor in floats.items():
        parent, _, leaf = name.rpartition(".")
        module: nn.Module = model.get_submodule(parent)
        module._parameters[leaf] = nn.Parameter(tensor.to(runner.device), requires_grad=False)
    missing = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if missing:
        raise ValueError(f"{folder}: tensor {missing[0]}: the native engine doesn't know where it comes from")
    kind: Any = type(base)
    base.__class__ = _native(kind)
    base.runner, base.folder, base._weights, base._said = runner, folder, weights, set()
    base.register_buffer("_cast", torch.empty(0, dtype=torch.float32, device=runner.device), persistent=False)
    for name in ("save_pretrained", "push_to_hub"):  # of what torch holds they would make a model without layers
        setattr(model, name, partial(_refuse, f"{name}: {folder} is the model; copy it, or load with engine='torch'"))
    return model.eval()


@cache
def _native(kind: Any) -> Any:
    return type(f"Native{kind.__name__}", (NativeBase, kind), {})


def _empty(kind: Any) -> Any:
    return kind.__new__(_native(kind))


def _floats_as(dtype: torch.dtype, value: Any) -> Any:
    """What goes into a model or comes out of it, its floats cast."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_floats_as(dtype, part) for part in value)
    if isinstance(value, dict):  # transformers' outputs are
        return type(value)(**{name: _floats_as(dtype, part) for name, part in value.items()})
    return value


def _refuse(words: str, *args: Any, **kwargs: Any) -> None:
    raise ValueError(words)
