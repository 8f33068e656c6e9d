"""Encoder methods from scratch: a BERT learns to read, students of a third of its layers learn from it, and three tasks
tell what each method was worth, beside a student of the same shape that had no teacher.

    python benchmarks/encoder_methods.py --data ../shared/data --work DIR [--size small|gpu] [--only TEXT] [--list]
        [--steps FACTOR] [--device cuda --bf16]
    python benchmarks/encoder_methods.py --data ../shared/data --quick

Problem: published students learned from other teachers, on other text, for longer than those they are compared with.
Method: one tokenizer, one text (text-books), one teacher, and for all students of a shape the same steps, batches and
learning rate; each number is a `dqbart.compress`, scored on the test set as `dqbart eval` does, for several seeds of
fine-tuning. encoder_methods_cells.py says which cells there are and what each stands on. They run one after the other
in this process; a stopped one goes on from its checkpoint, and finished ones are in the results file. Rejected: scores
on validation (it chose the student), and tuning the learning rate for each method, which would be most of the time.

Dropout is 0 on text, which is seen about once, and 0.1 on tasks. A failed gate is said, and costs the cells that stand
on it and exit code 1. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from encoder_methods_cells import STUDIES, Cell, Data, Grown, Shape, Study, cells, in_order, quantized
from encoder_methods_tables import best
from encoder_methods_tables import table as table  # where every benchmark has it
from ledger import RESULTS, Ledger, resumable

KEYS = ("study", "cell")
SPLITS = ("train", "validation", "test")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Workshop:
    """Makes, once each, what cells are made of, in folders below `work`: data, tokenizer, random models, results."""

    def __init__(self, data: Path, work: Path, device: str | None, bf16: bool) -> None:
        self.source, self.work, self.device, self.bf16 = data, work, device, bf16

    def folder(self, cell: Cell) -> Path:
        return self.work / re.sub("[ ,]+", "-", cell.name) / cell.settings

    def model(self, model: Cell | Shape | Grown, texts: Data) -> Path:
        """The folder of a finished cell, or of random weights; `texts`: what the tokenizer is made of."""
        if isinstance(model, Cell):
            return self.folder(model)
        start = self.work / "start"
        if isinstance(model, Grown):
            few, layers = self.folder(model.of), model.layers
            return self._once(start / f"{few.name}-{layers}", lambda folder: grow(few, layers, folder))
        words = self._once(
            start / f"tokenizer-{model.vocabulary}-{texts.rows[0] or 'all'}",
            lambda folder: train_tokenizer(self.rows(texts), model, folder),
        )
        name = f"{model.layers}x{model.width}-{model.heads}-{words.name}-{model.length}"
        return self._once(start / name, lambda folder: random_bert(model, words, folder))

    def rows(self, data: Data) -> Path:
        """A folder with the rows that a cell asks for."""
        plain = self.source / data.name
        if not plain.is_dir():
            raise FileNotFoundError(f"{plain}: no such folder; --data is the folder of all data sets")
        if any(most is not None for most in data.rows):
            name = "-".join([data.name, *("all" if most is None else str(most) for most in data.rows)])
            plain = self._once(self.work / "data" / name, lambda folder: sample(self.source / data.name, data, folder))
        if data.writer is None:
            return plain
        name = f"{plain.name}-{data.augmented}x{data.variants}-{data.writer.settings}"
        writer = self.folder(data.writer)
        return self._once(self.work / "data" / name, lambda folder: augment(plain, writer, data, folder, self.device))

    def _once(self, folder: Path, make: Callable[[Path], None]) -> Path:
        """`folder`, made under another name and renamed when it is whole."""
        if not folder.exists():
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            make(partial)
            os.replace(partial, folder)
        return folder

    def run(self, cell: Cell, texts: Data) -> dict[str, Any]:
        """A cell's row. Raises what `dqbart.compress` raises."""
        import dqbart
        from dqbart.tasks.run import evaluate

        on_text = cell.data.name == texts.name
        data, output = self.rows(cell.data), self.folder(cell)
        recipe = recipe_of(cell) | lengths(cell, data) | {"bf16": self.bf16 and on_text}
        model = self.model(cell.model, texts)
        student = None if cell.student is None else self.model(cell.student, texts)
        result = dqbart.compress(
            model, data, student=student, output=output, device=self.device, recipe=dqbart.Recipe.from_dict(recipe)
        )
        report = result.report
        row = cell.shown | {
            "bits": cell.recipe["bits"], "steps": sum(cell.steps), "minutes": report["seconds"]["training"] / 60,
            "bf16": recipe["bf16"], "file_bytes": report["sizes"]["file_bytes"],
        }  # fmt: skip
        shutil.rmtree(output.with_name(output.name + ".training"), ignore_errors=True)
        found = report.get("scores", {}).get("student", {}).get("values", {})
        if on_text:
            return row | {"words": found.get("accuracy")}
        score, _ = evaluate(str(output), str(data), device=self.device)
        return row | {"score": score.value, "metric": "accuracy", "validation": found["accuracy"]}


def recipe_of(cell: Cell) -> dict[str, Any]:
    """A cell's recipe without the mask rate of the study where its method masks nothing, which `compress` would refuse.
    The cell keeps it: by its fingerprint finished rows are known.
    """
    from dqbart import Recipe

    masks = {"task", "logits"} & Recipe.from_dict(cell.recipe).terms.keys()
    return {name: value for name, value in cell.recipe.items() if masks or name != "mask_rate"}


def lengths(cell: Cell, data: Path) -> dict[str, Any]:
    """The recipe's words for a number of steps; of two parts, in epochs."""
    if len(cell.steps) == 1:
        return {"max_steps": cell.steps[0]}
    from dqbart.data.files import load_rows

    epoch = math.ceil(len(load_rows(data)) / cell.recipe["batch_size"])
    first, second = ((steps - 0.5) / epoch for steps in cell.steps)  # rounded up to whole steps
    return {"epochs": first, "prediction_epochs": second}


def train_tokenizer(data: Path, shape: Shape, folder: Path) -> None:
    """BERT's lower-casing WordPiece, of the training texts."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    from dqbart.data.files import load_rows

    texts = [row["text"] for row in load_rows(data)]
    say(f"a tokenizer of {len(texts):,} texts")
    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(texts, vocab_size=shape.vocabulary, show_progress=False)
    BertTokenizerFast(vocab=trained.get_vocab(), model_max_length=shape.length).save_pretrained(folder)


def random_bert(shape: Shape, tokenizer: Path, folder: Path) -> None:
    """A BERT that knows nothing but where to look, without dropout."""
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, set_seed

    words = AutoTokenizer.from_pretrained(tokenizer)
    words.save_pretrained(folder)
    set_seed(shape.seed)
    config = BertConfig(
        vocab_size=len(words), pad_token_id=words.pad_token_id, hidden_size=shape.width,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, intermediate_size=4 * shape.width,
        max_position_embeddings=shape.length, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    look_beside_(model)
    model.save_pretrained(folder)


def grow(few: Path, layers: int, folder: Path) -> None:
    """A BERT of so many layers: those of another one, repeated from the first on."""
    from transformers import AutoTokenizer, BertForMaskedLM

    source = BertForMaskedLM.from_pretrained(few)
    config = copy.deepcopy(source.config)
    config.num_hidden_layers = layers
    model, there = BertForMaskedLM(config), source.bert.encoder.layer
    model.load_state_dict(source.state_dict(), strict=False)
    for number, layer in enumerate(model.bert.encoder.layer):
        layer.load_state_dict(there[number % len(there)].state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(few).save_pretrained(folder)


def look_beside_(model: Any) -> None:
    """Start attention on the words beside: positions are sinusoids, a layer's heads find those that lie -1, 1, -2, 2,
    ... from their own, and what they find is as large as what is there.

    A masked word is told by its neighbours. Random heads need millions of words to find them, and until then a BERT
    guesses by frequency (4 x 128, a million tokens: loss 6.18 without, 5.45 with).
    """
    import torch

    config = model.config
    width, size = config.hidden_size, config.hidden_size // config.num_attention_heads
    pairs = size // 2  # of a sine and a cosine; heads look at the first ones, which turn fast
    frequency_F = 1e-4 ** (torch.arange(0, width, 2) / width)
    frequency_F[:pairs] = torch.linspace(2.5, 0.1, pairs)
    table_PD = model.bert.embeddings.position_embeddings.weight
    # phases of their own: LayerNorm takes the mean, which should say nothing of the position
    angle_PF = torch.arange(len(table_PD))[:, None] * frequency_F + 2 * math.pi * torch.rand(len(frequency_F))
    sines, cosines = torch.arange(0, 2 * pairs, 2), torch.arange(1, 2 * pairs, 2)
    own_SD = torch.zeros(size, width)
    own_SD[sines, sines] = own_SD[cosines, cosines] = 1
    peak = 6 * size**0.5 / pairs  # of scores, where all pairs agree: 6
    with torch.no_grad():
        waves_PD = torch.stack([angle_PF.sin(), angle_PF.cos()], -1).flatten(1)[:, :width]
        table_PD.copy_(waves_PD * 2**0.5 * config.initializer_range)  # as large as words
        for layer in model.bert.encoder.layer:
            attention = layer.attention.self
            for weight_DD in (attention.value.weight, layer.attention.output.dense.weight):
                weight_DD.normal_(std=0.7 * width**-0.5)
            for head in range(config.num_attention_heads):
                offset = (head // 2 + 1) * (1 if head % 2 else -1)
                turn_F = offset * frequency_F[:pairs]
                turned_SD = torch.zeros(size, width)  # makes of position p what `own_SD` makes of p - offset
                turned_SD[sines, sines] = turned_SD[cosines, cosines] = turn_F.cos()
                turned_SD[sines, cosines], turned_SD[cosines, sines] = -turn_F.sin(), turn_F.sin()
                rows = slice(head * size, (head + 1) * size)
                attention.query.weight[rows] = own_SD * peak**0.5
                attention.key.weight[rows] = turned_SD * peak**0.5


def sample(source: Path, data: Data, folder: Path) -> None:
    """At most so many rows of each split: labelled ones drawn, texts the first, so that documents stay whole."""
    from dqbart.data.files import load_rows

    for split, most in zip(SPLITS, data.rows, strict=True):
        rows = load_rows(source, split=split)
        kept: Sequence[int] = range(len(rows) if most is None else min(most, len(rows)))
        if "label" in rows[0] and len(kept) < len(rows):
            kept = sorted(random.Random(data.seed).sample(range(len(rows)), len(kept)))
        names = ("sentence", "label") if "label" in rows[0] else ("text", "doc")
        write(folder / f"{split}.jsonl", ({name: rows[i][name] for name in names} for i in kept))


def augment(plain: Path, writer: Path, data: Data, folder: Path, device: str | None) -> None:
    """The rows of `plain`, with variants of the first ones by TinyBERT's augmentation; the teacher on text guesses."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    from dqbart.data.augmentation import Augmenter
    from dqbart.data.files import load_rows
    from dqbart.teacher import choose_device

    rows = load_rows(plain)
    texts, rest = [row["sentence"] for row in rows[: data.augmented]], rows[data.augmented :]
    say(f"{data.name}: up to {data.variants} variants each of {len(texts):,} training rows of {len(rows):,}")
    model = AutoModelForMaskedLM.from_pretrained(writer).to(choose_device(device))
    words = AutoTokenizer.from_pretrained(writer)
    found = Augmenter(model, words, variants=data.variants, seed=data.seed).augment(texts)
    made = [{"sentence": row.text, "label": rows[row.origin]["label"]} for row in found]
    write(folder / "train.jsonl", [*made, *rest])
    for split in SPLITS[1:]:
        write(folder / f"{split}.jsonl", load_rows(plain, split=split))


def write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def is_done(cell: Cell, study: Study, ledger: Ledger) -> bool:
    row = ledger.find(study=str(study), cell=cell.name)
    return row is not None and row["settings"] == cell.settings


def run(chosen: list[Cell], study: Study, ledger: Ledger, workshop: Workshop) -> list[str]:
    """Fill the ledger with what it lacks, and with what has changed. Returns the names of the cells that failed."""
    from dqbart.packed.gate import GateError

    failed: list[str] = []
    for number, cell in enumerate(chosen, 1):
        if is_done(cell, study, ledger):
            continue
        if lost := [other.name for other in cell.needs if other.name in failed]:
            say(f"SKIPPED {cell.name}: {lost[0]} failed")
            failed.append(cell.name)
            continue
        say(f"\n{number} of {len(chosen)}: {cell.title}")
        try:
            row = workshop.run(cell, Data("text-books", study.texts))
        except GateError as error:
            say(f"FAILED {cell.name}: {error}")
            failed.append(cell.name)
            continue
        row = {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
        ledger.add({"study": str(study), "cell": cell.name, "settings": cell.settings} | row)
    return failed


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of the data sets")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where models and data are kept")
    parser.add_argument("--size", choices=("small", "gpu"), default="small", help="shapes and steps (small: two cores)")
    parser.add_argument("--quick", action="store_true", help="the whole chain with hardly any training, in minutes")
    parser.add_argument(
        "--only", metavar="TEXT", help="only cells with TEXT in what --list says, and what they stand on"
    )
    parser.add_argument("--steps", type=float, default=1.0, metavar="FACTOR", help="times as many steps of all (1)")
    parser.add_argument("--list", action="store_true", help="name the cells, and which are done; run none")
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one)")
    parser.add_argument("--bf16", action="store_true", help="mixed precision on text")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results (results/encoder_methods.json)")
    args = parser.parse_args()
    if args.work is None and not (args.quick or args.list):
        parser.error("--work is missing: a folder for models and data, some gigabytes")
    return args


@resumable
def main() -> int:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        size = "quick" if args.quick else args.size
        study = STUDIES[size].times(args.steps)
        results = args.out or (Path(scratch) if args.quick else RESULTS) / "encoder_methods.json"
        ledger = Ledger(results, KEYS)
        everything = cells(study)
        chosen = in_order(cell for cell in everything if args.only is None or args.only in cell.title)
        if args.list:
            for cell in chosen:
                print("done   " if is_done(cell, study, ledger) else "missing", cell.title)
            return 0
        workshop = Workshop(args.data, (args.work or Path(scratch)) / size, args.device, args.bf16)
        failed = run(chosen, study, ledger, workshop)
        task = next(iter(study.task_steps))
        done = [ledger.find(study=str(study), cell=cell.name) for cell in everything if is_done(cell, study, ledger)]
        winner = best([row for row in done if row], task, str(study.narrow))
        if winner is not None and args.only in (None, "quantized"):
            failed += run(quantized(study, everything, winner), study, ledger, workshop)
        print(table(ledger.rows))
        print(json.dumps({"rows": len(ledger.rows), "failed": failed}))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
