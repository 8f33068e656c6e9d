"""Sequence-to-sequence with an encoder: the mask, the batches, and that decoding sees what training showed."""

import itertools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, sentences, word_tokenizer
from test_packed_modules import student
from tiny_models import ENCODERS, tiny_encoder, tiny_seq2seq
from transformers import BertConfig, BertForMaskedLM, BertTokenizer, DynamicCache, EncoderDecoderCache

from dqbart.data.columns import Examples
from dqbart.data.s2s import S2sCollator, S2sLayout, SeededItems, additive_mask, encode_s2s, s2s_mask
from dqbart.evaluation.s2s_generate import Seq2SeqEncoder, write_texts_s2s
from dqbart.packed.checkpoint import load_packed, save_packed
from dqbart.quant.attention import quantize_attention, use_attention
from dqbart.recipe import Recipe
from dqbart.tasks.s2s import EncoderSequenceToSequence, lowers_case

CACHED = ("bert", "roberta", "xlm-roberta")
START, PAD, END, MASK = 0, 1, 2, 4


def tokenizer() -> Any:
    """One token per word, with the special tokens of RoBERTa."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, cls_token="<s>", pad_token="<pad>", sep_token="</s>", unk_token="<unk>",
        mask_token="<mask>",
    )  # fmt: skip


def items(layout: S2sLayout, sources: list[str], targets: list[str]) -> list[dict[str, list[int]]]:
    return list(encode_s2s(tokenizer(), layout, sources, targets, max_source_length=40, max_target_length=20))


def plain(layout: S2sLayout, **changes: Any) -> S2sCollator:
    return S2sCollator(layout, rate=0.0, random_rate=0.0, keep_rate=0.0, **changes)


def logits_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits


def rows(text: str) -> torch.Tensor:
    return torch.tensor([[c == "1" for c in row] for row in text.split()])


def test_mask_golden() -> None:
    order, real = torch.tensor([[0, 0, 0, 2, 3]]), torch.tensor([[1, 1, 0, 1, 1]])
    assert s2s_mask(order, real).tolist() == [rows("11000 11000 11000 11010 11011").tolist()]


def test_pseudo_mask_by_hand() -> None:
    """Source 2, target 2, their copies 2, padding 1."""
    order = torch.tensor([[0, 0, 2, 3, 2, 3, 0]])
    real, pseudo = torch.tensor([[1] * 6 + [0]]), torch.tensor([[False] * 4 + [True] * 2 + [False]])
    expected = rows("1100000 1100000 1110000 1111000 1100100 1110010 1100000")
    assert s2s_mask(order, real, pseudo).tolist() == [expected.tolist()]


def test_additive_mask() -> None:
    mask = additive_mask(torch.tensor([[[True, False]]]), torch.bfloat16)
    assert mask.shape == (1, 1, 1, 2) and mask.dtype == torch.bfloat16
    assert mask.flatten().tolist() == [0.0, torch.finfo(torch.bfloat16).min]


def test_pseudo_batch_by_hand() -> None:
    model = tiny_encoder("roberta")
    layout = S2sLayout.of(model, tokenizer())
    assert (layout.first_position, layout.positions, layout.vocabulary) == (2, 62, 5 + len(WORDS))
    pairs = items(layout, ["cat sees dog", "cat"], ["dog cat", ""])
    batch = plain(layout)(pairs)
    cat, dog, sees = (tokenizer().convert_tokens_to_ids(w) for w in ("cat", "dog", "sees"))
    assert batch["input_ids"][0].tolist() == [START, cat, sees, dog, END, dog, cat, END, MASK, MASK, MASK]
    assert batch["input_ids"][1].tolist() == [START, cat, END, END, MASK] + [PAD] * 6
    assert (batch["position_ids"] - 2)[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7]
    assert (batch["position_ids"] - 2)[1].tolist() == [0, 1, 2, 3, 3] + [0] * 6
    assert batch["labels"].tolist() == [[-100] * 8 + [dog, cat, END], [-100] * 4 + [END] + [-100] * 6]
    assert batch["token_type_ids"].tolist() == [[0] * 5 + [1] * 6, [0, 0, 0, 1, 1] + [0] * 6]
    assert batch["attention_mask"].shape == (2, 1, 11, 11)
    seen = (batch["attention_mask"][1, 0] == 0).sum(-1).tolist()
    assert seen == [3, 3, 3, 4, 4] + [3] * 6  # padding sees the source: no row without anything to see
    assert plain(layout, multiple_of=8)(pairs)["input_ids"].shape == (2, 16)


def test_covering_rates_and_reproducibility() -> None:
    layout = S2sLayout(0, 2, 4, 1, 120, 0, 512, False)
    target = list(range(10, 110))
    items, others = (
        [{"input_ids": [0, 5, 2], "labels": target, "seed": start + i} for i in range(40)] for start in (0, 100)
    )
    first, again = (S2sCollator(layout)(items) for _ in range(2))
    assert all(torch.equal(first[k], again[k]) for k in first) and "token_type_ids" not in first
    other = S2sCollator(layout)(others)
    assert not torch.equal(first["input_ids"], other["input_ids"])
    history, covered, true = first["input_ids"][:, 3:103], first["input_ids"][:, 103:], torch.tensor([target] * 40)
    assert 0.77 < (covered == MASK).float().mean() < 0.83
    assert 0.08 < (covered == true).float().mean() < 0.12
    changed = history != true
    assert 0.42 < changed.float().mean() < 0.48  # half of the 90 % whose covered form differs
    assert torch.equal(history[changed], covered[changed])
    assert torch.equal(first["labels"][:, 103:], true)  # every token is learned, whatever was covered


def test_what_is_drawn_depends_on_epoch_and_item_alone() -> None:
    """Not on the batch, nor on what was drawn before: a run that was interrupted goes on as if it had not been."""
    layout = S2sLayout(0, 2, 4, 1, 120, 0, 64, False)
    seeded = SeededItems([{"input_ids": [0, 5, 2], "labels": list(range(10, 40))} for _ in range(3)], seed=1)
    together = S2sCollator(layout)([seeded[i] for i in (0, 1, 2)])["input_ids"]
    torch.manual_seed(5)
    assert torch.equal(S2sCollator(layout)([seeded[1]])["input_ids"][0], together[1])
    assert not torch.equal(together[0], together[1])
    seeded.set_epoch(1)
    assert not torch.equal(S2sCollator(layout)([seeded[1]])["input_ids"][0], together[1])


def test_masked_mode() -> None:
    layout = S2sLayout(0, 2, 4, 1, 120, 0, 64, True)
    target = [10, 11, 12, 13, 14, 15, 16, 17, 18, 2]
    collate = S2sCollator(layout, mode="masked", random_rate=0, keep_rate=0)
    batch = collate([{"input_ids": [0, 5, 2], "labels": target}, {"input_ids": [0, 5, 2], "labels": [2]}])
    ids, labels = batch["input_ids"][0, 3:], batch["labels"][0, 3:]
    assert (labels != -100).sum() == 7 and torch.equal(ids == MASK, labels != -100)
    assert torch.where(ids == MASK, labels, ids).tolist() == target
    assert batch["labels"][1].tolist() == [-100] * 3 + [2] + [-100] * 9  # at least one
    assert torch.equal(
        batch["attention_mask"][:1, 0] == 0, s2s_mask(torch.tensor([[0] * 3 + [*range(3, 13)]]), torch.ones(1, 13))
    )


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("mode", ["pseudo", "masked"])
def test_a_target_token_influences_nothing_before_it(kind: str, mode: Any) -> None:
    model = tiny_encoder(kind)
    use_attention(model)
    layout = S2sLayout.of(model, tokenizer())
    batch = S2sCollator(layout, mode=mode)(items(layout, ["the cat sees a dog"], ["dog a sees cat"]))
    s, t, changed = 7, 5, 2
    before = logits_of(model, batch)
    ids = batch["input_ids"].clone()
    ids[0, s + changed] = 20 if ids[0, s + changed] != 20 else 21
    moved = ((logits_of(model, batch | {"input_ids": ids}) - before).abs().amax(-1)[0] > 1e-4).tolist()
    history = [False] * changed + [True] * (t - changed)
    copies = [False] * (changed + 1) + [True] * (t - changed - 1) if mode == "pseudo" else []
    assert moved == [False] * s + history + copies
    if mode == "pseudo":
        ids = batch["input_ids"].clone()
        ids[0, s + t + changed] = 20 if ids[0, s + t + changed] != 20 else 21
        moved = ((logits_of(model, batch | {"input_ids": ids}) - before).abs().amax(-1)[0] > 1e-4).tolist()
        assert moved == [i == s + t + changed for i in range(s + 2 * t)]


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_every_attention_takes_the_mask(kind: str) -> None:
    """transformers hands a mask of four dimensions on as it is; a bool one would break eager and ours."""
    found = []
    for name in ("eager", "sdpa", "dqbart"):
        model = tiny_encoder(kind)
        use_attention(model) if name == "dqbart" else model.set_attn_implementation(name)
        layout = S2sLayout.of(model, tokenizer())
        found.append(logits_of(model, plain(layout)(items(layout, ["cat", "the old cat sees"], ["dog a", "cat"]))))
    assert torch.allclose(found[0], found[1], atol=1e-5) and torch.allclose(found[0], found[2], atol=1e-5)


def steps(model: Any, pair: dict[str, list[int]], cached: bool, extra: int = 0, side: str = "right") -> torch.Tensor:
    """Logits [T, V] of decoding with the target's tokens forced; `extra` columns of padding on one side."""
    writer = Seq2SeqEncoder(model, tokenizer())
    real, blank = torch.tensor([pair["input_ids"]]), torch.full((1, extra), PAD)
    ids = torch.cat([real, blank] if side == "right" else [blank, real], 1)
    past = EncoderDecoderCache(DynamicCache(), DynamicCache()) if cached else None
    with torch.no_grad():
        source = writer.encoder(ids, (ids != PAD).long())
        forced = [START, *pair["labels"][:-1]]
        return torch.cat([
            writer(torch.tensor([forced[: i + 1]]), source, past).logits[:, 0] for i in range(len(forced))
        ])  # fmt: skip


@pytest.mark.parametrize("numerics", ["float", "integer"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_training_sees_what_decoding_sees(kind: str, numerics: str) -> None:
    model = tiny_encoder(kind)
    use_attention(model) if numerics == "float" else quantize_attention(model)
    layout = S2sLayout.of(model, tokenizer())
    pairs = items(layout, ["the cat sees a small dog", "dog"], ["a dog sees cat", "cat old cat"])
    batch = plain(layout)(pairs)
    logits = logits_of(model, batch)
    near = 2e-4 if numerics == "float" else 3e-3  # where a code falls to the other side, as processors round
    for row, pair in enumerate(pairs):
        trained = logits[row][batch["labels"][row] != -100]
        assert len(trained) == len(pair["labels"])
        for cached in (False, True) if kind in CACHED else (False,):
            assert torch.allclose(steps(model, pair, cached), trained, atol=near), (row, cached)
            assert torch.allclose(steps(model, pair, cached, 5, "left"), trained, atol=near)
            assert torch.allclose(steps(model, pair, cached, 3, "right"), trained, atol=near)


@pytest.mark.parametrize("kind", ENCODERS)
def test_output_depends_on_no_batch_mate(kind: str) -> None:
    writer, sources = Seq2SeqEncoder(tiny_encoder(kind), tokenizer()), sentences(4)
    settings: Any = {"num_beams": 3, "max_new_tokens": 4, "no_repeat_ngram_size": 1, "min_new_tokens": 4}

    def written(texts: list[str], side: str, **more: Any) -> list[list[int]]:
        inputs = tokenizer()(texts, return_tensors="pt", padding=True, padding_side=side)
        types = {"token_type_ids": torch.zeros_like(inputs["input_ids"])}  # BERT's tokenizer gives them
        return writer.generate(**inputs, **types, **settings, **more)[:, 1:].tolist()

    together = written(sources, "right")
    assert together == [written([source], "right")[0] for source in sources]
    assert together == written(sources, "left") == written(sources, "right", use_cache=False)
    assert len({tuple(row) for row in together}) > 1 and all(len(set(row)) == 4 for row in together)


@pytest.mark.parametrize("cache", [True, False])
def test_beam_search_finds_the_best(cache: bool) -> None:
    """As many beams as tokens, two steps: all sequences, scored by hand from a training batch."""
    model = tiny_encoder("bert")
    layout = S2sLayout.of(model, tokenizer())
    source = tokenizer()(["the cat sees"], return_tensors="pt")
    after = [[END], *([a, b] for a, b in itertools.product(range(120), range(120)) if a != END)]
    batch = plain(layout)([{"input_ids": source["input_ids"][0].tolist(), "labels": [a, 5]} for a in range(120)])
    scores = logits_of(model, batch)[:, -2:].log_softmax(-1)
    score = {tuple(ids): scores[0, 0, ids[0]] + (scores[ids[0], 1, ids[1]] if ids[1:] else 0) for ids in after}
    best = max(score, key=lambda ids: float(score[ids]))
    writer, ids = Seq2SeqEncoder(model, tokenizer()), {"input_ids": source["input_ids"]}
    settings: Any = {"max_new_tokens": 2, "use_cache": cache, "length_penalty": 0.0}
    beams = writer.generate(**ids, **settings, num_beams=120, return_dict_in_generate=True, output_scores=True)
    assert [i for i in beams.sequences[0, 1:].tolist() if i != PAD] == list(best)
    assert beams.sequences_scores[0] == pytest.approx(float(score[best]), abs=1e-4)
    greedy = tuple(i for i in writer.generate(**ids, **{**settings, "length_penalty": 1.0})[0, 1:].tolist() if i != PAD)
    assert score[greedy] <= score[best] + 1e-5


@pytest.fixture(scope="module")
def reverser() -> Any:
    """A small BERT that learned to say two to four words backwards."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=PAD,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    use_attention(model)
    layout = S2sLayout.of(model, tokenizer())
    generator = torch.Generator().manual_seed(1)
    collate = S2sCollator(layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        lengths = torch.randint(2, 5, (32,), generator=generator).tolist()
        words = [torch.randint(5, 13, (n,), generator=generator).tolist() for n in lengths]
        batch = collate([
            {"input_ids": [START, *w, END], "labels": [*w[::-1], END], "seed": 32 * step + i}
            for i, w in enumerate(words)
        ])  # fmt: skip
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, step / 50, (STEPS - step) / (STEPS / 2))
        optimizer.step()
    return model.eval()


STEPS = 200


def test_it_learns_to_reverse(reverser: Any) -> None:
    sources = [s for n in (2, 3, 4) for s in itertools.islice(map(" ".join, itertools.permutations(WORDS[:8], n)), 40)]
    expected = [" ".join(s.split()[::-1]) for s in sources]
    for settings in ({}, {"num_beams": 4}):
        written = write_texts_s2s(reverser, tokenizer(), sources, max_target_length=8, **settings)  # type: ignore[arg-type]
        right = sum(a == b for a, b in zip(written, expected, strict=True))
        assert right >= 0.9 * len(sources), (right, written[:5])


def test_limits_count_the_target_only(reverser: Any) -> None:
    """A decoder's view would have the source in all of these counts."""
    source = " ".join(WORDS[:4])
    backwards = " ".join(WORDS[:4][::-1])
    assert write_texts_s2s(reverser, tokenizer(), [source], no_repeat_ngram_size=1, max_new_tokens=8) == [backwards]
    assert write_texts_s2s(reverser, tokenizer(), [source], max_length=3) == [" ".join(WORDS[:4][:1:-1])]
    longer = write_texts_s2s(reverser, tokenizer(), [source], min_new_tokens=7, max_new_tokens=7)
    assert len(longer[0].split()) == 7


def test_long_sources_are_cut_and_that_is_said(reverser: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        texts = write_texts_s2s(reverser, tokenizer(), ["cat " * 50, "dog"], max_new_tokens=4)
    assert len(texts) == 2 and "1 of 2 sources were cut to 20 tokens" in caplog.text
    caplog.clear()
    layout = S2sLayout.of(reverser, tokenizer())
    with caplog.at_level(logging.WARNING):
        pairs = encode_s2s(
            tokenizer(), layout, ["cat " * 50, "a"], ["dog", "a b c d e f g"], max_source_length=18, max_target_length=6
        )
    assert "of 2 pairs, 1 sources were cut to 18 tokens and 1 targets to 6" in caplog.text
    assert [len(i["labels"]) for i in pairs] == [2, 6] and all(i["labels"][-1] == END for i in pairs)
    assert len(pairs[0]["input_ids"]) == 18 and pairs[0]["input_ids"][-1] == END


@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
def test_a_packed_model_decodes_as_its_student(kind: str, tmp_path: Path) -> None:
    made = student(kind, "2-4-8")
    packed = load_packed(save_packed(made, tmp_path / "small"))
    pair = {"input_ids": [START, 6, 7, 8, END], "labels": [9, 10, END]}
    assert torch.allclose(steps(packed, pair, True), steps(made, pair, False), atol=1e-4)


def test_a_model_is_left_as_it_was(reverser: Any) -> None:
    implementation, hooks = (
        reverser.config._attn_implementation,
        len(reverser.cls.predictions.decoder._forward_pre_hooks),
    )
    write_texts_s2s(reverser, tokenizer(), ["the cat"], max_target_length=8)
    assert reverser.config._attn_implementation == implementation and not reverser.config.is_encoder_decoder
    assert len(reverser.cls.predictions.decoder._forward_pre_hooks) == hooks
    with torch.no_grad():
        assert reverser(torch.tensor([[0, 5, 2]])).logits.shape == (1, 3, 30)


def without(role: str) -> Any:
    made = tokenizer()
    setattr(made, f"{role}_token", None)
    return made


def bare() -> Any:
    """Special tokens in the vocabulary, none put around a text."""
    from tokenizers import processors

    made = tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    return made


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: (m, without("mask")), "has no mask token; use the tokenizer of a masked-language model"),
        (lambda m: (m, without("sep")), "has no sep token"),
        (lambda m: (m, word_tokenizer()), "has no cls token"),
        (lambda m: (m, bare()), r"turns an empty text into \[\]; expected \['<s>', '</s>'\]"),
        (lambda m: (tiny_seq2seq(), tokenizer()), "expected an encoder with its language head; load Auto"),
        (lambda m: (m.bert, tokenizer()), "expected an encoder with its language head"),
        (lambda m: (tiny_bert(vocab_size=7), tokenizer()), r"tokens, the model 7: .*resize_token_embeddings\(25\)"),
    ],
)  # fmt: skip
def test_an_unsuitable_model_or_tokenizer(change: Any, words: str) -> None:
    model, tok = change(tiny_encoder("bert"))
    with pytest.raises(ValueError, match=words) as error:
        S2sLayout.of(model, tok)
    assert "\n" not in str(error.value)


def tiny_bert(**changes: Any) -> Any:
    settings: Any = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8) | changes
    return BertForMaskedLM(BertConfig(**settings))


def test_wrong_use(reverser: Any) -> None:
    layout = S2sLayout.of(reverser, tokenizer())
    writer = Seq2SeqEncoder(reverser, tokenizer())
    encode: Any = lambda *texts, **limits: encode_s2s(tokenizer(), layout, *texts, **limits)  # noqa: E731
    for call, words in [
        (lambda: encode(["a"], []), "1 sources but 0 targets"),
        (lambda: encode([], []), "no sources"),
        (lambda: encode(["a"], ["b"], max_source_length=20, max_target_length=5), "share the model's 24 positions"),
        (lambda: encode(["a"], ["b"], max_source_length=2, max_target_length=5), "max_source_length 2"),
        (lambda: encode(["a"], ["b"], max_source_length=9, max_target_length=1), "max_target_length 1: expected at le"),
        (lambda: S2sCollator(layout, mode="v3"), "mode 'v3': expected 'pseudo' or 'masked'"),  # type: ignore[arg-type]
        (lambda: S2sCollator(layout, rate=1.5), "rate 1.5: expected 0 to 1"),
        (lambda: S2sCollator(layout, keep_rate=0.7, random_rate=0.7), "random_rate \\+ keep_rate 1.4"),
        (lambda: S2sCollator(layout)([{"input_ids": [0, 2]}]), "items without labels"),
        (lambda: S2sCollator(layout)([{"input_ids": [0] * 20, "labels": [2] * 5}]), "source of 20 tokens and a"),
        (lambda: write_texts_s2s(reverser, tokenizer(), ["a"], max_new_tokens=23), "23 new tokens: the model has 24"),
        (lambda: write_texts_s2s(reverser, tokenizer(), ["a"], num_beam=3, max_new_tokens=8), "you mean 'num_beams'"),
        (lambda: write_texts_s2s(reverser, tokenizer(), [], max_new_tokens=8), "no sources"),
        (lambda: writer.generate(torch.full((1, 20), 6), min_new_tokens=9, max_new_tokens=9), "lower max_source"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


def test_validation_measures_decoding(reverser: Any) -> None:
    """All rates 0: the loss is that of the tokens as decoding meets them, and no choice is left to chance."""
    layout = S2sLayout.of(reverser, tokenizer())
    pairs = items(replace(layout, positions=64), ["the cat sees"], ["sees cat the"])
    first, second = plain(layout)(pairs), plain(layout)(pairs)
    assert torch.equal(first["input_ids"], second["input_ids"])
    with torch.no_grad():
        loss = reverser(**first).loss
    expected = torch.nn.functional.cross_entropy(steps(reverser, pairs[0], True), torch.tensor(pairs[0]["labels"]))
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)


def test_scores_know_a_tokenizer_that_lowers_case() -> None:
    """Whatever it writes is lower case: against references as they are, a perfect student would get some 65 BLEU."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "The", *"abc", *"ABC"]
    for uncased in (True, False):
        words = BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, do_lower_case=uncased)
        assert lowers_case(words) == uncased
        recipe = Recipe(task="s2s", metric="bleu", max_target_length=6)
        model = tiny_bert(vocab_size=len(pieces), pad_token_id=0)
        found = EncoderSequenceToSequence(recipe, words, model).score(model, Examples(["a b", "c"], ["The cat", "A"]))
        assert found.score.definition.count("case:lc") == (2 if uncased else 0)
    for other in (tokenizer(), word_tokenizer()):  # know no capital letter
        assert not lowers_case(other)
