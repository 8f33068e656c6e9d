"""What one quantization-aware distillation step costs against the same step without quantization.

    python benchmarks/training_cost.py [--bits 2-2-8] [--rounds 5] [--losses default|all] [--device cuda] [--bf16]
        [--batch 4] [--source 256] [--target 64] [--shape bart-base|tiny]

bart-base shape with random weights, batch 4, source 256, target 64, fp32, AdamW step included, unless other is asked
for. Three steps: without quantization, with, and with it as a chain of torch operators and with whole logits and
attention maps ("plain"), which is what the training kernels are there to beat; the first two choose as training does.
On a CPU training uses no kernel, so the third is left out. Each runs in its own process, so that peak memory is its own
(of the GPU's, or the process's); the processes take turns, and ratios are taken per turn. The last line is JSON.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

SHAPES = {
    "bart-base": dict(d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12,
                      decoder_attention_heads=12, encoder_ffn_dim=3072, decoder_ffn_dim=3072),
    "tiny": dict(vocab_size=1000, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                 decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96),
}  # fmt: skip


def serve(args: argparse.Namespace) -> None:
    """Child: build once, then run one step per line on stdin and answer with its seconds and the peak memory."""
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    from dqbart.distill.capture import autocast
    from dqbart.distill.objective import Objective
    from dqbart.notation import Bits, Layers
    from dqbart.quant import quantizers
    from dqbart.quant.attention import use_attention
    from dqbart.quant.layers import prepare
    from dqbart.recipe import PAPER_LOSSES, LossWeights, Recipe
    from dqbart.student.depth import make_student, stack_maps

    torch.manual_seed(0)
    device = torch.device(args.device)
    config = BartConfig(**SHAPES[args.shape])
    teacher = BartForConditionalGeneration(config).to(device).eval()
    losses = PAPER_LOSSES if args.losses == "all" else LossWeights()
    recipe = Recipe(bits=Bits(args.bits), losses=losses, bf16=args.bf16)
    layers = Layers(f"{config.encoder_layers}-{config.decoder_layers}")
    student = make_student(teacher, layers).to(device)
    use_attention(teacher.requires_grad_(False))
    use_attention(student)
    if recipe.bits.quantized:
        prepare(student, recipe.bits)
    student.train()
    objective = Objective(recipe, stack_maps(teacher.config, layers))
    if args.plain:
        quantizers.FUSED.clear()
        objective.chunked = objective.mapless = False
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    ids = torch.randint(4, config.vocab_size, (args.batch, args.source), device=device)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.randint(4, config.vocab_size, (args.batch, args.target), device=device),
    }
    for _ in sys.stdin:
        start = time.perf_counter()
        with autocast(args.bf16, device):
            total, _, _ = objective(student, teacher, batch)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
        print(json.dumps([seconds, peak]), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", default="2-2-8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--losses", choices=("default", "all"), default="default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--source", type=int, default=256)
    parser.add_argument("--target", type=int, default=64)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="bart-base")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args)
        return 0
    steps = {"float": ["--bits", "32-32-32"], args.bits: []}
    if args.device != "cpu":
        steps[f"{args.bits} plain"] = ["--plain"]
    command = [sys.executable, __file__, *sys.argv[1:], "--serve"]
    children = [
        subprocess.Popen([*command, *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for more in steps.values()
    ]
    seconds: list[list[float]] = [[] for _ in children]
    memory = [0.0 for _ in children]
    for turn in range(args.rounds + 1):
        for i, child in enumerate(children):
            assert child.stdin and child.stdout
            child.stdin.write("step\n")
            child.stdin.flush()
            took, memory[i] = json.loads(child.stdout.readline())
            if turn:  # the first step also allocates, and compiles kernels
                seconds[i].append(took)
    for child in children:
        child.communicate()
    ratios = [statistics.median(b / a for a, b in zip(seconds[0], s, strict=True)) for s in seconds]
    for name, times, peak, ratio in zip(steps, seconds, memory, ratios, strict=True):
        print(f"step, {name + ':':13} {statistics.median(times) * 1e3:8.1f} ms ({ratio:.3f})   peak {peak:.2f} GiB")
    found: dict[str, Any] = {"bits": args.bits, "losses": args.losses, "device": args.device, "bf16": args.bf16}
    found |= {"time_ratio": round(ratios[1], 3), "memory_ratio": round(memory[1] / memory[0], 3)}
    if len(steps) == 3:
        found |= {"plain_time_ratio": round(ratios[2], 3), "plain_memory_ratio": round(memory[2] / memory[0], 3)}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
