"""More training texts from the ones at hand: words replaced by what a masked language model would say there.

Problem: a task's few thousand examples are too few for a student to copy its teacher. TinyBERT (arXiv 1909.10351,
section 3.2) writes up to N variants of each. A word that is one token is masked, and the model, shown the masked and
the full text as a pair, proposes its K best; a word that the tokenizer splits has its K nearest by word vectors. Then,
N times, each word gives way to a random one of its candidates with probability p. The label is the original's.

Different from the released code, on purpose: variants of a pair's second text go with the original first one (there:
with its last variant); a word's place comes from character offsets (there from counts of words and pieces, which can
drift apart); what is not replaced stays to the character, spaces and case included; candidates must be words, and
others than the word itself; any script and any fill-mask model will do; of texts too long for the model it sees a
window around the mask, where the end was cut off. Rejected: one random stream for all rows, with which a variant would
depend on the rows before it.

Shape suffixes: B masked words, L tokens, V vocabulary.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from random import Random
from typing import Any, NamedTuple

from dqbart.data.batches import progress_bar
from dqbart.data.word_vectors import EmbeddingVectors, WordVectors
from dqbart.data.words import ENGLISH_STOP_WORDS, PieceWords, Word, find_words, match_case

_CHUNK = 64  # texts whose masked copies are held at once


class AugmentedRow(NamedTuple):
    """An original or a variant of it, the second text of a pair, and the original's index, for its label."""

    text: str
    pair: str | None
    origin: int


class Candidates(NamedTuple):
    """What may stand for `text[start:end]`; the word itself where nothing else was found."""

    start: int
    end: int
    words: tuple[str, ...]


class _Query(NamedTuple):
    """A masked copy beside its original, `[CLS] masked [SEP] original [SEP]`; `mask` is the mask's place."""

    ids: list[int]
    types: list[int]
    mask: int


class Augmenter:
    """Writes variants of texts with a fill-mask model and word vectors.

    `fill_mask_model` is any of transformers' `AutoModelForMaskedLM` with its `tokenizer`; it runs where it is, in eval
    mode, and is left in the mode it was. Without `vectors`, its own input embeddings serve. `top_k` is K for both kinds
    of candidates, `probability` p, `variants` N (per text: a pair has up to 2 N). `stopwords` are lower-cased and never
    change. The model sees `batch_size` masked words at a time, each in at most `max_length` tokens, the copy included.
    Raises `ValueError` for a tokenizer without mask token or character offsets, a model without a fill-mask head, and
    numbers out of range.
    """

    def __init__(
        self,
        fill_mask_model: Any,
        tokenizer: Any,
        vectors: WordVectors | None = None,
        *,
        top_k: int = 15,
        probability: float = 0.4,
        variants: int = 20,
        seed: int = 28,
        stopwords: Collection[str] = ENGLISH_STOP_WORDS,
        batch_size: int = 64,
        max_length: int = 512,
    ) -> None:
        for name, value, least in (("top_k", top_k, 1), ("variants", variants, 0), ("batch_size", batch_size, 1)):
            if value < least:
                raise ValueError(f"{name} {value!r}: expected {least} or more")
        if not 0 <= probability <= 1:
            raise ValueError(f"probability {probability!r}: expected 0 to 1")
        if isinstance(stopwords, str):
            raise ValueError(f"stopwords {stopwords!r}: expected words, such as those of stop_words('en')")
        _check_model(fill_mask_model, tokenizer)
        self.model, self.tokenizer = fill_mask_model, tokenizer
        self.vectors = EmbeddingVectors(fill_mask_model, tokenizer) if vectors is None else vectors
        self.top_k, self.probability, self.variants, self.seed = top_k, probability, variants, seed
        self.stopwords, self.batch_size = frozenset(stopwords), batch_size
        self._pieces = PieceWords(tokenizer)
        self._frame = _Frame(fill_mask_model, tokenizer, max_length)

    def augment(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, start: int = 0, progress: bool = True
    ) -> Iterator[AugmentedRow]:
        """Each original, followed by its variants: new texts that differ from it and from each other.

        With `pairs`, the second texts, variants of the first text come with the original second one and the other way
        round. A text's variants depend on the seed, the text, the model and the settings, not on other rows, nor on
        `batch_size` (but for rounding, where two words tie for the K-th place). Rows are made as they are asked for;
        from the original at index `start` on they are, to the bit, those of all texts: which ones the model sees
        together follows from all of them. Raises `ValueError` at once for what is not a list of strings, and for lists
        of different lengths.
        """
        _check_texts("texts", texts)
        if pairs is not None:
            _check_texts("pairs", pairs)
            if len(pairs) != len(texts):
                raise ValueError(f"{len(texts)} texts but {len(pairs)} pairs; expected one each")
        columns = (texts,) if pairs is None else (texts, pairs)
        return self._rows(list(zip(*columns, strict=True)), start, progress)

    def _rows(self, originals: Sequence[tuple[str, ...]], start: int, progress: bool) -> Iterator[AugmentedRow]:
        unique = list(dict.fromkeys(text for original in originals for text in original))
        place = {text: i for i, text in enumerate(unique)}
        left = Counter(text for original in originals[start:] for text in original)  # how often each is still needed
        variants_of: dict[str, list[str]] = {}
        with progress_bar(len(left), "augmentation", unit="text", enabled=progress) as bar:
            for origin, original in enumerate(originals[start:], start):
                for text in original:
                    if text not in variants_of:
                        first = place[text] // _CHUNK * _CHUNK
                        chunk = unique[first : first + _CHUNK]
                        found = {text: variants for text, variants in self._variants(chunk) if left[text]}
                        variants_of |= found
                        bar.update(len(found))
                first_text, *second = original
                pair = second[0] if second else None
                yield AugmentedRow(first_text, pair, origin)
                yield from (AugmentedRow(variant, pair, origin) for variant in variants_of[first_text])
                if pair is not None:
                    yield from (AugmentedRow(first_text, variant, origin) for variant in variants_of[pair])
                left.subtract(original)
                for text in {text for text in original if not left[text]}:
                    del variants_of[text]

    def _variants(self, texts: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
        if not self.variants or not self.probability:
            return ((text, []) for text in texts)
        return ((text, self._draw(text, words)) for text, words in zip(texts, self.candidates(texts), strict=True))

    def _draw(self, text: str, words: Sequence[Candidates]) -> list[str]:
        random = Random(f"{self.seed} {text}")  # the same in every process, unlike hash()
        seen = {text: None}
        for _ in range(self.variants):
            variant, end = "", 0
            for word in words:
                if random.random() < self.probability:
                    variant += text[end : word.start] + random.choice(word.words)
                    end = word.end
            seen[variant + text[end:]] = None
        return list(seen)[1:]

    def candidates(self, texts: Sequence[str]) -> list[list[Candidates]]:
        """For each text its words that may change, in order, with their candidates."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
        )
        queries: dict[tuple[int, int], _Query] = {}
        words_of: list[list[Word]] = []
        for row, (text, ids, offsets) in enumerate(
            zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ):
            found = find_words(text, offsets)
            words_of.append([word for word in found if text[word.start : word.end].lower() not in self.stopwords])
            for column, word in enumerate(words_of[row]):
                if word.whole:
                    queries[row, column] = self._frame.query(ids, word)
        top = dict(zip(queries, self._fill(list(queries.values())), strict=True))
        return [
            [self._candidates(text, word, top.get((row, column))) for column, word in enumerate(words)]
            for row, (text, words) in enumerate(zip(texts, words_of, strict=True))
        ]

    def _candidates(self, text: str, word: Word, top: list[int] | None) -> Candidates:
        """From the model's best token ids, or from the word vectors where there are none."""
        own = text[word.start : word.end]
        if top is None:
            found = self.vectors.neighbours(own, self.top_k)
        else:
            pieces = [self._pieces[piece] for piece in top]
            found = [piece.text for piece in pieces if piece is not None and piece.spaced == word.spaced]
        # in an order of their own, so that near ties in the model's scores change nothing
        cased = sorted({match_case(candidate, own) for candidate in found if candidate.lower() != own.lower()})
        return Candidates(word.start, word.end, tuple(cased) or (own,))

    def _fill(self, queries: Sequence[_Query]) -> list[list[int]]:
        """The model's `top_k` token ids at each query's mask, best first."""
        top: list[list[int]] = [[]] * len(queries)
        order = sorted(range(len(queries)), key=lambda i: len(queries[i].ids))
        was_training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                for i, ids in zip(batch, self._top_ids([queries[i] for i in batch]), strict=True):
                    top[i] = ids
        finally:
            self.model.train(was_training)
        return top

    def _top_ids(self, queries: Sequence[_Query]) -> list[list[int]]:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        device, pad = self.model.device, self.tokenizer.pad_token_id or 0
        ids_BL = pad_sequence([torch.tensor(query.ids) for query in queries], batch_first=True, padding_value=pad)
        lengths_B = torch.tensor([len(query.ids) for query in queries])
        inputs = {"input_ids": ids_BL, "attention_mask": (torch.arange(ids_BL.shape[1]) < lengths_B[:, None]).long()}
        if self._frame.has_types:
            types = [torch.tensor(query.types) for query in queries]
            inputs["token_type_ids"] = pad_sequence(types, batch_first=True)
        rows_B, masks_B = torch.arange(len(queries)), torch.tensor([query.mask for query in queries])
        # logits of the masks alone: those of all tokens would be most of the memory
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, args: (args[0][rows_B, masks_B].unsqueeze(1), *args[1:]))
        try:
            with torch.inference_mode():
                logits = self.model(**{name: value.to(device) for name, value in inputs.items()}).logits
        finally:
            hook.remove()
        # a family that reads the head's weight without calling it gives all of them
        logits_BV = logits[:, 0] if logits.shape[1] == 1 else logits[rows_B, masks_B]
        return logits_BV.topk(min(self.top_k, logits_BV.shape[1])).indices.tolist()


class _Frame:
    """The special tokens around a pair, read from the tokenizer; every family has its own."""

    def __init__(self, model: Any, tokenizer: Any, max_length: int) -> None:
        encoded = tokenizer("a", "a")
        sides = encoded.sequence_ids()  # None for special tokens, else 0 or 1
        types = encoded.get("token_type_ids", [0] * len(sides))
        tokens = list(zip(encoded["input_ids"], types, strict=True))
        first, second = sides.index(0), sides.index(1)
        behind_first, behind_second = (len(sides) - sides[::-1].index(side) for side in (0, 1))
        self.special = tokens[:first], tokens[behind_first:second], tokens[behind_second:]
        self.types = types[first], types[second]
        self.mask = tokenizer.mask_token_id
        # RoBERTa's tokenizer writes no second type and its models have none; DistilBERT's models take no types
        self.has_types = getattr(model.config, "type_vocab_size", 0) > max(types) > 0
        limits = [max_length, tokenizer.model_max_length]
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None:
            limits.append(positions - 2)  # RoBERTa's table has 2 that no token gets
        self.room = (min(limits) - sum(map(len, self.special))) // 2
        if self.room < 1:
            raise ValueError(f"max_length {max_length!r}: no room for text in {min(limits)} tokens; expected more")

    def query(self, ids: list[int], word: Word) -> _Query:
        """The text beside its copy with one mask for the word; both cut to a window around it where they are long."""
        masked = [*ids[: word.first], self.mask, *ids[word.last :]]
        start = max(0, min(word.first - self.room // 2, len(masked) - self.room))
        window = slice(start, start + self.room)
        first, second = (
            [(token, kind) for token in side[window]] for side, kind in zip((masked, ids), self.types, strict=True)
        )
        before, between, after = self.special
        tokens = [*before, *first, *between, *second, *after]
        return _Query([i for i, _ in tokens], [kind for _, kind in tokens], len(before) + word.first - start)


def _check_model(model: Any, tokenizer: Any) -> None:
    if tokenizer.mask_token_id is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no mask token, so no word can be guessed; "
            "give augmentation a fill-mask model such as bert-base-uncased, with its tokenizer"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} tells no character offsets; give augmentation a model with a fast tokenizer "
            "(tokenizer.json), such as bert-base-multilingual-cased"
        )
    if model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__} has no fill-mask head; load it with AutoModelForMaskedLM")


def _check_texts(name: str, texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise ValueError(f"{name} {texts[:40]!r}: expected a list of strings")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{index}] is {type(text).__name__}: expected a string")
