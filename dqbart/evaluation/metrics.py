"""ROUGE and BLEU with everything that decides them said beside the number.

The numbers come from rouge-score and sacreBLEU, unchanged; what those leave open is fixed here.
ROUGE-Lsum needs sentences: they are split by the rule of `split_sentences`, where the usual nltk
model must be downloaded and two versions of it disagree. rouge-score drops every letter outside
a-z, so that Chinese scores 0 and German loses its umlauts: for languages other than English we hand
it words as Unicode sees them, unstemmed. Intervals come from resampling examples (Koehn 2004), on
sums of per-example statistics, so that nothing is counted twice.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import regex

from dqbart.data.sentences import split_sentences

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
References = Sequence[str] | Sequence[Sequence[str]]

# Scripts written without spaces: a word is one character, or one with its marks.
_WORD = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}]|[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*"
    r"|[[\p{L}\p{M}\p{N}]--[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]+",
    regex.VERSION1,
)
# 13a's words need spaces; sacreBLEU's Japanese and Korean tokenizers need MeCab: so characters.
_BLEU_TOKENIZERS = {"zh": "zh", "zho": "zh"} | dict.fromkeys(
    ("ja", "jpn", "ko", "kor", "th", "tha", "lo", "lao", "km", "khm", "my", "mya"), "char"
)


@dataclass(frozen=True)
class Score:
    """A score and what it means; `to_dict()` is plain JSON.

    `values` and `intervals` (95 %, [low, high]) are on a scale of 0 to 100, correlations -100 to 100; `definition` is
    the metric's exact definition (sacreBLEU's signature for BLEU), `n` the number of examples. Scores of labels have
    no language and no generation.
    """

    metric: str
    values: dict[str, float]
    intervals: dict[str, list[float]]
    n: int
    language: str
    definition: str
    generation: dict[str, Any]

    @property
    def main(self) -> str:
        """Which of `values` models are chosen by: ROUGE-L, else the first."""
        return "rougeL" if self.metric == "rouge" else next(iter(self.values))

    @property
    def value(self) -> float:
        """The one number models are chosen by."""
        return self.values[self.main]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        parts = []
        for name, value in self.values.items():
            interval = self.intervals.get(name)
            parts.append(f"{name} {value:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""))
        return f"{', '.join(parts)} (n={self.n})"


def score(
    metric: str,
    predictions: Sequence[str],
    references: References,
    *,
    language: str = "en",
    lowercase: bool = False,
    generation: Mapping[str, Any] | None = None,
    resamples: int = 1000,
    seed: int = 28,
) -> Score:
    """Score with `metric` "rouge" or "bleu", with 95 % intervals; `generation` is stored, not used. `lowercase`: BLEU
    takes no account of case, which ROUGE never does.

    Raises `ValueError` for another metric, no examples, lists of different lengths, and anything
    but texts.
    """
    if metric == "rouge":
        stats = rouge_per_example(predictions, references, language=language)
        values = {name: float(100 * scores_N.mean()) for name, scores_N in stats.items()}
        columns = {name: scores_N[:, None] for name, scores_N in stats.items()}
        intervals = {
            name: bootstrap_interval(
                stats_N1,
                lambda sums: 100 * sums[0] / len(predictions),
                resamples=resamples,
                seed=seed,
            )
            for name, stats_N1 in columns.items()
        }
        definition = rouge_definition(language)
    elif metric == "bleu":
        result = bleu(predictions, references, language=language, lowercase=lowercase)
        values = {"bleu": result["bleu"], "chrf": result["chrf"]}
        stats_NS = bleu_statistics(predictions, references, language=language, lowercase=lowercase)
        intervals = {"bleu": bootstrap_interval(stats_NS, bleu_of_sums, resamples=resamples, seed=seed)}
        definition = f"BLEU {result['signature']}; chrF {result['chrf_signature']}"
    else:
        raise ValueError(f"metric {metric!r}: expected 'rouge' or 'bleu'")
    return Score(
        metric, values, {k: list(v) for k, v in intervals.items()}, len(predictions), language,
        definition, dict(generation or {}),
    )  # fmt: skip


def rouge(predictions: Sequence[str], references: References, *, language: str = "en") -> dict[str, float]:
    """Mean F-measure x 100 of ROUGE-1, -2, -L and -Lsum (Lin 2004).

    Each kind takes the best reference of an example. English is stemmed (Porter). Raises
    `ValueError` as `score` does.
    """
    scores = rouge_per_example(predictions, references, language=language)
    return {name: float(100 * scores_N.mean()) for name, scores_N in scores.items()}


def rouge_per_example(
    predictions: Sequence[str], references: References, *, language: str = "en"
) -> dict[str, np.ndarray]:
    """F-measures of every example, `[N]`, 0 to 1, by kind. Raises `ValueError` as `score` does."""
    from rouge_score.rouge_scorer import RougeScorer

    accepted = _checked(predictions, references)
    tokenizer = None if _is_english(language) else _UnicodeTokenizer()
    scorer = RougeScorer(list(ROUGE), use_stemmer=True, tokenizer=tokenizer)
    scores_NK = np.empty((len(predictions), len(ROUGE)))
    for n, (prediction, texts) in enumerate(zip(predictions, accepted, strict=True)):
        lines = ["\n".join(split_sentences(text)) for text in texts]
        best = scorer.score_multi(lines, "\n".join(split_sentences(prediction)))
        scores_NK[n] = [best[name].fmeasure for name in ROUGE]
    return {name: scores_NK[:, k] for k, name in enumerate(ROUGE)}


def rouge_definition(language: str) -> str:
    """What the ROUGE numbers are, in a line to be stored beside them."""
    words = "a-z0-9 words, Porter stemmer" if _is_english(language) else "Unicode words, no stemmer"
    return (
        f"rouge-score {version('rouge-score')}, F-measure x 100, {words}, best of the references; "
        "Lsum: sentences end at a line end, at .!?… before white space and no lower-case letter, "
        "and at 。！？"
    )


def bleu(
    predictions: Sequence[str], references: References, *, language: str = "en", lowercase: bool = False
) -> dict[str, Any]:
    """sacreBLEU's corpus BLEU and chrF2 (Post 2018): `bleu`, `signature`, `chrf`, `chrf_signature`.

    Examples may have different numbers of references. `language` chooses the tokenizer: 13a, `zh`
    for Chinese, characters for Japanese, Korean, Thai, Lao, Khmer and Burmese; the signatures name
    it, and `lowercase` (case:lc), of both. Raises `ValueError` as `score` does.
    """
    from sacrebleu.metrics import BLEU, CHRF

    accepted = _checked(predictions, references)
    # sacreBLEU wants one stream per reference number, None where an example has fewer.
    widest = max(map(len, accepted))
    streams: Any = [[texts[r] if r < len(texts) else None for texts in accepted] for r in range(widest)]
    bleu_metric = BLEU(tokenize=_bleu_tokenizer(language), force=True, lowercase=lowercase)
    chrf_metric = CHRF(lowercase=lowercase)
    return {
        "bleu": float(bleu_metric.corpus_score(list(predictions), streams).score),
        "signature": str(bleu_metric.get_signature()),
        "chrf": float(chrf_metric.corpus_score(list(predictions), streams).score),
        "chrf_signature": str(chrf_metric.get_signature()),
    }


def bleu_statistics(
    predictions: Sequence[str], references: References, *, language: str = "en", lowercase: bool = False
) -> np.ndarray:
    """Counts of every example, int64 `[N, 10]`: both lengths, matches and totals of 1- to 4-grams.

    `bleu_of_sums` of their sum is the corpus BLEU. Raises `ValueError` as `score` does.
    """
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize=_bleu_tokenizer(language), force=True, effective_order=True, lowercase=lowercase)
    rows = []
    for prediction, texts in zip(predictions, _checked(predictions, references), strict=True):
        one = metric.sentence_score(prediction, texts)
        rows.append([one.sys_len, one.ref_len, *one.counts, *one.totals])
    return np.asarray(rows, np.int64)


def bleu_of_sums(sums_S: np.ndarray) -> float:
    """Corpus BLEU of summed `bleu_statistics`, 0 to 100, smoothed as sacreBLEU does by default."""
    from sacrebleu.metrics import BLEU

    system, reference, *counts = (int(x) for x in sums_S)
    result = BLEU.compute_bleu(counts[:4], counts[4:], system, reference, smooth_method="exp")
    return float(result.score)


def bootstrap_interval(
    stats_NS: np.ndarray,
    value: Callable[[np.ndarray], float],
    *,
    resamples: int = 1000,
    seed: int = 28,
) -> tuple[float, float]:
    """95 % percentile interval of `value(sum of the rows)`, rows drawn with replacement.

    `stats_NS` holds additive statistics of N examples. The same `seed` and N draw the same
    examples. Raises `ValueError` for no examples, or fewer than 1 resample.
    """
    if stats_NS.ndim != 2 or not len(stats_NS):
        raise ValueError(f"statistics of shape {stats_NS.shape}: expected [examples, figures], not empty")
    return resampled_interval(
        len(stats_NS), lambda drawn_N: value(stats_NS[drawn_N].sum(axis=0)), resamples=resamples, seed=seed
    )


def resampled_interval(
    count: int, value: Callable[[np.ndarray], float], *, resamples: int = 1000, seed: int = 28
) -> tuple[float, float]:
    """95 % percentile interval of `value(indices)`, `count` indices of examples drawn with replacement.

    For what is no function of sums. The same `seed` and `count` draw the same examples, here and in
    `bootstrap_interval`. Raises `ValueError` for no examples, or fewer than 1 resample.
    """
    if count < 1:
        raise ValueError(f"{count} examples: nothing to score; expected at least one")
    if resamples < 1:
        raise ValueError(f"resamples {resamples!r}: expected at least 1")
    draw = np.random.default_rng(seed)
    drawn = [value(draw.integers(0, count, count)) for _ in range(resamples)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


class _UnicodeTokenizer:
    """Lower-case runs of letters, marks and digits; single characters in scripts without spaces."""

    def tokenize(self, text: str) -> list[str]:
        words: list[str] = _WORD.findall(unicodedata.normalize("NFC", text).lower())
        return words


def _language_code(language: str) -> str:
    code = re.split("[-_]", language.lower())[0] if isinstance(language, str) else ""
    if not re.fullmatch("[a-z]{2,3}", code):
        raise ValueError(f"language {language!r}: expected a code such as en, de, zh or de_DE")
    return code


def _is_english(language: str) -> bool:
    return _language_code(language) in ("en", "eng")


def _bleu_tokenizer(language: str) -> str:
    return _BLEU_TOKENIZERS.get(_language_code(language), "13a")


def _checked(predictions: Sequence[str], references: References) -> list[list[str]]:
    """References as a list of lists, after looking at both sides."""
    for name, values in (("predictions", predictions), ("references", references)):
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise ValueError(f"{name} are {type(values).__name__}; expected a list, one per example")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions but {len(references)} references; expected one each")
    if not predictions:
        raise ValueError("nothing to score: no predictions; expected at least one")
    accepted = [[texts] if isinstance(texts, str) else texts for texts in references]
    for number, (prediction, texts) in enumerate(zip(predictions, accepted, strict=True)):
        if not isinstance(prediction, str):
            raise ValueError(f"prediction {number} is {type(prediction).__name__}; expected text")
        if not isinstance(texts, Sequence) or not texts or not all(isinstance(t, str) for t in texts):
            raise ValueError(f"reference {number} is {str(texts)[:60]!r}; expected a text or a list of texts")
    return [list(texts) for texts in accepted]
