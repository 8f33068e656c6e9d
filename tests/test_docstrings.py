"""The docstring set on a tiny tree of files: what becomes a pair, what is dropped, where it goes."""

import json
import sys
from pathlib import Path

import pytest

from dqbart.data import docstrings
from dqbart.data.docstrings import DocstringSet, harvest, headline_and_body, load_docstrings, write_docstrings

BODY = "The handler is called once per record, with the lock held, and must not raise."


def module(*texts: str) -> str:
    """Python source with one function per docstring."""
    return "\n".join(f"def f{i}():\n    {text!r}\n" for i, text in enumerate(texts))


def pair_text(name: str) -> str:
    return (
        f"Return the {name} of the given table.\n\nLooks at every row of {name} once and keeps the largest value found."
    )


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, Path]:
    """(held out, others): one held-out pair, and 200 other ones over two files."""
    held, others = tmp_path / "stdlib", tmp_path / "packages"
    held.mkdir()
    (others / "deep" / "er").mkdir(parents=True)
    (held / "a.py").write_text(module(f"Call the handler for each record.\n\n{BODY}"))
    (others / "b.py").write_text(module(*(pair_text(f"column{i}") for i in range(100))))
    (others / "deep" / "er" / "c.py").write_text(module(*(pair_text(f"column{i}") for i in range(100, 200))))
    return held, others


def load(roots: tuple[Path, Path]) -> DocstringSet:
    return load_docstrings([roots[0]], [roots[1]], processes=1)


def add(root: Path, *texts: str) -> None:
    (root / "added.py").write_text(module(*texts))


@pytest.mark.parametrize(
    ("docstring", "headline"),
    [
        (f"Call the handler.\n\n{BODY}", "Call the handler."),
        (f"\n    Call the handler\n    of each record.\n\n    {BODY}\n    ", "Call the handler of each record."),
        (f"Call the handler.\n{BODY}", "Call the handler."),  # no empty line, but a whole sentence
        (f"Call :meth:`~logging.Handler.handle` with ``None``.\n\n{BODY}", "Call logging.Handler.handle with None."),
        (f"{'word ' * 19}end.\n\n{BODY}", f"{'word ' * 19}end."),
    ],
)
def test_headline(docstring: str, headline: str) -> None:
    assert headline_and_body(docstring) == (headline, BODY)


@pytest.mark.parametrize(
    "docstring",
    [
        "",
        "   \n\n  ",
        "Call the handler.",
        f"Call handler.\n\n{BODY}",  # two words
        f"{'word ' * 20}end.\n\n{BODY}",  # 21
        f"Arguments of this call are:\n\n{BODY}",
        f"handler (callable): what is called\n\n{BODY}",
        f"First do this. Then do that.\n\n{BODY}",
        f">>> call the handler\n\n{BODY}",
        f"x_1 = 2 * 3 + 4 / 5\n\n{BODY}",
        "Call the handler.\n\nIt must not raise, at all.",  # six words
        f"Call the handler.\n\n{BODY} Call  the\nhandler.",  # the body has the headline
        f"Call the handler.\n\n{BODY} ``call the HANDLER!``",
        "Call the handler.\n\n>>> one two three four five six seven eight\nnine ten eleven",
    ],
)
def test_no_pair(docstring: str) -> None:
    assert headline_and_body(docstring) is None


@pytest.mark.parametrize(
    ("rest", "body"),
    [
        (f"{BODY}\n\n>>> call(1)\n1\n\nThen it stops.", f"{BODY} Then it stops."),
        (f"{BODY}\n\nParameters\n----------\nx : int\n    The number.", BODY),
        (f"{BODY}\n\nArgs:\n    x (int): The number.", BODY),
        (f"{BODY}\n\n:param x: the number", BODY),
        (f"{BODY}\n\nSee Also\n========\nother : something else", BODY),
        (f"{BODY}\n\nNotes\n-----\nIt is slow.", f"{BODY} It is slow."),
        (f"{BODY} As in::\n\n    call(1)\n    call(2)\n\nand so on.", f"{BODY} As in: and so on."),
        (
            "Args:\n  x: The number that is counted down to\n  y: zero",
            "Args: x: The number that is counted down to y: zero",
        ),
        (f"See `the manual <https://example.org>`_. {BODY}", f"See the manual. {BODY}"),
    ],
)
def test_body_without_noise(rest: str, body: str) -> None:
    assert headline_and_body(f"Call the handler.\n\n{rest}") == ("Call the handler.", body)


def test_long_body_is_cut() -> None:
    split = headline_and_body("Call the handler.\n\n" + "word " * 1000)
    assert split is not None and len(split[1].split()) == 120


def test_harvest_skips_what_is_no_python(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(
        '"""One."""\nclass A:\n    "Two."\n    async def f(self):\n        "Three."\n        "No."\n'
    )
    (tmp_path / "nested.py").write_text(
        "if True:\n    try:\n        def f():\n            'Four.'\n    finally:\n        pass\n"
    )
    (tmp_path / "syntax.py").write_text('"""Lost."""\nprint "python 2"\n')
    (tmp_path / "bytes.py").write_bytes(b'"""Lost \xff."""\n')
    (tmp_path / "null.py").write_bytes(b'"""Lost."""\0')
    (tmp_path / "latin.py").write_bytes('# coding: latin-1\n"""Fünf."""\n'.encode("latin-1"))
    (tmp_path / "surrogate.py").write_text('"""Lost \\ud800."""\n')
    (tmp_path / "deep.py").write_text("x = " + "(" * 5000 + ")" * 5000)
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    (tmp_path / "notes.txt").write_text('"""Lost."""')
    for folder in ("tests", "site-packages"):
        (tmp_path / "sub" / folder).mkdir(parents=True)
        (tmp_path / "sub" / folder / "x.py").write_text('"""Lost."""')
    assert set(harvest([tmp_path], processes=1)) == {"One.", "Two.", "Three.", "Four.", "Fünf."}


def test_nothing_is_imported(tmp_path: Path) -> None:
    (tmp_path / "harmful.py").write_text('"""Text."""\nraise SystemExit(3)\n')
    assert harvest([tmp_path], processes=1) == ["Text."]
    assert "harmful" not in sys.modules


def test_splits(roots: tuple[Path, Path]) -> None:
    data = load(roots)
    assert data.test == [{"source": BODY, "target": "Call the handler for each record."}]
    assert len(data.train) + len(data.validation) == len(data.texts) == 200
    assert 0 < len(data.validation) < 20
    assert all(text.startswith("Return the column") for text in data.texts)


def test_validation_is_capped(roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "VALIDATION_MAX", 1)
    data = load(roots)
    assert (len(data.train), len(data.validation)) == (199, 1)


@pytest.mark.parametrize(
    "text",
    [
        f"Call the handler for each record.\n\n{BODY}",
        f"call THE handler, for each record\n\n{BODY.replace(' ', '  ')}",
        f"Something quite different here.\n\n{BODY}",
        "Call the handler for each record.\n\nThe words below it are others, and there are enough of them.",
    ],
)
def test_what_repeats_the_test_set_is_dropped(roots: tuple[Path, Path], text: str) -> None:
    before = load(roots)
    add(roots[1], text)
    assert load(roots) == before


def test_a_held_out_text_without_pair_is_no_denoising_text(roots: tuple[Path, Path]) -> None:
    before = load(roots)
    for root in roots:
        add(root, "This is one line alone, that has no body and more than eight words.")
    assert load(roots) == before


def test_repeats_are_kept_once(roots: tuple[Path, Path]) -> None:
    before = load(roots)
    add(roots[1], pair_text("column7"), pair_text("Column7").replace(".", " !"))
    after = load(roots)
    assert (len(after.train), len(after.validation)) == (len(before.train), len(before.validation))
    assert len(after.texts) == len(before.texts)


def test_same_body_gives_one_pair(roots: tuple[Path, Path]) -> None:
    before = load(roots)
    body = "A body that two headlines share, which can't both be the answer to it."
    add(roots[1], f"The first of them.\n\n{body}", f"The second of them.\n\n{body}")
    after = load(roots)
    assert len(after.train) + len(after.validation) == len(before.train) + len(before.validation) + 1


def test_order_does_not_depend_on_files(roots: tuple[Path, Path]) -> None:
    before = load(roots)
    moved = roots[1].parent / "elsewhere"
    moved.mkdir()
    for name, path in (("z.py", roots[1] / "b.py"), ("a.py", roots[1] / "deep" / "er" / "c.py")):
        (moved / name).write_bytes(path.read_bytes())
    assert load((roots[0], moved)) == before


def test_processes_change_nothing(roots: tuple[Path, Path]) -> None:
    for i in range(150):  # enough files for a second process
        (roots[1] / f"many{i}.py").write_text(module(pair_text(f"row{i}")))
    assert load_docstrings([roots[0]], [roots[1]], processes=2) == load(roots)


def test_written_files(roots: tuple[Path, Path], tmp_path: Path) -> None:
    add(roots[0], "Réturn the “quoted” text.\n\nNothing here is plain ASCII — not even this line, as you see.")
    data = load(roots)
    folder = tmp_path / "new" / "data"
    paths = write_docstrings(folder, data)
    assert list(paths) == ["train", "validation", "test"]
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(first) == {"train.jsonl", "validation.jsonl", "test.jsonl"}
    for split, path in paths.items():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert rows == getattr(data, split)
    write_docstrings(folder, load(roots))
    assert first == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_bad_roots(roots: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.* is not a folder"):
        harvest([tmp_path / "nowhere"])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no docstring pairs for train under .*empty"):
        load((roots[0], empty))
    with pytest.raises(ValueError, match="no docstring pairs for test under .*empty"):
        load((empty, roots[1]))
