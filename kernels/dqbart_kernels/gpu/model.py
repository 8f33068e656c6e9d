"""Whole calls on the GPU: hidden states of a batch, and generation, whose steps never wait for the host.

A call is padded to a bucket (sources, tokens of each, steps), for which its launches are captured once (graphs.py). The
source side is one graph; a step, from the tokens it reads to the tokens it chose, is another, replayed until no source
runs any more; the host looks every `POLL` steps. Neither ids nor hidden states depend on the bucket.

Shape suffixes: B sources, S their tokens, R rows (hypotheses) of all sources.
"""

import contextlib
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from dqbart_kernels.gpu.graphs import Kept, Recorded, turn
from dqbart_kernels.gpu.head import LARGEST_K, tile_stats, top_tokens
from dqbart_kernels.gpu.passes import Passes, Sources, State
from dqbart_kernels.gpu.rules import Rules, apply_rules
from dqbart_kernels.gpu.sampling import Sampling, sample, streams
from dqbart_kernels.gpu.search import Search, advance_beams, advance_rows, keep, written_beams, written_rows

I32 = NDArray[np.int32]
F32 = NDArray[np.float32]
STUCK = 2  # in `Search.strange`
POLL = 8  # steps between two looks at what still runs
TOKENS, STEPS = 64, 32  # smallest buckets


@dataclass
class _Batch:
    """The source side of a bucket: what its graph reads and writes, and the loops that read that."""

    ids_BS: Tensor
    types_BS: Tensor | None
    length_B: Tensor
    launches: Callable[[], Any]
    run: Recorded[Any]
    result: Any = None
    loops: "Kept[_Loop]" = field(default_factory=Kept)


@dataclass
class _Loop:
    """The steps of a bucket."""

    state: State
    search: Search
    rules: Rules | None
    random_R: Tensor
    sampling_3: Tensor | None  # of `Sampling`
    step: Recorded[None] | None = None


class Model(Passes):
    """`Passes` for whole calls. One at a time runs on a device; from other threads, the next one waits."""

    def __init__(self, sizes: dict[str, int], embed_scale: float, eps: float, device: torch.device | str) -> None:
        super().__init__(sizes, embed_scale, eps, device)
        self._batches: Kept[_Batch] = Kept()
        self._pool = self._new_pool()

    def _new_pool(self) -> Any:
        return torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    @contextlib.contextmanager
    def _alone(self) -> Any:
        # buffers that inference mode makes could not be filled outside of it
        with turn(self.device), torch.inference_mode(False), torch.no_grad():
            yield

    def buckets(self, longest: int) -> list[int]:
        """The lengths that sources of up to `longest` tokens are padded to."""
        room = self.sizes["encoder_positions"] - self.sizes["position_offset"]
        return sorted({_bucket(length, TOKENS, room) for length in range(1, longest + 1)})

    def step_buckets(self) -> list[int]:
        """How many steps of a decoder there is room for in one loop."""
        room = self.sizes["decoder_positions"] - self.sizes["position_offset"]
        return sorted({_bucket(steps, STEPS, room) for steps in range(1, room + 1)})

    def hidden(self, ids_BS: Tensor, length_B: Tensor, types_BS: Tensor | None = None) -> Tensor:
        """Last hidden states fp32 [B, S, D] of the encoder on the device, zeros behind each source's `length_B` tokens.

        Raises `ValueError` for ids, token types or lengths out of range.
        """
        kinds, (b, s) = self.sizes["token_types"], ids_BS.shape
        if types_BS is not None and kinds:
            least, most = torch.stack([*torch.aminmax(types_BS)]).tolist()
            _check_range("token type", least, most, kinds)
        with self._alone():
            batch = self._batch(ids_BS, length_B, types_BS if kinds else None, decoder=False)
            found_BSD = batch.result[:b, :s]
            inside = torch.arange(found_BSD.shape[1], device=self.device) < batch.length_B[:b, None]
            # what is padded beyond the model's positions has no place in the bucket
            return torch.nn.functional.pad(found_BSD * inside[..., None], (0, 0, 0, s - found_BSD.shape[1]))

    def forget(self) -> None:
        """Give the memory of all captured graphs back."""
        with self._alone():
            self._batches, self._pool = Kept(), self._new_pool()
        gc.collect()  # a batch's loops refer to it
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def generate(
        self,
        sources: Sequence[I32],
        *,
        start_token: int,
        max_length: int,
        eos: Sequence[int] = (),
        num_beams: int = 1,
        num_return_sequences: int = 1,
        early_stopping: bool | str = False,
        length_penalty: float = 1.0,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        on_token: Callable[[int, int], bool] | None = None,
        **rules: Any,
    ) -> tuple[list[I32], F32, bool]:
        """As `dqbart_kernels.cpu.Model.generate`, without its threads; `rules` are those of `Rules.of`."""
        vocabulary, room = self.sizes["vocabulary"], self.sizes["decoder_positions"] - self.sizes["position_offset"]
        if not self.sizes["decoder_layers"]:
            raise ValueError("the model has no decoder")
        if not 2 <= max_length <= room + 1:
            raise ValueError(f"max_length {max_length}: expected 2 to {room + 1}")
        if not 0 <= start_token < vocabulary:
            raise ValueError(f"decoder start id {start_token}: expected 0 to {vocabulary - 1}")
        if num_beams < 1 or not 1 <= num_return_sequences <= (num_beams if num_beams > 1 else 1024):
            raise ValueError(f"num_return_sequences {num_return_sequences} of {num_beams} beams: out of range")
        if keep(num_beams, len(eos)) > LARGEST_K:
            raise ValueError(f"num_beams {num_beams}: expected at most {most_beams(len(eos))}")
        sampling = Sampling(temperature, top_k, top_p) if do_sample else None
        count, copies = len(sources), num_return_sequences if num_beams == 1 else num_beams
        ids_BS, length_B = _padded(sources)
        with self._alone():
            asked = Rules.of(vocabulary, self.device, max_length=max_length, eos=eos, **rules)
            batch = self._batch(ids_BS, length_B, None, decoder=True)
            steps = _bucket(max_length - 1, STEPS, room)
            key = copies, num_beams, steps, len(eos), asked and asked.shape, sampling is None
            loop = batch.loops.get(key, lambda: self._loop(batch, num_beams, copies, steps, len(eos), asked, sampling))
            if asked is not None and loop.rules is not None:
                loop.rules.copy_(asked)
            if sampling is not None and loop.sampling_3 is not None:
                loop.sampling_3.copy_(sampling.numbers(self.device))

            def start() -> None:
                loop.state.step.zero_()
                loop.state.tokens_TR[0].fill_(start_token)
                rows = torch.arange(len(loop.random_R), dtype=torch.int32, device=self.device)
                loop.state.history_RT.copy_(rows[:, None].expand_as(loop.state.history_RT))
                loop.random_R.copy_(streams(seed, len(loop.random_R)))
                running = count if num_beams > 1 else count * copies
                loop.search.start(running, max_length, eos, early_stopping, length_penalty)

            start()
            if loop.step is None:
                loop.step = Recorded(lambda: self._step(batch, loop, num_beams), self.device, self._pool)
                start()
            done, stopped = 0, False
            while done < max_length - 1 and not stopped:
                loop.step()
                done += 1
                if on_token is not None:
                    stopped = _hand_out(loop, count * copies, done, on_token)
                if (done % POLL == 0 or on_token is not None) and not int(loop.search.running):
                    break
            strange = int(loop.search.strange)
            if strange == STUCK:
                raise ValueError("every token is suppressed: nothing is left to sample")
            if strange:
                raise ValueError("the model's scores are not numbers: its weights are damaged")
            tokens_TR = loop.state.tokens_TR
            if num_beams > 1:
                texts, scores = written_beams(loop.search, tokens_TR, count, num_return_sequences)
            else:
                texts = written_rows(loop.search, tokens_TR, count * copies, done)
                scores = np.zeros(len(texts), np.float32)
            return texts, scores, not stopped

    def _batch(self, ids_BS: Tensor, length_B: Tensor, types_BS: Tensor | None, decoder: bool) -> _Batch:
        """The bucket of these sources, and what it makes of them."""
        (b, s), room = ids_BS.shape, self.sizes["encoder_positions"] - self.sizes["position_offset"]
        # One question to the device, not one each: an encoder's call is short.
        extremes = [*torch.aminmax(ids_BS), *torch.aminmax(length_B.to(ids_BS))]
        least, most, shortest, longest = torch.stack(extremes).tolist()
        if shortest < 1 or longest > room:
            i, length = next((i, n) for i, n in enumerate(length_B.tolist()) if not 1 <= n <= room)
            raise ValueError(f"source {i} has {length} tokens: expected 1 to {room}")
        _check_range("source id", least, most, self.sizes["vocabulary"])
        s = min(s, room)  # the rest is padding
        # to a power of two, or from 32 on to a multiple of it, so that large batches don't double
        shape = _bucket(b, 1, 32) if b <= 32 else triton.cdiv(b, 32) * 32, _bucket(s, TOKENS, room)

        def make() -> _Batch:
            ids, types = (torch.zeros(shape, dtype=torch.int32, device=self.device) for _ in range(2))
            lengths = torch.ones(shape[0], dtype=torch.int32, device=self.device)
            given = None if types_BS is None else types

            def run() -> Any:
                x = self.encode(ids, lengths, given)
                return self.sources(x, lengths, shape[1]) if decoder else x.value.view(*shape, -1)

            return _Batch(ids, given, lengths, run, Recorded(run, self.device, self._pool))

        batch = self._batches.get((shape, types_BS is not None, decoder), make)
        batch.ids_BS[:b, :s].copy_(ids_BS[:, :s])
        batch.length_B.fill_(1)
        batch.length_B[:b].copy_(length_B)
        if types_BS is not None and batch.types_BS is not None:
            batch.types_BS[:b, :s].copy_(types_BS[:, :s])
        batch.result = batch.run()
        return batch

    def _loop(
        self, batch: _Batch, beams: int, copies: int, steps: int, ends: int, rules: Rules | None,
        sampling: Sampling | None = None,
    ) -> _Loop:  # fmt: skip
        rows = len(batch.ids_BS) * copies
        return _Loop(
            self.state(rows, steps),
            Search.of(rows // beams, beams, steps, ends, self.device),
            rules,
            torch.zeros(rows, dtype=torch.int64, device=self.device),
            None if sampling is None else sampling.numbers(self.device),
        )

    def _step(self, batch: _Batch, loop: _Loop, beams: int) -> None:
        """One step of all rows."""
        state, search = loop.state, loop.search
        sources: Sources = batch.result
        x = self.decode(sources, state)
        wanted = min(keep(beams, len(search.numbers) - 2), self.sizes["vocabulary"]) if beams > 1 else 1
        if loop.sampling_3 is None and (loop.rules is None or not loop.rules.looks_back):
            values, tokens = self.best_tokens(x, wanted, beams > 1, loop.rules, state.step)
        else:
            scores_RV = self.logits(x)
            if loop.rules is not None:
                stats = tile_stats(scores_RV)
                apply_rules(
                    scores_RV, stats, loop.rules, state.tokens_TR, state.history_RT, state.step, normalize=beams > 1
                )
            if loop.sampling_3 is not None:
                tokens, values = sample(scores_RV, loop.random_R, loop.sampling_3)
                stuck = (values[:, 0] == -torch.inf) & (search.done_B == 0)
                search.strange.masked_fill_(stuck.any(), STUCK)
            else:
                values, tokens = top_tokens(scores_RV, wanted)
        if beams > 1:
            advance_beams(search, values, tokens, state.tokens_TR, state.history_RT, state.step)
        else:
            advance_rows(search, values.contiguous(), tokens, state.tokens_TR, state.step)


def most_beams(ends: int) -> int:
    """How many beams fit, with so many end tokens."""
    return LARGEST_K // keep(1, ends)


def _bucket(count: int, smallest: int, most: int) -> int:
    return min(most, max(smallest, triton.next_power_of_2(count)))


def _padded(sources: Sequence[I32]) -> tuple[Tensor, Tensor]:
    """int32 [B, S] and the lengths [B] of rows of ids."""
    if not sources or any(row.ndim != 1 for row in sources):
        raise ValueError("sources: expected one row of token ids each, at least one")
    ids = np.zeros((len(sources), max(1, *map(len, sources))), np.int32)
    for row, source in zip(ids, sources, strict=True):
        row[: len(source)] = source
    return torch.from_numpy(ids), torch.tensor([len(source) for source in sources], dtype=torch.int32)


def _check_range(what: str, least: int, most: int, limit: int) -> None:
    if least < 0 or most >= limit:
        raise ValueError(f"{what} {least if least < 0 else most}: expected 0 to {limit - 1}")


def _hand_out(loop: _Loop, rows: int, done: int, on_token: Callable[[int, int], bool]) -> bool:
    """Give this step's tokens away, of rows that went on until then. True: one said stop."""
    tokens = loop.state.tokens_TR[: done + 1, :rows].cpu().numpy()
    ended = np.isin(tokens[1:done], loop.search.numbers[2:].cpu().numpy()).any(0)
    answers = [on_token(int(row), int(tokens[done, row])) for row in np.flatnonzero(~ended)]
    return any(answers)
