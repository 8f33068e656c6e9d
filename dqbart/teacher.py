"""The checkpoint that comes in: loaded whole, in fp32, with its tokenizer, or refused in one line.

Which of transformers' classes it becomes is decided by the task; without one, by the run that left the checkpoint, or
by what it says it is.
"""

import copy
from pathlib import Path
from typing import Any

from dqbart.packed.sentence import sentence_folder
from dqbart.packed.verify import read_generation_config
from dqbart.quant.layers import SUPPORTED
from dqbart.quant.narrow import FIELD
from dqbart.quant.sharing import share_again
from dqbart.recipe import Recipe

CLASSES = {
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "questions": "AutoModelForQuestionAnswering",
    "text": "AutoModelForMaskedLM",
    "sentences": "AutoModel",
    "s2s": "AutoModelForMaskedLM",
}
# What a class is for, by what its name has behind the family's: "ForMaskedLM" of BertForMaskedLM.
_WRITERS = {"ForConditionalGeneration": "seq2seq", "Model": "seq2seq"}  # BartModel: its head is its vocabulary matrix
_ENCODERS = {
    "Model": "text",
    "ForMaskedLM": "text",
    "ForPreTraining": "text",
    "ForSequenceClassification": "classification",
    "ForQuestionAnswering": "questions",
}
_WRITING = ("bart", "mbart")
_HEADS = ("classifier", "classification_head", "qa_outputs")  # how transformers names what such a class adds


def load_teacher(
    teacher: Any, tokenizer: Any, device: str | None, task: str | None = None, seed: int = 28, role: str = "teacher"
) -> tuple[Any, Any, str]:
    """`(model in eval mode, tokenizer, task)` from a path, a hub id or objects; `role`: what an error calls it.

    A head that the checkpoint lacks is made at random, from `seed`. Raises `ValueError` for an architecture that can't
    be compressed, a class whose head would be lost, a packed model, a device that isn't there, a tokenizer with more
    tokens than the model, or a model object without one, `FileNotFoundError` for a folder without a checkpoint.
    """
    from transformers import AutoTokenizer

    if isinstance(teacher, str | Path):
        model, task = _from_pretrained(teacher, task, seed, role)
        try:
            tokenizer = AutoTokenizer.from_pretrained(teacher) if tokenizer is None else tokenizer
        except OSError as error:
            raise FileNotFoundError(f"{role} {str(teacher)!r}: {_first_line(error)}") from None
    else:
        model = teacher
        _check_config(getattr(model, "config", None), type(model).__name__)
        task = _task_of_object(model, task)
        model = copy.deepcopy(model).float()  # the user's own stays as it is
        model.config.architectures = [type(model).__name__]  # not what the checkpoint was that it began as
    if isinstance(tokenizer, str | Path):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    if tokenizer is None:
        raise ValueError("tokenizer is missing: a teacher given as an object needs tokenizer=... beside it")
    if tokenizer.pad_token_id is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no padding token; give the one of the checkpoint")
    _check_tokens(tokenizer, model.config)
    return model.to(choose_device(device)).eval(), tokenizer, task


def load_student(student: str | Path, teacher: Any, recipe: Recipe, task: str) -> Any:
    """The float checkpoint that a student starts as, on the teacher's device. Raises as `load_teacher` does."""
    model, _ = _from_pretrained(student, recipe.task or task, recipe.seed, "student")
    if model.config.vocab_size != teacher.config.vocab_size:
        raise ValueError(
            f"student {str(student)!r}: {model.config.vocab_size} tokens, but the teacher has "
            f"{teacher.config.vocab_size}; expected models of one tokenizer"
        )
    return model.to(teacher.device)


def _from_pretrained(name: str | Path, task: str | None, seed: int, role: str = "teacher") -> tuple[Any, str]:
    import torch
    import transformers

    local = str(name).count("/") > 1 or str(name).startswith((".", "/", "~")) or str(name).endswith("/")
    if local and not Path(name).exists():
        raise FileNotFoundError(f"{role} {str(name)!r}: no such folder; expected a checkpoint folder or a hub id")
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(f"{role} {str(name)!r}: no config.json there; expected a transformers checkpoint")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{role} {str(name)!r}: neither a folder here nor loadable from the hub ({_first_line(error)})"
        ) from None
    _check_config(config, str(name), role)
    told, task = task is not None, task_of(name, config, task, role)
    if config.model_type in _WRITING and Path(name).is_dir():
        read_generation_config(Path(name), config.vocab_size)  # it is the student's, too: wrong values are said now
    words = _architecture(config).endswith(("ForMaskedLM", "ForPreTraining"))
    kind = "AutoModel" if task == "text" and not words else CLASSES[task]  # no head to make up where none is used
    torch.manual_seed(seed)
    try:
        model, found = getattr(transformers, kind).from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except OSError as error:
        raise FileNotFoundError(f"{role} {str(name)!r}: {_first_line(error)}") from None
    if found["missing_keys"] and task == "seq2seq":  # all of which it would be trained to imitate
        missing = min(found["missing_keys"])
        raise ValueError(f"{role} {str(name)!r}: its file has no {missing}; expected all of a {type(model).__name__}")
    lost = [key for key in sorted(found["unexpected_keys"]) if key.partition(".")[0] in _HEADS]
    if lost and not told:
        raise ValueError(
            f"{role} {str(name)!r}: {type(model).__name__} has no place for {lost[0]} and others in its file; name the "
            'class that it was in "architectures" of config.json, or say with --task what it is for'
        )
    return share_again(model), task


def task_of_run(folder: Any) -> str | None:
    """What the run of ours that left a folder was for; None for any other checkpoint."""
    file = Path(folder) / "recipe.yaml" if isinstance(folder, str | Path) else None
    return Recipe.from_yaml(file).task if file is not None and file.is_file() else None


def task_of(name: Any, config: Any, task: str | None = None, role: str = "teacher") -> str:
    """What a checkpoint is for: what is asked, else what the run of ours that left it, modules.json or its class says.

    Raises `ValueError` for a class whose head would be lost unasked, or of an encoder-decoder that writes nothing.
    """
    known = task or task_of_run(name) or ("sentences" if sentence_folder(name) is not None else None)
    if known is not None and config.model_type not in _WRITING:
        return known  # its encoder is all that is needed
    own = _task_of_class(_architecture(config), config, f"{role} {str(name)!r}")
    return known or own


def _architecture(config: Any) -> str:
    return str((config.architectures or [""])[0])


def _task_of_class(architecture: str, config: Any, who: str) -> str:
    import transformers

    family = type(config).__name__.removesuffix("Config")
    writes = config.model_type in _WRITING
    tasks = _WRITERS if writes else _ENCODERS
    task = tasks.get(architecture.removeprefix(family) or "Model")
    if task is None:
        way_out = (
            "for classes or answers give an encoder, such as RobertaForSequenceClassification"
            if writes
            else "--task text goes on with its encoder alone, another --task with a head for that"
        )
        known = ", ".join(family + head for head in tasks if hasattr(transformers, family + head))
        raise ValueError(f"{who}: the head of {architecture} would be lost; expected one of {known}; {way_out}")
    return "regression" if task == "classification" and config.num_labels == 1 else task


def _task_of_object(model: Any, task: str | None) -> str:
    """As `task_of`; an object stays what it is, so that has to be the task's own class."""
    import transformers

    name, family = type(model).__name__, type(model.config).__name__.removesuffix("Config")
    task = task or _task_of_class(name, model.config, "teacher")
    heads = {"seq2seq": "ForConditionalGeneration", "questions": "ForQuestionAnswering", "sentences": "Model"}
    masks = task in ("text", "s2s")
    expected = family + ("ForMaskedLM" if masks else heads.get(task, "ForSequenceClassification"))
    if name != expected and not (task == "text" and hasattr(transformers, name)):
        raise ValueError(
            f"teacher: task {task!r} of a {name} object; expected a {expected}, as transformers.{CLASSES[task]} gives, "
            "or the checkpoint's name"
        )
    return task


def choose_device(device: str | None) -> str:
    """The device asked for, else CUDA where there is one, else the CPU; `LOCAL_RANK` picks the GPU."""
    import os

    import torch

    if device is None:
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise ValueError(
            f"device {device!r}: expected 'cpu'{' or cuda' if torch.cuda.is_available() else ', no GPU is here'}"
        )
    return device


def _check_config(config: Any, name: str, role: str = "teacher") -> None:
    model_type = getattr(config, "model_type", None)
    if model_type not in SUPPORTED:
        raise ValueError(
            f"{role} {name!r}: architecture {model_type!r} is not supported; expected {' or '.join(SUPPORTED)}"
        )
    if getattr(config, FIELD, None) is not None:
        raise ValueError(
            f"{role} {name!r}: a sub-network, {getattr(config, FIELD)} of {config.num_attention_heads} heads; give the "
            "whole network, or make that with other --bits and extract this one from it"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{role} {name!r} is quantized already; give the full-precision checkpoint")


def _check_tokens(tokenizer: Any, config: Any) -> None:
    size = config.vocab_size
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= size}
    if config.model_type in _WRITING:
        beyond.pop(tokenizer.mask_token_id, None)  # facebook/bart-large-cnn has no row for it, and never reads it
    if beyond:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r}: token {beyond[min(beyond)]!r} has id {min(beyond)}, but the model "
            f"has {size} tokens; call model.resize_token_embeddings({max(beyond) + 1}), train it and save it, or give "
            "the tokenizer that it was trained with"
        )


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split())[:200]
