"""ALBERT-shaped students: a narrow embedding with a map behind it, and layers that share their weights.

A student of an ALBERT or BERT-like teacher keeps the teacher's tokenizer, special tokens and task. Where widths allow
it starts from the teacher's weights:

Embedding. A BERT's is y = g (x - mean x) / std x + b over a sum x of word, position and type rows [D]. An ALBERT's
normalizes at width E and maps to D. The E directions that hold most of the words (their truncated SVD, after taking
each row's mean away, as the norm does) give rows x B [E], and the map diag(g) B^T sqrt(D / E) with bias b. One thing is
left: ALBERT's norm subtracts the mean over E, so directions are turned until that mean is along the one that matters
least. With E = D nothing is lost and an unshared student says what its teacher says; a test holds it to that.

Layers. What a layer has of its own comes from the teacher's layer by `layer_map`. What all share is the mean of these
layers. Nothing aligns neurons or heads of different layers, so copying one looked wiser; but it starts and stays worse.
Last hidden states of all-MiniLM-L6 from an `all` student, E = 128, 60 steps of 16 sentences of `stsb-free`, squared
error before and after: mean 0.41 and 0.15, layer 3 0.62 and 0.19, layer 5 0.57 and 0.19, layer 0 0.58 and 0.25, random
layers 1.05 and 0.55; the mean behind a random embedding 0.57 and 0.26.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dqbart.architectures import first_position
from dqbart.quant.sharing import FIELD, check_sharing, keep_whole, shared_parts, tie_layers
from dqbart.student.shape import check_heads, checked_layers, inherited, task_class, whole

# BERT's names in an ALBERT layer; the first four of each are the attention's or the feed-forward block's.
_ATTENTION = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.dense",
    "attention.output.LayerNorm": "attention.LayerNorm",
}
_FFN = {"intermediate.dense": "ffn", "output.dense": "ffn_output", "output.LayerNorm": "full_layer_layer_norm"}
_TEACHERS = ("bert", "roberta", "xlm-roberta", "albert")


def albert_config(
    teacher_config: Any,
    *,
    layers: int | None = None,
    embedding_size: int | None = None,
    hidden_size: int | None = None,
    heads: int | None = None,
    intermediate_size: int | None = None,
    sharing: str = "all",
) -> Any:
    """`AlbertConfig` for a student; `dqbart_sharing` in it is `sharing`, one of "all", "attention", "ffn", "none".

    Left out: `embedding_size` is 128, or less for a narrower student (an ALBERT teacher's own), other sizes are the
    teacher's, and `intermediate_size` keeps its ratio to the width. Raises `ValueError` for a teacher of another family
    and sizes that don't fit it.
    """
    from transformers import AlbertConfig

    c = teacher_config
    if c.model_type not in _TEACHERS:
        raise ValueError(f"architecture {c.model_type!r}: expected a teacher of one of {', '.join(_TEACHERS)}")
    check_sharing(sharing)
    if getattr(c, "inner_group_num", 1) != 1:
        raise ValueError(f"inner_group_num {c.inner_group_num!r} of the teacher: expected 1")
    layers = checked_layers(c.num_hidden_layers, c.num_hidden_layers if layers is None else layers)
    hidden = whole("hidden_size", hidden_size, c.hidden_size)
    check_heads(heads := whole("heads", heads, c.num_attention_heads), hidden)
    embedding = whole("embedding_size", embedding_size, getattr(c, "embedding_size", min(128, hidden)))
    if c.model_type == "albert" and embedding != c.embedding_size:
        raise ValueError(f"embedding_size {embedding}: the ALBERT teacher's is {c.embedding_size}; expected the same")
    if c.model_type != "albert" and embedding > c.hidden_size:
        raise ValueError(f"embedding_size {embedding}: expected 1 to {c.hidden_size}, the teacher's width")
    inner = round(c.intermediate_size * hidden / c.hidden_size)
    config = AlbertConfig(
        vocab_size=c.vocab_size, embedding_size=embedding, hidden_size=hidden, num_hidden_layers=layers,
        num_hidden_groups=1 if sharing == "all" else layers, num_attention_heads=heads,
        intermediate_size=whole("intermediate_size", intermediate_size, inner),
        hidden_act=c.hidden_act, hidden_dropout_prob=c.hidden_dropout_prob,
        attention_probs_dropout_prob=c.attention_probs_dropout_prob, type_vocab_size=c.type_vocab_size,
        max_position_embeddings=c.max_position_embeddings - first_position(c), layer_norm_eps=c.layer_norm_eps,
        initializer_range=c.initializer_range, **inherited(c),
    )  # fmt: skip
    setattr(config, FIELD, sharing)
    config._attn_implementation = "eager"
    return config


def shared_model(cls: Any, config: Any) -> Any:
    """A random model of a class; an ALBERT's layers share what `config.dqbart_sharing` says.

    Its `save_pretrained` writes a copy for each layer, so that transformers alone can read it; `save_packed` writes
    what is shared once. Raises `ValueError` for a sharing that doesn't fit the config.
    """
    shared_parts(config)  # before anything is allocated
    model = cls(config)
    tie_layers(model)
    keep_whole(model)
    return model


def albert_student(
    teacher: Any,
    *,
    layers: Sequence[int] | None = None,
    embedding_size: int | None = None,
    hidden_size: int | None = None,
    heads: int | None = None,
    intermediate_size: int | None = None,
    sharing: str = "all",
) -> Any:
    """A float ALBERT of the class for the teacher's task, sizes as in `albert_config`, started from its weights.

    `layers`: of the teacher, counted from 0, that its own begin as; all by default.
    The embedding is copied or factorized, its map to the layers too if the width is the teacher's. Attention is copied
    where width and heads are, feed-forward where width and inner width are; pooler and heads where shapes are. The rest
    is random, by torch's generator. Nothing is shared with the teacher. Raises `ValueError` as `albert_config`, and for
    a task that ALBERT has no class for.
    """
    mapped = range(teacher.config.num_hidden_layers) if layers is None else layers
    config = albert_config(
        teacher.config, layers=len(mapped), embedding_size=embedding_size, hidden_size=hidden_size, heads=heads,
        intermediate_size=intermediate_size, sharing=sharing,
    )  # fmt: skip
    student = shared_model(task_class(teacher, "Albert"), config).to(dtype=teacher.dtype)
    with torch.no_grad():
        state = teacher.base_model.state_dict()
        found = _embeddings(state, teacher.config, config) | _layers(state, teacher.config, config, mapped)
        base, own = student.base_model, student.base_model.state_dict()
        pooler = state.get("pooler.dense.weight", state.get("pooler.weight"))
        if pooler is not None and base.pooler is not None and pooler.shape == base.pooler.weight.shape:
            bias = state.get("pooler.dense.bias", state.get("pooler.bias"))
            found |= {"pooler.weight": pooler, "pooler.bias": bias}
        base.load_state_dict(own | found)
        _copy_heads(teacher, student)
    student.tie_weights()
    return student


def _embeddings(state: dict[str, Tensor], old: Any, new: Any) -> dict[str, Tensor]:
    tables = {name: state[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")}
    same_width = old.hidden_size == new.hidden_size
    if old.model_type == "albert":
        names = [name for name in state if name.startswith("embeddings.") or (same_width and "mapping_in" in name)]
        return {name: state[name] for name in names}
    tables["position"] = tables["position"][first_position(old) :]
    basis_DE = _basis(tables["word"], new.embedding_size)
    found = {
        f"embeddings.{name}_embeddings.weight": ((table.double() - table.double().mean(1, True)) @ basis_DE).to(table)
        for name, table in tables.items()
    }
    gain_D, bias_D = state["embeddings.LayerNorm.weight"], state["embeddings.LayerNorm.bias"]
    found["embeddings.LayerNorm.weight"] = gain_D.new_ones(new.embedding_size)
    found["embeddings.LayerNorm.bias"] = gain_D.new_zeros(new.embedding_size)
    if same_width:
        map_DE = gain_D.double()[:, None] * basis_DE * (old.hidden_size / new.embedding_size) ** 0.5
        found["encoder.embedding_hidden_mapping_in.weight"] = map_DE.to(gain_D)
        found["encoder.embedding_hidden_mapping_in.bias"] = bias_D
    return found


def _basis(words_VD: Tensor, size: int) -> Tensor:
    """Orthonormal columns [D, E], fp64: the span of the first E right singular vectors of the rows less their means,
    turned so that the last of these, the least, lies along (1, ..., 1) of the E coordinates."""
    gram_DD = torch.zeros(words_VD.shape[1], words_VD.shape[1], dtype=torch.float64)
    for rows in words_VD.split(8192):  # the vocabulary may be large
        rows = rows.double().cpu()
        rows = rows - rows.mean(1, keepdim=True)
        gram_DD += rows.T @ rows
    vectors_DE = torch.linalg.eigh(gram_DD).eigenvectors[:, -size:].flip(1)
    mirror_E = torch.full((size,), size**-0.5, dtype=torch.float64)
    mirror_E[-1] -= 1  # Householder: the reflection that swaps the last axis and the diagonal
    if length := float(mirror_E.square().sum()):
        vectors_DE = vectors_DE - 2 / length * (vectors_DE @ mirror_E)[:, None] * mirror_E
    return vectors_DE.to(words_VD.device)


def _layers(state: dict[str, Tensor], old: Any, new: Any, mapped: Sequence[int]) -> dict[str, Tensor]:
    same_width = old.hidden_size == new.hidden_size
    wanted = _ATTENTION if same_width and old.num_attention_heads == new.num_attention_heads else {}
    wanted = wanted | (_FFN if same_width and old.intermediate_size == new.intermediate_size else {})
    found = {}
    for i in range(new.num_hidden_groups):
        for theirs, ours in wanted.items():
            shared = new.num_hidden_groups == 1 or ours.partition(".")[0] in shared_parts(new)
            stems = {_stem(old, layer, theirs, ours) for layer in (mapped if shared else [mapped[i]])}
            for leaf in ("weight", "bias"):
                tensors = torch.stack([state[f"{stem}.{leaf}"] for stem in sorted(stems)])
                found[f"encoder.albert_layer_groups.{i}.albert_layers.0.{ours}.{leaf}"] = tensors.mean(0)
    return found


def _stem(old: Any, layer: int, theirs: str, ours: str) -> str:
    """Where a teacher has a module of one of its layers: by BERT's name for it, or by ALBERT's in a group."""
    if old.model_type != "albert":
        return f"encoder.layer.{layer}.{theirs}"
    return (
        f"encoder.albert_layer_groups.{layer * old.num_hidden_groups // old.num_hidden_layers}.albert_layers.0.{ours}"
    )


def _copy_heads(teacher: Any, student: Any) -> None:
    """Parameters outside the base models that do the same and have the same shape. Of a BERT's head for masked words
    that is the bias alone: the rest works on embeddings of another basis."""
    inside = {id(parameter) for parameter in student.base_model.parameters()}
    own = {name: parameter for name, parameter in student.named_parameters() if id(parameter) not in inside}
    for name, tensor in teacher.named_parameters():
        if name in ("cls.predictions.bias", "lm_head.bias"):
            name = "predictions.bias"
        target = own.get(name)
        if target is not None and target.shape == tensor.shape:
            target.copy_(tensor)
