"""Real inputs for a packed folder: what parity.py and engines.py decode."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging

import dqbart
from dqbart.data.batches import Collator, encode_pairs
from dqbart.data.columns import sample
from dqbart.data.splits import read_split


def arguments(doc: str | None, inputs: int) -> argparse.ArgumentParser:
    """PACKED, --data, --split and --inputs; `doc`: the script's docstring."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("packed", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--inputs", type=int, default=inputs)
    return parser


def read_batches(args: argparse.Namespace, batch_size: int) -> tuple[list[dict[str, Tensor]], Any, dqbart.Recipe]:
    """Batches of `input_ids` and `attention_mask`, the folder's tokenizer and recipe. Raises as the readers do."""
    logging.disable_progress_bar()
    recipe = dqbart.Recipe.from_yaml(args.packed / "recipe.yaml")
    tokenizer = AutoTokenizer.from_pretrained(args.packed)
    examples = sample(read_split(args.data, recipe, args.split), args.inputs)
    rows = encode_pairs(
        tokenizer, examples.sources, max_source_length=recipe.max_source_length, source_prefix=recipe.source_prefix,
        source_lang=recipe.source_lang, target_lang=recipe.target_lang,
    )  # fmt: skip
    collate = Collator(tokenizer.pad_token_id)
    starts = range(0, len(rows), batch_size)
    batches = [collate([rows[i] for i in range(s, min(s + batch_size, len(rows)))]) for s in starts]
    return [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in batches], tokenizer, recipe


def plainly(main: Callable[[], int]) -> int:
    """What `main` returns; 2 and one line where the folder or the data are not what they should be."""
    try:
        return main()
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
