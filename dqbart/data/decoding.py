"""Decode many sources with a model, by settings that are known before and recorded after.

`effective_generation` says everything that `model.generate` will be told; `decode_batches` does it. transformers takes
settings from the checkpoint, from its defaults and from the call, and records none of them beside a result.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dqbart.data.batches import Collator, encode_pairs, language_codes, progress_bar, set_languages

Settings = dict[str, Any]

# Generation settings that say how to compute, and nothing of the result.
IMPLEMENTATION_SETTINGS = frozenset(
    "use_cache cache_implementation cache_config max_cache_len return_legacy_cache compile_config disable_compile "
    "num_beam_groups diversity_penalty is_assistant num_assistant_tokens num_assistant_tokens_schedule "
    "assistant_confidence_threshold assistant_lookbehind assistant_early_exit target_lookbehind "
    "transformers_version prefill_chunk_size".split()
)
SAMPLING_SETTINGS = frozenset("temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff".split())
# Not recorded: none of them decides which words are written.
_TECHNICAL = IMPLEMENTATION_SETTINGS | frozenset(
    "output_attentions output_hidden_states output_scores output_logits return_dict_in_generate "
    "num_return_sequences".split()
)
_BEAM_ONLY = {"length_penalty": 1.0, "early_stopping": False}
_REFUSED = {"num_return_sequences": 1, "return_dict_in_generate": False, "output_scores": False}


def effective_generation(
    model: Any,
    overrides: Mapping[str, Any] | None = None,
    *,
    tokenizer: Any = None,
    target_lang: str | None = None,
    max_target_length: int | None = None,
) -> Settings:
    """Every setting `model.generate` is to use: overrides, then the checkpoint, then defaults.

    The result is plain JSON, to be passed to `generate_texts` and stored beside its scores; giving
    it back as `overrides` changes nothing. A checkpoint's sampling settings are left out where
    nothing is sampled, and beam settings are neutral in a greedy search. `max_target_length` counts
    label tokens and bounds the output where neither overrides nor checkpoint do (transformers would
    stop at 20). For tokenizers with languages `target_lang`, or the tokenizer's own, decides the
    first tokens.

    Raises `ValueError` for unknown names, wrong types, sampling settings without `do_sample`, and
    lengths that the model has no positions for.
    """
    from transformers import GenerationConfig

    overrides = dict(overrides or {})
    defaults = {k: v for k, v in GenerationConfig._get_default_generation_params().items() if v is not None}
    known = {k for k in GenerationConfig().to_dict().keys() | defaults.keys() if not k.startswith("_")}
    for name, value in overrides.items():
        _check_name(name, value, known)

    saved = {k: v for k, v in model.generation_config.to_dict().items() if v is not None and k in known}
    for name, value in (saved | overrides).items():
        _check_type(name, value, defaults)
    for pair in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        for chosen, other in (pair, pair[::-1]):
            if overrides.get(chosen) is not None and other in saved:
                overrides.setdefault(other, None)  # or transformers lets the checkpoint's *_new_tokens win
    positions = position_limit(model)
    if max_target_length is not None:
        defaults["max_length"] = max_target_length + 1  # the token that decoding starts from counts
    defaults["max_length"] = min(defaults["max_length"], positions or defaults["max_length"])

    settings = defaults | saved | _language_start(tokenizer, target_lang) | overrides
    if settings.get("max_new_tokens") is not None and "max_length" not in saved | overrides:
        del settings["max_length"]
    if settings.get("do_sample") is not True:
        useless = SAMPLING_SETTINGS & overrides.keys()
        if useless:
            raise ValueError(f"generation setting {min(useless)}: no effect unless do_sample is true; leave it out")
        settings = {k: v for k, v in settings.items() if k not in SAMPLING_SETTINGS}
    if settings["num_beams"] == 1:
        settings |= _BEAM_ONLY
    settings = {k: v for k, v in settings.items() if k not in _TECHNICAL or k in overrides}

    longest = settings.get("max_new_tokens") or settings["max_length"]
    if positions is not None and longest > positions:
        raise ValueError(f"generation max_length {longest}: the model has {positions} positions; give no more")
    if settings["min_length"] > longest:
        raise ValueError(f"generation min_length {settings['min_length']}: above the maximum length {longest}")
    return dict(sorted(settings.items()))


def _check_name(name: str, value: Any, known: Any) -> None:
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"generation setting {name!r}: {hint}expected a name of transformers' GenerationConfig")
    if name in _REFUSED and value != _REFUSED[name]:
        raise ValueError(f"generation setting {name} {value!r}: one text is written per source; leave it out")


def _check_type(name: str, value: Any, defaults: Settings) -> None:
    kind = int if name in ("max_new_tokens", "min_new_tokens") else type(defaults.get(name))
    if value is None and name not in defaults or kind not in (int, float, bool):
        return
    if name == "early_stopping" and value == "never":
        return
    if kind is bool or isinstance(value, bool):
        right = kind is bool and isinstance(value, bool)
    else:
        right = isinstance(value, int if kind is int else int | float)
    if not right:
        raise ValueError(f"generation setting {name} {value!r}: expected {kind.__name__}")
    low = 1 if name in ("num_beams", "max_length", "max_new_tokens") else 0
    if kind is int and value < low:
        raise ValueError(f"generation setting {name} {value!r}: expected at least {low}")


def _language_start(tokenizer: Any, target_lang: str | None) -> Settings:
    """First decoder tokens for a target language.

    mBART shifts labels by moving their last token to the front. In mBART-50's form that is the end
    token, and the language comes second: it is forced. In the older form the language itself is
    last, so decoding starts from it and forces nothing. The tokenizer's own encoding of an empty
    target tells which form it is.
    """
    if tokenizer is None or not language_codes(tokenizer):
        if target_lang is not None:
            raise ValueError(f"--target-lang {target_lang!r}: the tokenizer has no language codes; leave it out")
        return {}
    if target_lang is None and tokenizer.tgt_lang is None:
        raise ValueError(
            f"{type(tokenizer).__name__} needs --target-lang; known: {', '.join(language_codes(tokenizer))}"
        )
    set_languages(tokenizer, tokenizer.src_lang, target_lang or tokenizer.tgt_lang)
    first, *_, last = tokenizer(text_target="")["input_ids"]
    language = language_codes(tokenizer)[tokenizer.tgt_lang]
    return {
        "decoder_start_token_id": last,
        "forced_bos_token_id": language if first == language else None,
    }


def position_limit(model: Any) -> int | None:
    """Tokens that the model's position table holds; `None` if it says nothing."""
    return getattr(model.config, "max_position_embeddings", None)


def decode_batches(
    model: Any,
    tokenizer: Any,
    sources: Sequence[str],
    settings: Settings,
    *,
    batch_size: int,
    max_source_length: int | None = None,
    source_prefix: str = "",
    source_lang: str | None = None,
    target_lang: str | None = None,
    done: frozenset[int] = frozenset(),
    what: str = "decoding",
    progress: bool = True,
) -> Iterator[tuple[int, list[int], list[str]]]:
    """Yield (batch number, indices into `sources`, texts), longest sources first: memory fails early.

    Batches in `done` are passed over. The model is in eval mode during each batch, and as it was
    between batches. `max_source_length` is lowered to the positions the model has.
    """
    import torch

    limits = [n for n in (max_source_length, position_limit(model)) if n is not None]
    if not limits:
        raise ValueError("max_source_length None: the model has no position limit; give a number of tokens")
    encoded = encode_pairs(
        tokenizer, sources, max_source_length=min(limits),
        source_prefix=source_prefix, source_lang=source_lang, target_lang=target_lang,
        progress=progress,
    )  # fmt: skip
    collate = Collator(tokenizer.pad_token_id)
    order = sorted(range(len(sources)), key=lambda i: (-int(encoded.sources.lengths_R[i]), i))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with progress_bar(len(sources), what, unit="text", enabled=progress) as bar:
        for number, indices in enumerate(batches):
            if number in done:
                bar.update(len(indices))
                continue
            inputs = {k: v.to(model.device) for k, v in collate([encoded[i] for i in indices]).items()}
            training = [module for module in model.modules() if module.training]
            model.eval()
            try:
                with torch.no_grad():
                    ids = model.generate(**inputs, **settings)
            finally:
                for module in training:  # one by one: some parts may be frozen in eval mode on purpose
                    module.training = True
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            yield number, indices, [text.strip() for text in texts]
            bar.update(len(indices))


def check_texts(sources: Sequence[str], batch_size: int) -> None:
    """Raise `ValueError` unless `sources` holds a text or more and `batch_size` is positive."""
    if isinstance(sources, str) or not isinstance(sources, Sequence):
        raise ValueError(f"sources are {type(sources).__name__}; expected a list of texts")
    wrong = next((i for i, source in enumerate(sources) if not isinstance(source, str)), None)
    if wrong is not None:
        raise ValueError(f"source {wrong} is {type(sources[wrong]).__name__}; expected text")
    if not sources:
        raise ValueError("no sources to decode; expected at least one")
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size {batch_size!r}: expected a whole number of at least 1")
