"""Does a packed folder say exactly what its student says, whatever the batch, the padding and the cache?

    python benchmarks/parity.py PACKED --data FILE [--inputs 200]

PACKED was written by `dqbart compress`; the student is read from PACKED.training/best. On real inputs, on the CPU:
logits of both, greedy and beam-4 ids of both; then the packed model against itself: each example alone, in its batch,
with more padding, and decoded step by step against teacher forcing. Exit code 1 if anything differs. Last line: JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from real_inputs import arguments, plainly, read_batches
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

import dqbart
from dqbart.packed.checkpoint import round_floats_
from dqbart.quant.layers import prepare

TOLERANCE = 1e-4
BATCH = 20


def load_student(folder: Path, recipe: dqbart.Recipe) -> Any:
    student = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    if recipe.bits.quantized:
        prepare(
            student, recipe.bits, skip=recipe.skip, numerics=recipe.numerics, probability_bits=recipe.probability_bits
        )
    round_floats_(student, getattr(torch, recipe.float_dtype))
    return student


def padded(batch: dict[str, Tensor], extra: int, pad: int) -> dict[str, Tensor]:
    fill = {"input_ids": pad, "attention_mask": 0}
    return {k: torch.nn.functional.pad(v, (0, extra), value=fill[k]) for k, v in batch.items()}


@torch.no_grad()
def compare(student: Any, packed: Any, batches: list[dict[str, Tensor]], settings: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"inputs": 0, "max_logit_difference": 0.0}
    counts = ("greedy_ids", "beam4_ids", "alone", "more_padding", "cached")
    found |= {f"{name}_different": 0 for name in counts}
    for inputs in batches:
        found["inputs"] += len(inputs["input_ids"])
        for name, beams in (("greedy_ids", 1), ("beam4_ids", 4)):
            ours, theirs = (m.generate(**inputs, **settings | {"num_beams": beams}) for m in (packed, student))
            found[f"{name}_different"] += _different(ours, theirs)
        greedy = packed.generate(
            **inputs, **settings | {"num_beams": 1}, output_logits=True, return_dict_in_generate=True
        )
        decoder = greedy.sequences[:, :-1]
        logits_BTV, theirs = (m(**inputs, decoder_input_ids=decoder).logits for m in (packed, student))
        found["max_logit_difference"] = max(found["max_logit_difference"], float((logits_BTV - theirs).abs().max()))
        steps_BTV = torch.stack(greedy.logits, 1)
        more = packed(**padded(inputs, 7, packed.config.pad_token_id), decoder_input_ids=decoder).logits
        for i in range(len(decoder)):
            width = int(inputs["attention_mask"][i].sum())
            single = {k: v[i : i + 1, :width] for k, v in inputs.items()}
            alone = packed(**single, decoder_input_ids=decoder[i : i + 1]).logits[0]
            found["alone_different"] += not torch.equal(alone, logits_BTV[i])
            found["more_padding_different"] += not torch.equal(more[i], logits_BTV[i])
            ended = (decoder[i, 1:] == packed.config.eos_token_id).nonzero()
            stop = int(ended[0]) + 1 if len(ended) else decoder.shape[1]  # after its end a row is fed padding
            found["cached_different"] += not torch.equal(steps_BTV[i, :stop], logits_BTV[i, :stop])
    return found


def _different(a: Tensor, b: Tensor) -> int:
    return len(a) if a.shape != b.shape else int((a != b).any(1).sum())


def main() -> int:
    parser = arguments(__doc__, inputs=200)
    args = parser.parse_args()
    batches, _, recipe = read_batches(args, BATCH)
    student = load_student(args.packed.with_name(args.packed.name + ".training") / "best", recipe)
    packed = dqbart.load(args.packed, engine="torch")
    student.generation_config = packed.generation_config  # a checkpoint of the training doesn't have the recipe's
    found = compare(student, packed, batches, {"max_length": 33, "min_length": 0})
    for name, value in found.items():
        print(f"{name:24s} {value}")
    wrong = sum(v for k, v in found.items() if k.endswith("_different")) + (found["max_logit_difference"] > TOLERANCE)
    print(json.dumps(found | {"ok": not wrong}))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(plainly(main))
