"""From start and end logits to answers, and SQuAD's exact match and F1 with intervals.

An answer is the span of at most 30 tokens whose start and end logits have the largest sum, over all windows of its
question (Devlin et al. 2019, section 4.2); "no answer" is chosen where both logits at CLS beat it by more than a
threshold (section 4.3). Published scripts pair the 20 best starts with the 20 best ends, and may find no pair that is a
span; here all spans are compared, which is as quick and always ends in an answer.

Scores are those of SQuAD's v2.0 script (Rajpurkar et al. 2018); where every question has an answer they are v1.1's. The
script splits words at spaces, so that a Chinese answer would be one word and F1 no more than exact match: in languages
without spaces, characters are compared, and the words of other scripts among them.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dqbart.data.question_windows import EncodedQuestions
from dqbart.data.questions import Question
from dqbart.evaluation.metrics import Score, _language_code, _UnicodeTokenizer, bootstrap_interval

_UNSPACED = frozenset("zh zho ja jpn th tha lo lao km khm my mya".split())
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class BestAnswer:
    """`span` is the best answer from the context; `null_difference` is by how much "no answer" scores above it.

    `text` is the answer given: the span, or "" where the difference is above `null_threshold`.
    """

    span: str
    null_difference: float
    null_threshold: float = 0.0

    @property
    def text(self) -> str:
        return "" if self.null_difference > self.null_threshold else self.span


def best_answers(
    questions: Sequence[Question],
    features: EncodedQuestions,
    start_logits: Sequence[np.ndarray],
    end_logits: Sequence[np.ndarray],
    *,
    max_answer_length: int = 30,
    null_threshold: float = 0.0,
) -> list[BestAnswer]:
    """One answer per question; its span is a part of the context without white space at its ends.

    Logits are rows per feature, `[L]` or longer (padded). `max_answer_length` counts tokens. `null_threshold` is a
    difference of sums of two logits; `math.inf` answers always, as SQuAD v1 wants. The score of "no answer" is its
    lowest over the windows: in one that holds the answer it must lose. Raises `ValueError` for logits that are not
    finite or don't fit the features.
    """
    if max_answer_length < 1:
        raise ValueError(f"max_answer_length {max_answer_length!r}: expected at least 1")
    sizes = {len(features), len(start_logits), len(end_logits)}
    if len(questions) != features.questions or len(sizes) > 1:
        raise ValueError(
            f"{len(questions)} questions and {len(start_logits)}, {len(end_logits)} rows of logits; expected "
            f"{features.questions} questions and {len(features)} rows of each"
        )
    spans = [""] * len(questions)
    best_Q = np.full(len(questions), -math.inf)
    null_Q = np.full(len(questions), math.inf)
    for f, (start_row, end_row) in enumerate(zip(start_logits, end_logits, strict=True)):
        length, q, cls = int(features.input_ids.lengths_R[f]), int(features.question_F[f]), int(features.cls_F[f])
        start_L, end_L = (np.asarray(row, np.float64)[:length] for row in (start_row, end_row))
        if start_L.shape != (length,) or end_L.shape != (length,) or not np.isfinite([start_L, end_L]).all():
            raise ValueError(f"logits of feature {f}: expected {length} finite numbers each for start and end")
        null_Q[q] = min(null_Q[q], start_L[cls] + end_L[cls])
        left_N, right_N, context = features.char_starts[f], features.char_ends[f], questions[q].context
        shown_N = [not context[a:b].isspace() and a < b for a, b in zip(left_N, right_N, strict=True)]
        inside = slice(int(features.first_F[f]), int(features.first_F[f]) + len(left_N))
        best, start, end = _best_span(start_L[inside], end_L[inside], np.asarray(shown_N, bool), max_answer_length)
        if best > best_Q[q]:
            best_Q[q], spans[q] = best, context[left_N[start] : right_N[end]].strip()
    return [BestAnswer(spans[q], float(null_Q[q] - best_Q[q]), null_threshold) for q in range(len(questions))]


def _best_span(start_N: np.ndarray, end_N: np.ndarray, shown_N: np.ndarray, most: int) -> tuple[float, int, int]:
    """(score, first token, last token) of the best span of up to `most` tokens; -inf where no token shows anything.

    Spans neither start nor end at a token without visible characters. Of equals the first and shortest wins.
    """
    if not shown_N.any():
        return -math.inf, 0, 0
    width = min(most, len(start_N))
    ends_M = np.append(np.where(shown_N, end_N, -math.inf), np.full(width - 1, -math.inf))
    scores_NW = np.where(shown_N, start_N, -math.inf)[:, None] + np.lib.stride_tricks.sliding_window_view(ends_M, width)
    start, more = divmod(int(scores_NW.argmax()), width)
    return float(scores_NW[start, more]), start, start + more


def answer_words(text: str, language: str = "en") -> list[str]:
    """What is compared: lower-case words without ASCII punctuation and without a, an, the, whatever the language, as in
    the script; for Chinese, Japanese, Thai, Lao, Khmer and Burmese, characters and other scripts' words, letters and
    digits only.

    Raises `ValueError` for what is no language code.
    """
    if _language_code(language) in _UNSPACED:
        return _UnicodeTokenizer().tokenize(text)
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def exact_and_f1(prediction: str, answers: Sequence[str], language: str = "en") -> tuple[float, float]:
    """Exact match and F1 over words, each 0 to 1 and the best over `answers`; no answers: both are 1 for an empty one.

    References without a word in them count only where there is no other, and then as "no answer" (as in the script).
    """
    said = answer_words(prediction, language)
    references = [words for answer in answers if (words := answer_words(answer, language))] or [[]]
    return max(float(said == words) for words in references), max(_f1(said, words) for words in references)


def _f1(said: list[str], words: list[str]) -> float:
    if not said or not words:
        return float(said == words)
    common = (Counter(said) & Counter(words)).total()
    return 2 * common / (len(said) + len(words))


def question_score(
    questions: Sequence[Question],
    predictions: Sequence[str],
    *,
    language: str = "en",
    generation: Mapping[str, Any] | None = None,
    resamples: int = 1000,
    seed: int = 28,
) -> Score:
    """F1 and exact match x 100 with 95 % bootstrap intervals, metric "squad".

    With unanswerable questions among them also `has_answer_f1`, `has_answer_exact` (those with answers) and `no_answer`
    (the share of the others left unanswered). `predictions` are texts, "" for no answer; `generation` is stored, not
    used. Raises `ValueError` for no questions, lists of different lengths, and an unknown language.
    """
    exact_N, f1_N = _per_question(questions, predictions, language).T
    has_N = np.asarray([bool(question.answers) for question in questions])
    figures = {"f1": f1_N, "exact": exact_N}
    if has_N.any() and not has_N.all():
        figures |= {"has_answer_f1": f1_N[has_N], "has_answer_exact": exact_N[has_N]}
    if not has_N.all():
        figures["no_answer"] = exact_N[~has_N]
    intervals = {}
    for name, values_N in figures.items():
        stats_N2 = np.stack([values_N, np.ones_like(values_N)], axis=1)
        low, high = bootstrap_interval(
            stats_N2, lambda sums: 100 * float(sums[0] / sums[1]), resamples=resamples, seed=seed
        )
        intervals[name] = [low, high]
    words = (
        "characters, and other scripts' words" if _language_code(language) in _UNSPACED
        else "words in lower case without ASCII punctuation and a, an, the"
    )  # fmt: skip
    return Score(
        "squad", {name: float(100 * values_N.mean()) for name, values_N in figures.items()}, intervals, len(questions),
        language, f"SQuAD v2.0 F1 and exact match x 100, best of the references; {words}", dict(generation or {}),
    )  # fmt: skip


def best_null_threshold(
    questions: Sequence[Question], answers: Sequence[BestAnswer], *, figure: str = "f1", language: str = "en"
) -> tuple[float, float]:
    """The `null_threshold` with the best `figure` ("f1" or "exact") on these questions, and that figure x 100.

    Of equals the lowest. Below every difference it means: never answer. A score with it on the same questions flatters
    (the leaderboard calls it best F1); choose it on a validation split. Raises `ValueError` as `question_score` does.
    """
    if figure not in ("f1", "exact"):
        raise ValueError(f"figure {figure!r}: expected 'f1' or 'exact'")
    column = 1 if figure == "f1" else 0
    answered_N = _per_question(questions, [answer.span for answer in answers], language)[:, column]
    silent_N = _per_question(questions, [""] * len(questions), language)[:, column]
    difference_N = np.asarray([answer.null_difference for answer in answers])
    order = np.argsort(difference_N, kind="stable")
    sorted_N = difference_N[order]
    totals_N = silent_N.sum() + np.cumsum((answered_N - silent_N)[order])
    last = np.append(np.flatnonzero(np.diff(sorted_N)), len(order) - 1)  # equal differences are answered together
    totals_T = np.append(silent_N.sum(), totals_N[last])
    thresholds_T = np.append(np.nextafter(sorted_N[0], -math.inf), sorted_N[last])
    best = int(totals_T.argmax())
    return float(thresholds_T[best]), float(100 * totals_T[best] / len(order))


def _per_question(questions: Sequence[Question], predictions: Sequence[str], language: str) -> np.ndarray:
    """Exact match and F1 of every question, `[N, 2]`, 0 to 1."""
    if len(questions) != len(predictions):
        raise ValueError(f"{len(questions)} questions but {len(predictions)} predictions; expected one each")
    if not questions:
        raise ValueError("nothing to score: no questions; expected at least one")
    for number, prediction in enumerate(predictions):
        if not isinstance(prediction, str):
            raise ValueError(f"prediction {number} is {type(prediction).__name__}; expected text")
    pairs = zip(questions, predictions, strict=True)
    return np.asarray([exact_and_f1(prediction, question.answers, language) for question, prediction in pairs])
