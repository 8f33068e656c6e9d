"""What a recipe leaves to the teacher, filled in; and whether method, task and losses are for such a model at all."""

import dataclasses
from typing import Any

from dqbart.architectures import first_position
from dqbart.methods import BOTH, METHODS, OF_ENCODER_DECODERS, OF_ENCODERS
from dqbart.notation import Layers
from dqbart.recipe import METRICS, SHAPE, USUAL, WRITES, Recipe

# Low bits rebuild weights instead of rounding them, and want a larger step (TBT's scripts, ParetoQ).
LEARNING_RATE = {1: 2.5e-4, 2: 3e-4, 3: 1.5e-4, 4: 1e-4, 8: 5e-5, 32: 5e-5}
# Layers that are left out are more to make up for than any rounding (benchmarks/README.md, "Quality", "What failed").
FEWER_LAYERS = 3e-4


def resolve(recipe: Recipe, config: Any, task: str | None = None, student: Any = None) -> Recipe:
    """The recipe, with what depends on the teacher's transformers config: task, metric, layers, learning rate, lengths.

    `task`: the teacher's, where the recipe doesn't say. `student`: the config of what the student starts as, if that is
    no copy. Lengths are cut to the positions that the model has. The rate is a base by weight bits, by method and by
    whether layers are left out, times sqrt(768 / width): narrow models take larger steps (4+4 layers of width 256 did
    best near 5e-4 at two bits). Raises `ValueError` where method, task and losses are for other models, and for a key
    that nothing would read. What it gives, it gives back unchanged.
    """
    task = recipe.task or task or ("seq2seq" if config.is_encoder_decoder else "text")
    _check_family(recipe, config, task)
    if recipe.elastic:
        _check_elastic(recipe, config, task, student)
    both = [config] if student is None else [config, student]
    positions = min(one.max_position_embeddings - first_position(one) for one in both)
    changes: dict[str, Any] = {
        "task": task,
        "metric": recipe.metric or METRICS[task][0],
        "max_source_length": min(recipe.max_source_length, positions),
        "max_target_length": min(recipe.max_target_length, positions - 1),
    }
    own = Layers.of(config if student is None else student)
    if student is not None and (recipe.is_narrow or recipe.layers not in (None, own)):
        raise ValueError(f"layers {recipe.layers}: the student that is given has {own} and a shape; leave these out")
    if recipe.layers is None:
        changes["layers"] = own
    if recipe.learning_rate is None:
        low = min(recipe.bits.weights, recipe.bits.embeddings)
        width = recipe.hidden_size or (config if student is None else student).hidden_size
        base = METHODS[recipe.method].learning_rate if low == 32 else LEARNING_RATE[low]
        if student is None:  # MiniLM and DistilBERT make one, which takes more than rounding does
            base = max(base, METHODS[recipe.method].learning_rate)
            if recipe.layers not in (None, own):
                base = max(base, FEWER_LAYERS)
        changes["learning_rate"] = float(f"{base * (768 / width) ** 0.5:.2g}")
    resolved = dataclasses.replace(recipe, **changes)
    unset: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(recipe)}
    unset |= USUAL | {"generation": {}} | METHODS[recipe.method].settings
    unset["max_target_length"] = min(unset["max_target_length"], positions - 1)  # as a resolved recipe has it
    check_unread(resolved, config, unset)
    return resolved


def _check_family(recipe: Recipe, config: Any, task: str) -> None:
    family = "encoder-decoder" if config.is_encoder_decoder else "encoder"
    if (task == "seq2seq") != config.is_encoder_decoder:
        fit = [name for name in METRICS if (name == "seq2seq") == config.is_encoder_decoder]
        raise ValueError(f"task {task!r}: a {config.model_type} model is an {family}; expected one of {', '.join(fit)}")
    if family not in METHODS[recipe.method].families:
        fit = [name for name, method in METHODS.items() if family in method.families]
        raise ValueError(
            f"method {recipe.method!r} is for encoders, and a {config.model_type} model has a decoder; "
            f"expected one of {', '.join(fit)}"
        )
    own = OF_ENCODER_DECODERS if config.is_encoder_decoder else OF_ENCODERS
    for name in recipe.terms:
        if name not in (*BOTH, *own):
            raise ValueError(f"losses.{name}: a {config.model_type} model has {', '.join((*BOTH, *own))}")
    if task == "sentences" and recipe.trains and not recipe.elastic and {"task", "logits"} & set(recipe.terms):
        raise ValueError(
            f"method {recipe.method!r} with task 'sentences': no words or classes are put out that could be "
            "compared; give --method sentence"
        )
    if "order" in recipe.terms and (task, recipe.segments) != ("text", 2):
        raise ValueError(f"losses.order with task {task!r}, segments {recipe.segments}: expected 'text' and 2")
    narrow = [n for n in ("family", *SHAPE) if getattr(recipe, n) is not None]
    if narrow and config.is_encoder_decoder:
        raise ValueError(
            f"{narrow[0]} {getattr(recipe, narrow[0])!r}: only encoders' students have a shape of their own"
        )


def check_unread(recipe: Recipe, config: Any, unset: dict[str, Any]) -> None:
    """A key that nothing would read is refused: whoever gives it expects something of it.

    `recipe` is resolved; `unset`: the keys in question, and their values where nobody gives them. Raises `ValueError`.
    """
    method, task, stages = METHODS[recipe.method], recipe.task, recipe.stages()
    learned, told = (any(name in stage.terms for stage in stages) for name in BOTH)
    guessed = told and recipe.logits_loss == "kl" and task != "regression"
    two_parts = recipe.elastic or (method.then is not None and task not in ("text", "sentences"))
    related = {"attention_kl", "values", "queries", "keys"} & recipe.terms.keys()
    masked = task == "text" and (recipe.elastic or {*BOTH} & recipe.terms.keys())
    quantized, writes = recipe.bits.quantized, task in ("seq2seq", "s2s")
    readers: dict[str, tuple[Any, str]] = {
        "widths depths label_epochs": (recipe.elastic, "method 'dynabert'"),
        "prediction_epochs": (two_parts, "a method with a second part, on a task,"),
        "logits_loss": (told or recipe.numerics == "paper", "losses.logits"),
        "temperature": (guessed, "logits_loss 'kl' of classes or words"),
        "teacher_layer relation_heads": (related, "the losses attention_kl, queries, keys and values"),
        "sharing": (recipe.family == "albert" and config.model_type != "albert", "family 'albert' of another teacher"),
        "segments document_column": (task == "text", "task 'text'"),
        "mask_rate masking": (masked, "task 'text' with losses.task or losses.logits"),
        "source_prefix": (task not in ("text", "questions"), "tasks with one source text"),
        "label_smoothing": (
            learned and task not in ("regression", "questions", "sentences"),
            "losses.task of classes or words",
        ),
        "source_column": (task != "questions", "tasks other than questions"),
        "target_column": (task not in ("questions", "text"), "tasks with a column of outputs or labels"),
        "pair_column": (task in ("classification", "regression", "sentences"), "tasks on pairs of texts"),
        "source_lang max_target_length": (writes, "tasks that write"),
        "target_lang generation": (task in WRITES, "tasks that write or answer"),
        "skip probability_bits float_dtype": (quantized, "bits other than 32-32-32"),
        "quantize_heads": (quantized and not config.is_encoder_decoder, "encoders with bits other than 32-32-32"),
    }
    for names, (is_read, reader) in readers.items():
        for name in names.split():
            if not is_read and name in unset and getattr(recipe, name) != unset[name]:
                raise ValueError(f"{name} {getattr(recipe, name)!r}: only {reader} would read it; leave it out")


def _check_elastic(recipe: Recipe, config: Any, task: str, student: Any) -> None:
    if task in ("sentences", "s2s"):
        fit = [name for name in METRICS if name not in ("seq2seq", "sentences", "s2s")]
        raise ValueError(
            f"task {task!r} with method {recipe.method!r}: it compares what heads say; expected one of {', '.join(fit)}"
        )
    given = {name: getattr(recipe, name) for name in ("family", *SHAPE)}
    given |= {
        "student": None if student is None else student.model_type,
        "layers": None if recipe.layers == Layers.of(config) else recipe.layers,
        "layer_map": list(recipe.layer_map) if isinstance(recipe.layer_map, tuple) else None,
    }
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name} {value}: method {recipe.method!r} trains all of its teacher, and parts are cut from that; "
                f"leave {name} out"
            )
