"""Texts to token ids to padded batches.

Token ids are kept in one flat int32 array per side: lists of Python ints take nine times the
memory, 1.2 GB for 130,000 abstracts. Padding is done here because transformers' collator pads on
the tokenizer's side, and BART's learned positions do not look at the mask: padded on the left,
every token would get another position. The decoder's inputs are not made here; the model shifts the
labels itself, by its own family's rule.
"""

import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

if TYPE_CHECKING:
    import torch

_CHUNK = 1000  # texts per tokenizer call


def progress_bar(total: int, what: str, *, unit: str, enabled: bool = True) -> "tqdm[Any]":
    """A bar with time left on stderr, shown after a second; in a log file, a line every 30 s."""
    quiet = not sys.stderr.isatty()
    return tqdm(
        total=total, desc=what, unit=unit, disable=not enabled, delay=1, file=sys.stderr,
        mininterval=30 if quiet else 0.3, ncols=100 if quiet else None, dynamic_ncols=not quiet,
    )  # fmt: skip


class TokenRows(Sequence[list[int]]):
    """Rows of token ids of any length in one flat int32 array; `rows[i]` is a list."""

    def __init__(self, flat_T: np.ndarray, lengths_R: np.ndarray) -> None:
        self._flat_T = flat_T
        self._ends_R = np.cumsum(lengths_R)
        self.lengths_R = lengths_R

    def __len__(self) -> int:
        return len(self.lengths_R)

    def __getitem__(self, index: Any) -> Any:
        end = int(self._ends_R[index])  # raises IndexError past the end, as iteration needs
        return self._flat_T[end - int(self.lengths_R[index]) : end].tolist()


@dataclass(frozen=True)
class EncodedPairs:
    """A map-style data set of `{"input_ids", "attention_mask", "labels"}`, each a list.

    Without targets there are no labels. `cut_sources` and `cut_targets` count texts that were
    longer than allowed. `str()` is a line to print.
    """

    sources: TokenRows
    targets: TokenRows | None
    cut_sources: int
    cut_targets: int

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = self.sources[index]
        item = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        return item if self.targets is None else item | {"labels": self.targets[index]}

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return (self[i] for i in range(len(self)))

    def __str__(self) -> str:
        parts = [f"{len(self):,} examples", lengths_line("source", self.sources, self.cut_sources)]
        if self.targets is not None:
            parts.append(lengths_line("target", self.targets, self.cut_targets))
        return "; ".join(parts)


def lengths_line(side: str, rows: TokenRows, cut: int) -> str:
    """Mean, longest, and share of `cut` rows, in words."""
    share = f"{100 * cut / len(rows):.1f} %" if cut else "none"
    mean, longest = rows.lengths_R.mean(), rows.lengths_R.max()
    return f"{side} tokens mean {mean:.1f}, longest {longest}, {share} cut"


def encode_pairs(
    tokenizer: Any,
    sources: Sequence[str],
    targets: Sequence[str] | None = None,
    *,
    max_source_length: int,
    max_target_length: int = 0,
    source_prefix: str = "",
    source_lang: str | None = None,
    target_lang: str | None = None,
    progress: bool = True,
) -> EncodedPairs:
    """Tokenize sources and targets; both are cut to their maximum, special tokens kept.

    Lengths count special tokens. With language codes the tokenizer is switched to that pair and
    stays so, so that it is saved with it. Raises `ValueError` for lists of different lengths, no
    texts, a limit without room for text, unknown languages, and a tokenizer that puts no
    end-of-sequence token on targets.
    """
    set_languages(tokenizer, source_lang, target_lang)
    if targets is not None and len(targets) != len(sources):
        raise ValueError(f"{len(sources)} sources but {len(targets)} targets; expected one each")
    if not sources:
        raise ValueError("no sources to encode; expected at least one")
    encoded_sources, cut_sources = _encode(
        tokenizer, [source_prefix + s for s in sources] if source_prefix else sources,
        max_source_length, "source", progress,
    )  # fmt: skip
    if targets is None:
        return EncodedPairs(encoded_sources, None, cut_sources, 0)
    encoded_targets, cut_targets = _encode(tokenizer, targets, max_target_length, "target", progress)
    if tokenizer.eos_token_id not in encoded_targets[0]:
        raise ValueError(
            f"{type(tokenizer).__name__} ends targets without its end token {tokenizer.eos_token!r}, "
            "so a student would never learn to stop; give it a post-processor that adds the token"
        )
    return EncodedPairs(encoded_sources, encoded_targets, cut_sources, cut_targets)


def _encode(tokenizer: Any, texts: Sequence[str], max_length: int, side: str, progress: bool) -> tuple[TokenRows, int]:
    key = "text" if side == "source" else "text_target"
    special = len(tokenizer(**{key: ""})["input_ids"])
    if max_length <= special:
        raise ValueError(f"max_{side}_length {max_length}: expected above {special}, the special tokens' number")
    parts: list[np.ndarray] = []
    lengths: list[int] = []
    cut = 0
    with progress_bar(len(texts), f"{side}s to tokens", unit="text", enabled=progress) as bar:
        for start in range(0, len(texts), _CHUNK):
            chunk = list(texts[start : start + _CHUNK])
            encoded = tokenizer(**{key: chunk}, truncation=True, max_length=max_length)
            rows = encoded["input_ids"]
            if encoded.encodings:
                cut += sum(bool(row.overflowing) for row in encoded.encodings)
            else:  # a tokenizer written in Python does not say; one that fills the limit counts
                cut += sum(len(row) == max_length for row in rows)
            lengths += map(len, rows)
            parts.append(np.fromiter((i for row in rows for i in row), np.int32, sum(map(len, rows))))
            bar.update(len(chunk))
    return TokenRows(np.concatenate(parts), np.asarray(lengths)), cut


def language_codes(tokenizer: Any) -> dict[str, int]:
    """Language code -> token id, of tokenizers that have languages (mBART's); else empty."""
    codes = getattr(tokenizer, "lang_code_to_id", None) or {}
    return {code: i for code, i in codes.items() if i != tokenizer.unk_token_id}


def set_languages(tokenizer: Any, source_lang: str | None, target_lang: str | None) -> None:
    """Switch `tokenizer` to a language pair, in place; nothing to do for one without languages.

    Codes left out are taken from the tokenizer if it was saved with a pair. Raises `ValueError` for
    codes that it doesn't have, for codes given to a tokenizer without languages, and where a pair
    is needed and none is known (mBART's would otherwise write the source language in silence).
    """
    codes = language_codes(tokenizer)
    given = {"--source-lang": source_lang, "--target-lang": target_lang}
    for flag, code in given.items():
        if code is not None and not codes:
            raise ValueError(f"{flag} {code!r}: {type(tokenizer).__name__} has no language codes; leave it out")
        if code is not None and code not in codes:
            raise ValueError(f"{flag} {code!r}: expected one of {', '.join(sorted(codes))}")
    if not codes:
        return
    if getattr(tokenizer, "tgt_lang", None) is None and None in given.values():
        raise ValueError(
            f"{type(tokenizer).__name__} needs --source-lang and --target-lang, such as en_XX and "
            f"de_DE; known: {', '.join(sorted(codes))}"
        )
    if source_lang is not None:
        tokenizer.src_lang = source_lang
    if target_lang is not None:
        tokenizer.tgt_lang = target_lang


LABELS = ("labels", "start_positions", "end_positions", "sentence_order_label")


def model_inputs(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """What `model` takes of a batch: no labels, so that it computes no loss, and no token types where it has none."""
    without = (*LABELS, "token_type_ids") if model.config.model_type == "distilbert" else LABELS
    return {name: value for name, value in batch.items() if name not in without}


def tokenizer_for(model: Any, tokenizer: Any) -> Any:
    """The tokenizer, or a copy that makes no token types where the model has none."""
    if model.config.model_type != "distilbert" or "token_type_ids" not in tokenizer.model_input_names:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    return tokenizer


@dataclass(frozen=True)
class Collator:
    """Pads items of `EncodedPairs` on the right, labels with -100.

    Gives int64 `input_ids` and `attention_mask` `[B, S]` and `labels` `[B, T]`. `multiple_of`
    rounds both widths up, for hardware that likes 8 or 16.
    """

    pad_token_id: int
    multiple_of: int = 1

    def __call__(self, items: Sequence[dict[str, list[int]]]) -> dict[str, "torch.Tensor"]:
        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": -100}
        return {key: self._pad([item[key] for item in items], fill[key]) for key in items[0]}

    def _pad(self, rows: Sequence[list[int]], fill: int) -> "torch.Tensor":
        import torch

        width = -(-max(map(len, rows)) // self.multiple_of) * self.multiple_of
        return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.int64)
