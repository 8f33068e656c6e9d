"""Is a damaged model folder ever more than an error message? Thousands of random damages, loaded and run natively.

    python benchmarks/damage.py [--rounds 10000] [--seed 0]

Three tiny folders (BART, mBART, BERT) are damaged at random: bytes flipped, files cut, lengthened or deleted, values of
config.json, of generation_config.json and of the safetensors header replaced, and codes, scales and floats overwritten
with checksums that fit again, which only somebody malicious does. Each is loaded with the native engine and run in a
child process. It must be refused with one of the documented errors, or run. A child that dies, or takes more than
`SECONDS`, is a failure and its round is named; so is any other exception. Last line: JSON; exit code 1 for a failure.
"""

import argparse
import collections
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SECONDS = 30
FILES = ("model.safetensors", "config.json", "generation_config.json")
STRANGE = [
    0, -1, 1, 2, 3, 7, 64, 1000, 2**16, 2**31 - 1, 2**31, 2**63, 1e30, 0.5, -0.0, None, True, False, "", "x", [], {},
    [1, 2], {"a": 1}, "relu", "float16",
]  # fmt: skip


def make_folders(parent: Path) -> list[Path]:
    """The sound folders."""
    import torch
    from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertModel, MBartConfig
    from transformers import MBartForConditionalGeneration as MBart

    from dqbart.packed.checkpoint import save_packed
    from dqbart.quant.layers import prepare

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=24,
    )  # fmt: skip
    bert = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40,
        max_position_embeddings=24,
    )  # fmt: skip
    models = {
        "bart": (BartForConditionalGeneration(BartConfig(**sizes)), "2-2-8", "trits"),
        "mbart": (MBart(MBartConfig(**sizes)), "8-4-8", "planar32"),
        "bert": (BertModel(bert), "1-2-8", "planar32"),
    }
    return [
        save_packed(prepare(model.eval(), bits), parent / name, storage=storage)
        for name, (model, bits, storage) in models.items()
    ]


def replace_leaf(value: Any, chance: random.Random) -> Any:
    """The same JSON with one value, at any depth, replaced, or a key lost."""
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not keys:
        return chance.choice(STRANGE)
    key = chance.choice(keys)
    if isinstance(value[key], dict | list) and value[key] and chance.random() < 0.8:
        value[key] = replace_leaf(value[key], chance)
    elif chance.random() < 0.15:
        del value[key]
    else:
        value[key] = chance.choice(STRANGE)
    return value


def damage(folder: Path, chance: random.Random) -> str:
    """Damage a folder in place; returns what was done."""
    from dqbart.packed import shards

    kind = chance.choice(["bytes", "length", "value", "value", "header", "content", "content", "missing"])
    files = [folder / name for name in FILES if (folder / name).is_file()]
    file = files[0] if kind in ("header", "content") else chance.choice(files)
    data = bytearray(file.read_bytes())
    if kind == "value" and file.suffix == ".json":
        file.write_text(json.dumps(replace_leaf(json.loads(data), chance)))
    elif kind == "missing":
        file.unlink()
    elif kind == "length":
        keep = chance.randrange(len(data))
        file.write_bytes(data[:keep] if chance.random() < 0.7 else data + data[:keep])
    elif kind == "header":
        length = int.from_bytes(data[:8], "little")
        text = json.dumps(replace_leaf(json.loads(data[8 : 8 + length]), chance)).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    elif kind == "content":
        tensors = {name: shards.read_tensor(info).clone() for name, info in shards.read_shard(file).tensors.items()}
        name = chance.choice(sorted(tensors))
        raw = bytearray(tensors[name].numpy().tobytes())
        for _ in range(chance.choice([1, 4, len(raw) // 2 + 1])):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        import torch

        tensors[name] = torch.frombuffer(raw, dtype=tensors[name].dtype).view(tensors[name].shape)
        shards.write_shard(file, tensors, shards.metadata(tensors, 1))
    else:
        for _ in range(chance.choice([1, 2, 8])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        file.write_bytes(data)
    return f"{kind} of {file.name}"


def serve(folders: list[Path]) -> None:
    """Child: for each seed on stdin, damage a copy, load it, run it, and answer with a line of JSON."""
    import torch

    import dqbart

    torch.set_num_threads(1)
    ids = torch.tensor([[0, 9, 8, 7, 2], [0, 5, 2, 1, 1]])
    mask = (ids != 1).long()
    for line in sys.stdin:
        chance = random.Random(int(line))
        source = chance.choice(folders)
        folder = source.with_name("damaged")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        done = f"{source.name}: {damage(folder, chance)}"
        signal.alarm(SECONDS)
        try:
            model = dqbart.load(folder, engine="cpu", threads=2)
            with torch.no_grad():
                if source.name == "bert":
                    model(ids, mask)
                else:
                    model.generate(ids, attention_mask=mask, max_length=8)
            answer = ["ran", ""]
        except (ValueError, FileNotFoundError) as error:
            answer = ["refused", str(error)]
        except Exception as error:
            answer = ["unclear", f"{type(error).__name__}: {error}"]
        signal.alarm(0)
        print(json.dumps([done, *answer]), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", nargs="*", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return 0
    outcomes: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as parent:
        folders = make_folders(Path(parent))
        command = [sys.executable, __file__, "--serve", *map(str, folders)]
        child: Any = None
        for seed in range(args.seed, args.seed + args.rounds):
            if child is None:
                child = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
            child.stdin.write(f"{seed}\n")
            child.stdin.flush()
            line = child.stdout.readline()
            if line:
                done, outcome, message = json.loads(line)
            else:
                code = child.wait()
                done, outcome = f"seed {seed}", "timed out" if code == -signal.SIGALRM else "died"
                message, child = f"exit code {code}", None
            outcomes[outcome] += 1
            if outcome not in ("ran", "refused"):
                failures.append(f"seed {seed}: {done}: {outcome}: {message[:200]}")
                print(failures[-1], flush=True)
            if seed % 100 == 99:
                print(f"{seed + 1 - args.seed}/{args.rounds} {dict(outcomes)}", end="\r", file=sys.stderr, flush=True)
        if child is not None:
            child.stdin.close()
            child.wait()
    print(json.dumps({"rounds": args.rounds, **outcomes, "failures": len(failures)}))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
