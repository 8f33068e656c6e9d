"""Do the engines write the same words? A native one against torch, on real inputs, over a grid of options.

    python benchmarks/engines.py PACKED --data FILE [--engine cpu|triton] [--split test] [--inputs 1000] [--settings 4]

The torch engine is the oracle, on the same device: the CPU, or for engine triton the GPU. Both decode the same inputs;
a text whose ids differ is listed with the score that the torch engine gives to each, so that a tie (two hypotheses
within a rounding) can be told from a mistake. Logits of engine cpu are compared teacher-forced on what the torch engine
wrote. Last line: JSON; exit code 1 if a difference is not a tie.
"""

import json
import sys
import time
from typing import Any

import numpy as np
import torch
from real_inputs import arguments, plainly, read_batches

import dqbart
from dqbart.evaluation.generate import effective_generation

TIE = 0.02  # in mean log-probability: what flipped codes can do
BATCH = 25
SETTINGS: list[dict[str, Any]] = [
    {"num_beams": 1},
    {"num_beams": 4},
    {"num_beams": 4, "no_repeat_ngram_size": 2, "min_length": 8, "early_stopping": False, "length_penalty": 2.0},
    {"num_beams": 6, "repetition_penalty": 1.3, "early_stopping": "never", "length_penalty": 0.6},
]


@torch.no_grad()
def mean_log_probability(model: Any, inputs: dict[str, Any], ids: Any, ends: int) -> float:
    """Of one sequence of ids, its end included."""
    length = ids.tolist().index(ends, 1) + 1 if ends in ids[1:] else len(ids)
    logits = model(**inputs, decoder_input_ids=ids[None, : length - 1]).logits[0].float()
    return float(logits.log_softmax(-1).gather(1, ids[1:length, None]).mean())


def compare(fast: Any, slow: Any, batches: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"inputs": 0, "different": 0, "worse_than_a_tie": 0, "max_logit_difference": 0.0}
    seconds = [0.0, 0.0]
    gaps: list[float] = []
    differences: list[float] = []
    for number, inputs in enumerate(batches):
        ids = []
        for i, model in enumerate((fast, slow)):
            start = time.perf_counter()
            ids.append(model.generate(**inputs, **settings))
            seconds[i] += time.perf_counter() - start
        width = max(part.shape[1] for part in ids)
        ours, theirs = (
            torch.nn.functional.pad(p, (0, width - p.shape[1]), value=slow.config.pad_token_id) for p in ids
        )
        found["inputs"] += len(ours)
        for row in (ours != theirs).any(1).nonzero()[:, 0].tolist():
            length = int(inputs["attention_mask"][row].sum())
            single = {key: value[row : row + 1, :length] for key, value in inputs.items()}
            ends = slow.config.eos_token_id
            scores = [mean_log_probability(slow, single, part[row], ends) for part in (ours, theirs)]
            gaps.append(abs(scores[0] - scores[1]))
            for name, score, part in zip((fast.runner.name, "torch"), scores, (ours, theirs), strict=True):
                print(f"differs: {name:6s} {score:.4f} {part[row].tolist()}")
        if settings["num_beams"] == 1 and fast.runner.name == "cpu":
            differences += logit_differences(fast, slow, inputs, theirs[:, :-1])
        print(f"{number + 1}/{len(batches)}", end="\r", file=sys.stderr, flush=True)
    found["different"], found["worse_than_a_tie"] = len(gaps), sum(gap > TIE for gap in gaps)
    if differences:
        found["max_logit_difference"] = max(differences)
        found["logits_within_1e-3"] = round(float(np.mean(np.array(differences) < 1e-3)), 4)
    return found | {"torch_seconds_over_native": round(seconds[1] / seconds[0], 2)}


@torch.no_grad()
def logit_differences(fast: Any, slow: Any, inputs: dict[str, Any], decoder: Any) -> list[float]:
    """The largest difference of each input's logits."""
    want = slow(**inputs, decoder_input_ids=decoder).logits.numpy()
    masks = inputs["attention_mask"].bool()
    sources = [row[mask].numpy().astype(np.int32) for row, mask in zip(inputs["input_ids"], masks, strict=True)]
    got = fast.native.logits(sources, decoder.numpy().astype(np.int32), fast.runner.threads)
    return [float(np.abs(a - b).max()) for a, b in zip(got, want, strict=True)]


def main() -> int:
    parser = arguments(__doc__, inputs=1000)
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="how many of the option sets")
    parser.add_argument("--engine", choices=("cpu", "triton"), default="cpu", help="what is held to the torch engine")
    parser.add_argument("--device", help="default: cuda for engine triton, else cpu")
    args = parser.parse_args()
    device = torch.device(args.device or ("cuda" if args.engine == "triton" else "cpu"))
    fast, slow = (dqbart.load(args.packed, engine=engine, device=device) for engine in (args.engine, "torch"))
    batches, tokenizer, recipe = read_batches(args, BATCH)
    batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
    found = []
    for options in SETTINGS[: args.settings]:
        whole = effective_generation(slow, options, tokenizer=tokenizer, target_lang=recipe.target_lang)
        found.append({"options": options} | compare(fast, slow, batches, whole))
        print(json.dumps(found[-1]), flush=True)
    wrong = sum(row["worse_than_a_tie"] for row in found)
    print(json.dumps({"engine": args.engine, "runs_on": fast.runner.describe(), "rows": found, "ok": not wrong}))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(plainly(main))
