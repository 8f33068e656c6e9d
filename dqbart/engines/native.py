"""A packed folder read into native memory: which models the native engines run, and where their tensors go.

Every family is the same stack of layers under other names, so a family is a table of names and a few sizes.
`unsuitable` says what stands in the way; `open_native` reads a folder tensor by tensor, each checked as it comes. What
belongs to no layer (poolers, classifiers) is left to its caller. A `Runner` is an engine: cpu.py and triton.py have one
each.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from dqbart_kernels import cpu as native
from dqbart_kernels.sizes import ACTIVATIONS
from torch import Tensor

from dqbart.architectures import first_position
from dqbart.packed import shards
from dqbart.packed.layout import FIELD_BITS, as_bytes, as_words, pack, unpack_trits
from dqbart.packed.skeleton import expected_tensors
from dqbart.packed.spec import PackedSpec
from dqbart.packed.verify import (
    build_skeleton,
    check_headers,
    model_config,
    read_checked,
    read_config,
    read_spec,
    unchanged,
)
from dqbart.quant.narrow import FIELD
from dqbart.quant.sharing import places

S = TypeVar("S", bound="Stacks")

_EMBEDDINGS = {
    r"embeddings\.word_embeddings": "shared",
    r"embeddings\.position_embeddings": "encoder.embed_positions",
    r"embeddings\.token_type_embeddings": "encoder.token_types",
    r"embeddings\.LayerNorm": "encoder.layernorm_embedding",
}
_BERT = _EMBEDDINGS | {
    r"encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)": r"encoder.layers.\1.self_attn.\2",
    r"encoder\.layer\.(\d+)\.attention\.output\.dense": r"encoder.layers.\1.self_attn.out_proj",
    r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm": r"encoder.layers.\1.self_attn_layer_norm",
    r"encoder\.layer\.(\d+)\.intermediate\.dense": r"encoder.layers.\1.fc1",
    r"encoder\.layer\.(\d+)\.output\.dense": r"encoder.layers.\1.fc2",
    r"encoder\.layer\.(\d+)\.output\.LayerNorm": r"encoder.layers.\1.final_layer_norm",
}
_DISTILBERT = _EMBEDDINGS | {
    r"transformer\.layer\.(\d+)\.attention\.(q|k|v)_lin": r"encoder.layers.\1.self_attn.\2_proj",
    r"transformer\.layer\.(\d+)\.attention\.out_lin": r"encoder.layers.\1.self_attn.out_proj",
    r"transformer\.layer\.(\d+)\.sa_layer_norm": r"encoder.layers.\1.self_attn_layer_norm",
    r"transformer\.layer\.(\d+)\.ffn\.lin(1|2)": r"encoder.layers.\1.fc\2",
    r"transformer\.layer\.(\d+)\.output_layer_norm": r"encoder.layers.\1.final_layer_norm",
}
_GROUP = r"encoder\.albert_layer_groups\.(\d+)\.albert_layers\.0\."
_ALBERT = _EMBEDDINGS | {
    r"encoder\.embedding_hidden_mapping_in": "encoder.embedding_map",
    _GROUP + r"attention\.(query|key|value)": r"encoder.layers.\1.self_attn.\2",
    _GROUP + r"attention\.dense": r"encoder.layers.\1.self_attn.out_proj",
    _GROUP + r"attention\.LayerNorm": r"encoder.layers.\1.self_attn_layer_norm",
    _GROUP + "ffn": r"encoder.layers.\1.fc1",
    _GROUP + "ffn_output": r"encoder.layers.\1.fc2",
    _GROUP + "full_layer_layer_norm": r"encoder.layers.\1.final_layer_norm",
}
_SEQ2SEQ = {r"((?:shared|encoder|decoder)\b.*)": r"\1"}  # the native names are BART's


@dataclass(frozen=True)
class Family:
    """`prefix`: of the base model inside a model with a head. `names`: module names there to native ones."""

    prefix: str
    names: dict[str, str]
    attributes: tuple[str, str, str, str, str]  # of the config: width, heads, layers, feed-forward, activation


_USUAL = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "hidden_act")
_BART = ("d_model", "encoder_attention_heads", "encoder_layers", "encoder_ffn_dim", "activation_function")
FAMILIES = {
    "bart": Family("model", _SEQ2SEQ, _BART),
    "mbart": Family("model", _SEQ2SEQ, _BART),
    "bert": Family("bert", _BERT, _USUAL),
    "roberta": Family("roberta", _BERT, _USUAL),
    "xlm-roberta": Family("roberta", _BERT, _USUAL),
    "distilbert": Family("distilbert", _DISTILBERT, ("dim", "n_heads", "n_layers", "hidden_dim", "activation")),
    "albert": Family("albert", _ALBERT, _USUAL),
}
_SHORT = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}


def native_name(family: Family, name: str) -> str | None:
    """The native name of a module, or None for one that is not part of the stacks."""
    name = name.removeprefix(family.prefix + ".")
    for pattern, replacement in family.names.items():
        if re.fullmatch(pattern, name):
            found = re.sub(pattern, replacement, name)
            head, _, leaf = found.rpartition(".")
            return f"{head}.{_SHORT[leaf]}" if leaf in _SHORT else found
    return None


def unsuitable(folder: Path) -> str | None:
    """Why no native engine runs a packed folder; None if they do. Raises as `dqbart.packed.verify.verify` does."""
    config = read_config(folder)
    spec, c = read_spec(folder, config), model_config(folder, config)
    kind = c.model_type
    family = FAMILIES.get(kind)
    if family is None:
        return f"model type {kind!r}: it runs {', '.join(FAMILIES)}"
    if spec.numerics != "integer" or spec.activation_bits != 8 or spec.probability_bits != 16:
        return "it runs integer numerics with 8-bit activations and 16-bit probabilities"
    activation = getattr(c, family.attributes[4])
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        return f"activation {activation!r}: it runs {' and '.join(ACTIVATIONS)}"
    if kind in ("bart", "mbart") and c.encoder_attention_heads != c.decoder_attention_heads:
        return "encoder and decoder have different numbers of heads: it runs equal ones"
    kept, whole = getattr(c, FIELD, None), c.num_attention_heads
    if kept not in (None, whole):
        return f"attention with {kept!r} of {whole} heads: it runs all of them"
    if kind not in ("bart", "mbart") and getattr(c, "is_decoder", False):
        return "is_decoder: of this family it runs encoders, which see the whole text"
    if kind == "albert" and (c.inner_group_num != 1 or c.num_hidden_layers % max(1, c.num_hidden_groups)):
        return "layer groups of several or of unequal numbers of layers"
    own = {n: m for n, m in spec.modules.items() if m.tied_to is None}
    names = {name: native_name(family, name) for name in own}
    tied = [name for name, m in spec.modules.items() if m.tied_to is not None]
    if kind in ("bart", "mbart"):
        if "lm_head" not in tied:
            return "the vocabulary matrix or lm_head is in float: it runs packed ones"
    elif tied or None in names.values():
        outside = next(iter(tied), None) or next(name for name, found in names.items() if found is None)
        return f"{outside} is packed: of encoders it runs the stack of layers, and heads stay in float"
    used = [(place, m) for name, m in own.items() if m.kind == "linear" for place in places(c, name)]
    layers = {found: m for place, m in used if (found := native_name(family, place))}
    expected = 6 * c.num_hidden_groups + 1 if kind == "albert" else 6 * getattr(c, family.attributes[2])
    expected += 10 * c.decoder_layers if kind in ("bart", "mbart") else 0
    if len(layers) != expected or any(m.granularity != "row" for m in layers.values()):
        return f"{len(layers)} of {expected} linear layers are packed with a scale per column: it runs all or none"
    if "shared" not in names.values():
        return "the vocabulary matrix is in float: it runs packed ones"
    for name, module in layers.items():
        if name.endswith("k_proj") and module.bits != layers[name.replace("k_proj", "v_proj")].bits:
            return f"{name} and its v_proj have different bits: it multiplies them together"
        if name.endswith("self_attn.q_proj") and module.bits != layers[name.replace("q_proj", "k_proj")].bits:
            return f"{name} and its k_proj have different bits: it multiplies them together"
    return None


class Runner(Protocol):
    """A native engine: what holds a model and runs it. `model` is there once `make` was called."""

    name: str
    device: torch.device
    model: Any

    def reason(self) -> str | None:
        """Why it can't run here, in a line; None if it can."""

    def describe(self) -> str:
        """What it runs on, in words."""

    def most_beams(self, ends: int) -> int:
        """With so many end tokens."""

    def make(self, sizes: dict[str, int], embed_scale: float, eps: float) -> "Stacks": ...

    def hidden(self, ids_BL: Tensor, length_B: Tensor, types_BL: Tensor | None) -> Tensor:
        """Last hidden states fp32 [B, L, D] of an encoder, zeros behind each text's tokens."""

    def generate(self, sources: Sequence[native.I32], **options: Any) -> tuple[list[native.I32], native.F32, bool]:
        """As `dqbart_kernels.cpu.Model.generate`."""


def check_runs(runner: Runner, folder: Path) -> None:
    """Raises `ValueError` where this engine can't run, or not this folder."""
    if (reason := runner.reason()) is not None:
        raise ValueError(f"engine {runner.name!r} can't run here: {reason}; use engine 'torch'")
    if (reason := unsuitable(folder)) is not None:
        raise ValueError(f"engine {runner.name!r} can't run {folder}: {reason}; use engine 'torch'")


def check_ids(ids_BL: Tensor, tokens: int) -> None:
    """Raises `ValueError` for ids outside the vocabulary, before a cast to 32 bits could bring them inside."""
    for wrong in (int(ids_BL.min()), int(ids_BL.max())):
        if not 0 <= wrong < tokens:
            raise ValueError(f"source id {wrong}: expected 0 to {tokens - 1}")


class Stacks(Protocol):
    """What an engine's model takes: matrices and vectors by native name, all of them before `finish`."""

    def set_matrix(
        self,
        name: str,
        bits: int,
        shape: tuple[int, int],
        planar: native.U8,
        scale: native.F32,
        bias: native.F32 | None,
    ) -> None: ...

    def set_vector(self, name: str, values: native.F32) -> None: ...

    def finish(self) -> None: ...


def open_native(
    folder: Path, spec: PackedSpec, skeleton: Any, make: Callable[[dict[str, int], float, float], S]
) -> tuple[S, dict[str, shards.TensorInfo]]:
    """Read the folder's stacks into a model of `make(sizes, embed_scale, eps)`; and where the other tensors lie.

    Raises `FileNotFoundError` or `ValueError` naming file and tensor, as `dqbart.packed.verify.verify` does.
    """
    found = [shards.read_shard(file) for file in shards.shard_files(folder)]
    tensors = check_headers(found, expected_tensors(skeleton, spec), spec)

    def read(name: str) -> Tensor:
        return read_checked(name, tensors.pop(name), spec)

    family = FAMILIES[skeleton.config.model_type]
    model = make(*(_seq2seq if skeleton.config.model_type in ("bart", "mbart") else _encoder)(skeleton))
    for name, module in spec.modules.items():
        if module.tied_to is not None:
            continue
        words = read(f"{name}.weight")
        if module.layout == "trits":
            words = as_words(pack(unpack_trits(as_bytes(words), module.shape[1]), 2))
        bias_N = _floats(read(f"{name}.bias")) if f"{name}.bias" in tensors else None
        scale = _floats(read(f"{name}.weight_scale"))
        for place in places(skeleton.config, name):  # layers that share a matrix get a copy each
            model.set_matrix(
                str(native_name(family, place)), FIELD_BITS[module.bits], module.shape, as_bytes(words).numpy(),
                scale, bias_N,
            )  # fmt: skip
    for name in list(tensors):
        parent, _, leaf = name.rpartition(".")
        known = native_name(family, parent)
        if known is not None or name == "final_logits_bias":
            values = _floats(read(name))
            for place in places(skeleton.config, parent):
                model.set_vector(f"{native_name(family, place)}.{leaf}" if known else name, values)
    model.finish()
    return model, tensors


def require_weights(folder: Path, digest: str, who: str) -> None:
    """Raises `FileNotFoundError` or `ValueError` where the folder no longer holds the weights that were loaded."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: gone since this model was loaded, and {who} reads it again; put it back")
    if shards.weights_digest(folder) != digest:
        raise ValueError(
            f"{folder}: replaced by other weights since this model was loaded, and {who} reads it again; "
            "load the new ones with dqbart.load, or put the old ones back"
        )


def load_in_torch(folder: Path, digest: str, device: torch.device) -> Any:
    """The model in the torch engine. Raises as `require_weights` and `load_packed` do."""
    from dqbart.packed.checkpoint import load_packed

    with unchanged(folder):
        require_weights(folder, digest, "the torch engine, which this call needs,")
        return load_packed(folder, device=device)


def read_again(folder: Path, digest: str, runner: Runner) -> None:
    """Give an unpickled runner its model. Raises as `check_runs`, `require_weights` and `open_native` do."""
    if not hasattr(runner, "model"):
        with unchanged(folder):
            require_weights(folder, digest, "a pickle of it")
            check_runs(runner, folder)
            config = read_config(folder)
            spec = read_spec(folder, config)
            open_native(folder, spec, build_skeleton(folder, config, spec), runner.make)


def _seq2seq(skeleton: Any) -> tuple[dict[str, int], float, float]:
    c, before = skeleton.config, skeleton.config.model_type == "mbart"
    parts = {name: getattr(skeleton.model, name) for name in ("encoder", "decoder")}
    return (
        dict(
            d=c.d_model, heads=c.encoder_attention_heads, encoder_layers=c.encoder_layers,
            decoder_layers=c.decoder_layers, encoder_ffn=c.encoder_ffn_dim, decoder_ffn=c.decoder_ffn_dim,
            vocabulary=c.vocab_size, encoder_positions=parts["encoder"].embed_positions.weight.shape[0],
            decoder_positions=parts["decoder"].embed_positions.weight.shape[0],
            position_offset=parts["encoder"].embed_positions.offset, pre_norm=before, embedding_norm=True,
            head_bias=True, activation=ACTIVATIONS[c.activation_function],
        ),
        c.d_model**0.5 if c.scale_embedding else 1.0,
        parts["encoder"].layernorm_embedding.eps,
    )  # fmt: skip


def _encoder(skeleton: Any) -> tuple[dict[str, int], float, float]:
    c, embeddings = skeleton.config, skeleton.base_model.embeddings
    width, heads, layers, ffn, activation = (getattr(c, name) for name in FAMILIES[c.model_type].attributes)
    shared = c.model_type == "albert"
    return (
        dict(
            d=width, heads=heads, encoder_layers=c.num_hidden_groups if shared else layers, encoder_steps=layers,
            encoder_ffn=ffn, vocabulary=c.vocab_size, embedding_d=c.embedding_size if shared else width,
            embedding_map=shared, encoder_positions=embeddings.position_embeddings.num_embeddings,
            position_offset=first_position(c), token_types=getattr(c, "type_vocab_size", 0),
            activation=ACTIVATIONS[activation],
        ),
        1.0,
        embeddings.LayerNorm.eps,
    )  # fmt: skip


def _floats(tensor: Tensor) -> native.F32:
    return np.ascontiguousarray(tensor.float().reshape(-1).numpy())
