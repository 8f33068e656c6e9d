"""Rules, beam search and loop of the GPU engine on the torch engine's logits: the same ids as transformers' generate.

The kernels that make logits have tests of their own and are slow in the interpreter; here only what follows is ours.
"""

from typing import Any

import numpy as np
import pytest
import torch
from test_cpu_encoder import saved
from tiny_models import tiny_seq2seq, token_batch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from dqbart_kernels import cpu  # noqa: E402
from dqbart_kernels.gpu import model as gpu_model  # noqa: E402
from dqbart_kernels.gpu.head import tile_stats, top_tokens  # noqa: E402
from dqbart_kernels.gpu.model import Model  # noqa: E402
from dqbart_kernels.gpu.passes import State  # noqa: E402
from dqbart_kernels.gpu.rules import apply_rules  # noqa: E402
from dqbart_kernels.gpu.sampling import Sampling, sample, streams, uniform  # noqa: E402

from dqbart.engines.text import TextModel  # noqa: E402
from dqbart.engines.triton import GpuRunner  # noqa: E402
from dqbart.packed.checkpoint import load_packed  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class WithTorchLogits(Model):
    """The real loop; logits of a hypothesis come from the torch engine, uncached, over all that it says."""

    slow: Any

    def encode(self, ids_BS: Any, length_B: Any, type_BS: Any = None) -> Any:
        mask = (torch.arange(ids_BS.shape[1], device=DEVICE) < length_B[:, None]).long()
        return {"input_ids": ids_BS.long(), "attention_mask": mask}

    def sources(self, x: Any, length_B: Any, s: int) -> Any:
        return x

    def decode(self, sources: Any, state: State) -> Any:
        step, rows = int(state.step), state.tokens_TR.shape[1]
        writers = torch.cat([state.history_RT[:, :step].long(), torch.arange(rows, device=DEVICE)[:, None]], 1)
        said = torch.stack([state.tokens_TR[t, writers[:, t]] for t in range(step + 1)], 1).long()
        given = {name: x.repeat_interleave(rows // len(x), 0) for name, x in sources.items()}
        return self.slow(**given, decoder_input_ids=said).logits[:, -1].contiguous()

    def logits(self, x: Any) -> torch.Tensor:
        return x.clone()

    def best_tokens(
        self, x: Any, k: int, normalize: bool, rules: Any = None, step: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if rules is None:
            return top_tokens(x, k, normalize)
        scores = x.clone()
        apply_rules(scores, tile_stats(scores), rules, step, scores.int(), step, normalize)
        return top_tokens(scores, k)


class Runner(GpuRunner):
    def make(self, sizes: dict[str, int], embed_scale: float, eps: float) -> Model:
        self.model = WithTorchLogits(sizes, embed_scale, eps, DEVICE)
        return self.model


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[TextModel, Any]:
    model = tiny_seq2seq("bart", encoder=1, decoder=1, forced_eos_token_id=None)
    with torch.no_grad():
        model.final_logits_bias.normal_()
        model.final_logits_bias[0, 2] += 2  # so that hypotheses end
    model.generation_config.update(decoder_start_token_id=2, max_length=8)
    folder = saved(model, tmp_path_factory.mktemp("search") / "packed", "4-4-8")
    slow = load_packed(folder, DEVICE)
    fast = TextModel(folder, Runner(DEVICE))
    fast.native.slow = slow
    return fast, slow


@pytest.fixture(autouse=True)
def uncaptured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of another engine can't be captured in a graph."""
    monkeypatch.setattr(gpu_model, "Recorded", lambda run, *_: run)


OPTIONS: list[dict[str, Any]] = [
    {}, {"min_length": 6, "no_repeat_ngram_size": 2}, {"repetition_penalty": 1.4, "bad_words_ids": [[7], [8, 9]]},
    {"forced_bos_token_id": 5, "forced_eos_token_id": 2, "max_length": 7}, {"eos_token_id": [2, 40, 41]},
    {"forced_bos_token_id": 5, "forced_eos_token_id": 2, "max_length": 3},
]  # fmt: skip
BEAMS: list[dict[str, Any]] = [
    {"num_beams": 1},
    {"num_beams": 2, "early_stopping": True, "num_return_sequences": 2},
    {"num_beams": 4, "early_stopping": False, "length_penalty": 2.0},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": 0.5},
    {"num_beams": 5, "early_stopping": "never", "length_penalty": -1.0, "num_return_sequences": 3},
]


@pytest.mark.parametrize("beams", BEAMS, ids=lambda b: f"beams{b['num_beams']}-{b.get('early_stopping')}")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_same_ids_as_transformers(beams: dict[str, Any], options: dict[str, Any], pair: Any) -> None:
    fast, slow = pair
    batch = {name: x.to(DEVICE) for name, x in token_batch([9, 3], seed=len(options)).items()}
    assert torch.equal(fast.generate(**batch, **beams, **options), slow.generate(**batch, **beams, **options))


@pytest.mark.parametrize("allowed", [(5,), (5, 6), (2, 5)])
def test_fewer_texts_than_beams(allowed: tuple[int, ...], pair: Any) -> None:
    """What transformers then makes of equal scores is its own."""
    fast, slow = pair
    call: dict[str, Any] = {name: x.to(DEVICE) for name, x in token_batch([9, 3]).items()}
    call |= {"suppress_tokens": [token for token in range(120) if token not in allowed], "max_length": 4}
    for beams, count in ((3, 3), (5, 4)):
        settings = {"num_beams": beams, "num_return_sequences": count}
        assert torch.equal(fast.generate(**call, **settings), slow.generate(**call, **settings))


def test_rows_without_a_text_are_said(pair: Any) -> None:
    rows, scores, _ = pair[0].native.generate(
        [np.arange(3, 9, dtype=np.int32)], start_token=2, max_length=3, eos=[2], num_beams=3, num_return_sequences=3,
        forced_bos_token=5, forced_eos_token=2,
    )  # fmt: skip
    assert [row.tolist() for row in rows] == [[2, 5, 2], [2], [2]] and scores.tolist() == [0, -1e9, -1e9]


def test_alone_as_in_a_batch_and_again(pair: Any) -> None:
    fast, _ = pair
    batch = {name: x.to(DEVICE) for name, x in token_batch([9, 3, 20]).items()}
    together = fast.generate(**batch, num_beams=3)
    assert torch.equal(fast.generate(**batch, num_beams=3), together)
    alone = fast.generate(input_ids=batch["input_ids"][1:2, :3], num_beams=3)[0]
    assert torch.equal(alone, together[1, : len(alone)]) and (together[1, len(alone) :] == 1).all()


def test_samples_are_those_of_the_cpu_engine(pair: Any) -> None:
    if cpu.reason() is not None:
        pytest.skip(str(cpu.reason()))
    from dqbart.engines.cpu import CpuRunner

    fast, _ = pair
    slow = TextModel(fast.folder, CpuRunner(1))
    batch = token_batch([9, 3])
    for settings in ({}, {"top_k": 5, "temperature": 0.7}, {"top_p": 0.6, "num_return_sequences": 3}):
        call: dict[str, Any] = {**batch, **settings, "do_sample": True, "seed": 7}
        moved = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in call.items()}
        assert torch.equal(fast.generate(**moved).cpu(), slow.generate(**call))


def test_a_call_within_a_call_is_refused(pair: Any) -> None:
    fast, _ = pair

    class Greedy:
        def put(self, value: Any) -> None:
            fast.generate(**token_batch([3]))

        def end(self) -> None: ...

    with pytest.raises(ValueError, match="called by a streamer of another call on .*: wait until that one has ended"):
        fast.generate(**token_batch([9]), streamer=Greedy())
    assert len(fast.generate(**token_batch([9]))) == 1


def test_nothing_left_to_sample(pair: Any) -> None:
    fast, slow = pair
    everything = list(range(fast.config.vocab_size))
    with pytest.raises(ValueError, match="every token is suppressed: nothing is left to sample"):
        fast.generate(**token_batch([9, 3]), do_sample=True, suppress_tokens=everything)
    assert len(fast.generate(**token_batch([9, 3]), do_sample=True, max_length=4)) == 2  # and then as before


def test_sampling_follows_the_distribution() -> None:
    scores = torch.tensor([[1.0, -torch.inf, 3.0, 2.0]]).repeat(4000, 1).to(DEVICE)
    tokens, best = sample(scores, streams(3, 4000).to(DEVICE), Sampling(temperature=2.0).numbers(DEVICE))
    share = torch.bincount(tokens[:, 0].cpu(), minlength=4) / 4000
    want = torch.tensor([1.0, -torch.inf, 3.0, 2.0]).div(2).softmax(0)
    assert (share - want).abs().max() < 0.03 and share[1] == 0 and (best == 1.5).all()
    for cut, allowed in ((Sampling(top_k=2), {2, 3}), (Sampling(top_p=0.5), {2}), (Sampling(top_p=0.67), {2, 3})):
        tokens, _ = sample(scores, streams(5, 4000).to(DEVICE), cut.numbers(DEVICE))
        assert set(tokens[:, 0].tolist()) == allowed
    state = streams(11, 3)
    assert len({float(x) for _ in range(4) for x in uniform(state)}) == 12
    with pytest.raises(ValueError, match="temperature 0, top_k 0, top_p 1.0"):
        Sampling(temperature=0)


def test_a_streamer_gets_tokens_as_they_come(pair: Any) -> None:
    fast, slow = pair
    ids = token_batch([9])["input_ids"].to(DEVICE)
    got: list[int] = []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            got.extend(value.reshape(-1).tolist())

        def end(self) -> None:
            got.append(-1)

    out = fast.generate(input_ids=ids, streamer=Streamer())
    assert got == [*out[0].tolist(), -1] and torch.equal(out, slow.generate(input_ids=ids))
    rows, _, whole = fast.native.generate(
        [np.arange(3, 9, dtype=np.int32)] * 2, start_token=2, max_length=9, eos=[], on_token=lambda row, token: row == 1
    )
    assert [len(row) for row in rows] == [2, 2] and not whole


def test_what_it_refuses(pair: Any) -> None:
    fast, _ = pair
    source = np.arange(3, 9, dtype=np.int32)
    for sources, settings, words in (
        ([source], {"max_length": 80}, "max_length 80: expected 2 to 65"),
        ([source], {"start_token": 120}, "decoder start id 120: expected 0 to 119"),
        ([source], {"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences 3 of 2 beams"),
        ([source], {"num_beams": 40}, "num_beams 40: expected at most 32"),
        ([source, source[:0]], {}, "source 1 has 0 tokens: expected 1 to 64"),
        ([np.arange(119, 122, dtype=np.int32)], {}, "source id 121: expected 0 to 119"),
        ([np.array([-1], np.int32)], {}, "source id -1"),
        ([], {}, "expected one row of token ids each, at least one"),
    ):
        with pytest.raises(ValueError, match=words):
            fast.native.generate(sources, **({"start_token": 2, "max_length": 9} | settings))


def test_scores_that_are_not_numbers_are_said(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = pair

    def broken(sources: Any, state: State) -> torch.Tensor:
        logits = torch.zeros(state.tokens_TR.shape[1], 120, device=DEVICE)
        logits[0, 7] = torch.nan
        return logits

    monkeypatch.setattr(fast.native, "decode", broken)
    for beams in (1, 2):
        with pytest.raises(ValueError, match="scores are not numbers"):
            fast.native.generate([np.arange(3, 9, dtype=np.int32)], start_token=2, max_length=9, num_beams=beams)
