"""Targets that a data set lacks, written by the teacher.

Sequence-level distillation (Kim & Rush 2016, arXiv 1606.07947): the teacher's own beam-search
output is a target as good as a human's, often better, so plain sources are enough. Writing them
takes hours, so each finished batch is appended to a file. Batches are fixed by all sources, not by
what is left to do: a run that was interrupted writes, to the letter, what an uninterrupted one
writes.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dqbart.data.batches import set_languages
from dqbart.data.decoding import Settings, check_texts, decode_batches, effective_generation


def write_targets(
    teacher: Any,
    tokenizer: Any,
    sources: Sequence[str],
    *,
    cache_dir: str | Path,
    generation: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    max_source_length: int | None = None,
    max_target_length: int | None = None,
    source_prefix: str = "",
    source_lang: str | None = None,
    target_lang: str | None = None,
    progress: bool = True,
) -> list[str]:
    """The teacher's text for every source, in order, kept in `cache_dir` and continued from there.

    The file is named by a hash of the teacher's weights, the vocabulary, the sources and all
    settings, so that another teacher or setting never reads the wrong texts. `generation` is laid
    over the teacher's own settings (`effective_generation`). Several processes must not write the
    same file: let one write, then the others read. Raises `ValueError` as `encode_pairs` and
    `effective_generation` do, and for a cache file that is damaged elsewhere than in its last line.
    """
    check_texts(sources, batch_size)
    set_languages(tokenizer, source_lang, target_lang)
    settings = effective_generation(
        teacher, generation, tokenizer=tokenizer, target_lang=target_lang, max_target_length=max_target_length
    )
    inputs = {
        "batch_size": batch_size, "max_source_length": max_source_length,
        "source_prefix": source_prefix,
        "languages": [getattr(tokenizer, "src_lang", None), getattr(tokenizer, "tgt_lang", None)],
    }  # fmt: skip
    key = fingerprint(teacher, tokenizer, sources, settings | inputs)
    path = Path(cache_dir) / f"targets-{key}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    targets: list[str | None] = [None] * len(sources)
    done = _read_cache(path, targets)
    if None in targets:
        with path.open("a", encoding="utf-8") as file:
            if not path.stat().st_size:
                file.write(json.dumps({"generation": settings, **inputs}, default=str) + "\n")
            for number, indices, texts in decode_batches(
                teacher, tokenizer, sources, settings, batch_size=batch_size,
                max_source_length=max_source_length, source_prefix=source_prefix,
                source_lang=source_lang, target_lang=target_lang, done=done,
                what="teacher writes targets", progress=progress,
            ):  # fmt: skip
                file.write(json.dumps({"batch": number, "rows": indices, "texts": texts}) + "\n")
                file.flush()
                for index, text in zip(indices, texts, strict=True):
                    targets[index] = text
    return [text for text in targets if text is not None]


def _read_cache(path: Path, targets: list[str | None]) -> frozenset[int]:
    """Fill `targets` from the file; returns its batch numbers. A half-written last line is cut off."""
    if not path.exists():
        return frozenset()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    done = set()
    for number, line in enumerate(whole.splitlines()[1:], 2):
        try:
            batch = json.loads(line)
            for index, text in zip(batch["rows"], batch["texts"], strict=True):
                targets[index] = str(text)
            done.add(int(batch["batch"]))
        except (ValueError, KeyError, IndexError, TypeError):
            raise ValueError(f"{path} line {number}: damaged; delete the file to write it anew") from None
    return frozenset(done)


def fingerprint(teacher: Any, tokenizer: Any, sources: Sequence[Any], settings: Settings) -> str:
    """A hash of a model's weights, its vocabulary, the data and all settings, for the name of what they give."""
    import torch

    config = {k: v for k, v in teacher.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest = hashlib.sha256(json.dumps([settings, config], sort_keys=True, default=str).encode())
    for name, tensor in (*teacher.named_parameters(), *teacher.named_buffers()):  # tied ones once
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    for text in (*sorted(tokenizer.get_vocab().items()), *sources):
        digest.update(repr(text).encode() + b"\n")
    return digest.hexdigest()[:24]
