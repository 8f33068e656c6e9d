"""The report's plots, as PNG bytes.

Problem: one picture must do on a wide screen, on a phone, on a light page, on a dark one and in somebody's slides.
Method: narrow figures with text that survives being shrunk to 350 pixels, panels below each other instead of side by
side, a white ground of their own, colours that colour-blind readers can tell apart and a shape beside every colour.
Only matplotlib's `Figure` is used, no pyplot: nothing global, no display. Rejected: SVG (labels become markup) and a
script library (the page would need the network, or megabytes).
"""

import importlib.util
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

MIB = 2**20
INCHES, DPI = 5.0, 200  # width of every figure: its 10-point text is 9 pixels high on a phone
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B4C9A", "#7A7A7A")  # Okabe and Ito
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
FILLED: tuple[Any, ...] = ("full", "none", "left", "bottom", "right", "top")  # fill styles, the usual variant's first
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.")
USUAL = "integer, distilled"
LOW = 0.75  # of the teacher's score: what scores less would flatten everything else, and is named at the edge
OURS, PEER = "#0072B2", "#A9AEB4"
STYLE: dict[str, Any] = {
    "font.size": 10, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#666666", "axes.axisbelow": True,
    "axes.grid": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.7, "legend.frameon": False, "legend.fontsize": 9,
    "text.parse_math": False,
}  # fmt: skip
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model with its score, or the mean over several seeds of it.

    `task` names what is comparable: points of one task share teacher, data, metric and generation settings. `variant`
    is empty for what is usual (integer numerics, distilled). `interval` is the 95 % interval over test examples of the
    score, the mean over `seeds` where there are several. Scores are on the metric's own scale, sizes in bytes.
    """

    task: str
    bits: str
    layers: str
    metric: str
    score: float
    teacher_score: float
    file_bytes: int
    teacher_bytes: int | None = None
    interval: Sequence[float] | None = None
    teacher_interval: Sequence[float] | None = None
    retention_interval: Sequence[float] | None = None
    variant: str = ""
    seeds: int = 1
    name: str = ""

    @property
    def label(self) -> str:
        return ", ".join(filter(None, (f"{self.bits} bits", f"{self.layers} layers", self.variant)))

    @property
    def retention(self) -> float | None:
        """Student's score over the teacher's; None where the teacher scores nothing."""
        return self.score / self.teacher_score if self.teacher_score > 0 else None


@dataclass(frozen=True)
class Bar:
    """A measured time in milliseconds, or None and in `note` why there is none. `ours`: a dqbart engine."""

    label: str
    milliseconds: float | None
    ours: bool = False
    note: str = ""


def require_matplotlib() -> None:
    """Raises `ImportError` with the command that installs it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('matplotlib is not installed, and the report draws with it: pip install "dqbart[report]"')


def pareto(sizes_and_scores: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The pairs that no other beats, smallest first: each next one is larger and scores strictly more."""
    front: list[tuple[float, float]] = []
    for size, score in sorted(sizes_and_scores, key=lambda pair: (pair[0], -pair[1])):
        if not front or score > front[-1][1]:
            front.append((size, score))
    return front


def layer_order(layers: str) -> tuple[int, ...]:
    """Sorts `3-1` before `6-3` before `6-6` before `12-3`: by all layers, then by the encoder's."""
    counts = [int(n) for n in layers.split("-")]
    return sum(counts), *counts


def grouped(items: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """Items by key, in the order in which the keys first come."""
    found: dict[Any, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def size_quality(points: Sequence[Point]) -> bytes:
    """File size (logarithmic) against score, a panel a task: colour is bits, shape layers, filling the variant."""
    from matplotlib.lines import Line2D

    tasks = list(grouped(points, lambda p: p.task).items())
    colour = _styles({p.bits for p in points}, COLOURS, _bit_order)
    marker = _styles({p.layers for p in points}, MARKERS, layer_order)
    filled = _styles({"", *(p.variant for p in points)}, FILLED, str)

    def draw(axes: Any, number: int) -> None:
        task, members = tasks[number]
        teachers = {(p.teacher_bytes / MIB, p.teacher_score) for p in members if p.teacher_bytes}
        front = pareto([(p.file_bytes / MIB, p.score) for p in members] + sorted(teachers))
        axes.plot(*zip(*front, strict=True), color="#BBBBBB", linewidth=2, zorder=1)
        for p in members:
            axes.errorbar(
                p.file_bytes / MIB, p.score, _error(p), fmt=marker[p.layers], color=colour[p.bits], markersize=7,
                fillstyle=filled[p.variant], markerfacecoloralt="white", elinewidth=0.8, capsize=2,
            )  # fmt: skip
        for size, score in teachers:
            axes.plot(size, score, "*", color="black", markersize=12)
        axes.set_xscale("log")
        axes.set(title=task, xlabel="file, MiB (logarithmic)", ylabel=members[0].metric)
        _leave_out_low(axes, [(p, p.file_bytes / MIB) for p in members])
        _plain_numbers(axes.xaxis, [p.file_bytes / MIB for p in members] + [size for size, _ in teachers])

    keys = [Line2D([], [], marker="o", linestyle="", color=c, label=f"{b} bits") for b, c in colour.items()]
    keys += [Line2D([], [], marker=m, linestyle="", color="#666666", label=f"{n} layers") for n, m in marker.items()]
    keys += [
        Line2D([], [], marker="o", linestyle="", color="#666666", markerfacecoloralt="white", fillstyle=f, label=v)
        for v, f in filled.items()
        if v
    ]
    keys.append(Line2D([], [], color="#BBBBBB", linewidth=2, label="Pareto line"))
    if any(p.teacher_bytes for p in points):
        keys.append(Line2D([], [], marker="*", linestyle="", color="black", markersize=10, label="teacher, fp32"))
    return _png([3.2] * len(tasks), draw, keys)


def score_grid(points: Sequence[Point]) -> bytes:
    """Score by layers, a line for each width and variant (dashes, filling), a panel a task; the teacher in black."""
    from matplotlib.lines import Line2D

    tasks = list(grouped(points, lambda p: p.task).items())
    colour = _styles({p.bits for p in points}, COLOURS, _bit_order)
    dash = _styles({p.variant for p in points}, DASHES, str)
    filled = _styles({"", *(p.variant for p in points)}, FILLED, str)
    columns = sorted({p.layers for p in points}, key=layer_order)
    lines = sorted({(p.bits, p.variant) for p in points})

    def draw(axes: Any, number: int) -> None:
        task, members = tasks[number]
        places: list[tuple[Point, float]] = []
        for number, (bits, variant) in enumerate(lines):
            row = [p for p in members if (p.bits, p.variant) == (bits, variant)]
            row.sort(key=lambda p: columns.index(p.layers))
            shift = 0.05 * (number - (len(lines) - 1) / 2)  # so that intervals don't hide each other
            xs = [columns.index(p.layers) + shift for p in row]
            for x, p in zip(xs, row, strict=True):
                axes.errorbar(
                    x, p.score, _error(p), fmt="o", color=colour[bits], markersize=6, fillstyle=filled[variant],
                    markerfacecoloralt="white", elinewidth=1, capsize=2,
                )  # fmt: skip
            axes.plot(xs, [p.score for p in row], dash[variant], color=colour[bits])
            places += zip(row, xs, strict=True)
        axes.axhline(members[0].teacher_score, color="black", linewidth=1.2, linestyle=(0, (5, 3)))
        axes.set_xticks(range(len(columns)), columns)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set(title=task, xlabel="layers", ylabel=members[0].metric)
        _leave_out_low(axes, places)

    keys = [Line2D([], [], color=c, marker="o", markersize=5, label=f"{b} bits") for b, c in colour.items()]
    if len(dash) > 1:
        keys += [
            Line2D([], [], color="#666666", linestyle=d, marker="o", fillstyle=filled[v], markerfacecoloralt="white",
                   label=v or USUAL)
            for v, d in dash.items()
        ]  # fmt: skip
    keys.append(Line2D([], [], color="black", linestyle=(0, (5, 3)), label="teacher"))
    return _png([3.0] * len(tasks), draw, keys)


def latency(panels: Sequence[tuple[str, Sequence[Bar]]]) -> bytes:
    """Median times as bars, a panel a setting, fastest on top; what has no time keeps its line, with the reason."""

    def draw(axes: Any, number: int) -> None:
        title, bars = panels[number]
        bars = sorted(bars, key=lambda b: (b.milliseconds is None, b.milliseconds or 0.0))
        times = [b.milliseconds or 0.0 for b in bars]
        axes.barh(range(len(bars)), times, color=[OURS if b.ours else PEER for b in bars], height=0.7)
        for place, bar in enumerate(bars):
            text = f" {time_text(bar.milliseconds)}" if bar.milliseconds is not None else f" no time: {bar.note[:36]}"
            axes.text(times[place], place, text, va="center", fontsize=9)
        axes.set_yticks(range(len(bars)), [_short(b.label) for b in bars], fontsize=9)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_xlim(0, 1.3 * max(times) or 1)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="y", visible=False)
        axes.set(title=title, xlabel="milliseconds, median (shorter is faster)" if number == len(panels) - 1 else None)

    from matplotlib.patches import Patch

    keys = [Patch(color=OURS, label="dqbart"), Patch(color=PEER, label="what people use today")]
    return _png([0.7 + 0.26 * len(bars) for _, bars in panels], draw, keys)


def sensitivity(panels: Sequence[tuple[str, Sequence[tuple[str, float]]]], unit: str) -> bytes:
    """What it costs (`unit`) when only that part is quantized, the worst on top, a panel for each width."""

    def draw(axes: Any, number: int) -> None:
        title, rows = panels[number]
        axes.barh(range(len(rows)), [drop for _, drop in rows], color=[_stack_colour(name) for name, _ in rows])
        axes.set_yticks(range(len(rows)), [_short(name) for name, _ in rows], fontsize=8)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.axvline(0, color="#666666", linewidth=0.8)
        axes.grid(axis="y", visible=False)
        axes.set(title=title, xlabel=unit if number == len(panels) - 1 else None)

    from matplotlib.patches import Patch

    names = ("encoder", "decoder", "embeddings and head")
    keys = [Patch(color=_stack_colour(name), label=name) for name in names]
    return _png([0.8 + 0.2 * len(rows) for _, rows in panels], draw, keys)


def time_text(milliseconds: float) -> str:
    """`3.4 ms`, `41 ms`, `2.30 s`, `12.5 s`."""
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:.{2 if milliseconds < 10_000 else 1}f} s"
    return f"{milliseconds:.0f} ms" if milliseconds >= 10 else f"{milliseconds:.2g} ms"


def _short(label: str) -> str:
    """A label that leaves room for its bar."""
    return label if len(label) <= 36 else f"{label[:22]} … {label[-10:]}"


def _stack_colour(module: str) -> str:
    # the decoder first: its layers have an `encoder_attn`
    return COLOURS[1] if "decoder" in module else COLOURS[0] if "encoder" in module else COLOURS[2]


def _bit_order(bits: str) -> list[int]:
    return [-int(n) for n in bits.split("-")]


def _styles(values: Iterable[str], styles: Sequence[T], order: Callable[[str], Any]) -> dict[str, T]:
    """One style for each value; they repeat where there are more values than styles."""
    return {value: styles[i % len(styles)] for i, value in enumerate(sorted(values, key=order))}


def _error(point: Point) -> list[list[float]] | None:
    if point.interval is None:
        return None
    low, high = point.interval
    return [[max(0.0, point.score - low)], [max(0.0, high - point.score)]]


def _leave_out_low(axes: Any, places: Sequence[tuple[Point, float]]) -> None:
    """Fit the scale to what keeps `LOW` of the teacher's score; the rest is an arrow and a number at the lower edge."""
    low = [(p, x) for p, x in places if p.retention is not None and p.retention < LOW]
    kept = [pair for pair in places if pair not in low]
    if not low or not kept:
        return
    bounds = [value for p, _ in kept for value in (p.score, p.teacher_score, *(p.interval or ()))]
    span = max(bounds) - min(bounds) or 1.0
    axes.set_ylim(min(bounds) - 0.3 * span, max(bounds) + 0.1 * span)
    for number, (p, x) in enumerate(low):
        at = 0.02 + 0.07 * (number % 3)
        axes.text(x, at, f"↓ {p.score:.1f}", transform=axes.get_xaxis_transform(), ha="center", fontsize=8)


def _plain_numbers(axis: Any, values: Sequence[float]) -> None:
    """Sizes as people write them, instead of powers of ten: 1, 2, 5, 10, ..."""
    from matplotlib.ticker import NullFormatter, NullLocator

    steps = [m * 10**e for e in range(-4, 7) for m in (1, 2, 5)]
    low, high = min(values) / 1.3, max(values) * 1.3
    ticks = [s for s in steps if low <= s <= high]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.axes.set_xlim(low, high)


def _png(heights: list[float], draw: Callable[[Any, int], None], keys: list[Any]) -> bytes:
    """A column of panels of these heights (inches), the legend below."""
    from matplotlib import style
    from matplotlib.figure import Figure

    legend = 0.24 * -(-len(keys) // 3) + 0.1
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(INCHES, sum(heights) + legend), layout="constrained")
        panels = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
        for number, axes in enumerate(panels):
            draw(axes, number)
        figure.legend(handles=keys, loc="outside lower center", ncols=min(3, len(keys)))
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=DPI)
    return stream.getvalue()
