"""ROUGE and BLEU against their packages, known values by hand, other scripts, intervals."""

import json
import math
from typing import Any

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from dqbart.evaluation.metrics import (
    ROUGE,
    bleu,
    bleu_of_sums,
    bleu_statistics,
    bootstrap_interval,
    rouge,
    rouge_definition,
    rouge_per_example,
    score,
    split_sentences,
)

PREDICTIONS = [
    "The cats were sitting on the mat. It rained.",
    "A quick brown fox jumps over lazy dogs",
    "nothing in common",
    "",
]
REFERENCES = [
    "It rained. A cat sat on the mat, happily.",
    "The quick brown fox jumped over the lazy dog",
    "entirely different words",
    "something",
]


@pytest.mark.parametrize("kind", ROUGE)
def test_rouge_is_the_packages(kind: str) -> None:
    scorer = RougeScorer([kind], use_stemmer=True)
    prepared = [
        ("\n".join(split_sentences(r)), "\n".join(split_sentences(p)))
        for p, r in zip(PREDICTIONS, REFERENCES, strict=True)
    ]
    expected = [scorer.score(reference, prediction)[kind].fmeasure for reference, prediction in prepared]
    assert rouge_per_example(PREDICTIONS, REFERENCES)[kind].tolist() == expected
    assert rouge(PREDICTIONS, REFERENCES)[kind] == pytest.approx(100 * sum(expected) / 4)
    assert 0 < sum(expected) < 4


def test_rouge_by_hand() -> None:
    # 3 of 4 words in common: P = R = 3/4. Bigrams "a b", "b c" of 3 each; LCS "a b c" = 3.
    values = rouge(["a b c x"], ["a b c y"])
    assert values == pytest.approx({"rouge1": 75, "rouge2": 200 / 3, "rougeL": 75, "rougeLsum": 75})
    # Sentences in another order: LCS keeps only one of them, Lsum both.
    values = rouge(["Dogs bark. Cats meow."], ["Cats meow. Dogs bark."])
    assert values["rougeL"] == pytest.approx(50) and values["rougeLsum"] == pytest.approx(100)
    # One sentence holds both of the reference's, in another order: P = 4/5, R = 4/4.
    assert rouge(["Cats meow and dogs bark."], ["Dogs bark. Cats meow."])["rougeLsum"] == pytest.approx(800 / 9)
    # P = 2/2, R = 2/4, F = 2/3
    assert rouge(["one two"], ["one two three four"])["rouge1"] == pytest.approx(200 / 3)


def test_the_best_reference_counts_per_kind() -> None:
    references = [["x y z", "a b c"], ["a b", "b a", "q"]]
    values = rouge_per_example(["a b c", "b a"], references)
    assert all(values[kind].tolist() == [1.0, 1.0] for kind in ROUGE)
    assert rouge(["b a"], [["a b"]])["rouge2"] == 0


def test_german_letters_are_letters() -> None:
    # The package's own tokenizer reads "Größe" as "gr" and "e", so it finds "gr" here.
    default = RougeScorer(["rouge1"]).score("Größe", "Grün")["rouge1"].fmeasure
    assert default > 0 and rouge(["Grün"], ["Größe"], language="de")["rouge1"] == 0
    assert rouge(["schöne GRÖSSE"], ["Schöne Größe"], language="de_DE")["rouge1"] == pytest.approx(50)
    assert rouge(["ä ö ü"], ["ä ö ß"], language="en")["rouge1"] == 0
    assert rouge(["ä ö ü"], ["ä ö ß"], language="de")["rouge1"] == pytest.approx(200 / 3)
    assert rouge(["u\u0308ber"], ["über"], language="de")["rouge1"] == 100  # composed or not
    assert rouge(["running"], ["runs"], language="en")["rouge1"] == 100  # stemmed
    assert rouge(["running"], ["runs"], language="de")["rouge1"] == 0


@pytest.mark.parametrize(
    ("language", "prediction", "reference", "rouge1", "rouge2"),
    [
        ("zh", "我喜欢猫", "我喜欢狗", 75, 200 / 3),  # words are characters: 3 of 4, bigrams 2 of 3
        ("zh_CN", "GPT4很好", "GPT4 不好", 200 / 3, 0),  # gpt4 stays one word: 2 of 3
        ("ja_XX", "ねこが好き", "いぬが好き", 60, 50),
        ("hi_IN", "हिन्दी भाषा", "हिन्दी लिपि", 50, 0),  # vowel signs do not break words
        ("th", "แมว", "แมว", 100, 100),
        ("ru", "Привет, мир!", "привет мир", 100, 100),
        ("ko", "나는 고양이", "나는 강아지", 50, 0),
        ("ar_AR", "مرحبا بالعالم", "مرحبا يا عالم", 40, 0),
    ],
)
def test_scripts(language: str, prediction: str, reference: str, rouge1: float, rouge2: float) -> None:
    default = RougeScorer(["rouge1"], use_stemmer=True).score(reference, prediction)["rouge1"].fmeasure
    assert default in (0.0, 1.0) and default != rouge1 / 100  # the package alone sees nothing, or only "gpt4"
    values = rouge([prediction], [reference], language=language)
    assert (values["rouge1"], values["rouge2"]) == pytest.approx((rouge1, rouge2))


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four… Five", ["One.", "Two!", "Three?", "Four…", "Five"]),
        ("It costs 3.5 m. in all, e.g. here", ["It costs 3.5 m. in all, e.g. here"]),
        ('He said "Stop." (Twice.) "Go!" 5 left.', ['He said "Stop."', "(Twice.)", '"Go!"', "5 left."]),
        ("a\n\n b \r\nc.", ["a", "b", "c."]),
        ("我来了。你呢？“好！”他说", ["我来了。", "你呢？", "“好！”", "他说"]),
        ("यह एक है। यह दो है॥ तीन", ["यह एक है।", "यह दो है॥", "तीन"]),
        ("Wait... what? Über allem.", ["Wait... what?", "Über allem."]),
        ("ما هذا؟ كتاب", ["ما هذا؟", "كتاب"]),
        (" \n", []),
        ("", []),
        ("...", ["..."]),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


def test_bleu_is_sacrebleus() -> None:
    predictions = ["the cat is on the mat", "there is a dog here now", "he reads books every day ."]
    references = ["the cat sat on the mat", "there is one dog here", "he reads a book every day ."]
    expected = BLEU().corpus_score(predictions, [references])
    result = bleu(predictions, references)
    assert result["bleu"] == expected.score and 0 < expected.score < 100
    assert result["chrf"] == CHRF().corpus_score(predictions, [references]).score
    assert result["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.")
    assert result["chrf_signature"].startswith("nrefs:1|case:mixed|eff:yes|nc:6")


def test_case_counts_unless_told_not_to() -> None:
    said, wanted = ["Where did the NASA rover land ?"], ["where did the nasa rover land ?"]
    strict, loose = (bleu(said, wanted, lowercase=lowercase) for lowercase in (False, True))
    assert strict["bleu"] < 60 < loose["bleu"] == pytest.approx(100) and strict["chrf"] < 90 < loose["chrf"]
    for name in ("signature", "chrf_signature"):
        assert "case:mixed" in strict[name] and "case:lc" in loose[name]
    strict_sums, loose_sums = (bleu_statistics(said, wanted, lowercase=lowercase).sum(0) for lowercase in (False, True))
    assert bleu_of_sums(strict_sums) < 60 < bleu_of_sums(loose_sums) == pytest.approx(100)
    found = score("bleu", said, wanted, lowercase=True, resamples=2)
    assert found.intervals["bleu"] == pytest.approx([100, 100]) and found.definition.count("case:lc") == 2


def test_bleu_by_hand() -> None:
    # 4 of 5, 3 of 4, 2 of 3, 1 of 2 n-grams; system 5 words, reference 6: brevity exp(1 - 6/5).
    result = bleu(["a b c d x"], ["a b c d e f"])
    assert result["bleu"] == pytest.approx(100 * math.exp(-0.2) * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_bleu_with_uneven_references() -> None:
    predictions = ["a b c d e", "f g h i j", "k l m n o"]
    references = [["a b c d x", "a b c y e"], ["f g h i j"], ["k q m n o", "k l z n o", "k l m n"]]
    streams: Any = [
        ["a b c d x", "f g h i j", "k q m n o"],
        ["a b c y e", None, "k l z n o"],
        [None, None, "k l m n"],
    ]
    result = bleu(predictions, references)
    assert result["bleu"] == BLEU().corpus_score(predictions, streams).score
    assert result["signature"].startswith("nrefs:var|") and result["chrf_signature"].startswith("nrefs:var|")
    assert bleu_of_sums(bleu_statistics(predictions, references).sum(axis=0)) == pytest.approx(result["bleu"])
    # An empty text is a reference too, and not a missing one.
    assert bleu(["a b c d"], [["", "a b c d"]])["bleu"] == pytest.approx(100)


def test_bleu_of_chinese_and_japanese() -> None:
    assert BLEU().corpus_score(["我喜欢吃苹果"], [["我喜欢吃香蕉"]]).score == 0  # one word without the right tokenizer
    chinese = bleu(["我喜欢吃苹果"], ["我喜欢吃香蕉"], language="zh_CN")
    assert chinese["bleu"] == pytest.approx(100 * (4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert "tok:zh" in chinese["signature"]
    assert "tok:char" in bleu(["ねこが好き"], ["いぬが好き"], language="ja_XX")["signature"]
    assert "tok:13a" in bleu(["a"], ["b"], language="de_DE")["signature"]


def test_statistics_of_a_sample_are_its_corpus_bleu() -> None:
    words = "a b c d e f g".split()
    draw = np.random.default_rng(0)
    predictions = [" ".join(draw.choice(words, draw.integers(0, 9))) for _ in range(40)]
    references = [
        [" ".join(draw.choice(words, draw.integers(1, 9))) for _ in range(draw.integers(1, 4))] for _ in range(40)
    ]
    stats = bleu_statistics(predictions, references)
    for _ in range(5):
        sample = draw.integers(0, 40, 40)
        whole = bleu([predictions[i] for i in sample], [references[i] for i in sample])["bleu"]
        assert bleu_of_sums(stats[sample].sum(axis=0)) == pytest.approx(whole)
    low, high = bootstrap_interval(stats, bleu_of_sums, resamples=200)
    assert low < bleu(predictions, references)["bleu"] < high


def test_bootstrap_interval() -> None:
    values = np.random.default_rng(1).normal(50, 10, (400, 1))
    low, high = bootstrap_interval(values, lambda sums: sums[0] / 400)
    error = values.std() / 20  # of a mean of 400
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15)
    assert bootstrap_interval(values, lambda sums: sums[0] / 400) == (low, high)
    assert bootstrap_interval(values, lambda sums: sums[0] / 400, seed=1) != (low, high)
    assert bootstrap_interval(np.full((5, 1), 3.0), lambda sums: sums[0] / 5) == (3.0, 3.0)
    assert bootstrap_interval(np.ones((1, 1)), lambda sums: sums[0], resamples=1) == (1.0, 1.0)
    with pytest.raises(ValueError, match=r"shape \(0, 1\)"):
        bootstrap_interval(np.empty((0, 1)), lambda sums: sums[0])
    with pytest.raises(ValueError, match="resamples 0: expected at least 1"):
        bootstrap_interval(np.ones((1, 1)), lambda sums: sums[0], resamples=0)


@pytest.mark.parametrize("metric", ["rouge", "bleu"])
def test_scores_are_complete_json(metric: str) -> None:
    settings = {"num_beams": 4, "max_length": 20}
    result = score(metric, PREDICTIONS, REFERENCES, generation=settings, resamples=50)
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain == result.to_dict()
    assert plain["generation"] == settings and plain["n"] == 4 and plain["language"] == "en"
    if metric == "rouge":
        assert plain["values"] == rouge(PREDICTIONS, REFERENCES) and plain["intervals"].keys() == set(ROUGE)
        assert result.value == plain["values"]["rougeL"] and result.definition == rouge_definition("en")
        assert "rouge-score 0." in result.definition and "Porter" in result.definition
    else:
        assert result.value == plain["values"]["bleu"] == bleu(PREDICTIONS, REFERENCES)["bleu"]
        assert "tok:13a" in result.definition and "chrF nrefs:1" in result.definition
    for name, (low, high) in plain["intervals"].items():
        assert 0 <= low <= plain["values"][name] <= high <= 100
        assert f"{name} {plain['values'][name]:.2f} [{low:.2f}, {high:.2f}]" in str(result)
    assert str(result).endswith("(n=4)")
    assert score(metric, PREDICTIONS, REFERENCES, generation=settings, resamples=50) == result


@pytest.mark.parametrize("function", [rouge, bleu, bleu_statistics, lambda p, r: score("rouge", p, r)])
@pytest.mark.parametrize(
    ("predictions", "references", "words"),
    [
        ([], [], "no predictions; expected at least one"),
        (["a"], [], "1 predictions but 0 references"),
        (["a"], ["a", "b"], "1 predictions but 2 references"),
        ("abc", ["a", "b", "c"], "predictions are str; expected a list"),
        (["a"], "a", "references are str; expected a list"),
        (["a"], None, "references are NoneType"),
        (iter(["a"]), ["a"], "predictions are list_iterator"),
        (["a", None], ["a", "b"], "prediction 1 is NoneType; expected text"),
        (["a", "b"], ["a", []], r"reference 1 is '\[\]'; expected a text or a list of texts"),
        (["a"], [[None]], r"reference 0 is '\[None\]'"),
        (["a"], [3], "reference 0 is '3'"),
    ],
)
def test_bad_input(function: Any, predictions: Any, references: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        function(predictions, references)


def test_bad_names() -> None:
    with pytest.raises(ValueError, match="metric 'meteor': expected 'rouge' or 'bleu'"):
        score("meteor", ["a"], ["a"])
    for language in ("english", "", "1", None):
        for function in (rouge, bleu):
            with pytest.raises(ValueError, match=f"language {language!r}: expected a code such as en, de"):
                function(["a"], ["a"], language=language)  # type: ignore[arg-type]
