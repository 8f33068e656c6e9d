"""What the GPU does to scores against transformers' own logits processors, interpreted where there is no GPU."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import logits_process as processors

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from dqbart_kernels.gpu.head import tile_stats  # noqa: E402
from dqbart_kernels.gpu.rules import Rules, apply_rules  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V, END = 700, 2


def wanted(scores: torch.Tensor, said: torch.Tensor, **rules: Any) -> torch.Tensor:
    """transformers' processors, in the order its `generate` puts them."""
    given = GenerationConfig(**rules)
    chain = []
    if rules.get("repetition_penalty", 1) != 1:
        chain.append(processors.RepetitionPenaltyLogitsProcessor(rules["repetition_penalty"]))
    if rules.get("no_repeat_ngram_size"):
        chain.append(processors.NoRepeatNGramLogitsProcessor(rules["no_repeat_ngram_size"]))
    if "bad_words_ids" in rules:
        chain.append(processors.NoBadWordsLogitsProcessor(rules["bad_words_ids"], [END]))
    if "min_length" in rules:
        chain.append(processors.MinLengthLogitsProcessor(rules["min_length"], [END]))
    if "suppress_tokens" in rules:
        chain.append(processors.SuppressTokensLogitsProcessor(rules["suppress_tokens"]))
    if "begin_suppress_tokens" in rules:
        chain.append(processors.SuppressTokensAtBeginLogitsProcessor(rules["begin_suppress_tokens"], 1))
    if given.forced_bos_token_id is not None:
        chain.append(processors.ForcedBOSTokenLogitsProcessor(given.forced_bos_token_id))
    if given.forced_eos_token_id is not None:
        chain.append(processors.ForcedEOSTokenLogitsProcessor(10, given.forced_eos_token_id))
    for processor in chain:
        scores = processor(said, scores)
    return scores


CASES: list[dict[str, Any]] = [
    {"min_length": 5}, {"suppress_tokens": [0, 5, 699], "begin_suppress_tokens": [7, 8]},
    {"repetition_penalty": 1.7}, {"repetition_penalty": 0.6}, {"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3, "repetition_penalty": 2.0, "min_length": 4},
    {"bad_words_ids": [[9], [3, 4], [4, 3, 4], [3, 3, 3, 3, 3, 3]], "suppress_tokens": [3]},
    {"forced_bos_token_id": 11, "no_repeat_ngram_size": 1}, {"forced_eos_token_id": 2, "suppress_tokens": [1]},
]  # fmt: skip


@pytest.mark.parametrize("rules", CASES, ids=lambda rules: "+".join(rules))
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("length", [1, 2, 4, 9])
def test_scores(rules: dict[str, Any], normalize: bool, length: int) -> None:
    """Four hypotheses that say tokens 3 and 4 again and again, and whose past was written by other rows."""
    torch.manual_seed(length)
    rows, steps = 4, 12
    written = torch.randint(3, 5, (steps + 1, rows))
    history = torch.randint(0, rows, (rows, steps))
    said = torch.stack([
        torch.tensor([written[t, history[r, t]] for t in range(length - 1)] + [written[length - 1, r]])
        for r in range(rows)
    ])  # fmt: skip
    logits = torch.randn(rows, V) * 3
    logits[0, 3] = -torch.inf
    want = wanted(logits.log_softmax(1) if normalize else logits.clone(), said, **rules)
    ours = {name.removesuffix("_token_id").removesuffix("_tokens").removesuffix("_ids"): x for name, x in rules.items()}
    ours = {{"forced_bos": "forced_bos_token", "forced_eos": "forced_eos_token"}.get(name, name): x
            for name, x in ours.items()}  # fmt: skip
    asked = Rules.of(V, DEVICE, max_length=10, eos=[END], **ours)
    assert asked is not None
    found = logits.to(DEVICE)
    step = torch.tensor([length - 1], dtype=torch.int32, device=DEVICE)
    written, history = written.int().to(DEVICE), history.int().to(DEVICE)
    apply_rules(found, tile_stats(found), asked, written, history, step, normalize)
    torch.testing.assert_close(found.cpu(), want, rtol=2e-6, atol=4e-6)


def test_nothing_is_asked_and_what_does_not_fit() -> None:
    assert Rules.of(V, DEVICE, max_length=9, eos=[2], min_length=1) is None
    for rules, words in (
        ({"suppress": [V]}, "listed id 700: expected 0 to 699"),
        ({"forced_bos_token": 900}, "listed id 900"),
        ({"bad_words": [[]]}, "an empty bad word"),
        ({"bad_words": [[1, -4]]}, "listed id -4"),
    ):
        with pytest.raises(ValueError, match=words):
            Rules.of(V, DEVICE, max_length=9, eos=[2], **rules)  # type: ignore[arg-type]
