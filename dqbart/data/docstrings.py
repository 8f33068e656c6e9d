"""The demo's data: write the headline of a docstring from its body.

Problem: a demo needs real text-to-text pairs on a machine without network. Method: every Python machine carries
thousands of docstrings, and a good one is a one-line summary (PEP 257) over a longer text, so the summary is the
target and the text the source. Files are parsed with `ast`, never imported: importing half of site-packages runs
foreign code, needs minutes and breaks on missing extras. Rejected: a data set inside the wheel (megabytes for
what the machine has already) and a random split (the standard library is in many packages' copies; here it is
the test set as a whole, and whatever repeats it elsewhere is dropped from training).
"""

import ast
import hashlib
import json
import multiprocessing
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path

from dqbart.data.batches import progress_bar

__all__ = ["DocstringSet", "harvest", "headline_and_body", "load_docstrings", "write_docstrings"]

HEADLINE_WORDS = (3, 20)
BODY_WORDS = (8, 120)  # a longer body is cut
VALIDATION_PERCENT, VALIDATION_MAX = 3, 1000
SKIPPED_FOLDERS = frozenset(
    "test tests testing idlelib lib2to3 site-packages dist-packages __pycache__ _vendor node_modules".split()
)

# Sections that tell nothing about what the headline says; the text is cut there.
_TAIL = re.compile(
    r"^(examples?|see also|references?|doctest\w*|todo|usage|tests?|authors?|\.\. (code|math|plot|seealso"
    r"|versionadded|versionchanged|deprecated|doctest|ipython)[^\n]*)\s*:*\s*$",
    re.IGNORECASE,
)
# Tables of parameters: cut too, unless hardly any prose stands before them.
_TABLE = re.compile(
    r"^((other |keyword )?(parameters?|params?|arg(ument)?s?)|returns?|yields?|raises?|attributes?|methods|warns|shape"
    r"|inputs?|outputs?)\s*(:|$)|^:(param|type|returns?|rtype|raises?|arg|keyword)\b|^@(param|return)",
    re.IGNORECASE,
)
_RULE = re.compile(r"^[-=~^*#+.`|_\s]{3,}$")
_SURROGATE = re.compile("[\ud800-\udfff]")
_MARKUP = [
    (re.compile(r":[a-z:]+:`~?\.?([^`<]*?)(\s*<[^`]*>)?`"), r"\1"),  # :class:`~pkg.Name`
    (re.compile(r"`([^`<]+?)\s*<[^`]*>`_+"), r"\1"),  # `text <link>`_
    (re.compile(r"\[([^\]]+)\]\([^)]*\)"), r"\1"),  # [text](link)
    (re.compile(r"\[`~?([^`]*)`\]"), r"\1"),  # [`~pkg.Name`]
    (re.compile(r"`+|\*\*|\|"), ""),
    (re.compile(r"^:(?:param|arg|keyword|raises?|returns?|rtype|type)\s*([^:]*):", re.MULTILINE), r"\1:"),
    (re.compile(r"^\.\. \w+::", re.MULTILINE), ""),
    (re.compile(r"::(?=\s|$)"), ":"),
]


@dataclass(frozen=True)
class DocstringSet:
    """Pairs of `source` (body) and `target` (headline) per split, and the training side's whole texts for denoising."""

    train: list[dict[str, str]]
    validation: list[dict[str, str]]
    test: list[dict[str, str]]
    texts: list[str]


def _plain(text: str) -> str:
    """One line without markup."""
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def _prose(text: str) -> str:
    """Drops doctests, rules, and the sections that say nothing about the headline."""
    kept: list[str] = []
    in_doctest, words, code_indent = False, 0, -1
    for line in text.splitlines():
        bare = line.strip()
        if not bare:
            in_doctest = False
            kept.append("")
            continue
        indent = len(line) - len(line.lstrip())
        if code_indent >= 0 and indent > code_indent:  # a literal block after `::`
            continue
        code_indent = -1
        if bare.startswith((">>>", "```", "$ ")):
            in_doctest = True
        if _RULE.match(bare):
            if kept and 0 < len(kept[-1].split()) <= 3:  # what it underlines is a section's title
                words -= len(kept.pop().split())
            continue
        if in_doctest:
            continue
        if _TAIL.match(bare) or (_TABLE.match(bare) and words >= BODY_WORDS[0]):
            break
        if bare.endswith("::"):
            code_indent = indent
        kept.append(bare)
        words += len(bare.split())
    return "\n".join(kept).strip()


def _sentence_like(line: str) -> bool:
    low, high = HEADLINE_WORDS
    letters = sum(char.isalpha() or char == " " for char in line)
    return (
        low <= len(line.split()) <= high
        and line[0].isalpha()
        and not line.endswith((":", ",", ";", "?"))
        and letters >= 0.8 * len(line)
        and ">>>" not in line
        and not re.match(r"\S+( \(.*\))?:", line)  # `name (type): ...` of a parameter table
        and not re.search(r"[.!?] [A-Z]", line)
    )


def headline_and_body(docstring: str) -> tuple[str, str] | None:
    """Splits a docstring into its summary line and the text under it, both on one line without markup.

    The summary is the first paragraph, or else the first line where that is a whole sentence. None where there is
    no sentence-like summary of 3 to 20 words, no body of 8 words, or the body repeats the summary word for word.
    Bodies are cut after 120 words.
    """
    text = cleandoc(docstring)
    first, _, rest = text.partition("\n\n")
    headline = _plain(first)
    if headline and not _sentence_like(headline):
        first, _, rest = text.partition("\n")
        headline = _plain(first)
        if not headline.endswith("."):
            return None
    if not headline or not _sentence_like(headline):
        return None
    words = _plain(_prose(rest)).split()
    if len(words) < BODY_WORDS[0]:
        return None
    body = " ".join(words[: BODY_WORDS[1]])
    return None if _normalised(headline) in _normalised(body) else (headline, body)


def _normalised(text: str) -> str:
    return "".join(filter(str.isalnum, text.lower()))


def _docstrings(path: Path) -> list[str]:
    """All docstrings of one file; none where it is no valid Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
        return []  # templates, Python 2 leftovers, odd encodings: not ours to mend
    found: list[str] = []
    stack: list[ast.AST] = [tree]
    while stack:  # definitions sit in statement lists only: expressions need no visit
        node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring and not _SURROGATE.search(docstring):  # those can't be written as UTF-8
                found.append(docstring)
        stack.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))
    return found


def _files(roots: Iterable[Path]) -> list[Path]:
    found: set[Path] = set()
    for root in roots:
        for folder, folders, names in os.walk(root.resolve()):
            folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
            found.update(Path(folder, name) for name in names if name.endswith(".py"))
    return sorted(found)


def harvest(roots: Iterable[str | Path], processes: int | None = None) -> list[str]:
    """All distinct docstrings of the .py files under `roots`, tests and nested site-packages left out.

    Files that can't be read or parsed are skipped. `processes` is the number of workers (all cores by default); with
    one, or where the system can't fork, the files are read in this process. Progress goes to stderr after a second.
    Raises `FileNotFoundError` for a root that is no folder.
    """
    folders = [Path(root) for root in roots]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{str(folder)!r} is not a folder: name folders that hold .py files")
    files = _files(folders)
    workers = min(processes or os.cpu_count() or 1, len(files) // 100 + 1)
    if workers == 1 or "fork" not in multiprocessing.get_all_start_methods():
        return _collect(map(_docstrings, files), len(files))
    with warnings.catch_warnings():
        # Forking beside torch's threads is warned of; the workers only parse.
        warnings.simplefilter("ignore", DeprecationWarning)
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            return _collect(pool.imap(_docstrings, files, chunksize=32), len(files))


def _collect(parts: Iterable[list[str]], total: int) -> list[str]:
    found: dict[str, None] = {}
    with progress_bar(total, "docstrings", unit="file") as bar:
        for part in parts:
            found.update(dict.fromkeys(part))
            bar.update()
    return list(found)


def _digest(text: str) -> str:
    return hashlib.sha1(_normalised(text).encode(), usedforsecurity=False).hexdigest()


def _pairs(docstrings: Iterable[str]) -> list[dict[str, str]]:
    """Pairs with distinct bodies, in the order of their hash."""
    found = {}
    for docstring in docstrings:
        if split := headline_and_body(docstring):
            headline, body = split
            found[_digest(headline + body)] = {"source": body, "target": headline}
    bodies: set[str] = set()
    distinct = []
    for _, pair in sorted(found.items()):
        key = _normalised(pair["source"])
        if key not in bodies:
            bodies.add(key)
            distinct.append(pair)
    return distinct


def load_docstrings(
    test_roots: Sequence[str | Path] | None = None,
    train_roots: Sequence[str | Path] | None = None,
    processes: int | None = None,
) -> DocstringSet:
    """Test pairs from `test_roots` (the standard library), the others from `train_roots` (site-packages).

    The same files give the same lists: order and the train / validation split (3 %, at most 1,000) follow the SHA-1
    of the letters and digits. No docstring that has a test pair's body or headline is in train or validation, nor
    in the denoising texts, which leave out all docstrings of the test folders. Raises `FileNotFoundError` for a
    missing root, `ValueError` where there is nothing to train on or to test on.
    """
    paths = sysconfig.get_paths()
    test_roots = [paths["stdlib"]] if test_roots is None else test_roots
    if train_roots is None:
        train_roots = sorted({paths["purelib"], paths["platlib"]})
    held_out = harvest(test_roots, processes)
    others = harvest(train_roots, processes)
    test = _pairs(held_out)
    seen = {_normalised(text) for pair in test for text in pair.values()}
    texts: dict[str, str] = {}
    kept: list[str] = []
    held_out_texts = {_normalised(text) for docstring in held_out for text in (docstring, _text(docstring))}
    for docstring in others:
        if seen.isdisjoint(map(_normalised, headline_and_body(docstring) or ())):
            kept.append(docstring)
            text = _text(docstring)
            if len(text.split()) >= BODY_WORDS[0] and _normalised(text) not in held_out_texts:
                texts[_digest(text)] = text
    train: list[dict[str, str]] = []
    validation: list[dict[str, str]] = []
    for pair in _pairs(kept):
        chosen = int(_digest(pair["source"] + pair["target"])[:8], 16) % 100 < VALIDATION_PERCENT
        (validation if chosen and len(validation) < VALIDATION_MAX else train).append(pair)
    for name, pairs, roots in (("train", train, train_roots), ("test", test, test_roots)):
        if not pairs:
            raise ValueError(f"no docstring pairs for {name} under {list(map(str, roots))}: name other folders")
    return DocstringSet(train, validation, test, [text for _, text in sorted(texts.items())])


def _text(docstring: str) -> str:
    """The whole docstring for denoising: one line, markup and doctests out."""
    return _plain(_prose(cleandoc(docstring)))


def write_docstrings(folder: str | Path, data: DocstringSet | None = None) -> dict[str, Path]:
    """Writes train, validation and test .jsonl (`source`, `target`) into `folder`; returns the paths by split."""
    data = data or load_docstrings()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for split in ("train", "validation", "test"):
        written[split] = folder / f"{split}.jsonl"
        lines = (json.dumps(pair, ensure_ascii=False) + "\n" for pair in getattr(data, split))
        written[split].write_text("".join(lines), encoding="utf-8")
    return written
