"""The gate: a fresh process loads the packed folder and must say what the student says.

    python -m dqbart.packed.gate FOLDER PROBE RESULT

PROBE is a safetensors file with inputs and the student's greedy ids; the process writes its own ids and its logits
for the student's ids to RESULT. A separate process, because the one that trained has modules, caches and
registrations that a user's will not have.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LOGIT_TOLERANCE = 1e-4
NEW_TOKENS = 32


class GateError(RuntimeError):
    """The packed folder does not behave as the student it was made from."""


def probe_inputs(student: Any, tokenizer: Any, texts: list[str], max_length: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` `[B, S]`, right-padded: the texts, or random ids where there are none."""
    if texts:
        rows = [tokenizer(t, truncation=True, max_length=min(max_length, 256))["input_ids"] for t in texts]
    else:
        generator = torch.Generator().manual_seed(28)
        high, longest = student.config.vocab_size, min(64, student.config.max_position_embeddings)
        rows = [torch.randint(4, high, (n,), generator=generator).tolist() for n in (1, longest // 2, longest)]
    width = max(map(len, rows))
    pad = student.config.pad_token_id
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def behaviour(model: Any, inputs: dict[str, Tensor], decoder_ids: Tensor | None = None) -> dict[str, Tensor]:
    """Greedy ids of a model, and its logits for `decoder_ids` (by default those ids); of an encoder, whatever floats
    it gives, as `logits` `[B, ...]`, and no ids.
    """
    if not model.config.is_encoder_decoder:
        output = model(**inputs)
        floats = [t.float().flatten(1) for t in output.values() if torch.is_tensor(t) and t.is_floating_point()]
        return {"logits": torch.cat(floats, 1)}
    longest = min(NEW_TOKENS + 1, model.config.max_position_embeddings)
    ids = model.generate(
        **inputs,
        num_beams=1,
        do_sample=False,
        max_length=longest,
        max_new_tokens=None,
        min_length=0,
        min_new_tokens=None,
    )
    logits = model(**inputs, decoder_input_ids=ids if decoder_ids is None else decoder_ids).logits
    return {"ids": ids, "logits": logits.float()}


def check_in_fresh_process(student: Any, folder: Path, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Compare `student` (on the CPU, in eval mode) with the folder; raises `GateError` with the figures."""
    from safetensors.torch import load_file, save_file

    expected = behaviour(student, inputs)
    with tempfile.TemporaryDirectory() as scratch:
        probe, result = Path(scratch) / "probe.safetensors", Path(scratch) / "result.safetensors"
        ids = {"decoder_ids": expected["ids"].contiguous()} if "ids" in expected else {}
        save_file(inputs | ids, probe)
        # Modules come from where they come from here, and none from a secrets.py or datasets.py in the user's folder.
        paths = [*map(os.path.abspath, filter(None, sys.path)), str(Path(__file__).parents[2])]
        command = [sys.executable, "-P", "-m", "dqbart.packed.gate", *map(os.path.abspath, (folder, probe, result))]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise GateError(f"{folder}: a fresh process can't run the packed model: {last}")
        found = load_file(result)
    difference = float((found["logits"] - expected["logits"]).abs().max())
    same_ids = torch.equal(found["ids"], expected["ids"]) if "ids" in expected else None
    if same_ids is False or not difference <= LOGIT_TOLERANCE:
        words = "" if same_ids is None else f" greedy ids are {'equal' if same_ids else 'different'};"
        raise GateError(
            f"{folder}: packed logits differ from the student's by {difference:.2e} (allowed {LOGIT_TOLERANCE:.0e});"
            f"{words} the folder is not moved into place"
        )
    return {"inputs": len(inputs["input_ids"]), "max_logit_difference": difference, "greedy_ids_equal": same_ids}


def main(folder: str, probe: str, result: str) -> None:
    from safetensors.torch import load_file, save_file

    from dqbart.packed.checkpoint import load_packed
    from dqbart.packed.plain import is_plain, load_plain

    inputs = load_file(probe)
    model = load_plain(folder) if is_plain(folder) else load_packed(folder)
    found = behaviour(model, inputs, inputs.pop("decoder_ids", None))
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
