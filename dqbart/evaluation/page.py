"""One HTML page that needs nothing else: sections in, a string out.

The page knows nothing of models. Whatever it is given is text and is escaped; outputs of a model may well contain
`<script>`. A content security policy forbids what a mistake here would let through: scripts and everything that is
not in the page itself. Plots are data URIs. Rejected: a template library, for one page with five kinds of blocks.
"""

import base64
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Fact:
    """One of the three numbers of the first screen: `17.8 x` `smaller than ...`, and where it comes from.

    Without a `value` it was not measured, and the note says what would.
    """

    value: str
    what: str
    note: str


@dataclass(frozen=True)
class Table:
    """Rows of values; None becomes an empty cell. With a `summary` it is folded away behind that line.

    `wrap` breaks long values of the last column into lines, otherwise the table scrolls in a narrow window.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    summary: str = ""
    wrap: bool = False


@dataclass(frozen=True)
class Picture:
    """A plot, drawn when the page is written; `name` is its file's, `alt` says what is to be seen."""

    name: str
    alt: str
    draw: Callable[[], bytes]


@dataclass(frozen=True)
class Example:
    """What was read, what a person wrote, and what the two models did."""

    source: str
    reference: str
    teacher: str
    student: str


Block = str | Table | Picture | Example  # a str is a paragraph, `code` between backticks


@dataclass(frozen=True)
class Section:
    """`missing`: why there is nothing to show and what would make it, then there are no blocks."""

    title: str
    blocks: Sequence[Block] = ()
    missing: str = ""


@dataclass(frozen=True)
class Page:
    title: str
    lead: str
    facts: Sequence[Fact]
    sections: Sequence[Section]
    foot: str = ""


def write(page: Page, out: Path) -> list[Path]:
    """Write `out` and its plots as `NAME-plots/*.png`; returns the plots' files.

    Raises `ValueError` if `out` is a folder, `OSError` if it can't be written.
    """
    if out.is_dir():
        raise ValueError(f"--out {str(out)!r}: that is a folder; expected a file to write, such as report.html")
    folder = out.with_name(f"{out.stem}-plots")
    folder.mkdir(parents=True, exist_ok=True)
    images, files = {}, []
    for picture in (block for s in page.sections for block in s.blocks if isinstance(block, Picture)):
        images[picture.name] = picture.draw()
        files.append(folder / f"{picture.name}.png")
        files[-1].write_bytes(images[picture.name])
    out.write_text(render(page, images), encoding="utf-8")
    return files


def render(page: Page, images: Mapping[str, bytes]) -> str:
    """The page as HTML; `images` are PNG bytes by the pictures' names."""
    facts = "".join(
        f'<div class="fact">{f"<b>{escape(f.value)}</b>" if f.value else "<i>not measured</i>"}'
        f"<span>{escape(f.what)}</span><p>{_text(f.note)}</p></div>"
        for f in page.facts
    )
    shown = "".join(
        f"<section><h2>{escape(s.title)}</h2>{''.join(_block(b, images) for b in s.blocks)}</section>"
        for s in page.sections
        if s.blocks
    )
    missing = "".join(f"<li><b>{escape(s.title)}.</b> {_text(s.missing)}</li>" for s in page.sections if not s.blocks)
    if missing:
        shown += f'<section><h2>Not measured here</h2><ul class="missing">{missing}</ul></section>'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(page.title)}</title><style>{CSS}</style></head>\n<body><main>"
        f'<header><h1>{escape(page.title)}</h1><p class="lead">{_text(page.lead)}</p></header>'
        f'<div class="facts">{facts}</div>{shown}<footer><p>{_text(page.foot)}</p></footer></main></body></html>\n'
    )


def _block(block: Block, images: Mapping[str, bytes]) -> str:
    if isinstance(block, str):
        return f"<p>{_text(block)}</p>"
    if isinstance(block, Picture):
        data = base64.b64encode(images[block.name]).decode()
        return f'<figure><img src="data:image/png;base64,{data}" alt="{escape(block.alt)}"></figure>'
    if isinstance(block, Table):
        return _table(block)
    return _example(block)


def _table(table: Table) -> str:
    """Columns whose every value starts like a number are set to the right. A narrow window scrolls it by itself."""
    columns = range(len(table.header))
    right = {c for c in columns if all(re.match(r"[-\d]|$", _cell(row[c])) for row in table.rows)}
    kind = {c: ' class="n"' if c in right else "" for c in columns}
    head = "".join(f'<th scope="col"{kind[c]}>{escape(table.header[c])}</th>' for c in columns)
    body = "".join(
        "<tr>" + "".join(f"<td{kind[c]}>{escape(_cell(row[c]))}</td>" for c in columns) + "</tr>" for row in table.rows
    )
    wrap = ' class="wrap"' if table.wrap else ""
    html = f"<table{wrap}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    html = f'<div class="scroll" tabindex="0">{html}</div>'
    return f"<details><summary>{escape(table.summary)}</summary>{html}</details>" if table.summary else html


def _cell(value: Any) -> str:
    return "" if value is None else str(value)


def _example(example: Example) -> str:
    source = escape(example.source)
    if len(example.source) > 300:
        source = f"<details><summary>{escape(example.source[:280])} …</summary>{source}</details>"
    student = _compared(example.teacher, example.student)
    rows = {"source": source, "reference": escape(example.reference), "teacher": escape(example.teacher)}
    rows["this model"] = student
    pairs = "".join(f"<dt>{who}</dt><dd>{text or '<i>nothing</i>'}</dd>" for who, text in rows.items())
    return f'<dl class="example">{pairs}</dl>'


def _compared(teacher: str, student: str) -> str:
    """The student's text, escaped, the words marked that the teacher does not have there."""
    ours = student.split()
    steps = difflib.SequenceMatcher(None, teacher.split(), ours, autojunk=False).get_opcodes()
    parts = []
    for kind, _, _, start, end in steps:
        words = escape(" ".join(ours[start:end]))
        parts.append(words if kind == "equal" else f"<mark>{words}</mark>" if words else "")
    return " ".join(filter(None, parts))


def _text(text: str) -> str:
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


CSS = """
:root { color-scheme: light dark; --ground: #fbfaf8; --card: #fff; --ink: #1d2125; --soft: #5c646c; --line: #e0ddd8;
  --accent: #005a8f; --mark: #fbe3b5 }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171a; --card: #1c2024; --ink: #e6e4e0; --soft: #a0a8b0; --line: #343a40; --accent: #7cc4f2;
    --mark: #5c4713 }
}
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 3rem }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; letter-spacing: -.01em; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 0 0 .5rem }
section { margin-top: 3rem }
p { margin: 0 0 .8rem; max-width: 42rem; overflow-wrap: anywhere }
.lead { color: var(--soft); margin: .5rem 0 0 }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1rem; margin-top: 1.75rem }
.fact { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.15rem }
.fact i { display: block; font-size: 1.35rem; line-height: 1.7; color: var(--soft); font-style: normal }
.fact b { display: block; font-size: 2rem; line-height: 1.15; font-weight: 650; color: var(--accent) }
.fact span { display: block; font-weight: 600; line-height: 1.35 }
.fact p { margin: .45rem 0 0; font-size: .85rem; line-height: 1.45; color: var(--soft) }
figure { margin: 1rem 0; max-width: 38rem; background: #fff; border: 1px solid var(--line); border-radius: .6rem;
  padding: .6rem }
img { display: block; width: 100%; height: auto }
.scroll { overflow-x: auto; margin: .75rem 0 1rem; border: 1px solid var(--line); border-radius: .6rem;
  background: var(--card) }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .8rem; text-align: left; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line) }
td { max-width: 34rem }
tbody tr:last-child td { border-bottom: 0 }
th { color: var(--soft); font-weight: 600 }
.n { text-align: right }
.wrap td:last-child { white-space: normal; overflow-wrap: anywhere; min-width: 14rem }
details > summary { cursor: pointer; color: var(--accent) }
.example { margin: 0 0 1rem; padding: .9rem 1.1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; display: grid; grid-template-columns: 7rem 1fr; gap: .3rem .9rem }
.example dt { color: var(--soft); font-size: .85rem; padding-top: .1rem; overflow-wrap: anywhere }
.example dd { margin: 0; min-width: 0; overflow-wrap: anywhere }
.example dd summary { color: inherit }
mark { background: var(--mark); color: inherit; border-radius: .2rem; padding: 0 .1rem }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere }
.missing { padding-left: 1.1rem; max-width: 42rem }
.missing li { margin-bottom: .6rem }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--soft); font-size: .85rem }
@media (max-width: 560px) {
  main { padding: 1.5rem 1rem 2rem }
  section { margin-top: 2.25rem }
  .example { display: block }
  .example dt { padding: 0 }
  .example dd { margin-bottom: .6rem }
}
"""
