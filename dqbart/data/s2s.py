"""An encoder as a sequence-to-sequence model: UniLM's attention mask, and the batches to train it.

Source and target stand in one row, and one mask makes one encoder both halves of a seq2seq model: source tokens see the
source, a target token sees the source and the target up to itself. What comes next is asked with [MASK], which the
pretrained head knows, so nothing new is learned from scratch (UniLM, Dong et al. 2019, arXiv 1905.03197).

Two ways to train. `masked` (UniLM v1) covers a share of the target in place; what is covered is missing from the
history of everything after it, and the rest of the target teaches nothing. `pseudo` (UniLM v2, arXiv 2002.12804, and
s2s-ft's default) appends a covered copy of the whole target that shares its positions: copy i sees the source, the
target before it and itself, which is what decoding sees at step i, and every token is learned in one pass. Rejected:
predicting at the token before, as a causal decoder does; the encoder's head never learned to look one ahead.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dqbart.data.batches import EncodedPairs, TokenRows, _encode
from dqbart.data.epochs import EpochItems

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger("dqbart")


def s2s_mask(order_BL: "Tensor", real_BL: "Tensor", pseudo_BL: "Tensor | None" = None) -> "Tensor":
    """Who sees whom: bool `[B, L, L]`, True where query i may see key j.

    `order`: 0 for source tokens, the position for target tokens (of any offset, above 0), anything for padding.
    allow(i, j) = real(j) and order(j) <= order(i). Where `pseudo` is True, tokens are covered copies: nobody sees them
    but themselves, and they see strictly smaller orders only. Every row has something to see where its source has.
    """
    import torch

    allow_BLL = order_BL.unsqueeze(1) <= order_BL.unsqueeze(2)
    if pseudo_BL is not None:
        before_BLL = order_BL.unsqueeze(1) < order_BL.unsqueeze(2)
        itself_LL = torch.eye(order_BL.size(1), dtype=torch.bool, device=order_BL.device)
        allow_BLL = torch.where(pseudo_BL.unsqueeze(2), before_BLL, allow_BLL) & ~pseudo_BL.unsqueeze(1) | itself_LL
    return allow_BLL & real_BL.bool().unsqueeze(1)


def additive_mask(allow_BQK: "Tensor", dtype: "torch.dtype | None" = None) -> "Tensor":
    """`[B, 1, Q, K]`, 0 where allowed and the least number of `dtype` (default float32) elsewhere.

    transformers' encoders hand a mask of four dimensions to attention as it is. Eager attention and ours add it, so a
    bool one would give allowed keys one point more and forbid nothing; sdpa takes both kinds.
    """
    import torch

    dtype = dtype or torch.float32
    zero = torch.zeros((), dtype=dtype, device=allow_BQK.device)
    return torch.where(allow_BQK.unsqueeze(1), zero, torch.finfo(dtype).min)


@dataclass(frozen=True)
class S2sLayout:
    """What a model and its tokenizer say about rows: special tokens, positions, token types.

    `first_position` is the index of the first token's position (RoBERTa's follows its padding's), `positions` how many
    tokens have one, `token_types` whether targets are told apart by type 1.
    """

    start: int
    end: int
    mask: int
    pad: int
    vocabulary: int
    first_position: int
    positions: int
    token_types: bool

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> "S2sLayout":
        """Raises `ValueError` for a model that is no masked-language model with a table of positions, and for a
        tokenizer that lacks a special token, puts none around a text, or has more tokens than the model.
        """
        from torch import nn

        name, kind = type(tokenizer).__name__, type(model).__name__
        config = model.config
        if config.is_encoder_decoder or getattr(config, "is_decoder", False) or model.get_output_embeddings() is None:
            raise ValueError(f"{kind}: expected an encoder with its language head; load AutoModelForMaskedLM")
        tokens = {role: getattr(tokenizer, f"{role}_token_id") for role in ("cls", "sep", "mask", "pad")}
        for role, token in tokens.items():
            if token is None:
                raise ValueError(
                    f"{name} has no {role} token; use the tokenizer of a masked-language model (BERT, RoBERTa, XLM-R), "
                    f"or add_special_tokens({{'{role}_token': ...}}) and resize the model's embeddings"
                )
        if (wrapped := tokenizer("")["input_ids"]) != [tokens["cls"], tokens["sep"]]:
            raise ValueError(
                f"{name} turns an empty text into {tokenizer.convert_ids_to_tokens(wrapped)}; expected "
                f"[{tokenizer.cls_token!r}, {tokenizer.sep_token!r}]: give it a post-processor that adds them"
            )
        if len(tokenizer) > config.vocab_size:
            raise ValueError(
                f"{name} has {len(tokenizer)} tokens, the model {config.vocab_size}: take the model's own tokenizer "
                f"or model.resize_token_embeddings({len(tokenizer)})"
            )
        tables = [m for n, m in model.named_modules() if n.endswith(".position_embeddings")]
        if len(tables) != 1 or not isinstance(tables[0], nn.Embedding):
            raise ValueError(f"{kind} has no table of positions; expected BERT, RoBERTa, XLM-R, DistilBERT or ALBERT")
        first = 0 if tables[0].padding_idx is None else tables[0].padding_idx + 1
        return cls(
            tokens["cls"], tokens["sep"], tokens["mask"], tokens["pad"], len(tokenizer), first,
            tables[0].num_embeddings - first, getattr(config, "type_vocab_size", 0) > 1,
        )  # fmt: skip


def encode_s2s(
    tokenizer: Any,
    layout: S2sLayout,
    sources: Sequence[str],
    targets: Sequence[str],
    *,
    max_source_length: int = 464,
    max_target_length: int = 48,
    source_prefix: str = "",
    progress: bool = True,
) -> EncodedPairs:
    """Pairs as token ids: sources `[CLS] ... [SEP]`, labels `... [SEP]`, without a start token.

    Lengths count these special tokens; the defaults are MiniLM's for summaries, 512 together. What is longer is cut,
    special tokens kept, and said in the log. Raises `ValueError` for lists of different lengths or none, a limit
    without room for text, and limits whose sum passes the model's positions.
    """
    if len(targets) != len(sources):
        raise ValueError(f"{len(sources)} sources but {len(targets)} targets; expected one each")
    if not sources:
        raise ValueError("no sources to encode; expected at least one")
    if max_target_length < 2:
        raise ValueError(f"max_target_length {max_target_length}: expected at least 2, a token and the end token")
    if max_source_length + max_target_length > layout.positions:
        raise ValueError(
            f"max_source_length {max_source_length} + max_target_length {max_target_length}: source and target share "
            f"the model's {layout.positions} positions; lower one of them"
        )
    prefixed = [source_prefix + source for source in sources]
    source_rows, cut_sources = _encode(tokenizer, prefixed, max_source_length, "source", progress)
    target_rows, cut_targets = _encode(tokenizer, targets, max_target_length + 1, "target", progress)
    lengths_R = target_rows.lengths_R - 1  # the start token goes: the source's end stands before the target
    flat_T = np.fromiter(chain.from_iterable(row[1:] for row in target_rows), np.int32, int(lengths_R.sum()))
    pairs = EncodedPairs(source_rows, TokenRows(flat_T, lengths_R), cut_sources, cut_targets)
    if cut_sources or cut_targets:
        log.warning(
            "of %d pairs, %d sources were cut to %d tokens and %d targets to %d",
            len(pairs), cut_sources, max_source_length, cut_targets, max_target_length,
        )  # fmt: skip
    return pairs


class SeededItems(EpochItems):
    """Items of `encode_s2s`, each with a `seed` for what the collator draws: a new one in every epoch."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        return self.items[index] | {"seed": int(self.generator(index).integers(2**62))}


@dataclass(frozen=True)
class S2sCollator:
    """Batches for a masked-language model, from items of `encode_s2s`.

    Gives `input_ids`, `position_ids`, `labels` (and `token_type_ids`) `[B, L]` and an additive `attention_mask`
    `[B, 1, L, L]`; rows are `source | target | covered target` (pseudo) or `source | target` (masked), then padding,
    and labels are -100 except where something is to be predicted. A covered token is [MASK], or a random token at
    `random_rate`, or itself at `keep_rate`.

    `rate` in pseudo mode is the share of the history that is replaced by its covered form, so that the model
    learns to go on after mistakes of its own (s2s-ft's target_mask_prob, 0.5); every token is predicted. In masked mode
    it is the share to predict, at least one token (UniLM's 0.7). With all three rates 0, pseudo logits are those of
    decoding: for validation. What is drawn for an item follows its `seed` (`SeededItems`); without one, 0.
    Raises `ValueError` for an unknown mode, a rate outside 0..1, items without labels, and rows too long.
    """

    layout: S2sLayout
    mode: Literal["pseudo", "masked"] = "pseudo"
    rate: float | None = None
    random_rate: float = 0.1
    keep_rate: float = 0.1
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if self.mode not in ("pseudo", "masked"):
            raise ValueError(f"mode {self.mode!r}: expected 'pseudo' or 'masked'")
        rates = {"rate": self._rate, "random_rate": self.random_rate, "keep_rate": self.keep_rate}
        rates["random_rate + keep_rate"] = self.random_rate + self.keep_rate
        for name, value in rates.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} {value!r}: expected 0 to 1")

    @property
    def _rate(self) -> float:
        return {"pseudo": 0.5, "masked": 0.7}[self.mode] if self.rate is None else self.rate

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, "Tensor"]:
        import torch

        if any("labels" not in item for item in items):
            raise ValueError("items without labels; encode them with targets (encode_s2s)")
        rows = [self._row(item["input_ids"], item["labels"], item.get("seed", 0)) for item in items]
        lengths_B = torch.tensor([len(row["labels"]) for row in rows])
        width = -(-int(lengths_B.max()) // self.multiple_of) * self.multiple_of

        def padded(name: str, fill: int) -> "Tensor":
            return torch.tensor([[*row[name], *[fill] * (width - len(row[name]))] for row in rows])

        order_BL, real_BL = padded("order", 0), torch.arange(width) < lengths_B.unsqueeze(1)
        batch = {
            "input_ids": padded("input_ids", self.layout.pad),
            "attention_mask": additive_mask(s2s_mask(order_BL, real_BL, padded("pseudo", 0).bool())),
            "position_ids": padded("position_ids", 0) + self.layout.first_position,
            "labels": padded("labels", -100),
        }
        return batch | {"token_type_ids": (order_BL > 0).long()} if self.layout.token_types else batch

    def _row(self, source: list[int], target: list[int], seed: int) -> dict[str, list[int]]:
        import torch

        draw = torch.Generator().manual_seed(seed)
        s, t = len(source), len(target)
        if s + t > self.layout.positions:
            raise ValueError(
                f"a source of {s} tokens and a target of {t}: the model has {self.layout.positions} positions; "
                "encode with lower max_source_length or max_target_length"
            )
        covered = self._cover(target, draw)
        if self.mode == "pseudo":
            hits = (torch.rand(t, generator=draw) < self._rate).tolist()
        else:
            chosen = torch.randperm(t, generator=draw)[: max(1, int(self._rate * t))]
            hits = torch.zeros(t, dtype=torch.bool).index_fill(0, chosen, True).tolist()
        history = [c if hit else token for token, c, hit in zip(target, covered, hits, strict=True)]
        positions = list(range(s, s + t))
        row = {
            "input_ids": source + history, "position_ids": list(range(s)) + positions,
            "order": [0] * s + positions, "pseudo": [0] * (s + t), "labels": [-100] * s,
        }  # fmt: skip
        if self.mode == "masked":
            row["labels"] += [token if hit else -100 for token, hit in zip(target, hits, strict=True)]
            return row
        row["labels"] += [-100] * t
        copies = {
            "input_ids": covered, "position_ids": positions, "order": positions, "pseudo": [1] * t, "labels": target
        }  # fmt: skip
        return {name: row[name] + copies[name] for name in row}

    def _cover(self, target: list[int], draw: "torch.Generator") -> list[int]:
        import torch

        draws = torch.rand(len(target), generator=draw).tolist()
        others = torch.randint(self.layout.vocabulary, (len(target),), generator=draw).tolist()
        kept, other = self.keep_rate, self.keep_rate + self.random_rate
        return [
            token if draw < kept else random if draw < other else self.layout.mask
            for token, random, draw in zip(target, others, draws, strict=True)
        ]
