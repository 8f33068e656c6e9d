"""Which tokens are hidden, and what stands in their place: exact rules, and shares within their sampling error."""

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_plain import bert, numbered, roberta
from tiny_models import ENCODERS, tiny_encoder
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from dqbart.data.blocks import EncodedBlocks, encode_blocks, encode_pairs_of_segments
from dqbart.data.masking import CHOICES, NGRAM_PROBABILITIES, BlockCollator, MaskedItems, Masker
from dqbart.data.plain import PlainTexts
from dqbart.evaluation.predict import predict_masked
from dqbart.methods import METHODS
from dqbart.recipe import Recipe
from dqbart.tasks.text import PlainText

SPECIAL = {0, 1, 2, 3, 4}  # of bert()
SPELT = "cat w1 dog w2 w3 house w4, w5. unbelievable w6! w7 w8 bird w9 "


def blocks(words: bool = True, length: int = 66) -> EncodedBlocks:
    """40 blocks of up to 64 tokens, of one to twelve tokens a word."""
    return encode_blocks(bert(), [[SPELT] * 60], length, words=words, progress=False)


def masker(choose: str = "uniform", rate: float = 0.15) -> Masker:
    return Masker(bert(), rate, choose, blocks().counts_V)


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def near(share: float, count: int) -> Any:
    """Within four standard errors of a share of `count` independent draws."""
    return pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / count))


def chosen_in(labels: list[int]) -> np.ndarray:
    return np.flatnonzero(np.asarray(labels) != -100)


@pytest.mark.parametrize("choose", CHOICES)
def test_shares_and_labels(choose: str) -> None:
    data, hide = blocks(), masker(choose)
    generator, seen = draw(), Counter[str]()
    for _ in range(40):
        for item in data:
            ids, labels = hide(item["input_ids"], generator, item["word_starts"])
            seen["text"] += len(ids) - 2
            for old, new, label in zip(item["input_ids"], ids, labels, strict=True):
                if label == -100:
                    assert new == old
                    continue
                assert label == old and old not in SPECIAL
                seen["chosen"] += 1
                seen["mask"] += new == 4
                seen["kept"] += new == old
                assert new == 4 or new not in SPECIAL
    count = seen["chosen"]
    # Rounded by chance, so the share is 15 % in the mean; a word of 12 tokens that comes first is more than that.
    assert count / seen["text"] == pytest.approx(0.15, abs=0.003 if choose in ("word", "ngram") else 0.001)
    assert seen["mask"] / count == near(0.8, count)
    random_is_itself = 0.1 / len(hide.replacements)
    assert seen["kept"] / count == near(0.1 + random_is_itself, count)


def test_random_tokens_are_any_but_special_ones() -> None:
    hide = masker()
    assert set(hide.replacements.tolist()) == set(range(len(bert()))) - SPECIAL
    seen = set()
    generator = draw()
    for _ in range(600):
        ids, labels = hide([2, *[60] * 100, 3], generator)
        seen |= {new for new, label in zip(ids, labels, strict=True) if label != -100} - {4, 60}
    assert len(seen) > 0.95 * len(hide.replacements) and not seen & SPECIAL


@pytest.mark.parametrize("choose", CHOICES)
def test_every_row_has_a_hole(choose: str) -> None:
    hide, generator = masker(choose), draw()
    for length in (1, 2, 3, 5):
        counts = [len(chosen_in(hide([2, *[60] * length, 3], generator, [1] * (length + 2))[1])) for _ in range(100)]
        assert min(counts) == 1 and max(counts) == 1
    # 10 tokens: 1.5 in the mean, never 2 of them always.
    counts = [len(chosen_in(hide([2, *[60] * 10, 3], generator, [1] * 12)[1])) for _ in range(1000)]
    assert set(counts) == {1, 2} and np.mean(counts) - 1 == near(0.5, 1000)
    # Nothing but special and unknown tokens: nothing to choose, and no error.
    assert hide([2, 1, 1, 3], generator, [1] * 4) == ([2, 1, 1, 3], [-100] * 4)
    assert hide([], generator, []) == ([], [])


# --- where


def test_frequency_prefers_rare_tokens_by_the_rule() -> None:
    """One of two tokens that occur 32 and 1024 times: the rare one 32^0.7 = 11.3 times as often."""
    counts_V = np.zeros(len(bert()), np.int64)
    counts_V[60], counts_V[61] = 32, 1024
    hide, generator = Masker(bert(), 0.15, "frequency", counts_V), draw()
    rare = sum(hide([2, 60, 61, 3], generator)[1][1] != -100 for _ in range(8000))
    ratio = 32**0.7
    assert rare / 8000 == near(ratio / (1 + ratio), 8000)
    # A token that the data never had counts as one that it had once.
    counts_V[60], counts_V[61] = 0, 1
    even = sum(hide([2, 70, 71, 3], generator)[1][1] != -100 for _ in range(2000))
    assert even / 2000 == near(0.5, 2000)


def test_frequency_draws_several_as_multinomial_does() -> None:
    """DistilBERT's own way is torch.multinomial without replacement: the same inclusion frequencies."""
    counts_V = np.ones(len(bert()), np.int64)
    counts_V[60:66] = [1, 10, 100, 1000, 10000, 100000]
    hide, generator = Masker(bert(), 0.5, "frequency", counts_V), draw()
    rows = 4000
    found_6 = np.zeros(6)
    for _ in range(rows):
        found_6[chosen_in(hide([2, *range(60, 66), 3], generator)[1]) - 1] += 1
    weights_6 = torch.from_numpy(counts_V[60:66].astype(float)) ** -0.7
    drawn = torch.multinomial(weights_6.expand(rows, 6), 3, generator=torch.Generator().manual_seed(0))
    expected_6 = torch.bincount(drawn.flatten(), minlength=6) / rows
    assert found_6.sum() == 3 * rows
    assert found_6 / rows == pytest.approx(expected_6.numpy(), abs=0.03)
    assert (np.diff(found_6) < 0).all()


def test_uniform_is_uniform() -> None:
    hide, generator, rows = masker(), draw(), 3000
    found_20 = np.zeros(20)
    for _ in range(rows):
        found_20[chosen_in(hide([2, *range(60, 80), 3], generator)[1]) - 1] += 1
    assert found_20 / rows == near(0.15, rows)


def units_of(starts: list[int]) -> list[set[int]]:
    """Positions of every word; the first may be the rest of a word that the block before began."""
    firsts = [0, 1, *(i for i, start in enumerate(starts) if start and i > 1)]
    return [set(range(a, b)) for a, b in zip(firsts, [*firsts[1:], len(starts)], strict=True)]


@pytest.mark.parametrize("choose", ["word", "ngram"])
def test_words_are_hidden_whole(choose: str) -> None:
    data, hide, generator = blocks(), masker(choose), draw()
    several = 0
    for item in data:
        for _ in range(10):
            chosen = set(chosen_in(hide(item["input_ids"], generator, item["word_starts"])[1]).tolist())
            for unit in units_of(item["word_starts"]):
                assert unit <= chosen or not unit & chosen
                several += len(unit) > 1 and unit <= chosen
            assert len(chosen) <= max(12, math.ceil(0.15 * (len(item["input_ids"]) - 2)))
    assert several > 100
    # A word longer than the share is hidden where there is nothing else, and where it happens to come first.
    ids, starts = [2, 60, 61, 62, 63, 3], [1, 1, 0, 0, 0, 1]
    assert chosen_in(hide(ids, generator, starts)[1]).tolist() == [1, 2, 3, 4]


def test_ngram_probabilities() -> None:
    assert NGRAM_PROBABILITIES == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    assert [p / NGRAM_PROBABILITIES[0] for p in NGRAM_PROBABILITIES] == pytest.approx([1, 1 / 2, 1 / 3])


def test_ngram_lengths() -> None:
    """Long rows with few holes: runs are hardly ever cut short by a neighbour or by the end of the share."""
    hide, generator = masker("ngram", 0.02), draw()
    places, words = np.arange(5000), np.arange(5000)
    lengths = Counter[int]()
    for _ in range(60):
        spans = hide._spans(places, words, 100, generator)
        assert all((np.diff(span) == 1).all() for span in spans)
        assert len(set(np.concatenate(spans))) == sum(map(len, spans)) == 100
        lengths.update(map(len, spans))
    assert set(lengths) == {1, 2, 3}
    total = sum(lengths.values())
    for length, share in enumerate(NGRAM_PROBABILITIES, 1):
        assert lengths[length] / total == pytest.approx(share, abs=0.03)


def test_ngrams_end_at_special_tokens_and_count_words() -> None:
    hide, generator = masker("ngram", 0.9), draw()
    places = np.asarray([1, 2, 4, 5, 6, 7])  # 3 is a [SEP]; 4 and 5 are one word
    words = np.asarray([0, 1, 3, 3, 4, 5])
    longest = 0
    for _ in range(300):
        for span in hide._spans(places, words, 6, generator):
            assert not {2, 4} <= set(span.tolist())
            longest = max(longest, len(span))
    assert longest == 4  # three words, one of them of two tokens


# --- data sets


def test_masks_follow_from_seed_epoch_and_index_alone() -> None:
    data = blocks()
    items = MaskedItems(data, masker("word"), seed=3)
    first = list(items)
    assert [items[i] for i in reversed(range(len(items)))] == first[::-1]  # any order
    assert items[-1] == first[-1] and len(items) == len(data)
    assert first[0].keys() == {"input_ids", "attention_mask", "labels"}
    items.set_epoch(1)
    second = list(items)
    assert sum(a["labels"] == b["labels"] for a, b in zip(first, second, strict=True)) == 0
    assert list(MaskedItems(data, masker("word"), seed=4)) != first
    again = MaskedItems(data, masker("word"), seed=3)
    again.set_epoch(1)  # as a run resumed in its second epoch
    assert list(again) == second
    again.set_epoch(0)
    assert list(again) == first
    equal = MaskedItems(encode_blocks(bert(), [["w1 w2 w3 w4 w5 w6 w7 w8"]] * 20, 10, progress=False), masker(), 0)
    assert len({tuple(item["labels"]) for item in equal}) > 1  # equal rows do not get equal holes
    with pytest.raises(IndexError):
        items[len(items)]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing_even_those_that_live_on(workers: int) -> None:
    items = MaskedItems(blocks(), masker(), seed=3)
    loader = DataLoader(
        items, batch_size=4, num_workers=workers, collate_fn=BlockCollator(0), persistent_workers=workers > 0
    )
    plain = BlockCollator(0)
    for epoch in range(2):
        items.set_epoch(epoch)
        alone = copy.deepcopy(items)
        for number, batch in enumerate(loader):
            expected = plain([alone[i] for i in range(4 * number, min(4 * number + 4, len(items)))])
            assert {k: v.tolist() for k, v in batch.items()} == {k: v.tolist() for k, v in expected.items()}


def test_accelerate_says_the_epoch() -> None:
    from accelerate import Accelerator

    items = MaskedItems(blocks(), masker(), seed=3)
    loader = Accelerator(cpu=True).prepare(DataLoader(items, batch_size=2, collate_fn=BlockCollator(0)))
    first = [batch["labels"] for batch in loader]
    loader.set_epoch(1)
    second = [batch["labels"] for batch in loader]
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rate_zero_is_tinyberts_general_stage() -> None:
    pairs = encode_pairs_of_segments(bert(), [["W1 w2 w3. W4 w5 w6 w7. W8 w9."]], 32, words=True, progress=False)
    without_mask = PreTrainedTokenizerFast(tokenizer_object=bert()._tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    items = MaskedItems(pairs, Masker(without_mask, rate=0), seed=0)
    assert items[0] == {key: value for key, value in pairs[0].items() if key != "word_starts"}
    assert items[0].keys() == {"input_ids", "attention_mask", "token_type_ids"}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "sentence"])
def test_what_is_scored_on_masked_words_has_seen_some(method: str, tmp_path: Path) -> None:
    recipe = Recipe(method=method, task="text", max_source_length=66, mask_rate=0.4)
    teacher = tiny_encoder("bert")
    task, texts = PlainText(recipe, bert(), teacher), PlainTexts([[SPELT] * 60], "text")
    task.adapt(teacher, new_head=False)
    items, collator = task.training_set(texts, None, tmp_path)
    batch = collator(list(items))
    looks_at_words = bool({"task", "logits"} & recipe.terms.keys())
    assert looks_at_words == (method not in ("minilm", "minilm2", "tinybert")) == task.is_scored(texts)
    assert ("labels" in batch) == looks_at_words
    share = (batch["input_ids"] == 4).sum() / batch["attention_mask"].sum()
    assert share == pytest.approx(0.4 * 0.8 if looks_at_words else 0, abs=0.05)


def test_padding_is_never_a_target() -> None:
    data = encode_blocks(bert(), numbered([30, 9, 3]), 40, progress=False)
    items = [MaskedItems(data, masker(), seed=0)[i] for i in range(3)]
    batch = BlockCollator(bert().pad_token_id, multiple_of=8)([item | {"sentence_order_label": 1} for item in items])
    assert batch["input_ids"].shape == batch["labels"].shape == (3, 32)
    padding = batch["attention_mask"] == 0
    assert (batch["input_ids"][padding] == 0).all() and (batch["labels"][padding] == -100).all()
    assert padding.sum(1).tolist() == [0, 32 - 11, 32 - 5]
    assert batch["sentence_order_label"].tolist() == [1, 1, 1]
    pairs = encode_pairs_of_segments(bert(), [["w1. W2 w3 w4 w5 w6 w7."], ["w1. W2 w3 w4 w5 w6."]], 40, progress=False)
    types = BlockCollator(0)(list(pairs))["token_type_ids"]
    assert types.tolist() == [[0] * 4 + [1] * 8, [0] * 4 + [1] * 7 + [0]]


def test_a_model_learns_from_it() -> None:
    data = encode_blocks(roberta(), [["the cat sat. the dog sat on the mat"] * 4], 32, words=True, progress=False)
    items = MaskedItems(data, Masker(roberta(), choose="ngram"), seed=0)
    batch = BlockCollator(roberta().pad_token_id)([{**item} for item in items])
    model = tiny_encoder("roberta")
    model.resize_token_embeddings(len(roberta()))
    loss = model(**batch).loss
    assert torch.isfinite(loss) and loss > 0


# --- errors


def test_what_cannot_be_masked() -> None:
    without_mask = PreTrainedTokenizerFast(tokenizer_object=bert()._tokenizer, unk_token="[UNK]")
    with pytest.raises(ValueError, match="has no mask token, which masked .* such as minilm or tinybert") as error:
        Masker(without_mask)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="masking 'words': expected one of uniform, frequency, word, ngram"):
        Masker(bert(), choose="words")
    for rate in (-0.1, 1, 15, math.nan):
        with pytest.raises(ValueError, match=f"masking rate {rate}: expected at least 0 and below 1"):
            Masker(bert(), rate)
    with pytest.raises(ValueError, match="masking 'frequency' needs how often each token occurs"):
        Masker(bert(), choose="frequency")
    for choose in ("word", "ngram"):
        with pytest.raises(ValueError, match=f"masking '{choose}' needs to know where words start: encode with words"):
            MaskedItems(blocks(words=False), masker(choose), seed=0)[0]


@pytest.mark.parametrize("kind", ENCODERS)
def test_masked_words_are_guessed_without_whole_logits(kind: str) -> None:
    model = tiny_encoder(kind).train()
    lengths = [7, 3, 9, 5, 4]
    generator = torch.Generator().manual_seed(2)
    rows = []
    for length in lengths:
        ids = torch.randint(5, 120, (length,), generator=generator).tolist()
        labels = [token if place % 3 == 1 else -100 for place, token in enumerate(ids)]
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    rows.append({"input_ids": [6, 7], "attention_mask": [1, 1], "labels": [-100, -100]})  # nothing to guess
    seen: list[int] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda m, i, out: seen.append(out[..., 0].numel()))
    found = predict_masked(model, rows, BlockCollator(1), batch_size=4, progress=False)
    assert len(found) == len(rows)
    best_M, labels_M = np.concatenate(found, axis=1)
    hook.remove()
    assert sum(seen) == len(best_M) == sum(-(-(length - 1) // 3) for length in lengths) and model.training
    model.eval()
    expected = []
    with torch.no_grad():
        for row in rows:
            best = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].argmax(-1).tolist()
            expected += [(guess, label) for guess, label in zip(best, row["labels"], strict=True) if label != -100]
    assert list(zip(best_M.tolist(), labels_M.tolist(), strict=True)) == expected
