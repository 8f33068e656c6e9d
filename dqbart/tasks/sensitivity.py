"""Which part of a model suffers most from fewer bits: each is quantized alone, all others stay in float.

Problem: a recipe gives all layers the same bits, and one bad layer may cost most of the score. Method: no training; a
prepared copy of the teacher is switched, part by part, between float and quantized (weights and activations of the
part together) and compared with the float model on the same targets. What stands out can be left in float with `skip`
in the recipe. Rejected: a copy of the model per part, which computes the float logits once per part; and
`prepare(skip=...)` alone, for queries, keys and values are quantized by attention modules, which it does not skip.
"""

import copy
import dataclasses
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from dqbart.data.batches import model_inputs, progress_bar
from dqbart.data.columns import sample
from dqbart.fitting import resolve
from dqbart.quant.attention import use_attention
from dqbart.quant.layers import prepare
from dqbart.recipe import Recipe
from dqbart.tasks import Task, open_task
from dqbart.teacher import load_teacher

FLOAT = ""  # the "part" that stands for no part
HEADS = r"pooler|classifier|qa_outputs|seq_relationship|vocab_transform|(lm_head|predictions)(?=\.(?!decoder))"


def part_of(name: str, per: str) -> str:
    """`encoder.3` for `model.encoder.layers.3.fc1` (per module `encoder.3.fc1`), and for what other families call that;
    `pooler`, `classifier` and the like for heads; `embedding` for all else: the vocabulary, norms outside of layers.
    """
    match = re.search(r"\b(encoder|decoder|transformer)\.(?:layers?|albert_layer_groups)\.(\d+)(\..+)$", name)
    if match:
        stack = "decoder" if match[1] == "decoder" else "encoder"
        return f"{stack}.{match[2]}{match[3] if per == 'module' else ''}"
    head = re.search(HEADS, name)
    return "embedding" if head is None else name if per == "module" else head[0]


class Switch:
    """A quantized copy of a float model, of which one part at a time is turned on."""

    def __init__(self, teacher: Any, recipe: Recipe, per: str) -> None:
        self.model = copy.deepcopy(teacher).eval().requires_grad_(False)
        use_attention(self.model)  # for float too, so that nothing but the part makes a difference
        classes = {name: type(module) for name, module in self.model.named_modules()}
        prepare(
            self.model,
            recipe.bits,
            skip=recipe.skip,
            numerics=recipe.numerics,
            probability_bits=recipe.probability_bits,
            heads=recipe.quantize_heads,
        )
        # What prepare changes: (module, attribute, float value, quantized value), by part.
        self.parts: dict[str, list[tuple[nn.Module, str, Any, Any]]] = {}
        for name, module in self.model.named_modules():
            numerics = getattr(module, "attention_numerics", None)
            has_bits = numerics is not None or hasattr(module, "quantized_weight")
            if not has_bits and (per == "module" or re.search(HEADS, name)):
                module.__class__ = classes[name]  # a norm or an activation beside what has bits
                continue
            for change in (
                ("__class__", classes[name], type(module)), ("attention_numerics", None, numerics)
            ):  # fmt: skip
                if change[1] is not change[2]:
                    self.parts.setdefault(part_of(name, per), []).append((module, *change))

    def turn_on(self, chosen: str) -> Any:
        """The model with this part quantized and no other."""
        for part, changes in self.parts.items():
            for module, attribute, off, on in changes:
                setattr(module, attribute, on if part == chosen else off)
        return self.model


def sensitivity(
    teacher: Any, data: Any, recipe: Recipe, *, per: Literal["layer", "module"] = "layer", score_outputs: bool = False,
    limit: int = 200, tokenizer: Any = None, device: str | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per part that the recipe quantizes, in the model's order, with that part alone at its bits.

    `teacher`, `data`: as for `compress`; of the data the validation split, and of more than `limit` examples a fixed
    sample. Of encoder-decoders `kl`: KL(float || quantized) in nats per target token, `loss` and `loss_float`:
    cross-entropy of the targets, all teacher-forced. Of encoders `hidden`: the error of the last hidden states,
    ||quantized - float|| / ||float|| over all tokens. With `score_outputs` also `score`, the task's metric, and `drop`,
    the float model's score less that; else None. Raises `ValueError` for another `per`, examples without what a loss or
    a score needs, and as `compress` does.
    """
    if per not in ("layer", "module"):
        raise ValueError(f"per {per!r}: expected 'layer' or 'module'")
    name = teacher
    teacher, tokenizer, known_task = load_teacher(name, tokenizer, device, recipe.task, seed=recipe.seed)
    recipe = resolve(dataclasses.replace(recipe, epochs=0, max_steps=0), teacher.config, known_task)
    task = open_task(recipe, tokenizer, teacher, name)
    examples = sample(task.read_split(data, "validation"), limit)
    if (score_outputs or teacher.config.is_encoder_decoder) and not task.is_scored(examples):
        raise ValueError(task.why_unscored(data, examples))
    switch = Switch(task.adapt(teacher, new_head=False), recipe, per)
    found = _forced(switch, task, examples) if teacher.config.is_encoder_decoder else _hidden(switch, task, examples)
    scores: dict[str, float | None] = dict.fromkeys(found)
    for part in scores if score_outputs else ():
        scores[part] = task.score(switch.turn_on(part), examples).score.value
        print(f"{part or 'float'}: {scores[part]:.2f}", file=sys.stderr, flush=True)
    best, rows = scores[FLOAT], []
    for part in switch.parts:
        score = scores[part]
        drop = None if score is None or best is None else best - score
        rows.append({"part": part, "bits": recipe.bits.text, **found[part], "score": score, "drop": drop})
    return rows


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """A table for people, the worst part first: what it changes and, where it was measured, score lost."""
    measure = "kl" if all("kl" in row for row in rows) else "hidden"
    worst = sorted(rows, key=lambda row: row[measure] if row["drop"] is None else row["drop"], reverse=True)
    says = {
        "kl": "KL from the float model and loss added, nats per token",
        "hidden": "error of the last hidden states, as a share of them",
    }
    return [f"alone in few bits: {says[measure]}; points of score lost"] + [
        f"  {row['part']:28s} {row['bits']:9s} "
        + (
            f"KL {row['kl']:.4f}  loss {row['loss'] - row['loss_float']:+.4f}" if measure == "kl"
            else f"error {row['hidden']:.4f}"
        )
        + ("" if row["drop"] is None else f"  score {0.0 - row['drop']:+.2f}")
        for row in worst
    ]  # fmt: skip


@torch.no_grad()
def _forced(switch: Switch, task: Task, examples: Any) -> dict[str, dict[str, float]]:
    """`kl` and `loss`, means over all target tokens, of the float model and of each part."""
    sums = {part: {"kl": 0.0, "loss": 0.0} for part in (FLOAT, *switch.parts)}
    tokens = 0
    for batch in _batches(switch.model, task, examples):
        labels_BT = batch["labels"]
        inputs = model_inputs(switch.model, batch)
        inputs["decoder_input_ids"] = switch.model.prepare_decoder_input_ids_from_labels(labels_BT)
        real_BT, float_NV = labels_BT != -100, torch.empty(0)
        for part, sum_ in sums.items():
            log_NV = switch.turn_on(part)(**inputs).logits[real_BT].float().log_softmax(-1)
            float_NV = log_NV if part == FLOAT else float_NV
            sum_["kl"] += float(F.kl_div(log_NV, float_NV, reduction="sum", log_target=True))
            sum_["loss"] += float(F.nll_loss(log_NV, labels_BT[real_BT], reduction="sum"))
        tokens += int(real_BT.sum())
    float_loss = sums[FLOAT]["loss"] / tokens
    return {
        part: {"kl": sum_["kl"] / tokens, "loss": sum_["loss"] / tokens, "loss_float": float_loss}
        for part, sum_ in sums.items()
    }


@torch.no_grad()
def _hidden(switch: Switch, task: Task, examples: Any) -> dict[str, dict[str, float]]:
    """`hidden` of the float model, 0, and of each part."""
    squares, whole = dict.fromkeys((FLOAT, *switch.parts), 0.0), 0.0
    for batch in _batches(switch.model, task, examples):
        real_BL, inputs = batch["input_ids"] != task.tokenizer.pad_token_id, model_inputs(switch.model, batch)
        float_ND = torch.empty(0)
        for part in squares:
            found_ND = switch.turn_on(part).base_model(**inputs).last_hidden_state[real_BL].double()
            float_ND = found_ND if part == FLOAT else float_ND
            squares[part] += float((found_ND - float_ND).square().sum())
        whole += float(float_ND.square().sum())
    return {part: {"hidden": (square / whole) ** 0.5} for part, square in squares.items()}


def _batches(model: Any, task: Task, examples: Any) -> Iterator[dict[str, torch.Tensor]]:
    """What the task trains on, the longest first, on the model's device."""
    with tempfile.TemporaryDirectory() as folder:
        encoded, collator = task.training_set(examples, model, Path(folder))
    items = sorted((encoded[i] for i in range(len(encoded))), key=lambda item: -len(item["input_ids"]))
    with progress_bar(len(items), "part by part", unit="text") as bar:
        for start in range(0, len(items), task.recipe.eval_batch_size):
            some = items[start : start + task.recipe.eval_batch_size]
            yield {name: tensor.to(model.device) for name, tensor in collator(some).items()}
            bar.update(len(some))
