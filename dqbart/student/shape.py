"""Other shapes: a config of the teacher's family with fewer layers and another width, and DistilBERT's for a BERT.

Families name the same sizes differently, so a table of four field names is all there is to know. A narrower student
copies nothing from its teacher (MiniLM and TinyBERT start from random weights, or from a student distilled on plain
text); `dqbart.student.depth` copies where only layers go.

DistilBERT (arXiv 1910.01108, section 3) is BERT without token types and pooler under other names. Its authors drop
the token types; here the vector of type 0, which BERT adds to every token of a single text, moves into the positions,
so that a DistilBERT of all layers says what its BERT says of single texts.
"""

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dqbart.student.maps import layer_map

# model_type -> config fields that hold layers, width, heads, feed-forward width.
_USUAL = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
SIZES: dict[str, tuple[str, str, str, str]] = dict.fromkeys(("bert", "roberta", "xlm-roberta", "albert"), _USUAL) | {
    "distilbert": ("n_layers", "dim", "n_heads", "hidden_dim")
}
# BERT's names in DistilBERT; all others have no place there.
_MODULES = {
    "embeddings.word_embeddings": "embeddings.word_embeddings",
    "embeddings.position_embeddings": "embeddings.position_embeddings",
    "embeddings.LayerNorm": "embeddings.LayerNorm",
}
_LAYER = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
_HEADS = {
    "cls.predictions.transform.dense": "vocab_transform",
    "cls.predictions.transform.LayerNorm": "vocab_layer_norm",
    "cls.predictions.decoder": "vocab_projector",
    "qa_outputs": "qa_outputs",
}
_TYPE = "embeddings.token_type_embeddings.weight"


def student_config(
    teacher_config: Any,
    *,
    layers: int,
    hidden_size: int | None = None,
    heads: int | None = None,
    intermediate_size: int | None = None,
    embedding_size: int | None = None,
) -> Any:
    """A new config of the teacher's family with these sizes; everything else is the teacher's.

    Left out, `heads` and `embedding_size` (of ALBERT alone) stay the teacher's, and `intermediate_size` keeps its ratio
    to the width: MiniLM's L6-H384 from BERT-base is `layers=6, hidden_size=384`. Raises `ValueError` for an unknown
    family, sizes that are no whole numbers from 1, more layers than the teacher's, and heads that don't divide the
    width.
    """
    kind = teacher_config.model_type
    if kind not in SIZES:
        raise ValueError(f"architecture {kind!r}: expected an encoder, one of {', '.join(SIZES)}")
    layers_field, width_field, heads_field, ffn_field = SIZES[kind]
    width = whole("hidden_size", hidden_size, getattr(teacher_config, width_field))
    ratio = getattr(teacher_config, ffn_field) / getattr(teacher_config, width_field)
    check_heads(heads := whole("heads", heads, getattr(teacher_config, heads_field)), width)
    values = {
        layers_field: checked_layers(getattr(teacher_config, layers_field), layers),
        width_field: width,
        heads_field: heads,
        ffn_field: whole("intermediate_size", intermediate_size, round(ratio * width)),
    }
    if kind == "albert":
        values["embedding_size"] = whole("embedding_size", embedding_size, teacher_config.embedding_size)
        values["num_hidden_groups"] = _groups(teacher_config, layers)
    elif embedding_size is not None:
        raise ValueError(
            f"embedding_size {embedding_size!r}: the embedding of a {kind} is as wide as its layers; leave it out, or "
            "make an ALBERT student of the teacher"
        )
    config = copy.deepcopy(teacher_config)
    config._attn_implementation = "eager"
    for field, value in values.items():
        setattr(config, field, value)
    return config


def _groups(config: Any, layers: int) -> int:
    """ALBERT's groups of layers for a number of layers: as many as layers where the teacher has it so, else as many
    as the teacher's."""
    groups: int = config.num_hidden_groups
    return layers if groups == config.num_hidden_layers and groups > 1 else min(groups, layers)


def whole(name: str, given: Any, default: int) -> int:
    """`given`, or `default` for None. Raises `ValueError` for what is no whole number from 1."""
    if given is None:
        return default
    if type(given) is not int or given < 1:
        raise ValueError(f"{name} {given!r}: expected a whole number from 1")
    return given


def checked_layers(teacher_layers: int, layers: int) -> int:
    """Raises `ValueError` as `layer_map` does."""
    return len(layer_map(teacher_layers, whole("layers", layers, teacher_layers)))


def check_heads(heads: int, width: int) -> None:
    """Raises `ValueError` for heads that don't divide the width."""
    if width % heads:
        fit = [count for count in range(1, min(width, 64) + 1) if width % count == 0]
        raise ValueError(f"heads {heads}: don't divide the width {width}; expected one of {fit}")


def distilbert_config_of(bert_config: Any, layers: int) -> Any:
    """`DistilBertConfig` of the shape of a BERT with `layers` of its layers.

    LayerNorm's eps is lost: DistilBERT's is always 1e-12. Raises `ValueError` for another family and for more layers
    than there are.
    """
    from transformers import DistilBertConfig

    if bert_config.model_type != "bert":
        raise ValueError(
            f"architecture {bert_config.model_type!r}: a DistilBERT is made of a bert; other families keep their class"
        )
    checked_layers(bert_config.num_hidden_layers, layers)
    config = DistilBertConfig(
        vocab_size=bert_config.vocab_size, max_position_embeddings=bert_config.max_position_embeddings,
        n_layers=layers, n_heads=bert_config.num_attention_heads, dim=bert_config.hidden_size,
        hidden_dim=bert_config.intermediate_size, dropout=bert_config.hidden_dropout_prob,
        attention_dropout=bert_config.attention_probs_dropout_prob, activation=bert_config.hidden_act,
        initializer_range=bert_config.initializer_range, **inherited(bert_config),
    )  # fmt: skip
    config._attn_implementation = "eager"
    return config


def inherited(config: Any) -> dict[str, Any]:
    """What every family calls the same and a student takes over: special tokens, labels, ties."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "id2label", "label2id")
    return {name: copy.deepcopy(getattr(config, name)) for name in names} | {"problem_type": config.problem_type}


def convert_bert_to_distilbert(state_dict: dict[str, Tensor], layers: Sequence[int]) -> dict[str, Tensor]:
    """DistilBERT's tensors out of a BERT's: layer i is the BERT's `layers[i]`, for DistilBERT itself 0, 2, 4, 7, 9, 11.

    Names follow the class that the tensors are of: with "bert." in front they get "distilbert.", and the heads for
    masked words and for answers come along. Not the classifier, which expects the pooler. Tensors are copies. Raises
    `ValueError` for tensors that are no BERT's and for layers that it doesn't have.
    """
    prefix = "bert." if any(name.startswith("bert.") for name in state_dict) else ""
    base = prefix and "distilbert."
    if f"{prefix}{_TYPE}" not in state_dict:
        raise ValueError(f"no tensor {prefix}{_TYPE}: expected a BERT's state_dict()")
    pairs = [(prefix + old, base + new) for old, new in _MODULES.items()] + list(_HEADS.items())
    for i, layer in enumerate(layers):
        if f"{prefix}encoder.layer.{layer}.output.dense.weight" not in state_dict:
            raise ValueError(f"layers {list(layers)}: the tensors given have no layer {layer!r}; they count from 0")
        pairs += [
            (f"{prefix}encoder.layer.{layer}.{old}", f"{base}transformer.layer.{i}.{new}")
            for old, new in _LAYER.items()
        ]
    converted = {
        f"{new}.{leaf}": state_dict[f"{old}.{leaf}"].detach().clone()
        for old, new in pairs
        for leaf in ("weight", "bias")
        if f"{old}.{leaf}" in state_dict
    }
    converted[f"{base}embeddings.position_embeddings.weight"] += state_dict[f"{prefix}{_TYPE}"][0]
    return converted


def distilbert_student(teacher: Any, layers: Sequence[int]) -> Any:
    """A DistilBERT of a BERT teacher, of the class for the same task, initialised by `convert_bert_to_distilbert`.

    What the BERT has no counterpart for (a classifier without pooler) is random. Raises `ValueError` where there is
    no such class, and as the functions above.
    """
    config = distilbert_config_of(teacher.config, len(layers))
    student = task_class(teacher, "DistilBert")(config).to(dtype=teacher.dtype)
    found = convert_bert_to_distilbert(teacher.state_dict(), layers)
    student.load_state_dict(student.state_dict() | found)
    student.tie_weights()
    return student


def task_class(teacher: Any, family: str) -> Any:
    """transformers' class of another family for the teacher's task, "DistilBert" say. Raises `ValueError`."""
    import transformers

    own = type(teacher).__name__
    for before in ("XLMRoberta", "Roberta", "Bert", "Albert"):
        if own.startswith(before):
            task = own.removeprefix(before)
            found = getattr(transformers, family + task, None)
            if found is None and task == "ForPreTraining":
                found = getattr(transformers, f"{family}ForMaskedLM")
            if found is not None:
                return found
    raise ValueError(f"teacher {own}: there is no {family} class for its task; load it as a ...ForMaskedLM or ...Model")
