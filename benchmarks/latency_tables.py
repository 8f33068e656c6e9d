"""The tables of latency.py, from its rows alone.

A ratio is read from the row (`vs_PEER`: how many times as fast as that peer, taken round by round in one run), never
computed here from two medians: those may come from different days.
"""

import statistics
from typing import Any

from ledger import markdown

BEAMS = {"prefill": 1, "greedy": 1, "beam4": 4, "beam6": 6, "forward": 1}
REFERENCE = "transformers-fp32"
LEGEND = (
    "Each cell: median ms ± interquartile range · tokens/s · times as fast as the best peer · as transformers fp32, "
    "both with the same layers (? where they were not measured side by side). Ids: rows that get the ids of "
    "transformers fp32, or of dqbart-torch for other dqbart engines, greedily: quantization changes the first, nothing "
    "may change the second. Load: s. Memory: MiB of the whole process."
)
Row = dict[str, Any]


def number(value: float) -> str:
    """Three digits or more."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(rows: list[Row]) -> str:
    """Markdown: one table per device, shape, threads, source and batch, then ratios to each peer over all of them."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in ("device", "shape", "threads", "source", "batch")), []).append(row)
    parts = [LEGEND]
    for (device, shape, threads, source, batch), group in groups.items():
        title = f"{shape}, {device}, {threads} threads, source {source}, batch {batch}"
        counts = sorted({row["tokens"] for row in group if row["mode"] not in ("prefill", "forward")})
        if counts:
            title += f", {' or '.join(map(str, counts))} tokens"
        parts.append(f"\n<details><summary>{title}</summary>\n\n{_group(group)}\n\n</details>")
    return "\n".join(parts) + _summary(rows)


def _group(rows: list[Row]) -> str:
    modes = [mode for mode in BEAMS if any(row["mode"] == mode for row in rows)]
    lines: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row["layers"], row["system"], row["bits"]), {})[row["mode"]] = row
    peaks = [name for name in ("peak_mib", "device_peak_mib") if any(name in row for row in rows)]
    cells = []
    for (layers, system, bits), found in lines.items():
        done = [row for row in found.values() if row["error"] is None]
        line = [layers, system, bits, *(_cell(found.get(mode), _best(rows, layers, mode)) for mode in modes)]
        errors = {row["error"] for row in found.values()}
        if len(errors) == 1 and not done:  # the reason once
            line[4:] = ["–"] * (len(modes) - 1)
        if done:
            line += [_same_ids(found), number(done[0]["load_s"]), f"{done[0]['loaded_mib']:.0f}"]
            line += [f"{max(row.get(name, 0) for row in done):.0f}" for name in peaks]
        cells.append(line + [None] * (6 + len(modes) + len(peaks) - len(line)))
    return markdown(["layers", "system", "bits", *modes, "ids", "load", "loaded", *_titles(peaks)], cells)


def _titles(peaks: list[str]) -> list[str]:
    return [{"peak_mib": "peak", "device_peak_mib": "GPU peak"}[name] for name in peaks]


def _same_ids(found: dict[str, Row]) -> str | None:
    """Of the mode that goes first: an error in it leaves the cell empty."""
    row = found.get("greedy") or found.get("forward")
    return f"{row['agree']}/{row['batch']}" if row and row.get("agree") is not None else None


def _best(rows: list[Row], layers: str, mode: str) -> str | None:
    """The fastest peer's name."""
    found = [row for row in rows if row["layers"] == layers and row["mode"] == mode and row["error"] is None]
    peers = [row for row in found if not row["system"].startswith("dqbart-")]
    return min(peers, key=lambda row: row["median_ms"])["system"] if peers else None


def _cell(row: Row | None, best: str | None) -> str | None:
    if row is None:
        return None
    if row["error"] is not None:
        return str(row["error"])
    words = [f"{number(row['median_ms'])} ± {number(row['iqr_ms'])}"]
    if row["tokens_per_s"]:
        words.append(f"{number(row['tokens_per_s'])}/s")
    words += [f"{row[f'vs_{name}']:.2f} x" if f"vs_{name}" in row else "?" for name in (best, REFERENCE)]
    return " · ".join(words)


def _summary(rows: list[Row]) -> str:
    """Ratios of each dqbart system to each peer: smallest, median and largest over threads, sources and batches."""
    found: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for row in rows:
        if row["system"].startswith("dqbart-") and row["error"] is None:
            key = tuple(row[name] for name in ("device", "shape", "layers", "system", "bits", "mode"))
            line = found.setdefault(key, {})
            for name, value in row.items():
                if name.startswith("vs_"):
                    line.setdefault(name.removeprefix("vs_"), []).append(value)
    names = list(dict.fromkeys(name for line in found.values() for name in line))
    if not names:
        return ""
    cells = [[*key, *(spread(line.get(name)) for name in names)] for key, line in found.items()]
    title = "\n\nTimes as fast as each peer, over all threads, sources and batches: smallest / median / largest.\n\n"
    return title + markdown(["device", "shape", "layers", "system", "bits", "mode", *names], cells)


def spread(values: list[float] | None) -> str | None:
    """Smallest, median and largest; of one value itself."""
    if not values:
        return None
    shown = (min(values), statistics.median(values), max(values)) if len(values) > 1 else values
    return " / ".join(f"{value:.2f}" for value in shown)
