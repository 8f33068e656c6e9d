"""Masked language modelling: which tokens are hidden, and what stands in their place.

15 % of the tokens are chosen; of those, 80 % become the mask token, 10 % a random token, 10 % stay (Devlin et al.
2019). Four ways to choose, by name:

- `uniform`: every token alike.
- `frequency`: a token that occurs n times in the data with a weight of n^-0.7 (DistilBERT): rare words carry more.
- `word`: whole words, all their tokens or none.
- `ngram`: runs of one to three whole words, with probabilities 6/11, 3/11 and 2/11 (ALBERT, p(n) ~ 1/n).

Masks are dynamic, new in every epoch; fixed ones let a model see the same few holes again and again. The share of
single tokens is exact in the mean (of whole words a little less, where one more would be too much): a row's number of
chosen tokens is rounded up or down by chance, where rounding to the nearest would give rows of 10 tokens 20 % and rows
of 9 tokens 11 %. A rate of 0 hides nothing and gives no labels: TinyBERT's general stage.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dqbart.data.batches import Collator
from dqbart.data.epochs import EpochItems

if TYPE_CHECKING:
    import torch

CHOICES = ("uniform", "frequency", "word", "ngram")
NGRAM_PROBABILITIES = (6 / 11, 3 / 11, 2 / 11)
SMOOTHING = 0.7
IGNORED = -100


class Masker:
    """Hides tokens of one row. Special tokens are never chosen, and never written over another token.

    `counts_V` is how often each token occurs in the data (`EncodedBlocks.counts_V`), for `frequency`. Raises
    `ValueError` for another `choose`, a `rate` outside [0, 1), and a tokenizer without a mask token (unless rate is 0).
    """

    def __init__(
        self,
        tokenizer: Any,
        rate: float = 0.15,
        choose: str = "uniform",
        counts_V: np.ndarray | None = None,
    ) -> None:
        if choose not in CHOICES:
            raise ValueError(f"masking {choose!r}: expected one of {', '.join(CHOICES)}")
        if not 0 <= rate < 1:
            raise ValueError(f"masking rate {rate!r}: expected at least 0 and below 1; 0.15 is usual")
        if rate and tokenizer.mask_token_id is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no mask token, which masked language modelling needs; use a method "
                "without it, such as minilm or tinybert"
            )
        self.rate, self.choose = rate, choose
        self.mask_token_id = tokenizer.mask_token_id
        ids = np.asarray(sorted(tokenizer.get_vocab().values()))
        self.special_V = np.zeros(ids[-1] + 1, bool)
        self.special_V[list(tokenizer.all_special_ids)] = True
        self.replacements = ids[~self.special_V[ids]]
        self.weights_V = None
        if choose == "frequency":
            if counts_V is None:
                raise ValueError("masking 'frequency' needs how often each token occurs in the data")
            padded_V = np.zeros(len(self.special_V))
            padded_V[: len(counts_V)] = counts_V
            self.weights_V = np.maximum(padded_V, 1) ** -SMOOTHING

    def __call__(
        self, ids: Sequence[int], draw: np.random.Generator, word_starts: Sequence[int] | None = None
    ) -> tuple[list[int], list[int]]:
        """`(ids with holes, labels)`; labels are the token where one was chosen, else -100.

        At least one token is chosen in a row that has any besides special ones. `word_starts` is 1 where a word
        starts, else 0; `word` and `ngram` need it (`ValueError`).
        """
        ids_L = np.asarray(ids, np.int64)
        labels_L = np.full_like(ids_L, IGNORED)
        places = np.flatnonzero(~self.special_V[ids_L])
        if self.rate and len(places):
            budget = max(1, int(self.rate * len(places) + draw.random()))
            if self.choose in ("word", "ngram"):
                if word_starts is None:
                    raise ValueError(f"masking {self.choose!r} needs to know where words start: encode with words=True")
                chosen = np.concatenate(self._spans(places, np.cumsum(word_starts)[places], budget, draw))
            else:
                # The smallest of exponential times: drawing without replacement, in proportion to the weights.
                times = draw.standard_exponential(len(places))
                if self.weights_V is not None:
                    times /= self.weights_V[ids_L[places]]
                chosen = places[np.argsort(times)[:budget]]
            labels_L[chosen] = ids_L[chosen]
            fate = draw.random(len(chosen))
            ids_L[chosen[fate < 0.8]] = self.mask_token_id
            changed = chosen[fate >= 0.9]
            ids_L[changed] = draw.choice(self.replacements, len(changed))
        return ids_L.tolist(), labels_L.tolist()

    def _spans(self, places: np.ndarray, words: np.ndarray, budget: int, draw: np.random.Generator) -> list[np.ndarray]:
        """Positions of each run of whole words chosen: at most `budget` in all, unless the first word alone has more.

        A run ends before a special token, before a chosen word, and where the budget ends.
        """
        borders = [0, *(np.flatnonzero(np.diff(words)) + 1).tolist(), len(places)]
        count = len(borders) - 1
        after_gap = np.diff(places, prepend=-2) > 1
        chances = NGRAM_PROBABILITIES if self.choose == "ngram" else (1.0,)
        limits = (1 + draw.choice(len(chances), count, p=chances)).tolist()
        free = [True] * count
        spans: list[np.ndarray] = []
        for first in draw.permutation(count).tolist():
            last, left = first, budget
            while (
                last < min(first + limits[first], count)
                and free[last]
                and (borders[last + 1] - borders[last] <= left or (last == first and not spans))
                and (last == first or not after_gap[borders[last]])
            ):
                left -= borders[last + 1] - borders[last]
                last += 1
            if last > first:
                free[first:last] = [False] * (last - first)
                spans.append(places[borders[first] : borders[last]])
                budget = left
            if budget <= 0:
                break
        return spans


class MaskedItems(EpochItems):
    """Items with holes in their `input_ids` and with `labels`, new ones in every epoch.

    `items` is `EncodedBlocks` or `SentenceOrder`. With a rate of 0 the items are passed on without labels.
    """

    def __init__(self, items: Any, masker: Masker, seed: int) -> None:
        super().__init__(items, seed)
        self.masker = masker

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        item = dict(self.items[index])
        starts = item.pop("word_starts", None)
        if self.masker.rate:
            item["input_ids"], item["labels"] = self.masker(item["input_ids"], self.generator(index), starts)
        return item


class BlockCollator(Collator):
    """Pads blocks on the right, as `Collator` does, token types too; numbers become a tensor `[B]`."""

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, "torch.Tensor"]:
        import torch

        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "token_type_ids": 0, "labels": IGNORED}
        columns = {key: [item[key] for item in items] for key in items[0] if key != "word_starts"}
        return {
            key: self._pad(values, fill[key]) if key in fill else torch.tensor(values)
            for key, values in columns.items()
        }
