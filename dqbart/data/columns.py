"""Which column is the source, which the target, and the texts in them.

Names are guessed from what public data sets call them, among columns that hold text; the guess is a
value that prints as one line, so that the user sees it and can override it. Where names say nothing
we ask instead of taking the first two columns, as the transformers examples do: an id column would
then be trained on in silence.
"""

import difflib
import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

from dqbart.data.labels import ClassName

# In order of preference: where a row has both, `article` is the source and `abstract` the target.
SOURCE_NAMES = (
    "source", "src", "source_text", "document", "article", "dialogue", "input", "inputs",
    "input_text", "text", "body", "content", "abstract", "passage", "context", "sentence", "complex",
    "question", "prompt",
)  # fmt: skip
TARGET_NAMES = (
    "target", "tgt", "target_text", "summary", "highlights", "tldr", "title", "headline", "output",
    "outputs", "output_text", "translation", "abstract", "simple", "answer", "completion",
    "response", "question", "reference",
)  # fmt: skip
REFERENCE_NAMES = ("references", "refs", "reference")
# As column names; "id" (Indonesian) is left out, for that is what id columns are called.
LANGUAGES = frozenset(
    "af ar az bg bn ca cs da de el en es et eu fa fi fr gl gu he hi hr hu hy is it ja ka kk km ko "
    "lt lv mk ml mn mr my nb ne nl no pl ps pt ro ru si sk sl sq sr sv sw ta te th tl tr uk ur vi xh zh".split()
)

VARIANT_OF = "variant_of"  # what augmentation adds to a row: the text that it was made of. No column to learn from

_LOOK = 100  # rows looked at for the guess


@dataclass(frozen=True)
class Columns:
    """Columns in use; `a.b` is key b of the dict in column a. `str()` is a line to print."""

    source: str
    target: str | None = None
    references: str | None = None
    guessed: bool = False

    def __str__(self) -> str:
        target = f"target {self.target!r}" if self.target else "no target"
        references = f", references {self.references!r}" if self.references else ""
        how = " (guessed; change with --source-column, --target-column)" if self.guessed else ""
        return f"columns: source {self.source!r}, {target}{references}{how}"


@dataclass(frozen=True)
class Examples:
    """Texts ready for encoding: lists of one length, `None` where the data has no such column.

    `references[i]` are all accepted outputs of example i; `skipped` counts rows that were left out
    because their source or target was empty.
    """

    sources: list[str]
    targets: list[str] | None = None
    references: list[list[str]] | None = None
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.sources)

    def select(self, indices: Iterable[int]) -> "Examples":
        """The examples at `indices`, in that order."""
        chosen = list(indices)
        return Examples(
            [self.sources[i] for i in chosen],
            None if self.targets is None else [self.targets[i] for i in chosen],
            None if self.references is None else [self.references[i] for i in chosen],
        )


def guess_columns(
    rows: Sequence[dict[str, Any]],
    source: str | None = None,
    target: str | None = None,
    *,
    source_lang: str | None = None,
    target_lang: str | None = None,
) -> Columns:
    """Find the columns in `rows`, keeping the names that are given.

    Language codes (`en_XX` or `en`) find columns called `en` and `de`, alone or inside
    `{"translation": {...}}`; without codes English is taken as the source. A target column that
    holds lists of strings gives references. Raises `ValueError` for a name that isn't there, and
    where no source can be told.
    """
    kinds = column_kinds(rows)
    for name, flag in ((source, "--source-column"), (target, "--target-column")):
        if name is not None:
            check_column(name, flag, kinds)
    if source is not None and source == target:
        raise ValueError(f"column {source!r} is given as source and as target; they must differ")
    guessed = source is None or target is None

    texts = [name for name, kind in kinds.items() if kind is str]
    lower = {name.lower(): name for name in reversed(texts)}
    source_like = [lower[name] for name in SOURCE_NAMES if name in lower]
    target_like = [lower[name] for name in TARGET_NAMES if name in lower]
    pair = _language_columns(texts, source_lang, target_lang)
    if pair and source in (None, pair[0]) and target in (None, pair[1]):
        if source_lang and target_lang:  # named by the user, so worth more than a column called "source"
            source_like, target_like = [pair[0]], [pair[1]]
        else:
            source_like, target_like = [*source_like, pair[0]], [*target_like, pair[1]]
    if source is None:
        others = [name for name in texts if name != target]
        source = next((name for name in source_like if name != target), None)
        if source is None:
            if len(others) != 1:
                raise ValueError(f"no source column recognised among {column_names(kinds)}; give --source-column")
            source = others[0]
    if target is None:
        target = next((name for name in target_like if name != source), None)
    lists = {name.lower(): name for name, kind in kinds.items() if kind is list}
    references = next((lists[n] for n in REFERENCE_NAMES if n in lists), None)
    if target is not None and kinds[target] is list:
        target, references = None, target
    elif target is None and references is None:
        references = next((lists[n] for n in TARGET_NAMES if n in lists), None)
    return Columns(source, target, references, guessed)


def read_examples(rows: Sequence[dict[str, Any]], columns: Columns) -> Examples:
    """The texts of `columns`, in the order of the rows.

    Rows whose source or target is empty (missing value, empty or white space) are left out and
    counted. Where there are references but no target, the first reference is the target. Raises
    `ValueError` with the row number for anything else than text, and if no row is left.
    """
    sources: list[str] = []
    targets: list[str] = []
    references: list[list[str]] = []
    for number, row in enumerate(rows, 1):
        source = read_text(row, columns.source, number)
        accepted = _texts(row, columns.references, number) if columns.references else []
        target = read_text(row, columns.target, number) if columns.target else (accepted or [""])[0]
        if not source or (not target and (columns.target or columns.references)):
            continue
        sources.append(source)
        targets.append(target)
        references.append(accepted or [target])
    if not sources:
        raise ValueError(f"{columns}: all {len(rows)} rows are empty there")
    has_target = columns.target or columns.references
    return Examples(
        sources,
        targets if has_target else None,
        references if columns.references else None,
        len(rows) - len(sources),
    )


class Splittable(Protocol):
    """What `hold_out` can divide: examples with a source text each."""

    @property
    def sources(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def select(self, indices: Iterable[int]) -> Self: ...


S = TypeVar("S", bound=Splittable)


def hold_out(examples: S, count: int) -> tuple[S, S]:
    """Split off about `count` examples: (rest, held out), both in file order.

    Examples go by the hash of their source, so equal sources stay together, no seed is needed, and
    adding rows to a file moves few examples across. Raises `ValueError` where nothing would be left on one side.
    """
    held = _by_hash(examples, count)
    if not 0 < len(held) < len(examples):
        raise ValueError(
            f"can't hold out {count} of {len(examples)} examples ({len({*examples.sources})} different sources, equal "
            "ones together); give --dev-data"
        )
    rest = sorted(set(range(len(examples))).difference(held))
    return examples.select(rest), examples.select(held)


def sample(examples: S, count: int | None) -> S:
    """`count` examples chosen as `hold_out` does, in file order; all where there are no more, or `count` is None.

    The first rows of a file are no sample of a set that is sorted by class, length or document. Raises `ValueError`
    for a count below 1.
    """
    if count is not None and count < 1:
        raise ValueError(f"a sample of {count} examples: expected at least 1")
    if count is None or count >= len(examples):
        return examples
    return examples.select(_by_hash(examples, count, whole=False))


def _by_hash(examples: Splittable, count: int, *, whole: bool = True) -> list[int]:
    """`whole`: equal sources all or none, and none that would make it more than twice `count`; else just `count`."""
    by_hash: dict[bytes, list[int]] = {}
    for index, source in enumerate(examples.sources):
        by_hash.setdefault(hashlib.sha256(source.encode()).digest(), []).append(index)
    held: list[int] = []
    most = max(2 * count, min(map(len, by_hash.values()), default=0))  # one of them, if all are large
    for key in sorted(by_hash):
        if len(held) >= count:
            break
        if not whole or len(held) + len(by_hash[key]) <= most:
            held += by_hash[key]
    return sorted(held if whole else held[:count])


def check_column(name: str, flag: str, kinds: Collection[str]) -> None:
    """Raise `ValueError` for a column that isn't there; `flag` is how the user gave it."""
    if name not in kinds:
        close = difflib.get_close_matches(name, kinds, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"column {name!r} ({flag}) is not in the data, which has {column_names(kinds)}{hint}")


def column_kinds(rows: Sequence[dict[str, Any]]) -> dict[str, type]:
    """Column -> str, list (of str), or object, by the first rows; dicts are opened one level, as `column.key`."""
    kinds: dict[str, type] = {}
    for row in rows[:_LOOK]:
        flat: dict[str, Any] = {}
        for name, value in row.items():
            flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
        flat.pop(VARIANT_OF, None)
        for name, value in flat.items():
            if value is None or value == "" or value == []:
                kinds.setdefault(name, object)
            elif kinds.get(name, object) is object:
                is_list = isinstance(value, list) and all(isinstance(v, str) for v in value)
                is_text = isinstance(value, str) and not isinstance(value, ClassName)
                kinds[name] = str if is_text else list if is_list else object
    return kinds


def _language_columns(names: Sequence[str], source_lang: str | None, target_lang: str | None) -> tuple[str, str] | None:
    """Columns named after languages, as (source, target); `None` unless there is one clear pair."""
    found = {name.rpartition(".")[2].lower(): name for name in names if _is_language(name)}
    if source_lang and target_lang:
        codes = (source_lang.lower(), target_lang.lower())
        first, second = (found.get(code) or found.get(code.partition("_")[0]) for code in codes)
        return (first, second) if first and second and first != second else None
    if len(found) != 2:
        return None
    one, two = sorted(found, key=lambda code: code != "en")  # stable: otherwise the order of the data
    return found[one], found[two]


def _is_language(name: str) -> bool:
    column, dot, code = name.rpartition(".")
    return code.lower().partition("_")[0] in LANGUAGES or (bool(dot) and column == "translation")


def read_value(row: dict[str, Any], name: str) -> Any:
    """What `row` has in column `name`, which may be `column.key`; `None` where it has nothing."""
    if name in row:
        return row[name]
    column, _, key = name.partition(".")
    inner = row.get(column)
    return inner.get(key) if isinstance(inner, dict) else None


def read_text(row: dict[str, Any], name: str, number: int) -> str:
    """The text in column `name`, empty where there is none; `ValueError` with the row number for anything else."""
    value = read_value(row, name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"row {number}: column {name!r} holds {type(value).__name__}, expected text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON's \ud800 makes one; tokenizers can't take it
            raise ValueError(
                f"row {number}: column {name!r} has half a surrogate pair at character {error.start}; replace it"
            ) from None
    return value if value.strip() else ""


def _texts(row: dict[str, Any], name: str, number: int) -> list[str]:
    value = read_value(row, name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"row {number}: column {name!r} holds {value!r:.60}, expected a list of texts")
    return [text for text in value if text.strip()]


def column_names(columns: Iterable[str]) -> str:
    """Column names in quotes, for messages."""
    return ", ".join(map(repr, columns))
