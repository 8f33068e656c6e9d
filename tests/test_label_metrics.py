"""Scores of labels against sums by hand and other libraries, and logits in the order of their texts."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_labelled import bert_tokenizer, refused
from tiny_models import ENCODERS, tiny_encoder
from transformers import (
    AlbertForSequenceClassification,
    BertForSequenceClassification,
    DistilBertForSequenceClassification,
    RobertaForSequenceClassification,
    XLMRobertaForSequenceClassification,
)

from dqbart.data.labelled import LabelCollator, Labelled, encode_labelled
from dqbart.evaluation.label_metrics import LABEL_METRICS, score_labels
from dqbart.evaluation.metrics import bootstrap_interval, resampled_interval
from dqbart.evaluation.predict import predict_logits
from dqbart.packed.checkpoint import load_packed, save_packed
from dqbart.quant.layers import prepare

HEADS = {
    "bert": BertForSequenceClassification, "roberta": RobertaForSequenceClassification,
    "xlm-roberta": XLMRobertaForSequenceClassification, "distilbert": DistilBertForSequenceClassification,
    "albert": AlbertForSequenceClassification,
}  # fmt: skip


def values(kind: str, predictions: Any, references: Any, names: Any = None) -> dict[str, float]:
    return score_labels(kind, predictions, references, names, resamples=2).values


# --- classes


def test_two_classes_by_hand() -> None:
    found, wanted = [1, 1, 1, 0, 0, 1, 0, 0, 0, 1], [1, 1, 0, 0, 0, 1, 1, 0, 0, 0]
    tp, fp, fn, tn = 3, 2, 1, 4
    got = values("classification", found, wanted)
    assert got["accuracy"] == pytest.approx(70)
    assert got["f1"] == pytest.approx(100 * 2 * tp / (2 * tp + fp + fn))
    phi = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert got["matthews"] == pytest.approx(100 * phi)
    flipped = values("classification", [1 - x for x in found], [1 - x for x in wanted])
    assert flipped["f1"] == pytest.approx(100 * 2 * tn / (2 * tn + fp + fn)) != got["f1"]  # class 1 is the positive one
    assert flipped["matthews"] == pytest.approx(got["matthews"])
    assert values("accuracy", [1 - x for x in wanted], wanted)["matthews"] == pytest.approx(-100)
    assert values("accuracy", np.array(found, bool), torch.tensor(wanted)) == got


def test_three_classes_by_hand() -> None:
    found, wanted = [0, 0, 1, 2, 2, 1], [0, 1, 1, 2, 0, 1]
    got = values("classification", found, wanted)
    assert got["accuracy"] == pytest.approx(400 / 6)
    assert got["f1"] == pytest.approx(100 * (2 / 4 + 4 / 5 + 2 / 3) / 3)
    # R_K: (4*6 - (2*2 + 2*3 + 2*1)) / sqrt((36 - 4-4-4) * (36 - 4-9-1))
    assert got["matthews"] == pytest.approx(100 * 12 / math.sqrt(24 * 22))
    names = ["a", "b", "c", "never seen"]  # a class that is nowhere is in no mean
    assert values("classification", found, wanted, names) == got
    assert values("f1", [0, 1], [0, 1], ["a", "b", "c"])["f1"] == 100


def test_logits_are_taken() -> None:
    logits = np.array([[0.1, 2, -1], [3, 2, 1], [-5, -4, -3.0]], np.float32)
    assert values("accuracy", logits, [1, 0, 2])["accuracy"] == 100
    assert values("pearson", [[1.0], [2.0], [4.0]], [1, 2, 4])["pearson"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("found", "wanted", "accuracy", "f1"),
    [
        ([0, 0, 0], [0, 0, 0], 100, 0),  # nothing positive to find, nothing found
        ([1, 1], [1, 1], 100, 100),
        ([1, 1], [0, 0], 0, 0),
        ([0, 0, 0, 0], [0, 1, 0, 1], 50, 0),
        ([1, 1, 1, 1], [0, 1, 0, 1], 50, 200 / 3),
        ([2, 2, 2], [2, 2, 2], 100, 100),
        ([1], [1], 100, 100),
    ],
)
def test_degenerate_classes(found: list[int], wanted: list[int], accuracy: float, f1: float) -> None:
    with np.errstate(all="raise"):
        score = score_labels("classification", found, wanted, resamples=20)
    assert score.values == pytest.approx({"accuracy": accuracy, "f1": f1, "matthews": 0})
    assert np.isfinite(list(score.intervals.values())).all()


# --- numbers


def test_correlations_by_hand() -> None:
    x, y = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 10.0]
    # deviations -1.5 -.5 .5 1.5 and -3 -1 -2 6: 13 / sqrt(5 * 50); ranks 1 3 2 4: 1 - 6 * 2 / (4 * 15)
    assert values("regression", x, y) == pytest.approx({"spearman": 80, "pearson": 1300 / math.sqrt(250)})
    # ties: ranks 1.5 1.5 3 4 and 2 2 2 4 against their mean 2.5: 3 / sqrt(4.5 * 3)
    assert values("spearman", [0, 0, 1, 2], [5, 5, 5, 7])["spearman"] == pytest.approx(300 / math.sqrt(13.5))
    assert values("regression", [1, 2, 3], [-1, -8, -27])["spearman"] == pytest.approx(-100)
    assert values("regression", [1, 2, 3], [-1, -2, -3])["pearson"] == pytest.approx(-100)
    big, small = [1e300, -1e300, 5e299], [1e-300, -1e-300, 5e-301]
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        assert values("regression", big, small) == pytest.approx({"spearman": 100, "pearson": 100})
        assert values("regression", [1 + 1e-9, 1, 1 + 2e-9], [2, 1, 3])["pearson"] == pytest.approx(100, abs=1e-4)


@pytest.mark.parametrize(
    ("x", "y"), [([0.1] * 3, [1, 2, 3]), ([1, 2, 3], [0.1] * 3), ([0.0] * 3, [0.0] * 3), ([2.5], [1.5])]
)
def test_constant_numbers_give_zero(x: list[float], y: list[float]) -> None:
    with np.errstate(all="raise"):
        score = score_labels("regression", x, y, resamples=20)
    assert score.values == {"spearman": 0.0, "pearson": 0.0}
    assert score.intervals == {"spearman": [0.0, 0.0], "pearson": [0.0, 0.0]}


def test_against_other_libraries() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(0)
    for classes, count in ((2, 50), (3, 7), (20, 200), (151, 300)):
        wanted = draw.integers(0, classes, count)
        found = np.where(draw.random(count) < 0.6, wanted, draw.integers(0, classes, count))
        got = values("classification", found, wanted)
        average = "binary" if max(wanted.max(), found.max()) < 2 else "macro"
        assert got["accuracy"] == pytest.approx(100 * metrics.accuracy_score(wanted, found))
        assert got["f1"] == pytest.approx(100 * metrics.f1_score(wanted, found, average=average))
        assert got["matthews"] == pytest.approx(100 * metrics.matthews_corrcoef(wanted, found))
    for levels in (3, 10, 1000):
        x = draw.integers(0, levels, 80).astype(float)
        y = np.round(x + draw.normal(0, levels / 3, 80))
        got = values("regression", x, y)
        assert got["pearson"] == pytest.approx(100 * stats.pearsonr(x, y)[0])
        assert got["spearman"] == pytest.approx(100 * stats.spearmanr(x, y)[0])


# --- the score and its interval


@pytest.mark.parametrize("name", ["classification", "regression", "accuracy", "f1", "matthews", "pearson", "spearman"])
def test_score(name: str) -> None:
    draw = np.random.default_rng(1)
    wanted = draw.integers(0, 2, 60)
    found = np.where(draw.random(60) < 0.8, wanted, 1 - wanted)
    score = score_labels(name, found, wanted, resamples=200)
    kind = "classification" if name in ("classification", *LABEL_METRICS["classification"]) else "regression"
    first = LABEL_METRICS[kind][0] if name == kind else name
    assert score.metric == first == next(iter(score.values)) and set(score.values) == set(LABEL_METRICS[kind])
    assert score.value == score.values[first] and score.n == 60
    for metric, (low, high) in score.intervals.items():
        assert low < score.values[metric] < high <= 100
    assert json.loads(json.dumps(score.to_dict())) == score.to_dict()
    assert str(score).startswith(f"{first} {score.value:.2f} [") and str(score).endswith("(n=60)")
    assert score == score_labels(name, found, wanted, resamples=200)
    assert score != score_labels(name, found, wanted, resamples=200, seed=3)


def test_interval_is_that_of_the_whole_statistic() -> None:
    """Of F1 over the examples drawn, not of a mean of per-example figures."""
    found, wanted = np.array([1, 1, 0, 0, 1, 0, 1, 1]), np.array([1, 0, 1, 0, 1, 0, 1, 0])
    score = score_labels("classification", found, wanted, resamples=300, seed=5)
    draw = np.random.default_rng(5)
    drawn = []
    for _ in range(300):
        rows = draw.integers(0, 8, 8)
        drawn.append(values("f1", found[rows], wanted[rows], ["no", "yes"])["f1"])
    assert score.intervals["f1"] == pytest.approx(np.percentile(drawn, [2.5, 97.5]).tolist())
    right_N1 = (found == wanted)[:, None].astype(float)
    interval = bootstrap_interval(right_N1, lambda sums: 100 * sums[0] / 8, resamples=300, seed=5)
    assert score.intervals["accuracy"] == pytest.approx(list(interval))
    x, y = np.array([1, 5, 2, 2, 8.0]), np.array([1, 4, 4, 2, 9.0])
    interval = resampled_interval(5, lambda rows: values("spearman", x[rows], y[rows])["spearman"], resamples=50)
    assert score_labels("spearman", x, y, resamples=50).intervals["spearman"] == pytest.approx(list(interval))
    with pytest.raises(ValueError, match="0 examples: nothing to score; expected at least one"):
        resampled_interval(0, lambda rows: 0.0)


def test_definitions_say_which_f1() -> None:
    assert "F1 of class 1 ('good')" in score_labels("f1", [0, 1], [0, 1], ["bad", "good"], resamples=1).definition
    assert score_labels("f1", [0, 1], [0, 1], resamples=1).definition.startswith("F1 of class 1, ")
    assert "macro F1" in score_labels("f1", [0, 1], [0, 1], ["a", "b", "c"], resamples=1).definition
    assert "ties by their mean" in score_labels("pearson", [0, 1], [0, 1], resamples=1).definition


@pytest.mark.parametrize(
    ("metric", "predictions", "references", "names", "words"),
    [
        ("rouge", [1], [1], None, "metric 'rouge': expected one of classification, accuracy, f1, matthews, regression"),
        ("accuracy", [], [], None, "nothing to score: no predictions"),
        ("accuracy", [1, 0], [1], None, "predictions [2] and references [1]: expected one each"),
        ("accuracy", [1, 0], [[1], [0]], None, "predictions [2] and references [2, 1]: expected one each"),
        ("accuracy", [0.5, 1], [0, 1], None, "predictions are float64; expected whole numbers, the ids of classes"),
        ("accuracy", ["a"], ["a"], None, "predictions are <U1; expected whole numbers"),
        ("accuracy", [0], [None], None, "references are object; expected whole numbers"),
        ("accuracy", [0, -1], [0, 1], None, "predictions has class -1: expected ids at least 0"),
        ("accuracy", [0, 1], [0, 2], ["a", "b"], "references has class 2: expected ids 0 to 1"),
        ("accuracy", [[1.0], [2.0]], [0, 1], None, "logits [2, 1]: expected two classes or more for each example"),
        ("accuracy", [[1.0, 2.0]], [0], ["a", "b", "c"], "logits [1, 2]: expected 3 classes for each example"),
        ("accuracy", [[1.0, 2], [float("nan"), 0]], [0, 1], None, "logits of example 1 are not finite"),
        ("pearson", [1.0, float("nan")], [0, 1], None, "predictions of example 1 are not finite: nan"),
        ("pearson", [1.0, 2], [0, float("inf")], None, "references of example 1 are not finite"),
        ("pearson", [[1.0, 2]], [0], None, "predictions [1, 2]: expected one number for each example"),
        ("pearson", ["a"], [0], None, "predictions are <U1; expected numbers"),
    ],
)
def test_refused(metric: str, predictions: Any, references: Any, names: Any, words: str) -> None:
    refused(words, score_labels, metric, predictions, references, names)


def test_resamples_refused() -> None:
    refused("resamples 0: expected at least 1", score_labels, "accuracy", [1], [1], resamples=0)


# --- predictions


def classifier(kind: str, classes: int = 3) -> Any:
    config = tiny_encoder(kind).config
    config.num_labels, config.initializer_range = classes, 0.3
    torch.manual_seed(3)
    return HEADS[kind](config).eval()


def examples(kind: str, count: int = 9) -> Any:
    """Texts of different lengths; token types only where the model knows two."""
    tokenizer = bert_tokenizer()
    if kind not in ("bert", "albert"):
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    texts = [
        " ".join(["big", "dog", "the", "cat", "sees"][i % 5] for i in range(n)) for n in (3, 1, 9, 4, 20, 1, 7, 2, 5)
    ]
    pairs = None if kind == "distilbert" else [text[:9] for text in reversed(texts)]
    labels = [0] * len(texts)
    return encode_labelled(tokenizer, Labelled(texts, pairs, labels).select(range(count)), 40, progress=False)


@pytest.mark.parametrize("kind", ENCODERS)
def test_logits_are_in_order(kind: str) -> None:
    model, encoded, collate = classifier(kind), examples(kind), LabelCollator(1)
    with torch.no_grad():
        alone = [model(**{k: v for k, v in collate([item]).items() if k != "labels"}).logits[0] for item in encoded]
    for batch_size in (1, 2, 4, 100):
        logits = predict_logits(model, encoded, collate, batch_size, progress=False)
        assert logits.shape == (9, 3) and logits.dtype == np.float32
        np.testing.assert_allclose(logits, torch.stack(alone).numpy(), atol=1e-5)
    assert len({tuple(row) for row in logits.round(4).tolist()}) > 5  # the order can be seen


@pytest.mark.parametrize("classes", [1, 3])
def test_packed_models_and_regression(classes: int, tmp_path: Path) -> None:
    packed = load_packed(save_packed(prepare(classifier("bert", classes), "4-4-8"), tmp_path / "small"))
    encoded = examples("bert")
    logits = predict_logits(packed, encoded, LabelCollator(1), 4, progress=False)
    alone = [predict_logits(packed, [item], LabelCollator(1), progress=False)[0] for item in encoded]
    assert logits.shape == (9, classes)
    np.testing.assert_allclose(logits, alone, atol=1e-5)


def test_mode_is_restored_and_inputs_are_the_model_s() -> None:
    model = classifier("bert")
    model.config.hidden_dropout_prob = 0.5
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    model.bert.embeddings.eval()  # frozen on purpose
    modes = [module.training for module in model.modules()]
    seen: list[dict[str, Any]] = []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    encoded = examples("bert")
    first = predict_logits(model, encoded, LabelCollator(1), 4, progress=False)
    assert (first == predict_logits(model, encoded, LabelCollator(1), 4, progress=False)).all()  # no dropout
    assert [module.training for module in model.modules()] == modes
    assert all(kwargs.keys() == {"input_ids", "attention_mask", "token_type_ids"} for kwargs in seen)
    widths = [kwargs["input_ids"].shape[1] for kwargs in seen[:3]]
    assert widths == sorted(widths, reverse=True) and widths[0] > widths[-1]
    handle.remove()

    def broken(items: Any) -> Any:
        raise RuntimeError("no batch")

    with pytest.raises(RuntimeError, match="no batch"):
        predict_logits(model, encoded, broken, 4, progress=False)
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()


def test_predictions_refused() -> None:
    model, encoded, collate = classifier("bert"), examples("bert", 2), LabelCollator(1)
    refused("nothing to predict: no examples", predict_logits, model, [], collate)
    for size in (0, -1, 2.0, True, None):
        refused(
            f"batch_size {size!r}: expected a whole number of at least 1", predict_logits, model, encoded, collate, size
        )
    others: list[tuple[Callable[[], Any], str]] = [
        (lambda: tiny_encoder("bert").bert, "BertModel gives logits none for 2 texts"),
        (lambda: tiny_encoder("bert"), "BertForMaskedLM gives logits [2, "),
    ]
    for make, words in others:
        refused(words, predict_logits, make(), encoded, collate)
