"""The training loop behind teachers.py: denoising, batches alike in length, and a schedule in minutes.

Problem: a small BART must be trained from scratch on two cores that others use too. Method: half of each batch per
worker thread (see `Crew`), padding cut by grouping lengths, and a learning rate that follows the share of the budget
spent, all phases together, so that a run always ends with a finished decay. Rejected: transformers' Trainer (at this
size its overhead counts, and its schedule wants the number of steps beforehand), averaging checkpoints (a decay to zero
leaves nothing to average; of ten validations the best weights are kept), and a warm-up per phase (the second one undid
what the first phase had learned).

transformers' own initialisation was rejected too: after 1,600 steps of denoising such a model still wrote unigrams
(loss 5.3). `mimetic_` starts where trained models end up, and copies within 300 steps.
"""

import math
import random
import re
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

BOS, PAD, EOS = 0, 1, 2  # as in BART and mBART
WARM_UP = 0.04  # of the budget
SMOOTHING = 0.1
CHECKS = 10  # validations in the last phase

Example = tuple[list[int], list[int]]  # source and target ids


@dataclass(frozen=True)
class Task:
    """What is trained. Lengths in tokens; `batch_tokens` counts source and target with padding; minutes per phase."""

    multilingual: bool
    d_model: int
    heads: int
    vocabulary: int
    max_source: int
    max_target: int
    minutes: dict[str, float]
    learning_rate: float = 8e-4
    layers: int = 6
    batch_tokens: int = 3000
    half: bool = False  # store fp16


@torch.no_grad()
def mimetic_(model: Any) -> None:
    """Start attention where training would take it (Trockman & Kolter 2023, arXiv 2305.09828).

    W_q = W_k, orthogonal, so that a query finds keys like itself; cross-attention's W_o W_v = I / 2, so that what it
    finds is handed on; positions are sinusoids, so that neighbours are alike.
    """
    width = model.config.d_model
    frequency_F = torch.exp(torch.arange(0, width, 2) / width * -math.log(10000))
    for stack in (model.model.encoder, model.model.decoder):
        table_PD = stack.embed_positions.weight
        angle_PF = torch.arange(len(table_PD))[:, None] * frequency_F
        table_PD.copy_(torch.cat([angle_PF.sin(), angle_PF.cos()], 1) * 2**0.5 * model.config.init_std)
    for name, module in model.named_modules():
        if hasattr(module, "q_proj"):
            alike_DD = torch.linalg.qr(torch.randn(width, width))[0] / 2
            module.q_proj.weight.copy_(alike_DD)
            module.k_proj.weight.copy_(alike_DD)
            if name.endswith("encoder_attn"):
                value_DD = torch.linalg.qr(torch.randn(width, width))[0] * 0.5**0.5
                module.v_proj.weight.copy_(value_DD)
                module.out_proj.weight.copy_(value_DD.T)


class Denoiser:
    """Texts to restore. "mask": a quarter of the tokens masked, positions aligned: teaches copying within minutes.

    "infill" is BART's corruption (Lewis et al. 2020, section 2): sentences permuted, 30 % of the tokens infilled. Spans
    have lengths from Poisson(3) and become one mask each, empty spans too.
    """

    def __init__(self, task: Task, tokenizer: Any, texts: list[str], kind: str) -> None:
        self.corrupt = {"mask": self._mask, "infill": self._infill}[kind]
        room = task.max_source - 2
        ids = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        chunks = [text[i : i + room] for text in ids for i in range(0, len(text), room)]
        self.chunks = [chunk for chunk in chunks if len(chunk) >= 8]
        self.mask = tokenizer.mask_token_id
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        self.ends = {i for i, token in enumerate(tokens) if re.fullmatch(r"\W*[.!?]\W*", token)}
        self.starts = {i for i, token in enumerate(tokens) if token.startswith("Ġ")}  # a space in byte-level BPE

    def _mask(self, ids: list[int], rng: np.random.Generator) -> list[int]:
        return [self.mask if hidden else i for i, hidden in zip(ids, rng.random(len(ids)) < 0.25, strict=True)]

    def _infill(self, ids: list[int], rng: np.random.Generator) -> list[int]:
        cuts = [i for i in range(1, len(ids)) if ids[i - 1] in self.ends and ids[i] in self.starts]
        sentences = np.split(np.asarray(ids), cuts)
        noisy = [int(i) for j in rng.permutation(len(sentences)) for i in sentences[j]]
        left = round(0.3 * len(noisy))
        while left > 0:
            span = min(int(rng.poisson(3)), left)
            start = int(rng.integers(0, len(noisy) - span + 1))
            left -= max(span, 1)  # also where an earlier mask is in the way: this must end
            if self.mask not in noisy[start : start + span]:
                noisy[start : start + span] = [self.mask]
        return noisy

    def examples(self, epoch: int) -> list[Example]:
        rng = np.random.default_rng(epoch)
        return [([BOS, *self.corrupt(ids, rng), EOS], [BOS, *ids, EOS]) for ids in self.chunks]


def make_batches(examples: list[Example], tokens: int, seed: int) -> list[list[int]]:
    """Indices in batches of at most `tokens` padded tokens, alike in length, in random order."""
    rng = random.Random(seed)
    order = list(range(len(examples)))
    rng.shuffle(order)
    order.sort(key=lambda i: (len(examples[i][0]) // 6, len(examples[i][1])))
    found: list[list[int]] = [[]]
    source = target = 0
    for i in order:
        source, target = max(source, len(examples[i][0])), max(target, len(examples[i][1]))
        if found[-1] and (source + target) * (len(found[-1]) + 1) > tokens:
            found.append([])
            source, target = len(examples[i][0]), len(examples[i][1])
        found[-1].append(i)
    rng.shuffle(found)
    return found


def pad(rows: list[list[int]], device: torch.device) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows], device=device)


def loss_sum(model: Any, batch: list[Example], smoothing: float) -> torch.Tensor:
    """Cross-entropy summed over the real target tokens; the head sees no padding."""
    source_BL = pad([source for source, _ in batch], model.device)
    labels_BT = pad([target for _, target in batch], model.device)
    decoder_BT = model.prepare_decoder_input_ids_from_labels(labels_BT)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        hidden_BTD = model.model(
            input_ids=source_BL, attention_mask=source_BL.ne(PAD), decoder_input_ids=decoder_BT
        ).last_hidden_state
        real_BT = labels_BT.ne(PAD)
        logits_NV = model.lm_head(hidden_BTD[real_BT]) + model.final_logits_bias
    return F.cross_entropy(logits_NV.float(), labels_BT[real_BT], reduction="sum", label_smoothing=smoothing)


def target_tokens(batch: list[Example]) -> int:
    return sum(len(target) for _, target in batch)


class Crew:
    """Worker threads with one torch thread each; on a GPU just one, the caller.

    On small matrices two halves of a batch side by side are a little quicker than one batch on two OpenMP threads (0.50
    against 0.58 s a step), and 9 times quicker while another process holds a core: no operator waits at a barrier.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.pool = None
        if workers > 1:
            torch.set_num_threads(1)
            self.pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        return list(self.pool.map(function, items) if self.pool else map(function, items))

    def share(self, batch: list[Example]) -> list[list[Example]]:
        """The batch in one part per worker, alike in length."""
        return [part for i in range(self.workers) if (part := batch[i :: self.workers])]


class Clock:
    """Time spent. On a CPU, time that other processes took is not counted: the budget buys work, not waiting."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.last = time.monotonic(), time.process_time()

    def lap(self) -> tuple[float, float]:
        """(seconds of work, seconds on the wall) since the last lap; with no threads given, both are the wall's."""
        now = time.monotonic(), time.process_time()
        wall, cpu = now[0] - self.last[0], now[1] - self.last[1]
        self.last = now
        return (min(wall, cpu / self.threads) if self.threads else wall), wall


class Training:
    """Runs the phases of a task in order; saved every three minutes, continued where it was left."""

    def __init__(self, model: Any, task: Task, crew: Crew, path: Path) -> None:
        self.model, self.task, self.crew, self.path = model, task, crew, path
        self.best_weights: dict[str, torch.Tensor] | None = None
        self.saved: dict[str, Any] = {}
        self.state: dict[str, Any] = {"phase": 0, "wall": 0.0, "best": float("inf"), "history": {}}
        self._start_phase(0)
        if path.exists():
            self.saved = torch.load(path, map_location="cpu", weights_only=True)
            self.state, self.best_weights = self.saved["state"], self.saved["best_weights"]
            model.load_state_dict(self.saved["model"])
            print(f"resumed at {self.state}", file=sys.stderr)

    def _start_phase(self, number: int) -> None:
        self.state |= {"phase": number, "spent": 0.0, "step": 0, "epoch": 0, "position": 0, "tokens": 0}

    def _start_optimizer(self) -> None:
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)
        if self.saved:
            self.optimizer.load_state_dict(self.saved["optimizer"])
            torch.set_rng_state(self.saved["rng"])
            self.saved = {}

    def save(self) -> None:
        content = {
            "state": self.state,
            "model": self.model.state_dict(),
            "best_weights": self.best_weights,
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        partial = self.path.with_suffix(".partial")
        torch.save(content, partial)
        partial.replace(self.path)

    def step(self, batch: list[Example], rate: float) -> float:
        """One update; returns the loss per target token."""
        count = target_tokens(batch)

        def backward(part: list[Example]) -> float:
            loss = loss_sum(self.model, part, SMOOTHING) / count
            loss.backward()  # type: ignore[no-untyped-call]  # the workers' gradients add up in place
            return loss.item()

        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = self.crew.map(backward, self.crew.share(batch))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(sum(losses))

    def validate(self, examples: list[Example]) -> None:
        """Keeps the weights if their loss (unsmoothed) is the best so far."""

        def part(indices: list[int]) -> float:
            with torch.no_grad():  # is a setting per thread
                return loss_sum(self.model, [examples[i] for i in indices], 0.0).item()

        self.model.eval()
        total = sum(self.crew.map(part, make_batches(examples, self.task.batch_tokens, 0)))
        self.model.train()
        loss = total / target_tokens(examples)
        print(f"validation loss {loss:.4f}", flush=True)
        if loss < self.state["best"]:
            self.state["best"] = loss
            self.best_weights = {key: value.cpu().clone() for key, value in self.model.state_dict().items()}

    def run(self, sources: dict[str, Callable[[int], list[Example]]], validation: list[Example]) -> dict[str, Any]:
        """Trains on `sources[phase](epoch)`; leaves the best weights in the model and returns the state."""
        names = list(self.task.minutes)
        self._start_optimizer()
        while self.state["phase"] < len(names):
            name = names[self.state["phase"]]
            last = self._run_phase(name, sources[name], validation if name == names[-1] else [])
            kept = {key: self.state[key] for key in ("spent", "step", "epoch", "tokens")}
            self.state["history"][name] = kept | {"last_loss": last}
            self._start_phase(self.state["phase"] + 1)
            self.save()
        if self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)
        return self.state

    def _run_phase(self, name: str, source: Callable[[int], list[Example]], validation: list[Example]) -> float:
        state, budget = self.state, 60 * self.task.minutes[name]
        whole = 60 * sum(self.task.minutes.values())
        before = 60 * sum(minutes for _, minutes in list(self.task.minutes.items())[: state["phase"]])
        self.model.train()
        clock = Clock(self.crew.workers if self.model.device.type == "cpu" else 0)
        last_save, last_line = time.monotonic(), 0.0
        losses: list[float] = []
        while state["spent"] < budget:
            examples = source(state["epoch"])
            for indices in make_batches(examples, self.task.batch_tokens, state["epoch"])[state["position"] :]:
                batch = [examples[i] for i in indices]
                done = state["spent"] / budget
                share = (before + state["spent"]) / whole
                rate = self.task.learning_rate * max(0.0, min(share / WARM_UP, (1 - share) / (1 - WARM_UP)))
                losses.append(self.step(batch, rate))
                work, wall = clock.lap()
                state["spent"] += work
                state["wall"] += wall
                state["step"] += 1
                state["position"] += 1
                state["tokens"] += sum(len(s) for s, _ in batch) + target_tokens(batch)
                if validation and int(CHECKS * state["spent"] / budget) > int(CHECKS * done):
                    self.validate(validation)
                    clock.lap()
                now = time.monotonic()
                if now - last_line > 20:
                    last_line = now
                    print(
                        f"{name}: {100 * done:4.1f} %  epoch {state['epoch']} step {state['step']}"
                        f"  loss {np.mean(losses[-200:]):.3f}  lr {rate:.1e}"
                        f"  {state['tokens'] / state['spent']:,.0f} tokens/s"
                        f"  {max(0.0, budget - state['spent']) / 60:.1f} min left",
                        flush=True,
                    )
                if now - last_save > 180:
                    self.save()
                    last_save = now
                if state["spent"] >= budget:
                    break
            else:
                state["epoch"] += 1
                state["position"] = 0
        return float(np.mean(losses[-200:])) if losses else float("nan")
