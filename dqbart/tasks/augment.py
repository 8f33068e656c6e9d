"""More training data from a masked language model and word vectors, as TinyBERT makes it: file in, file out.

A step of its own, not a part of `compress`: it takes hours on large sets, its result is worth a look, and other
methods profit, too. Only the training split is read; what is held out to select students must be held out before.
"""

import json
import sys
from pathlib import Path
from typing import Any

from dqbart.data.augmentation import Augmenter
from dqbart.data.columns import VARIANT_OF, read_text
from dqbart.data.files import load_rows
from dqbart.data.labelled import guess_label_columns
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
    original text in `variant_of`, by which `compress` keeps them together where it holds out a dev set. Raises
    `FileExistsError` for an `out` that exists, and `ValueError` and `FileNotFoundError` as the readers do.
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
    found = augmenter.augment([text for _, text in kept], pairs)
    aside = out.with_suffix(".partial")
    with open(aside, "w", encoding="utf-8") as file:
        for made in found:
            original, text = kept[made.origin]
            row = original | {columns.text: made.text}
            if columns.pair:
                row[columns.pair] = made.pair
            if row != original:
                row.setdefault(VARIANT_OF, text)  # so that a dev set has no variants of what is trained on
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")  # parquet has dates
    aside.replace(out)
    return {"rows": len(kept), "written": len(found)}
