"""Augmentation: what may change and what may not, for every tokenizer family and script, with tiny random models."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import torch
from conftest import word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from masking_tokenizers import ENGLISH, TOKENIZERS, bert_tokenizer
from tiny_models import tiny_encoder

from dqbart.data import augmentation
from dqbart.data.augmentation import Augmenter, Candidates
from dqbart.data.word_vectors import EmbeddingVectors, WordVectors
from dqbart.data.words import PieceWords, stop_words
from dqbart.tasks.augment import augment_file


def augmenter(kind: str = "bert", **settings: Any) -> Augmenter:
    return Augmenter(tiny_encoder(kind), TOKENIZERS[kind](), **settings)


def answering(pieces: Sequence[str], kind: str = "bert", **settings: Any) -> Augmenter:
    """With a model whose best tokens are `pieces`, best first, wherever it is asked."""
    made = augmenter(kind, **{"top_k": len(pieces), **settings})
    head = made.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.zeros_like(head.weight))
    bias = torch.full((120,), -9.0)
    bias[made.tokenizer.convert_tokens_to_ids(list(pieces))] = torch.arange(len(pieces), 0, -1.0)
    head.bias = torch.nn.Parameter(bias)
    return made


def recorded(made: Augmenter) -> list[dict[str, torch.Tensor]]:
    """Everything the model is given from now on."""
    calls: list[dict[str, torch.Tensor]] = []
    made.model.register_forward_pre_hook(lambda _, args, given: calls.append(given), with_kwargs=True)
    return calls


def changed(text: str, found: list[Candidates]) -> dict[str, tuple[str, ...]]:
    return {text[word.start : word.end]: word.words for word in found}


def fits(variant: str, text: str, found: list[Candidates], *, keep: bool) -> bool:
    """Whether `variant` is `text` with candidates at words and nothing else changed; with `keep`, words may stay."""
    pattern, end = "", 0
    for word in found:
        own = (text[word.start : word.end],) if keep else ()
        pattern += re.escape(text[end : word.start]) + f"(?:{'|'.join(map(re.escape, word.words + own))})"
        end = word.end
    return re.fullmatch(pattern + re.escape(text[end:]), variant) is not None


# -- candidates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "word", "masked"),
    [
        ("bert", "the cat sees . dog", "sees", "[CLS] the cat [MASK] . dog [SEP] the cat sees . dog [SEP]"),
        ("distilbert", "the cat", "cat", "[CLS] the [MASK] [SEP] the cat [SEP]"),
        ("bert", "我喜欢", "喜", "[CLS] 我 [MASK] 欢 [SEP] 我 喜 欢 [SEP]"),
        ("roberta", "the cat sees", "cat", "<s> the <mask> Ġsees </s> </s> the Ġcat Ġsees </s>"),
        ("roberta", "!我", "我", "<s> ! <mask> </s> </s> ! æ Ī ĳ </s>"),  # one mask for three bytes
        ("xlm-roberta", "the cat", "cat", "<s> ▁the <mask> </s> </s> ▁the ▁cat </s>"),
        ("xlm-roberta", "我喜欢。", "喜欢", "<s> ▁我 <mask> 。 </s> </s> ▁我 喜欢 。 </s>"),
    ],
)
def test_the_model_sees_the_masked_text_and_the_original(kind: str, text: str, word: str, masked: str) -> None:
    made = augmenter(kind, batch_size=1)
    calls = recorded(made)
    found = made.candidates([text])[0]
    tokens = [" ".join(made.tokenizer.convert_ids_to_tokens(call["input_ids"][0])) for call in calls]
    assert tokens.count(masked) == 1 and word in changed(text, found)
    assert len(calls) == len(found)
    for call in calls:
        assert call["attention_mask"].all()
        assert ("token_type_ids" in call) == (kind == "bert")
        if kind == "bert":
            first = call["input_ids"][0].tolist().index(3) + 1  # [CLS] masked [SEP]
            length = call["input_ids"].shape[1]
            assert call["token_type_ids"][0].tolist() == [0] * first + [1] * (length - first)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_candidates_are_the_model_s_best_at_the_mask(kind: str) -> None:
    """Against the model called plainly, one row at a time, without padding and with all logits."""
    made = augmenter(kind, top_k=40, stopwords=())
    tokenizer, pieces = made.tokenizer, PieceWords(made.tokenizer)
    texts = ["the cat sees old house", "the dog", "the bird sees cat"]  # one token a word in all of them
    for text, found in zip(texts, made.candidates(texts), strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(found) == len(text.split())
        for position, word in enumerate(found):
            own = text[word.start : word.end]
            masked = [*ids[:position], tokenizer.mask_token_id, *ids[position + 1 :]]
            row = tokenizer(tokenizer.decode(masked), text, return_tensors="pt")
            if kind not in ("bert", "albert"):
                row.pop("token_type_ids", None)
            place = row["input_ids"][0].tolist().index(tokenizer.mask_token_id)
            with torch.no_grad():
                best = made.model(**row).logits[0, place].topk(40).indices.tolist()
            expected = {p.text for p in map(pieces.__getitem__, best) if p is not None and p.spaced} - {own}
            assert set(word.words) == (expected or {own})


def test_parts_specials_punctuation_and_the_word_itself_are_no_candidates() -> None:
    made = answering(["cat", "##s", "[SEP]", "[UNK]", ".", "中", "dog", "1", "house"])
    assert changed("The cat", made.candidates(["The cat"])[0]) == {"cat": ("dog", "house")}
    assert changed("CAT Bird", made.candidates(["CAT Bird"])[0]) == {
        "CAT": ("DOG", "HOUSE"), "Bird": ("Cat", "Dog", "House")
    }  # fmt: skip
    assert changed("中", made.candidates(["中"])[0]) == {"中": ("中",)}  # nothing else in its script: itself
    assert changed("我", made.candidates(["我"])[0]) == {"我": ("中",)}
    made = answering(["Ġcat", "the", "s", "Ġ", "<s>", "Ġdog"], "roberta")
    assert changed("a bird", made.candidates(["a bird"])[0]) == {"bird": ("cat", "dog")}
    made = answering(["▁cat", "house", "s", "北京", "▁我", "人。"], "xlm-roberta")
    assert changed("old 喜欢", made.candidates(["old 喜欢"])[0]) == {"old": ("cat",), "喜欢": ("北京", "我")}


def test_top_k_counts_before_dropping() -> None:
    assert changed("cat", answering(["##s", "dog", "house"], top_k=2).candidates(["cat"])[0]) == {"cat": ("dog",)}


def test_split_words_take_word_vectors() -> None:
    vectors = WordVectors(["cats", "lions", "Tigers"], np.eye(3) + 0.5)
    made = answering(["dog"], vectors=vectors)
    calls = recorded(made)
    assert changed("Cats", made.candidates(["Cats"])[0]) == {"Cats": ("Lions",)}  # top_k is 1
    made.top_k = 2
    assert changed("cats CATS", made.candidates(["cats CATS"])[0]) == {
        "cats": ("lions", "tigers"), "CATS": ("LIONS", "TIGERS")
    }  # fmt: skip
    assert changed("unable cat", made.candidates(["unable cat"])[0]) == {"unable": ("unable",), "cat": ("dog",)}
    assert len(calls) == 1
    assert isinstance(augmenter().vectors, EmbeddingVectors)  # when none are given


def test_a_literal_mask_in_the_text_is_not_ours() -> None:
    made = answering(["dog", "house"], batch_size=1)
    calls = recorded(made)
    text = "[MASK] cat [MASK] bird"
    assert changed(text, made.candidates([text])[0])["cat"] == ("dog", "house")
    assert [list(made.augment([text]))[i].text.count("[MASK]") for i in range(3)] == [2, 2, 2]
    assert "[CLS] [MASK] [MASK] [MASK] bird [SEP]" in made.tokenizer.decode(calls[0]["input_ids"][0])


def test_long_texts_are_seen_through_a_window() -> None:
    made = augmenter(max_length=23, top_k=40, batch_size=1)
    calls = recorded(made)
    text = "cat dog house bird river old new tree night book city hello world " * 5
    found = made.candidates([text])[0]
    assert len(found) == len(calls) == 65
    for i, call in enumerate(calls):
        row = made.tokenizer.convert_ids_to_tokens(call["input_ids"][0])
        left, right = row[1:11], row[12:22]
        assert (row[0], row[11], row[22]) == ("[CLS]", "[SEP]", "[SEP]")
        place = left.index("[MASK]")
        assert left[:place] + left[place + 1 :] == right[:place] + right[place + 1 :]
        start = min(max(i - 5, 0), 55)
        assert right == text.split()[start : start + 10] and start + place == i
    assert sum(word.words != (text[word.start : word.end],) for word in found) == 65
    # by default the window is what the model has room for: 64 positions
    for kind in TOKENIZERS:
        made = augmenter(kind, variants=1)
        calls = recorded(made)
        list(made.augment(["the cat sees old dog " * 14]))
        assert 58 <= max(call["input_ids"].shape[1] for call in calls) <= 62


# -- variants ---------------------------------------------------------------------------------------------------------

TEXTS = [
    "The cat sees the old house.",
    "don't   SEE\n\tthe Dog, 19 (birds)!  ",
    "我喜欢北京，你好！Hello 中国。",
    "",
    "... 42 !?",
    "cats houses unable",
    "the a it",
]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_only_words_change_and_only_to_their_candidates(kind: str, text: str) -> None:
    made = augmenter(kind, variants=7, top_k=40, probability=1.0)
    (found,) = made.candidates([text])
    rows = list(made.augment([text]))
    assert rows[0] == (text, None, 0) and 1 <= len(rows) <= 8
    variants = [row.text for row in rows[1:]]
    assert all(fits(variant, text, found, keep=False) for variant in variants)
    assert len(set(variants) | {text}) == len(rows)
    if any(len(word.words) > 1 for word in found):
        assert len(rows) > 2
    for word in found:
        own = text[word.start : word.end]
        assert own.isalpha() and own.lower() not in stop_words("en") and 1 <= len(word.words) <= 40
        assert word.words == (own,) or own not in word.words


@settings(max_examples=25, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" catdoghouse我喜'-.1\u0301"), max_size=30))
def test_any_text_keeps_what_is_not_a_word(text: str) -> None:
    for made in FUZZED:
        (found,) = made.candidates([text])
        for row in list(made.augment([text]))[1:]:
            assert fits(row.text, text, found, keep=True) and row.text != text
        assert all(regex.match(r"\p{L}", text[word.start : word.end]) for word in found)


FUZZED = [augmenter(kind, variants=2, top_k=60) for kind in ("bert", "roberta", "xlm-roberta")]


def test_probability_0_gives_the_original_alone_and_asks_nobody() -> None:
    for settings_ in ({"probability": 0.0}, {"variants": 0}):
        made = augmenter(**settings_)
        calls = recorded(made)
        assert list(made.augment(TEXTS)) == [(text, None, i) for i, text in enumerate(TEXTS)]
        assert calls == []
    assert list(augmenter().augment([])) == [] == list(augmenter().augment([], []))


def test_probability_is_per_word() -> None:
    made = answering(["dog"], probability=0.3, variants=400)
    words = [Candidates(4 * i, 4 * i + 3, tuple(f"{n:03}" for n in range(900))) for i in range(10)]
    drawn = made._draw("cat " * 10, words)  # 900 candidates: hardly two variants are the same
    changed_share = np.mean([[part != "cat" for part in variant.split()] for variant in drawn], axis=0)
    assert 350 < len(drawn) <= 400 and ((0.2 < changed_share) & (changed_share < 0.42)).all()


def test_stop_words_are_the_caller_s() -> None:
    text = "the CAT sees a dog"
    assert list(changed(text, augmenter().candidates([text])[0])) == ["CAT", "sees", "dog"]
    assert list(changed(text, augmenter(stopwords=()).candidates([text])[0])) == text.split()
    assert list(changed(text, augmenter(stopwords=["cat", "dog"]).candidates([text])[0])) == ["the", "sees", "a"]


def test_a_pair_s_other_text_is_the_original() -> None:
    """The released code left the last variant of text 1 beside the variants of text 2."""
    made = augmenter(variants=5, top_k=40, probability=0.9)
    firsts, seconds = ["old cat sees house", "big tree"], ["small dog likes river", "old cat sees house"]
    rows = list(made.augment(firsts, seconds))
    for origin, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        mine = [row for row in rows if row.origin == origin]
        assert mine[0] == (first, second, origin)
        assert all((row.text == first) != (row.pair == second) for row in mine[1:])
        of_first = [row.text for row in mine if row.pair == second]
        of_second = [row.pair for row in mine if row.text == first]
        assert of_first == [row.text for row in made.augment([first])]
        assert of_second == [row.text for row in made.augment([second])]
        assert 2 < len(of_first) <= 6 and 2 < len(of_second) <= 6
    assert [row.origin for row in rows] == sorted(row.origin for row in rows)


def test_variants_depend_on_the_text_and_the_seed_alone() -> None:
    texts = [*TEXTS, "old dog likes the small river", "The cat sees the old house."]
    made = augmenter(top_k=40, variants=4)
    rows = list(made.augment(texts))
    for batch_size in (1, 3, 500):
        assert list(augmenter(top_k=40, variants=4, batch_size=batch_size).augment(texts)) == rows
    by_text = {i: [row.text for row in rows if row.origin == i] for i in range(len(texts))}
    torch.manual_seed(77)
    for i, text in enumerate(texts):
        assert [row.text for row in made.augment([text])] == by_text[i]
    reverse = list(made.augment(texts[::-1]))
    assert [row.text for row in reverse if row.origin == 0] == by_text[len(texts) - 1] == by_text[0]
    assert list(augmenter(top_k=40, variants=4, seed=29).augment(texts)) != rows
    one_word = answering(["dog"], variants=20)  # texts of one shape don't all change at the same places
    places = [
        [row.text.split().index("dog") for row in list(one_word.augment([text]))[1:]]
        for text in ("cat " * 9, "old " * 9)
    ]
    assert places[0] != places[1]


def test_a_text_is_asked_about_once() -> None:
    made = augmenter(variants=2)
    calls = recorded(made)
    list(made.augment(["old cat", "new dog", "old cat"] * 40, ["old cat", "old cat", "old cat"] * 40))
    assert sum(len(call["input_ids"]) for call in calls) == 4


def test_from_a_start_on_the_model_is_asked_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are made of all texts, or near ties would fall otherwise; nothing is asked that nobody needs."""
    monkeypatch.setattr(augmentation, "_CHUNK", 3)
    texts = [f"old cat {word} house" for word in ENGLISH.split()[:12]]
    texts[7] = texts[0]
    made, pairs = augmenter(variants=2, batch_size=4), [*texts[6:], *texts[:6]]
    calls = recorded(made)
    whole = list(made.augment(texts, pairs))
    asked = [call["input_ids"].tolist() for call in calls]
    assert len({str(batch) for batch in asked}) == len(asked)  # each text once
    for start in (1, 5, 9, 12):
        del calls[:]
        rest = list(made.augment(texts, pairs, start=start))
        assert rest == [row for row in whole if row.origin >= start]
        again = [call["input_ids"].tolist() for call in calls]
        assert all(batch in asked for batch in again) and len(again) <= len(asked) and bool(again) == (start < 12)
    lazy = made.augment(texts)
    del calls[:]
    next(lazy)
    assert 0 < len(calls) <= 3  # one chunk of the four


class Fuse:
    """A value of a row that stops the writing of it, as Ctrl-C does, until it is mended."""

    blown = True

    def __repr__(self) -> str:
        return "Fuse"

    def __str__(self) -> str:
        if Fuse.blown:
            raise KeyboardInterrupt
        return "mended"


def test_an_interrupted_file_goes_on_to_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_encoder("bert").save_pretrained(tmp_path / "bert")
    bert_tokenizer().save_pretrained(tmp_path / "bert")
    names = ENGLISH.split()
    rows = [{"text": f"{a} {b} cat", "other": f"old {b} {a}", "label": i % 2, "score": 0.1 * i, "n": None}
            for i, (a, b) in enumerate(zip(names * 4, names[::-1] * 4, strict=True))]  # fmt: skip
    for i, row in enumerate(rows):
        row["text"] += f" {names[i % 7]}"
    rows[70]["n"] = Fuse()
    call: dict[str, Any] = dict(text_column="text", pair_column="other", variants=2, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        augment_file(tmp_path / "bert", rows, tmp_path / "cut.jsonl", **call)
    (partial,) = tmp_path.glob("cut.jsonl.*.partial")
    assert len(partial.read_text().splitlines()) == 70 and not (tmp_path / "cut.jsonl").exists()
    with partial.open("a") as file:
        file.write('[{"text": "old c')  # a kill in the middle of a line
    with pytest.raises(KeyboardInterrupt):  # another setting begins anew, and leaves this one alone
        augment_file(tmp_path / "bert", rows, tmp_path / "cut.jsonl", **call, seed=29)
    other = next(path for path in tmp_path.glob("cut.jsonl.*.partial") if path != partial)
    Fuse.blown = False
    capsys.readouterr()
    counts = augment_file(tmp_path / "bert", rows, tmp_path / "cut.jsonl", **call)
    assert f"70 of {len(rows)} rows are done, in {partial}; going on" in capsys.readouterr().err
    assert augment_file(tmp_path / "bert", rows, tmp_path / "whole.jsonl", **call) == counts
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    found = [json.loads(line) for line in (tmp_path / "cut.jsonl").read_text().splitlines()]
    assert counts == {"rows": len(rows), "written": len(found)} and len(found) > 2 * len(rows)
    assert sum(row["n"] == "mended" for row in found) > 1
    assert list(tmp_path.glob("*.partial")) == [other]
    other.rename(tmp_path / other.name.replace("cut", "new")).write_text("[1\n")
    with pytest.raises(ValueError, match=r"partial line 1: damaged; delete the file to write it anew"):
        augment_file(tmp_path / "bert", rows, tmp_path / "new.jsonl", **call, seed=29)


def test_dropout_is_off_and_the_mode_comes_back() -> None:
    """TinyBERT's scripts left their teacher in training mode."""
    made = augmenter(variants=4, top_k=40)
    expected = list(made.augment(TEXTS))
    for module in made.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9
    made.model.train()
    state = torch.get_rng_state()
    assert list(made.augment(TEXTS)) == expected
    assert made.model.training and torch.equal(torch.get_rng_state(), state)
    made.model.get_output_embeddings().forward = None  # breaks the call
    with pytest.raises(TypeError):
        list(made.augment(TEXTS))
    assert made.model.training and not made.model.get_output_embeddings()._forward_pre_hooks


def test_a_head_that_is_not_called_gives_the_same() -> None:
    """Some families multiply by the head's weight themselves: the hook never runs, and all logits come."""
    expected = augmenter(top_k=30).candidates(TEXTS)
    made = augmenter(top_k=30)
    head = made.model.get_output_embeddings()

    class Plain(torch.nn.Module):
        def forward(self, h: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(h, head.weight, head.bias)

    made.model.cls.predictions.decoder = Plain()
    made.model.get_output_embeddings = lambda: head
    assert made.candidates(TEXTS) == expected


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"top_k": 0}, "top_k 0: expected 1 or more"),
        ({"variants": -1}, "variants -1: expected 0 or more"),
        ({"batch_size": 0}, "batch_size 0: expected 1 or more"),
        ({"probability": 1.5}, "probability 1.5: expected 0 to 1"),
        ({"probability": float("nan")}, "probability nan: expected 0 to 1"),
        ({"stopwords": "en"}, "stopwords 'en': expected words"),
        ({"max_length": 4}, "max_length 4: no room for text"),
    ],
)
def test_wrong_settings(settings_: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        augmenter(**settings_)


def test_wrong_texts() -> None:
    made = augmenter()
    for given_, words in (
        (("cat",), "texts 'cat': expected a list of strings"),
        ((["cat", None],), r"texts\[1\] is NoneType: expected a string"),
        ((["cat"], ["dog", 3]), r"pairs\[1\] is int"),
        ((["cat"], "dog"), "pairs 'dog'"),
        ((["cat", "dog"], ["cat"]), "2 texts but 1 pairs; expected one each"),
    ):
        with pytest.raises(ValueError, match=words):
            made.augment(*given_)  # at once, nothing asked for


def test_models_that_cannot_fill_a_mask_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match="has no mask token, so no word .* give augmentation a fill-mask model"
    ) as error:
        Augmenter(tiny_encoder("bert"), word_tokenizer())
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="BertModel has no fill-mask head; load it with AutoModelForMaskedLM"):
        Augmenter(tiny_encoder("bert").bert, bert_tokenizer())
    slow = bert_tokenizer()
    monkeypatch.setattr(type(slow), "is_fast", False)
    with pytest.raises(ValueError, match="tells no character offsets; give augmentation a model with a fast"):
        Augmenter(tiny_encoder("bert"), slow)
