"""Decode a test set with a model, the way its scores will say it was decoded.

`effective_generation` says first what will be done, `generate_texts` does it, and `write_outputs` is both for a recipe.
Seq2SeqTrainer's `predict` was rejected: it takes settings from three places and records none of them, and pads all
outputs to one width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dqbart.data.decoding import check_texts, decode_batches, effective_generation
from dqbart.recipe import Recipe

__all__ = ["effective_generation", "generate_texts", "write_outputs"]


def write_outputs(
    model: Any,
    tokenizer: Any,
    sources: Sequence[str],
    recipe: Recipe,
    *,
    generation: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> tuple[list[str], dict[str, Any]]:
    """One text per source, as a recipe says, and the settings in force.

    `generation` and `batch_size` stand for the recipe's. Raises as `effective_generation` and `generate_texts` do.
    """
    settings = effective_generation(
        model, recipe.generation if generation is None else generation, tokenizer=tokenizer,
        target_lang=recipe.target_lang, max_target_length=recipe.max_target_length,
    )  # fmt: skip
    texts = generate_texts(
        model, tokenizer, sources, batch_size=batch_size or recipe.eval_batch_size, generation=settings,
        max_source_length=recipe.max_source_length, source_prefix=recipe.source_prefix,
        source_lang=recipe.source_lang, target_lang=recipe.target_lang, progress=progress,
    )  # fmt: skip
    return texts, settings


def generate_texts(
    model: Any,
    tokenizer: Any,
    sources: Sequence[str],
    *,
    batch_size: int = 32,
    max_source_length: int | None = None,
    generation: Mapping[str, Any] | None = None,
    source_prefix: str = "",
    source_lang: str | None = None,
    target_lang: str | None = None,
    progress: bool = True,
) -> list[str]:
    """One text per source, in the order of the sources, special tokens left out.

    `generation` is laid over the checkpoint's settings by `effective_generation`, or comes from it.
    Sources are decoded longest first; the model is in eval mode meanwhile and as it was afterwards,
    also after an error. Progress with the time left goes to stderr when it takes more than a
    second. Raises `ValueError` for no sources, a batch size below 1, and as `effective_generation`
    and `dqbart.data.batches.encode_pairs` do.
    """
    check_texts(sources, batch_size)
    settings = effective_generation(model, generation, tokenizer=tokenizer, target_lang=target_lang)
    texts = [""] * len(sources)
    for _, indices, written in decode_batches(
        model, tokenizer, sources, settings, batch_size=batch_size,
        max_source_length=max_source_length, source_prefix=source_prefix,
        source_lang=source_lang, target_lang=target_lang, progress=progress,
    ):  # fmt: skip
        for index, text in zip(indices, written, strict=True):
            texts[index] = text
    return texts
