"""Native code and what it is not made for: damaged folders and very many calls (benchmarks/damage.py does more)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dqbart_kernels import cpu
from tiny_models import tiny_seq2seq, token_batch

import dqbart
from dqbart.packed.checkpoint import save_packed
from dqbart.quant.layers import prepare

pytestmark = pytest.mark.skipif(cpu.reason() is not None, reason=str(cpu.reason()))
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "damage.py"


def test_damaged_folders_are_refused_or_run() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--rounds", "100"], capture_output=True, text=True, timeout=300)
    last = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout
    assert last["rounds"] == 100 and last["failures"] == 0 and last["ran"] > 5 and last["refused"] > 30


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_hundred_thousand_tokens_leak_nothing(tmp_path: Path) -> None:
    folder = save_packed(prepare(tiny_seq2seq(encoder=1, decoder=1), "2-2-8"), tmp_path / "m")
    model = dqbart.load(folder, engine="cpu", threads=2)
    batch = token_batch([9, 5, 12, 3])

    def tokens(wanted: int) -> None:
        while wanted > 0:
            for options in ({"num_beams": 4}, {"do_sample": True, "seed": 1}):
                model.generate(**batch, max_length=60, min_length=60, **options)
                wanted -= 4 * 59

    tokens(10_000)
    before = resident_bytes()
    tokens(100_000)
    assert resident_bytes() - before < 2 * 2**20  # leaking 20 bytes a token would show


def test_models_are_freed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    large = tiny_seq2seq(encoder=1, decoder=1, vocab_size=20_000, d_model=64)
    folder = save_packed(prepare(large, "8-8-8"), tmp_path / "m")
    dqbart.load(folder, engine="cpu")
    before = resident_bytes()
    for _ in range(30):  # 1.3 MB each
        dqbart.load(folder, engine="cpu")
    assert resident_bytes() - before < 10 * 2**20
