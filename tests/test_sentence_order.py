"""Pairs of consecutive segments and their order: the invariants, and the released ALBERT code's defect."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_masking import near
from test_plain import BOOKS, bert, needs_books, roberta, text_of

from dqbart.data.blocks import EncodedBlocks, encode_blocks, encode_pairs_of_segments
from dqbart.data.masking import BlockCollator, MaskedItems, Masker
from dqbart.data.plain import read_texts
from dqbart.data.sentence_order import LABEL, SentenceOrder

CLS, SEP = 2, 3


def documents(count: int = 40, seed: int = 0) -> list[list[str]]:
    """Documents of none to many sentences of 1 to 30 words, in paragraphs of one or several sentences."""
    draw = np.random.default_rng(seed)
    made = []
    for number in range(count):
        sentences = [
            " ".join(f"{'abcdefghij'[number % 10]}w{i}" for i in draw.integers(0, 100, draw.integers(1, 30))) + "."
            for _ in range(draw.integers(0, 12))
        ]
        sentences = [sentence.capitalize() for sentence in sentences]
        made.append([" ".join(sentences[i : i + 3]) for i in range(0, len(sentences), 3)])
    return made


def pairs(max_length: int = 64, **options: Any) -> EncodedBlocks:
    return encode_pairs_of_segments(bert(), documents(), max_length, progress=False, **options)


def segments(item: dict[str, Any]) -> tuple[list[int], list[int]]:
    """What stands between the special tokens, in the order of the text."""
    ids = item["input_ids"]
    middle = ids.index(SEP)
    assert ids[0] == CLS and ids[-1] == SEP and ids.count(SEP) == 2
    assert item["token_type_ids"] == [0] * (middle + 1) + [1] * (len(ids) - middle - 1)
    first, second = ids[1:middle], ids[middle + 1 : -1]
    return (second, first) if item.get(LABEL) else (first, second)


def check(items: Any, texts: list[list[str]]) -> None:
    """Put in order, every pair is a stretch of one document."""
    streams = [" ".join(map(str, text_of(bert(), document))) + " " for document in texts]
    for item in items:
        first, second = segments(item)
        assert first and second
        joined = " ".join(map(str, first + second)) + " "
        assert any(joined in stream for stream in streams)


def test_both_segments_are_from_one_place_of_one_document() -> None:
    data = pairs()
    check(data, documents())
    order = SentenceOrder(data, seed=0)
    check(order, documents())
    assert {item[LABEL] for item in order} == {0, 1}


def test_the_check_fails_on_the_released_codes_behaviour() -> None:
    """There, a chunk of one sentence takes B from a random other document, and is labelled as swapped."""
    data = pairs()
    a, _ = segments(data[0])
    _, b = segments(data[len(data) - 1])
    item = {"input_ids": [CLS, *b, SEP, *a, SEP], LABEL: 1}
    item["token_type_ids"] = [0] * (len(b) + 2) + [1] * (len(a) + 1)
    with pytest.raises(AssertionError):
        check([item], documents())


def test_documents_of_one_sentence_give_no_pair() -> None:
    texts = [["Only one sentence here."], ["First one here. Second one here."], ["one " * 60], []]
    data = encode_pairs_of_segments(bert(), texts, 64, progress=False)
    assert len(data) == 1
    check(data, texts[1:2])
    assert data.dropped == "left out: 2 documents of fewer than two sentences, 0 ends of documents"
    assert str(data).startswith("1 pairs of segments, text tokens mean ")
    with pytest.raises(ValueError, match="no text to train on is left of 2 documents; left out: 2 documents of fewer"):
        encode_pairs_of_segments(bert(), [texts[0], texts[2]], 64, progress=False)
    # What is left of a document and is one sentence, or too short, is left out too.
    texts = [["W1 w2 w3 w4 w5. W6 w7 w8 w9. W10 w11 w12."]]  # 6, 5 and 4 tokens
    data = encode_pairs_of_segments(bert(), texts, 14, progress=False)
    assert len(data) == 1 and data.dropped.endswith(" 1 ends of documents")
    assert len(data[0]["input_ids"]) == 14 and segments(data[0]) == (
        bert()("w1 w2 w3 w4 w5.", add_special_tokens=False)["input_ids"],
        bert()("w6 w7 w8 w9.", add_special_tokens=False)["input_ids"],
    )


def test_pairs_fill_the_room_and_part_at_sentences() -> None:
    for max_length in (12, 20, 64, 500):
        data = pairs(max_length)
        assert max(len(item["input_ids"]) for item in data) <= max_length
        check(data, documents())
    dot = bert().convert_tokens_to_ids(".")
    data = pairs(500)
    assert all(segments(item)[0][-1] == dot for item in data)
    shares_P = np.asarray(data.cuts_R) / data.rows.lengths_R
    assert shares_P.min() < 0.3 and shares_P.max() > 0.7  # not always in the middle
    assert [*pairs(seed=1)] == [*pairs(seed=1)] != [*pairs(seed=2)]


def test_sentences_longer_than_half_the_room_are_cut_and_not_lost() -> None:
    texts = [["W1 w2 w3 w4 w5 w6 w7 w8 w9. " * 3]]
    data = encode_pairs_of_segments(bert(), texts, 20, progress=False)
    assert data.rows.lengths_R.tolist() == [10, 10, 10] and data.cuts_R is not None and set(data.cuts_R) == {8}
    check(data, texts)


def test_repeated_sentences_and_spaces_are_told_apart() -> None:
    texts = [["No. No.  No. W1 w2 w3 w4 w5."]]
    cuts = set()
    for seed in range(30):
        data = encode_pairs_of_segments(bert(), texts, 64, seed=seed, progress=False)
        assert len(data) == 1 and data.cuts_R is not None
        cuts.add(int(data.cuts_R[0]))
    assert cuts == {3, 6, 9}  # "n ##o ." each
    # Byte-level tokens begin with the space before a sentence.
    data = encode_pairs_of_segments(roberta(), [["the cat sat. Yes. the dog sat."]], 64, progress=False)
    assert data.cuts_R is not None
    second = roberta().decode(data.rows[0][int(data.cuts_R[0]) :])
    assert second in (" Yes. the dog sat.", " the dog sat.")


def test_swapping_twice_restores() -> None:
    data = pairs(words=True)
    for index in range(len(data)):
        plain, swapped = data.item(index), data.item(index, swap=True)
        first, second = segments(plain)
        assert segments(swapped) == (second, first)
        assert segments({**swapped, LABEL: 1}) == (first, second)
        assert swapped["token_type_ids"] == [0] * (len(second) + 2) + [1] * (len(first) + 1)
        # Where words start goes along with its tokens.
        for item in (plain, swapped):
            tokens = bert().convert_ids_to_tokens(item["input_ids"])
            assert [not token.startswith("##") for token in tokens] == [bool(start) for start in item["word_starts"]]


def test_half_of_the_pairs_are_swapped_anew_in_every_epoch() -> None:
    data = pairs()
    order = SentenceOrder(data, seed=5)
    labels_EP = []
    for epoch in range(20):
        order.set_epoch(epoch)
        labels_EP.append([item[LABEL] for item in order])
    seen = np.asarray(labels_EP)
    assert seen.mean() == near(0.5, seen.size)
    assert (0 < seen.mean(0)).all() and (seen.mean(0) < 1).all()  # every pair in both orders
    assert np.abs(np.corrcoef(seen[0], seen[1])[0, 1]) < 0.5


def test_together_with_masks() -> None:
    order = SentenceOrder(pairs(words=True), seed=5)
    items = MaskedItems(order, Masker(bert(), choose="ngram"), seed=5)
    for epoch in (0, 1):
        items.set_epoch(epoch)  # reaches the order too
        for masked, plain in zip(items, order, strict=True):
            assert masked[LABEL] == plain[LABEL]
            restored = [
                label if label != -100 else token
                for token, label in zip(masked["input_ids"], masked["labels"], strict=True)
            ]
            assert restored == plain["input_ids"] and "word_starts" not in masked
    batch = BlockCollator(0)([items[i] for i in range(4)])
    assert batch[LABEL].shape == (4,) and batch["token_type_ids"].shape == batch["labels"].shape
    # The two draw different numbers: what is swapped says nothing about what is hidden.
    assert items.generator(0).random() != order.generator(0).random()


def test_blocks_of_one_segment_have_no_order() -> None:
    with pytest.raises(ValueError, match="sentence order needs two segments; make the blocks with encode_pairs_of_seg"):
        SentenceOrder(encode_blocks(bert(), documents(), 64, progress=False), seed=0)


def test_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [{"text": text, "doc": str(i)} for i, document in enumerate(documents()) for text in document]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = encode_pairs_of_segments(bert(), read_texts(file).documents, 64, progress=False)
    assert list(data) == list(pairs())


@needs_books
def test_real_books() -> None:
    texts = [document[:4] for document in read_texts(BOOKS, "test").documents]
    data = encode_pairs_of_segments(bert(), texts, 128, progress=False)
    check(SentenceOrder(data, seed=0), texts)
    total = sum(len(text_of(bert(), document)) for document in texts)
    assert data.rows.lengths_R.sum() > 0.95 * total
