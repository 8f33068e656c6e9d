"""Extractive question answering, the answers: spans from logits, scores by hand, thresholds, real questions."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_questions import BEIJING, FRANCE, KINDS, PARIS, encode, tokenizer_for
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    RobertaConfig,
    RobertaForQuestionAnswering,
)

from dqbart.data.question_windows import EncodedQuestions, QuestionCollator
from dqbart.data.questions import Question, read_questions
from dqbart.evaluation.predict import predict_spans
from dqbart.evaluation.question_metrics import (
    BestAnswer,
    answer_words,
    best_answers,
    best_null_threshold,
    exact_and_f1,
    question_score,
)

SQUAD = Path(__file__).parents[1].parent / "shared" / "data" / "squad-qg" / "test.jsonl.gz"


def model_for(kind: str, tokenizer: Any) -> Any:
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, max_position_embeddings=70)
    if kind == "distilbert":
        config = DistilBertConfig(**sizes, dim=16, n_layers=2, n_heads=2, hidden_dim=24)
        return DistilBertForQuestionAnswering(config).eval()
    sizes |= dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    if kind == "bert":
        return BertForQuestionAnswering(BertConfig(**sizes, initializer_range=0.5)).eval()
    return RobertaForQuestionAnswering(RobertaConfig(**sizes, initializer_range=0.5)).eval()


ODD = [
    Question("short", "q?", "b"),
    Question("long", "what is the capital?", f"{PARIS} " * 15),
    Question("unicode", "哪里 🙂?", BEIJING + " 🙂🙃 née İstanbul ﬁn\u200b\u0301 " + "x" * 70),
    Question("spaces", " a ", "\n\t b \u3000c \u00a0"),
    Question("dropped", "a", "\u200b"),  # BERT makes no token of it
    FRANCE,
]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_a_model_are_parts_of_the_context(kind: str) -> None:
    tokenizer = tokenizer_for(kind)
    model, encoded = model_for(kind, tokenizer), encode(tokenizer, ODD, most=20)
    collator = QuestionCollator(tokenizer.pad_token_id)
    model.train()
    model.qa_outputs.eval()
    starts, ends = predict_spans(model, encoded, collator, 3, progress=False)
    assert model.training and not model.qa_outputs.training
    assert [len(row) for row in starts] == [len(row) for row in ends] == encoded.input_ids.lengths_R.tolist()
    for f in (0, len(encoded) // 2):  # alone and unpadded: the same numbers, in the order of the features
        inputs = {k: torch.tensor([v]) for k, v in encoded[f].items() if not k.endswith("positions")}
        with torch.no_grad():
            alone = model.eval()(**inputs)
        assert np.allclose(alone.start_logits[0], starts[f], atol=1e-5)
        assert np.allclose(alone.end_logits[0], ends[f], atol=1e-5)
    answers = best_answers(ODD, encoded, starts, ends, null_threshold=math.inf)
    for question, answer in zip(ODD, answers, strict=True):
        assert answer.text in question.context and answer.text == answer.text.strip()
        assert bool(answer.text) != (kind != "roberta" and question.id == "dropped")
    assert any(answer.null_difference > 0 for answer in answers)
    silent = best_answers(ODD, encoded, starts, ends, null_threshold=-math.inf)
    assert {answer.text for answer in silent} == {""} and [a.span for a in silent] == [a.span for a in answers]


def test_predicting_restores_and_reports() -> None:
    tokenizer = tokenizer_for("bert")
    model, encoded = model_for("bert", tokenizer), encode(tokenizer, [FRANCE])
    collator = QuestionCollator(tokenizer.pad_token_id)
    for size in (0, True, 1.5):
        with pytest.raises(ValueError, match=f"batch_size {size}: expected a whole number"):
            predict_spans(model, encoded, collator, size, progress=False)  # type: ignore[arg-type]
    base = model.base_model.train()
    with pytest.raises(ValueError, match="BertModel gives no start and end logits.*AutoModelForQuestionAnswering"):
        predict_spans(base, encoded, collator, progress=False)
    assert base.training


def logits(encoded: EncodedQuestions, window: int, **points: float) -> np.ndarray:
    """Zeros, `cls` at CLS, and the rest at the context token of that letter (in its first place in the window)."""
    row_L = np.zeros(int(encoded.input_ids.lengths_R[window]))
    for letter, value in points.items():
        place = encoded.cls_F[window] if letter == "cls" else encoded.first_F[window] + LETTERS[window].index(letter)
        row_L[place] = value
    return row_L


LETTERS = ["abcdefg", "fghijkl", "klmnopq", "pqrstuv", "uvwxyz"]


@pytest.fixture(scope="module")
def alphabet() -> tuple[list[Question], EncodedQuestions]:
    questions = [Question("1", "q?", " ".join("abcdefghijklmnopqrstuvwxyz"))]
    return questions, encode(tokenizer_for("bert"), questions, max_length=12, stride=2, most=6)


def test_best_answer_by_hand(alphabet: tuple[list[Question], EncodedQuestions]) -> None:
    questions, encoded = alphabet
    starts = [logits(encoded, f, cls=[1, 2, 5, 1, 3][f]) for f in range(5)]
    ends = [logits(encoded, f, cls=[3, 2, 1, 0.5, 3][f]) for f in range(5)]
    starts[1] = logits(encoded, 1, cls=2, f=-99, g=-99, h=4, k=6)
    ends[1] = logits(encoded, 1, cls=2, i=3, g=50)  # g stands before every good start
    starts[3] = logits(encoded, 3, cls=1, p=-99, q=5)
    ends[3] = logits(encoded, 3, cls=0.5, q=1, u=2.5, p=9)
    # Window 1: h..i = 7, k = 6. Window 3: q..u = 7.5, q = 6. Lowest "no answer": 1.5.
    answer = best_answers(questions, encoded, starts, ends)[0]
    assert answer == BestAnswer("q r s t u", 1.5 - 7.5, 0.0) and answer.text == "q r s t u"
    # With at most 4 tokens q..u is out.
    assert best_answers(questions, encoded, starts, ends, max_answer_length=4)[0] == BestAnswer("h i", 1.5 - 7)
    assert best_answers(questions, encoded, starts, ends, max_answer_length=1)[0].span == "k"  # of equals the first
    assert best_answers(questions, encoded, starts, ends, null_threshold=-6)[0].text == "q r s t u"
    assert best_answers(questions, encoded, starts, ends, null_threshold=-6.01)[0].text == ""
    padded = [np.append(row, [99, 99]) for row in starts]
    assert best_answers(questions, encoded, padded, ends)[0] == answer


def test_answers_come_from_the_context_only(alphabet: tuple[list[Question], EncodedQuestions]) -> None:
    questions, encoded = alphabet
    rows = [np.zeros(int(length)) for length in encoded.input_ids.lengths_R]
    for row, first in zip(rows, encoded.first_F, strict=True):
        row[1:first] = 100  # the question
        row[-1] = 100
    assert best_answers(questions, encoded, rows, rows)[0] == BestAnswer("a", 0.0)
    for broken in (
        rows[:-1],
        [rows[0][:-1], *rows[1:]],
        [rows[0] * math.nan, *rows[1:]],
        [rows[0] + math.inf, *rows[1:]],
    ):
        with pytest.raises(
            ValueError, match="rows of logits; expected|logits of feature 0: expected 12 finite numbers"
        ):
            best_answers(questions, encoded, rows, broken)
    with pytest.raises(ValueError, match="2 questions and .*; expected 1 questions"):
        best_answers(questions * 2, encoded, rows, rows)
    with pytest.raises(ValueError, match="max_answer_length 0: expected at least 1"):
        best_answers(questions, encoded, rows, rows, max_answer_length=0)


def test_all_spans_are_compared(alphabet: tuple[list[Question], EncodedQuestions]) -> None:
    """Against brute force, on random logits in which the best starts often follow the best ends."""
    questions, encoded = alphabet
    draw = np.random.default_rng(0)
    for _ in range(20):
        rows = [[draw.normal(size=n) for n in encoded.input_ids.lengths_R] for _ in range(2)]
        best = max(
            (rows[0][f][first + i] + rows[1][f][first + j], " ".join(LETTERS[f][i : j + 1]))
            for f, first in enumerate(encoded.first_F)
            for i in range(len(LETTERS[f]))
            for j in range(i, min(i + 3, len(LETTERS[f])))
        )
        assert best_answers(questions, encoded, *rows, max_answer_length=3)[0].span == best[1]


def test_white_space_is_no_answer() -> None:
    """Byte tokens of white space have characters, but an answer neither is one nor ends in one."""
    questions = [Question("1", "q", "a  b \n")]
    encoded = encode(tokenizer_for("roberta"), questions)
    context_L = slice(int(encoded.first_F[0]), int(encoded.first_F[0]) + 6)
    row = np.zeros(int(encoded.input_ids.lengths_R[0]))
    row[context_L] = [0, 9, 9, 1, 9, 9]
    assert best_answers(questions, encoded, [row], [row])[0].span in ("b", "a  b")


# Metrics


@pytest.mark.parametrize(
    ("prediction", "answers", "language", "exact", "f1"),
    [
        ("The Eiffel-Tower!", ["eiffeltower"], "en", 1, 1),  # no article, no punctuation, lower case
        ("an  apple\ta day", ["Apple day"], "en", 1, 1),
        ("theatre", ["atre"], "en", 0, 0),  # an article is a word
        ("in the big city", ["big city", "the big old city in France"], "en", 0, 0.8),  # 2*2/(3+2); 2*3/(3+5) = 0.75
        ("a b b", ["b b b c"], "en", 0, 4 / 6),  # said: b b; common: 2 of 2 and 4
        ("Paris", ["London"], "en", 0, 0),
        ("", [], "en", 1, 1),
        ("the", [], "en", 1, 1),  # nothing is left of it
        ("Paris", [], "en", 0, 0),
        ("", ["Paris"], "en", 0, 0),
        ("", ["a", "Paris"], "en", 0, 0),  # "a" does not count, where there is another
        ("", ["a"], "en", 1, 1),
        ("über", ["Über."], "de", 1, 1),
        ("中华人民共和国", ["中华人民"], "en", 0, 0),
        ("中华人民共和国", ["中华人民"], "zh", 0, 8 / 11),
        ("《红楼梦》。", ["红楼梦"], "zh_CN", 1, 1),
        ("用DNA检测", ["DNA 检测"], "zh", 0, 6 / 7),  # 用 dna 检 测
        ("東京タワー", ["東京"], "ja", 0, 4 / 7),
    ],
)
def test_scores_by_hand(prediction: str, answers: list[str], language: str, exact: float, f1: float) -> None:
    assert exact_and_f1(prediction, answers, language) == pytest.approx((exact, f1))


def test_words_and_languages() -> None:
    assert answer_words("The U.S. A-Team's «end»") == ["us", "ateams", "«end»"]
    with pytest.raises(ValueError, match="language 'klingon': expected a code"):
        answer_words("a", "klingon")


def questions_of(*answers: tuple[str, ...]) -> list[Question]:
    return [Question(str(i), "q", "x y z", a, tuple("x y z".index(t) for t in a)) for i, a in enumerate(answers)]


def test_score_of_version_2_by_hand() -> None:
    questions = questions_of(("x y",), ("z",), (), ())
    found = question_score(questions, ["x", "z", "", "y"], generation={"null_threshold": 0.5}, resamples=200)
    # F1 2*1/(1+2), 1, 1, 0.
    assert list(found.values) == ["f1", "exact", "has_answer_f1", "has_answer_exact", "no_answer"]
    assert found.values == pytest.approx(
        {"f1": 800 / 12, "exact": 50, "has_answer_f1": 500 / 6, "has_answer_exact": 50, "no_answer": 50}
    )
    assert found.metric == "squad" and found.n == 4 and found.generation == {"null_threshold": 0.5}
    assert set(found.intervals) == set(found.values)
    assert all(low <= found.values[name] <= high for name, (low, high) in found.intervals.items())
    assert found.intervals["has_answer_f1"] == pytest.approx([200 / 3, 100])
    json.dumps(found.to_dict(), allow_nan=False)


def test_score_of_version_1_and_of_none() -> None:
    found = question_score(questions_of(("x y", "y"), ("z",)), ["y", ""], language="zh", resamples=50)
    assert found.values == {"f1": 50, "exact": 50} and "characters" in found.definition and found.language == "zh"
    assert list(question_score(questions_of(()), ["x"], resamples=50).values) == ["f1", "exact", "no_answer"]


def test_what_can_not_be_scored() -> None:
    for questions, predictions, message in [
        ([], [], "nothing to score"),
        (questions_of(()), [], "1 questions but 0 predictions"),
        (questions_of(()), [None], "prediction 0 is NoneType; expected text"),
    ]:
        with pytest.raises(ValueError, match=message):
            question_score(questions, predictions)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="figure 'em': expected 'f1' or 'exact'"):
        best_null_threshold(questions_of(()), [BestAnswer("x", 0.0)], figure="em")


def test_best_threshold_by_hand() -> None:
    questions = questions_of(("x",), (), ("z",), (), ("x y",))
    answers = [BestAnswer(t, d) for t, d in (("x", -3.0), ("y", -1.0), ("z", 0.5), ("z", 2.0), ("x", 4.0))]
    # Right when answering up to -3: 3 (x, both silent); to -1: 2; to 0.5: 3; to 2: 2; to 4: 2 + 2/3.
    assert best_null_threshold(questions, answers) == pytest.approx((-3, 60))
    assert best_null_threshold(questions, answers, figure="exact") == pytest.approx((-3, 60))
    # A half-right second answer makes 0.5 the best.
    questions[1] = Question("1", "q", "x y z", ("y z",), (2,))
    assert best_null_threshold(questions, answers) == pytest.approx((0.5, 100 * (1 + 2 / 3 + 1 + 1) / 5))
    assert best_null_threshold(questions, answers, figure="exact") == pytest.approx((0.5, 60))


def test_best_threshold_is_reached() -> None:
    """Texts with the threshold score what it says, and no threshold scores more; equal differences included."""
    draw = np.random.default_rng(1)
    for _ in range(15):
        questions = questions_of(*(((), ("x",), ("y z",))[i] for i in draw.integers(0, 3, 9)))
        answers = [BestAnswer("xyz"[draw.integers(3)], float(draw.integers(-2, 3))) for _ in questions]

        def at(threshold: float, questions: Any = questions, answers: Any = answers) -> float:
            texts = [BestAnswer(a.span, a.null_difference, threshold).text for a in answers]
            return question_score(questions, texts, resamples=1).values["f1"]

        threshold, value = best_null_threshold(questions, answers)
        assert at(threshold) == pytest.approx(value) == max(at(t) for t in np.arange(-3, 3, 0.5))
        assert math.isfinite(threshold)


def test_never_answering_is_a_threshold() -> None:
    threshold, value = best_null_threshold(questions_of((), ()), [BestAnswer("x", -7.0), BestAnswer("y", 1.0)])
    assert value == 100 and threshold < -7 and BestAnswer("x", -7.0, threshold).text == ""


@pytest.mark.skipif(not SQUAD.is_file(), reason=f"{SQUAD} is not here")
def test_real_questions() -> None:
    """Logits made from the labels give every answer back, up to what tokens can say."""
    with gzip.open(SQUAD, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][::10]
    flat = []
    for row in rows:
        context = row["source"].removeprefix(f"answer: {row['answer']} context: ")
        answers = {"text": [row["answer"]], "answer_start": [context.index(row["answer"])]}
        flat.append({"id": row["id"], "context": context, "question": row["target"], "answers": answers})
    questions = read_questions(flat)
    assert len(questions) > 100 and questions.repaired == 0
    for kind in KINDS:
        encoded = encode(tokenizer_for(kind), questions, max_length=384, stride=128, most=64)
        rows_FL = [[np.zeros(int(n)) for n in encoded.input_ids.lengths_R] for _ in range(2)]
        for f, item in enumerate(encoded):
            for side, key in enumerate(("start_positions", "end_positions")):
                rows_FL[side][f][item[key]] = 9
        texts = [a.text for a in best_answers(questions, encoded, *rows_FL, max_answer_length=400)]
        found = question_score(questions, texts, resamples=50)
        assert encoded.unseen == 0 and found.values["f1"] > 99 and found.values["exact"] > 97, kind
