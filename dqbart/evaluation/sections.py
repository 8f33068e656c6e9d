"""Data to sections of the report: pure functions, no matplotlib, no HTML, no files.

What is drawn comes from two places, report.json of packed folders and the ledgers of benchmarks/; both turn their rows
into `Point`s and latency rows, and from there on they are the same. A section without data is still a section: it says
what would make it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from dqbart.evaluation import plots
from dqbart.evaluation.page import Block, Fact, Picture, Section, Table
from dqbart.evaluation.plots import MIB, USUAL, Bar, Point, grouped, layer_order, time_text

GOOD = 0.95  # of the teacher's score: what a model has to keep to stand for the others
SHOWN_PARTS = 30
Row = dict[str, Any]


def best_point(points: Sequence[Point]) -> Point | None:
    """The smallest that keeps 95 % of its teacher's score, else the one that keeps most; None without scores.

    Ablations don't stand for the others, unless there is nothing else.
    """
    scored = [p for p in points if p.retention is not None]
    scored = [p for p in scored if not p.variant] or scored
    good = [p for p in scored if (p.retention or 0) >= GOOD]
    if good:
        return min(good, key=lambda p: (p.file_bytes, -(p.retention or 0)))
    return max(scored, key=lambda p: p.retention or 0, default=None)


def mib(count: float) -> str:
    """`29.9 MiB`, or `57.7 KiB` where MiB would be nothing."""
    return f"{count / MIB:,.1f} MiB" if count >= MIB else f"{count / 1024:,.1f} KiB"


def percent(part: float | None, interval: Sequence[float] | None = None) -> str:
    """`97.1 %`, `97.1 % [96.0, 98.2]`, or nothing."""
    bounds = f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
    return "" if part is None else f"{100 * part:.1f} %{bounds}"


def score_text(score: float, interval: Sequence[float] | None, seeds: int = 1) -> str:
    """`17.21 [16.80, 17.60] (3 seeds)`."""
    bounds = "" if interval is None else " [{:.2f}, {:.2f}]".format(*interval)
    return f"{score:.2f}{bounds}" + (f" ({seeds} seeds)" if seeds > 1 else "")


def size_fact(file_bytes: int, teacher_bytes: int, what: str = "") -> Fact:
    fp32, fp16 = (round(teacher_bytes / width / file_bytes, 2) for width in (1, 2))  # as report.json rounds them
    note = f"{mib(file_bytes)} on disk, measured, against {mib(teacher_bytes)}. Against fp16: {fp16:.1f} ×. {what}"
    return Fact(f"{fp32:.1f} ×", "smaller than the teacher in fp32", note.strip())


def quality_fact(point: Point | None, missing: str, what: str = "") -> Fact:
    if point is None:
        return Fact("", "of the teacher's score kept", missing)
    student = score_text(point.score, point.interval, point.seeds)
    note = f"{student} against the teacher's {score_text(point.teacher_score, point.teacher_interval)}; {point.task}."
    if point.retention_interval:
        note += " Kept: {:.1f} to {:.1f} %, both resampled together.".format(
            *(100 * x for x in point.retention_interval)
        )
    note = f"{note} {what}".strip()
    return Fact(percent(point.retention), f"of the teacher's {point.metric} kept", note)


def size_quality_section(points: Sequence[Point], how: str) -> Section:
    """Plot with the Pareto line, and the table under it."""
    title = "Size against quality"
    if not points:
        return Section(title, missing=how)
    rows = []
    for p in sorted(points, key=lambda p: (p.task, p.file_bytes)):
        smaller = f"{p.teacher_bytes / p.file_bytes:.1f} ×" if p.teacher_bytes else None
        rows.append(
            [p.name or p.task, p.bits, p.layers, p.variant or USUAL, f"{p.file_bytes / MIB:.2f}", smaller,
             percent(p.retention, p.retention_interval), score_text(p.score, p.interval, p.seeds),
             score_text(p.teacher_score, p.teacher_interval)]
        )  # fmt: skip
    metric = " / ".join(dict.fromkeys(p.metric for p in points))
    header = ["model" if points[0].name else "task", "bits", "layers", "how", "file, MiB", "fp32 / file"]
    header += ["kept", metric, "teacher"]
    text = (
        "Up is better, left is smaller. What lies on the grey line is beaten by nothing else here: whatever is as "
        "small or smaller scores less. Bars are 95 % intervals over test examples; an arrow at the lower edge is a "
        "score far below."
    )
    draw = partial(plots.size_quality, points)
    picture = Picture("size-quality", "File size against score, with the Pareto line", draw)
    return Section(
        title, [text, picture, Table(header, rows, summary=f"All {len(rows)} models" if len(rows) > 12 else "")]
    )


def grid_section(points: Sequence[Point], how: str) -> Section:
    """Score by layers and bits: plot, and for each task a table of what is kept of the teacher's score."""
    title = "Score by layers and bits"
    if len({(p.bits, p.layers) for p in points}) < 2:
        return Section(title, missing=how)
    layers = sorted({p.layers for p in points}, key=layer_order, reverse=True)
    blocks: list[Block] = [
        "Each line is one choice of bits; to the left the student has fewer layers. Dashed: the teacher.",
        Picture(
            "layers-bits", "Score by number of layers, a line for each bit width", partial(plots.score_grid, points)
        ),
    ]
    for task, members in grouped(points, lambda p: p.task).items():
        rows = []
        for (bits, variant), row in grouped(members, lambda p: (p.bits, p.variant)).items():
            cells = [[f"{p.score:.2f} ({percent(p.retention)})" for p in row if p.layers == n] for n in layers]
            rows.append([bits, variant or USUAL, *map(" / ".join, cells)])
        text = f"{members[0].metric} by layers, in brackets what is kept of the teacher's"
        blocks += [f"{task}: {text} {members[0].teacher_score:.2f}.", Table(["bits", "how", *layers], rows)]
    return Section(title, blocks)


def is_ours(row: Row) -> bool:
    return "dqbart" in str(row["system"])


def main_settings(rows: Sequence[Row]) -> list[Row]:
    """Rows at the setting (source, batch, threads) that has most times; of equals the smallest batch, then source."""
    settings = grouped(rows, lambda r: (r["batch"], r["source"], r["threads"]))
    timed = {s: sum(r.get("median_ms") is not None for r in members) for s, members in settings.items()}
    return settings[min(settings, key=lambda s: (-timed[s], [number or 0 for number in s]))]  # a GPU has no threads


def full_depth(rows: Sequence[Row]) -> str:
    return max((str(r["layers"]) for r in rows), key=layer_order)


def setting_text(row: Row) -> str:
    """`128 source tokens, batch 1, 2 threads`."""
    threads = f", {row['threads']} thread{'s' if row['threads'] != 1 else ''}" if row["threads"] else ""
    return f"{row['source']} source tokens, batch {row['batch']}{threads}"


def speed_fact(rows: Sequence[Row], machine: str, how: str, *, as_deep: bool = True) -> Fact:
    """dqbart's fastest against the fastest peer, measured side by side: greedy, main setting.

    `as_deep`: both with all layers; else a student may have fewer than what it replaces, and the note says so. The
    ratio is the row's own `vs_PEER` (taken round by round), else that of two medians of one run.
    """
    for members in grouped(rows, lambda r: (r["device"], r["shape"])).values():
        depths = {full_depth(members)} if as_deep else {r["layers"] for r in members}
        main = [r for r in main_settings(members) if r.get("median_ms") and r["layers"] in depths]
        modes = grouped(main, lambda r: str(r["mode"]))
        for chosen in sorted(modes.values(), key=lambda m: not str(m[0]["mode"]).startswith("greedy")):
            first = min((r for r in chosen if is_ours(r)), key=lambda r: r["median_ms"], default=None)
            peers = [r for r in chosen if first and not is_ours(r) and
                     (f"vs_{r['system']}" in first or r.get("run") == first.get("run"))]  # fmt: skip
            if first and peers:
                second = min(peers, key=lambda r: r["median_ms"])
                ratio = first.get(f"vs_{second['system']}") or second["median_ms"] / first["median_ms"]
                times = "; ".join(f"{_bar_label(r)} layers: {time_text(r['median_ms'])}" for r in (first, second))
                note = f"{times}. {first['shape']}, {first['mode']}, {setting_text(first)}. {machine}"
                of_how_many = f", the fastest of {len(peers)} peers" if len(peers) > 1 else ""
                value = f"{ratio:.1f} × faster" if ratio >= 1 else f"{1 / ratio:.1f} × slower"
                return Fact(value, f"than {second['system']}" + of_how_many, note.strip())
    return Fact("", "speed against what people use today", how)


def _bar_label(row: Row) -> str:
    return f"{row['system']} {row['bits']}, {row['layers']}" if is_ours(row) else f"{row['system']}, {row['layers']}"


def latency_section(rows: Sequence[Row], machine: str, how: str) -> Section:
    """For each device and shape a plot at one setting, a panel a mode and depth; all times in a folded table."""
    title = "Latency against peers"
    if not rows:
        return Section(title, missing=how)
    text = (
        "Medians of interleaved runs (± interquartile range, or [fastest, slowest]). Side by side: models of one depth."
    )
    blocks: list[Block] = [f"{text} {machine}".strip()]
    for number, ((device, shape), members) in enumerate(grouped(rows, lambda r: (r["device"], r["shape"])).items()):
        main = main_settings(members)
        panels = []
        for mode in grouped(main, lambda r: str(r["mode"])).values():
            depths = grouped(mode, lambda r: str(r["layers"]))
            for depth in sorted(depths, key=layer_order, reverse=True):
                bars = [Bar(_bar_label(r), r.get("median_ms"), is_ours(r), _why_not(r)) for r in depths[depth]]
                panels.append((f"{mode[0]['mode']}, {depth} layers", bars))
        setting = f"{shape} on {device}, {setting_text(main[0])}"
        alt = f"Median times of {setting}: dqbart beside what people use today"
        blocks += [f"{setting}:", Picture(f"latency-{number + 1}", alt, partial(plots.latency, panels))]
        header = ["mode", "source", "batch", "threads", "layers", "system", "bits", "median, ms"]
        cells = [[*(r[key] for key in header[:-1]), _milliseconds(r)] for r in members]
        blocks.append(Table(header, cells, summary=f"All {len(members)} cases of {shape} on {device}"))
    return Section(title, blocks)


def _milliseconds(row: Row) -> str:
    time = row.get("median_ms")
    spread = f" ± {row['iqr_ms']:.2g}" if row.get("iqr_ms") is not None else ""
    spread += " [{:.4g}, {:.4g}]".format(*row["spread_ms"]) if row.get("spread_ms") else ""
    return f"{time:.4g}{spread}" if time is not None else _why_not(row)


def _why_not(row: Row) -> str:
    return str(row.get("error") or "missing")


def sensitivity_section(rows: Sequence[Row], metric: str, how: str) -> Section:
    """What is lost when only that part is quantized, the worst first: score if it was measured, or loss, KL, error."""
    title = "What each layer costs"
    measures = {
        "drop": f"{metric} points lost", "more loss": "more loss, nats per token",
        "kl": "KL from the float model, nats per token",
        "hidden": "error of the last hidden states, as a share of them",
    }  # fmt: skip
    rows = [
        r | ({"more loss": r["loss"] - r["loss_float"]} if {"loss", "loss_float"} <= r.keys() else {}) for r in rows
    ]
    measure = next((m for m in measures if rows and all(r.get(m) is not None for r in rows)), None)
    if measure is None:
        return Section(title, missing=how)
    panels = []
    for (task, bits), members in grouped(rows, lambda r: (r.get("task"), r.get("bits"))).items():
        worst = sorted(members, key=lambda r: r[measure], reverse=True)
        name = ", ".join(filter(None, (task, f"{bits} bits" if bits is not None else None)))
        more = f" (worst {SHOWN_PARTS} of {len(worst)})" if len(worst) > SHOWN_PARTS else ""
        panels.append((name + more, [(_part(r), float(r[measure])) for r in worst[:SHOWN_PARTS]]))
    unit = measures[measure]
    columns = [key for key in dict.fromkeys(key for r in rows for key in r) if key not in ("run", "more loss")]
    cells = [[f"{r[c]:.4g}" if isinstance(r.get(c), float) else r.get(c) for c in columns] for r in rows]
    text = f"{unit}, when only that layer is quantized and all others stay in float, without training."
    return Section(
        title,
        [
            f"{text[0].upper()}{text[1:]} What stands out can be left in float with `skip` in the recipe.",
            Picture("sensitivity", text, partial(plots.sensitivity, panels, unit)),
            Table(columns, cells, summary=f"All {len(rows)} rows"),
        ],
    )


def _part(row: Row) -> str:
    return str(row.get("part") or row.get("module") or row.get("layer") or "?").removeprefix("model.")
