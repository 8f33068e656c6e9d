"""More training data from a masked language model and word vectors, as TinyBERT makes it: file in, file out.

A step of its own, not a part of `compress`: it takes hours on large sets, its result is worth a look, and other
methods profit, too. Only the training split is read; what is held out to select students must be held out before.
What is done is kept beside the file to be, a line per original, and a rerun goes on from there to the same bytes.
"""

import hashlib
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from dqbart.data.augmentation import Augmenter
from dqbart.data.columns import VARIANT_OF, read_text
from dqbart.data.files import load_rows
from dqbart.data.labelled import guess_label_columns
from dqbart.data.pseudo import fingerprint
from dqbart.data.word_vectors import read_word_vectors
from dqbart.data.words import stop_words
from dqbart.teacher import load_teacher


def augment_file(
    model: str | Path,
    data: Any,
    out: str | Path,
    *,
    text_column: str | None = None,
    pair_column: str | None = None,
    vectors: str | Path | None = None,
    variants: int = 20,
    probability: float = 0.4,
    top_k: int = 15,
    language: str = "en",
    seed: int = 28,
    device: str | None = None,
) -> dict[str, int]:
    """Write the training rows of `data` and up to `variants` new ones of each as JSON lines; returns both counts.

    `model`: a masked language model, path or hub id. `vectors`: a text file of word vectors for words of several
    pieces; without one the model's own embeddings. All other columns, labels among them, are copied; new rows have the
    original text in `variant_of`, by which `compress` keeps them together where it holds out a dev set. The same call
    goes on after an interruption: until all is done, rows are in `OUT.KEY.partial`, whose key tells model, rows and
    settings. Raises `FileExistsError` for an `out` that exists, and `ValueError` and `FileNotFoundError` as the readers
    do, `ValueError` for a damaged partial file.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out}: exists already; choose another --out")
    if not str(out).endswith(".jsonl"):
        raise ValueError(f"--out {str(out)!r}: expected a name that ends with .jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)  # now, not after hours
    rows = load_rows(data)
    columns = guess_label_columns(rows, text_column, pair_column)
    inside = [name for name in (columns.text, columns.pair) if name and name not in rows[0]]
    if inside:
        raise ValueError(f"column {inside[0]!r}: a text inside of another column can't be replaced; give it its own")
    print(f"{len(rows):,} rows; {columns}", file=sys.stderr, flush=True)
    kept = [(row, read_text(row, columns.text, number)) for number, row in enumerate(rows, 1)]
    kept = [(row, text) for row, text in kept if text]
    loaded = None if vectors is None else read_word_vectors(vectors)
    filler, tokenizer, _ = load_teacher(model, None, device, "s2s", seed)  # the class with a head for masked words
    architecture = (filler.config.architectures or [""])[0]
    if not architecture.endswith(("ForMaskedLM", "ForPreTraining")):
        raise ValueError(f"{model}: {architecture} has no head for masked words; expected a fill-mask checkpoint")
    augmenter = Augmenter(
        filler, tokenizer, loaded, top_k=top_k, probability=probability, variants=variants, seed=seed,
        stopwords=stop_words(language),
    )  # fmt: skip
    pairs = [read_text(row, columns.pair, 0) for row, _ in kept] if columns.pair else None
    settings = dict(
        columns=[columns.text, columns.pair], variants=variants, probability=probability, top_k=top_k,
        language=language, seed=seed, vectors=None if vectors is None else _digest(Path(vectors)),
    )  # fmt: skip
    partial = out.with_name(f"{out.name}.{fingerprint(filler, tokenizer, kept, settings)}.partial")
    done = _whole_lines(partial)
    if done:
        print(f"{done:,} of {len(kept):,} rows are done, in {partial}; going on", file=sys.stderr, flush=True)
    with partial.open("a", encoding="utf-8") as file:
        found = augmenter.augment([text for _, text in kept], pairs, start=done)
        for origin, group in groupby(found, key=lambda made: made.origin):
            original, text = kept[origin]
            line = []
            for made in group:
                row = original | {columns.text: made.text} | ({columns.pair: made.pair} if columns.pair else {})
                if row != original:
                    row.setdefault(VARIANT_OF, text)  # so that a dev set has no variants of what is trained on
                line.append(row)
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")  # parquet has dates
            file.flush()
    written = _flatten(partial, out)
    partial.unlink()
    return {"rows": len(kept), "written": written}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _whole_lines(path: Path) -> int:
    """How many lines a file has, if there is one; a last one that was cut short is cut off."""
    count = size = 0
    if path.exists():
        with path.open("r+b") as file:
            for line in file:
                if line.endswith(b"\n"):
                    count, size = count + 1, size + len(line)
            file.truncate(size)
    return count


def _flatten(partial: Path, out: Path) -> int:
    """Write the rows of each line as lines of their own, and count them; `out` is there once it is whole."""
    aside, written = out.with_suffix(".partial"), 0
    with partial.open(encoding="utf-8") as lines, aside.open("w", encoding="utf-8") as file:
        for number, line in enumerate(lines, 1):
            try:
                rows = json.loads(line)
            except ValueError:
                raise ValueError(f"{partial} line {number}: damaged; delete the file to write it anew") from None
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            written += len(rows)
    aside.replace(out)
    return written
