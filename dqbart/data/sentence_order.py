"""ALBERT's sentence-order prediction: which of two consecutive segments came first.

Both segments are always from one place of one document, so that the topic gives nothing away: that is what the task
was made for (Lan et al. 2020, section 3.1). The released code does not keep to it: where a chunk has one sentence only,
it takes the second segment from a random other document and labels the pair "swapped". Here a chunk without two
segments is no pair at all (`encode_pairs_of_segments` leaves it out and counts it).

Swapping happens when an item is asked for: every pair is seen in both orders over the epochs.
"""

from typing import Any

from dqbart.data.blocks import EncodedBlocks
from dqbart.data.epochs import EpochItems

LABEL = "sentence_order_label"  # as transformers' AlbertForPreTraining calls it


class SentenceOrder(EpochItems):
    """Pairs of segments, each swapped with probability 1/2 anew in every epoch, with `sentence_order_label`.

    The label is 1 for a swapped pair, else 0. Raises `ValueError` for blocks of one segment.
    """

    stream = 1

    def __init__(self, pairs: EncodedBlocks, seed: int) -> None:
        if pairs.cuts_R is None:
            raise ValueError("sentence order needs two segments; make the blocks with encode_pairs_of_segments")
        super().__init__(pairs, seed)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        swap = bool(self.generator(index).random() < 0.5)
        return self.items.item(index, swap=swap) | {LABEL: int(swap)}
