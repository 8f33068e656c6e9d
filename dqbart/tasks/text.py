"""Plain text, for students of everything and nothing: general distillation, with or without masked words."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from dqbart.data.blocks import EncodedBlocks, encode_blocks, encode_pairs_of_segments
from dqbart.data.masking import BlockCollator, MaskedItems, Masker
from dqbart.data.plain import PlainTexts, hold_out_end, read_texts
from dqbart.data.sentence_order import SentenceOrder
from dqbart.data.splits import data_name
from dqbart.evaluation.metrics import Score, bootstrap_interval
from dqbart.evaluation.predict import predict_masked
from dqbart.recipe import Recipe
from dqbart.tasks import DEV_HELD_OUT, PROBES, Outcome, Task

PROBE_TOKENS = 64  # logits of whole vocabularies are large


class PlainText(Task):
    """Blocks of text. Words are masked where the head is looked at, be it for the words themselves or for what the
    teacher says there; the dev score, then, is the share of masked words that are guessed right. Methods that look at
    nothing but inner layers see whole texts, and have no dev score.
    """

    needs_references = False

    def __init__(self, recipe: Recipe, tokenizer: Any, model: Any) -> None:
        super().__init__(recipe, tokenizer)
        self.has_words = model.get_output_embeddings() is not None
        self.collator = BlockCollator(tokenizer.pad_token_id)

    def read_split(self, data: Any, split: str) -> PlainTexts:
        found = read_texts(data, split, self.recipe.source_column, self.recipe.document_column)
        print(f"{data_name(data)} ({split}): {found}", file=sys.stderr, flush=True)
        return found if split == "train" else found.apart()

    def hold_out(self, train: PlainTexts) -> tuple[PlainTexts, PlainTexts] | None:
        divided = super().hold_out(train)
        count = min(DEV_HELD_OUT, sum(map(len, train.documents)) // 10)
        if divided is None and count:
            print(
                f"too few documents to hold any out: the last {count:,} texts are held out", file=sys.stderr, flush=True
            )
            divided = hold_out_end(train, count)
        return divided and (divided[0], divided[1].apart())

    def adapt(self, model: Any, *, new_head: bool) -> Any:
        if not self.recipe.trains and not self.recipe.elastic:
            return model  # whatever it lacks
        if self.recipe.terms.keys() & {"task", "logits"} and model.get_output_embeddings() is None:
            raise ValueError(
                f"{type(model).__name__}: has no masked-language-model head, which losses.task and losses.logits need; "
                "use a method that looks at inner layers, such as minilm or tinybert"
            )
        if self._needs_masks and not self.recipe.mask_rate:
            who = "losses.task, which learns" if "task" in self.recipe.terms else "method 'dynabert', which measures on"
            raise ValueError(
                f"mask_rate {self.recipe.mask_rate!r} with {who} masked words; expected above 0, such as 0.15, or a "
                "method without them, such as tinybert"
            )
        Masker(self.tokenizer, self._rate())  # there is a mask, if one is needed
        return model

    def training_set(self, train: PlainTexts, teacher: Any, folder: Path) -> tuple[Any, Any]:
        blocks = self._encode(train)
        masker = Masker(self.tokenizer, self._rate(), self.recipe.masking, blocks.counts_V)
        pairs = SentenceOrder(blocks, self.recipe.seed) if "order" in self.recipe.terms else blocks
        return MaskedItems(pairs, masker, self.recipe.seed), self.collator

    def is_scored(self, examples: PlainTexts) -> bool:
        return self.has_words and self._guesses

    def why_unscored(self, data: Any, examples: PlainTexts) -> str:
        if not self.has_words:
            return "the checkpoint has no masked-language-model head, so there are no words to guess"
        return (
            f"method {self.recipe.method!r} looks at inner layers alone, so there are no words to guess; fine-tune the "
            "student on a task (dqbart compress --student), and score that"
        )

    def score(self, model: Any, examples: PlainTexts, *, settings: Any = None) -> Outcome:
        """Accuracy of masked words, the same ones for every model, in texts one by one."""
        blocks = encode_blocks(self.tokenizer, examples.documents, self.recipe.max_source_length, progress=False)
        rate = self.recipe.mask_rate or 0.15
        items = MaskedItems(blocks, Masker(self.tokenizer, rate), seed=28)
        pairs_N = predict_masked(model, items, self.collator, self.recipe.eval_batch_size)
        hits_N2 = np.array([[(found_M == wanted_M).sum(), len(wanted_M)] for found_M, wanted_M in pairs_N])

        if not hits_N2[:, 1].any():
            raise ValueError("no token was masked: nothing to score; expected longer texts, or a higher mask_rate")

        def share(sums_2: np.ndarray) -> float:
            return float(100 * sums_2[0] / max(1, sums_2[1]))

        definition = f"share of masked tokens guessed right, x 100; {100 * rate:g} % masked; texts resampled"
        values, interval = {"accuracy": share(hits_N2.sum(0))}, [*bootstrap_interval(hits_N2, share)]
        return Outcome(Score("accuracy", values, {"accuracy": interval}, len(hits_N2), "", definition, {}), [])

    def probe(self, model: Any, examples: PlainTexts | None) -> dict[str, Any]:
        if examples is None:
            return super().probe(model, examples)
        texts = [texts[0] for texts in examples.documents[:PROBES]]
        return dict(
            self.tokenizer(texts, truncation=True, max_length=min(PROBE_TOKENS, self.recipe.max_source_length),
                           padding=True, padding_side="right", return_tensors="pt")
        )  # fmt: skip

    @property
    def _guesses(self) -> bool:
        return self.recipe.elastic or bool(self.recipe.terms.keys() & {"task", "logits"})

    @property
    def _needs_masks(self) -> bool:
        return "task" in self.recipe.terms or self.recipe.elastic  # importance is measured on masked words

    def _rate(self) -> float:
        # what is scored on masked words must have seen some: the teacher's logits are compared on masked texts, too
        return self.recipe.mask_rate if self._guesses else 0.0

    def _encode(self, texts: PlainTexts) -> EncodedBlocks:
        recipe = self.recipe
        words = recipe.masking in ("word", "ngram")
        if recipe.segments == 2:
            return encode_pairs_of_segments(
                self.tokenizer, texts.documents, recipe.max_source_length, words=words, seed=recipe.seed
            )
        return encode_blocks(self.tokenizer, texts.documents, recipe.max_source_length, words=words)
