"""What one quantization-aware distillation step costs against the same step without quantization.

    python benchmarks/training_cost.py [--bits 2-2-8] [--rounds 5] [--losses default|all]

bart-base shape with random weights, batch 4, source 256, target 64, fp32, AdamW step included. Each configuration
runs in its own process, so that peak memory is its own; the processes take turns, and ratios are taken per turn.
The last line is JSON.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

BATCH, SOURCE, TARGET = 4, 256, 64


def serve(bits: str, losses: str) -> None:
    """Child: build once, then run one step per line on stdin and answer with its seconds and the peak memory."""
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    from dqbart.distill.objective import Objective
    from dqbart.quant.attention import use_attention
    from dqbart.quant.layers import prepare
    from dqbart.recipe import PAPER_LOSSES, Bits, Layers, LossWeights, Recipe
    from dqbart.student.depth import make_student, stack_maps

    torch.manual_seed(0)
    teacher = BartForConditionalGeneration(
        BartConfig(d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12,
                   decoder_attention_heads=12, encoder_ffn_dim=3072, decoder_ffn_dim=3072)
    ).eval()  # fmt: skip
    recipe = Recipe(bits=Bits(bits), losses=PAPER_LOSSES if losses == "all" else LossWeights())
    student = make_student(teacher, Layers("6-6"))
    use_attention(teacher.requires_grad_(False))
    use_attention(student)
    if recipe.bits.quantized:
        prepare(student, recipe.bits)
    student.train()
    objective = Objective(recipe, stack_maps(teacher.config, Layers("6-6")))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    ids = torch.randint(4, 50265, (BATCH, SOURCE))
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.randint(4, 50265, (BATCH, TARGET)),
    }
    for _ in sys.stdin:
        start = time.perf_counter()
        total, _, _ = objective(student, teacher, batch)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
        print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", default="2-2-8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--losses", choices=("default", "all"), default="default")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.bits, args.losses)
        return 0
    command = [sys.executable, __file__, "--serve", "--losses", args.losses, "--bits"]
    children = [
        subprocess.Popen([*command, bits], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for bits in ("32-32-32", args.bits)
    ]
    seconds: list[list[float]] = [[], []]
    memory = [0.0, 0.0]
    for turn in range(args.rounds + 1):
        for i, child in enumerate(children):
            assert child.stdin and child.stdout
            child.stdin.write("step\n")
            child.stdin.flush()
            took, memory[i] = json.loads(child.stdout.readline())
            if turn:  # the first step also allocates
                seconds[i].append(took)
    for child in children:
        child.communicate()
    ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
    print(f"step, float:     {statistics.median(seconds[0]):6.2f} s   peak {memory[0]:.2f} GiB")
    print(f"step, {args.bits}:     {statistics.median(seconds[1]):6.2f} s   peak {memory[1]:.2f} GiB")
    print(json.dumps({"bits": args.bits, "losses": args.losses, "time_ratio": round(ratio, 3),
                      "memory_ratio": round(memory[1] / memory[0], 3)}))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
