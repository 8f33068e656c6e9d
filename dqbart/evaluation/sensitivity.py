"""Which part of a model suffers most from fewer bits: each is quantized alone, all others stay in float.

Problem: a recipe gives all layers the same bits, and one bad layer may cost most of the score. Method: no training; a
prepared copy of the teacher is switched, part by part, between float and quantized (weights and activations of the
part together) and compared with the float model on the same targets. What stands out can be left in float with `skip`
in the recipe. Rejected: a copy of the model per part, which computes the float logits once per part; and
`prepare(skip=...)` alone, for queries, keys and values are quantized by attention modules, which it does not skip.
"""

import copy
import re
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from dqbart.data.batches import Collator, encode_pairs, progress_bar
from dqbart.data.columns import Examples, sample
from dqbart.evaluation.generate import write_outputs
from dqbart.evaluation.metrics import score
from dqbart.fitting import resolve
from dqbart.quant.attention import use_attention
from dqbart.quant.layers import prepare
from dqbart.recipe import Recipe

FLOAT = ""  # the "part" that stands for no part


def part_of(name: str, per: str) -> str:
    """`encoder.3` for `model.encoder.layers.3.fc1` (per module `encoder.3.fc1`); else `embedding`, lm_head included."""
    match = re.search(r"\b(encoder|decoder)\.layers\.(\d+)(\..+)$", name)
    return f"{match[1]}.{match[2]}{match[3] if per == 'module' else ''}" if match else "embedding"


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
        )
        # What prepare changes: (module, attribute, float value, quantized value), by part.
        self.parts: dict[str, list[tuple[nn.Module, str, Any, Any]]] = {}
        for name, module in self.model.named_modules():
            numerics = getattr(module, "attention_numerics", None)
            if per == "module" and numerics is None and not hasattr(module, "quantized_weight"):
                continue  # a norm or an activation, which has no bits
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


@torch.no_grad()
def sensitivity(
    teacher: Any, tokenizer: Any, examples: Examples, recipe: Recipe, *, per: Literal["layer", "module"] = "layer",
    score_outputs: bool = False, limit: int = 200,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per part that the recipe quantizes, in the model's order, with that part alone at its bits.

    `kl`: KL(float || quantized) in nats per target token, `loss` and `loss_float`: cross-entropy of the targets, all
    teacher-forced. With `score_outputs` also `score`, the recipe's metric on what is written, and `drop`, the float
    model's score less that; else None. Of more than `limit` examples a fixed sample. The teacher is left as it is.
    Raises `ValueError` for another `per`, an encoder, examples without targets, and as `prepare` and `encode_pairs` do.
    """
    if per not in ("layer", "module"):
        raise ValueError(f"per {per!r}: expected 'layer' or 'module'")
    if not teacher.config.is_encoder_decoder:
        raise ValueError(f"a {teacher.config.model_type} model: expected an encoder-decoder, BART or mBART")
    if examples.targets is None:
        raise ValueError("examples have no targets, and a loss needs them: give data with a target column")
    recipe = resolve(recipe, teacher.config)
    examples = sample(examples, limit)
    switch = Switch(teacher, recipe, per)
    forced = _forced(switch, tokenizer, examples, recipe)
    scores: dict[str, float | None] = dict.fromkeys(forced)
    with progress_bar(len(scores), "scores", unit="part", enabled=score_outputs) as bar:
        for part in scores if score_outputs else ():
            texts, _ = write_outputs(switch.turn_on(part), tokenizer, examples.sources, recipe, progress=False)
            references: Any = examples.references or examples.targets
            scores[part] = score(recipe.scored_by, texts, references, language=recipe.written_in).value
            bar.update()
    rows = []
    for part in switch.parts:
        found, best = scores[part], scores[FLOAT]
        row = {"part": part, "bits": recipe.bits.text, **forced[part], "loss_float": forced[FLOAT]["loss"]}
        rows.append(row | {"score": found, "drop": None if found is None or best is None else best - found})
    return rows


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """A table for people, the worst part first: KL, loss added and, where it was measured, score lost."""
    worst = sorted(rows, key=lambda row: row["kl"] if row["drop"] is None else row["drop"], reverse=True)
    return ["alone in few bits: KL from the float model and loss added, nats per token; points of score lost"] + [
        f"  {row['part']:28s} {row['bits']:9s} KL {row['kl']:.4f}  loss {row['loss'] - row['loss_float']:+.4f}"
        + ("" if row["drop"] is None else f"  score {-row['drop']:+.2f}")
        for row in worst
    ]


def _forced(switch: Switch, tokenizer: Any, examples: Examples, recipe: Recipe) -> dict[str, dict[str, float]]:
    """`kl` and `loss`, means over all target tokens, of the float model and of each part."""
    pairs = encode_pairs(
        tokenizer, examples.sources, examples.targets, max_source_length=recipe.max_source_length,
        max_target_length=recipe.max_target_length, source_prefix=recipe.source_prefix,
        source_lang=recipe.source_lang, target_lang=recipe.target_lang,
    )  # fmt: skip
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i]["input_ids"]))
    device, collate = switch.model.device, Collator(tokenizer.pad_token_id)
    sums = {part: {"kl": 0.0, "loss": 0.0} for part in (FLOAT, *switch.parts)}
    tokens = 0
    with progress_bar(len(pairs), "loss by part", unit="text") as bar:
        for start in range(0, len(pairs), recipe.eval_batch_size):
            batch = collate([pairs[i] for i in order[start : start + recipe.eval_batch_size]])
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
            labels_BT = batch["labels"].to(device)
            inputs["decoder_input_ids"] = switch.model.prepare_decoder_input_ids_from_labels(labels_BT)
            real_BT, float_NV = labels_BT != -100, torch.empty(0)
            for part, sum_ in sums.items():
                log_NV = switch.turn_on(part)(**inputs).logits[real_BT].float().log_softmax(-1)
                float_NV = log_NV if part == FLOAT else float_NV
                sum_["kl"] += float(F.kl_div(log_NV, float_NV, reduction="sum", log_target=True))
                sum_["loss"] += float(F.nll_loss(log_NV, labels_BT[real_BT], reduction="sum"))
            tokens += int(real_BT.sum())
            bar.update(len(labels_BT))
    return {part: {name: value / tokens for name, value in sum_.items()} for part, sum_ in sums.items()}
