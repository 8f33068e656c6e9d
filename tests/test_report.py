"""The report: numbers that are there and no others, hostile text, missing parts, and what it says when it can't."""

import copy
import importlib.util
import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import ledger
import pytest
import report as benchmark_report
from test_card import scored  # noqa: F401 (a fixture)

from dqbart.cli import main
from dqbart.evaluation import page, sections
from dqbart.evaluation.report import build, model_points, read_models, report
from dqbart.pipeline import Result

PNG = b"\x89PNG\r\n"
HOSTILE = "<script>alert(1)</script></style>\"'&`$\\frac{x$ <img src=//x.y onerror=z>"


class Reader(HTMLParser):
    """Tags, what they refer to, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert not any(name.startswith("on") for name, _ in attrs), attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def put(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def values(scored: Result) -> dict[str, Any]:  # noqa: F811
    """A real report.json, to be changed."""
    return copy.deepcopy(scored.report)


def times(system: str, median: float | None, **changes: Any) -> dict[str, Any]:
    row = dict(device="cpu", shape="bart-base", layers="6-6", system=system, bits="", mode="greedy", source=128)
    return row | dict(batch=1, threads=1, median_ms=median) | changes


# --- one page, from real folders


def test_the_page_needs_nothing_else_and_says_what_is_missing(scored: Result, tmp_path: Path, capsys) -> None:  # noqa: F811
    out = tmp_path / "deep" / "page.html"
    assert main(["report", str(scored.folder), "--out", str(out)]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["plots"] == [str(tmp_path / "deep" / "page-plots" / "size-quality.png")]
    assert all(Path(file).read_bytes().startswith(PNG) for file in answer["plots"])
    assert set(answer["missing"]) == {"Latency against peers", "Score by layers and bits", "What each layer costs"}
    html = out.read_text(encoding="utf-8")
    read = Reader(html)
    assert read.references and all(reference.startswith("data:") for reference in read.references)
    assert not {"script", "link", "iframe"} & set(read.tags) - {"link"} and "url(" not in html and "@import" not in html
    assert "default-src 'none'" in html and "prefers-color-scheme: dark" in html and "width=device-width" in html
    assert read.tags.count("img") == 1 and "python benchmarks/latency.py" in read.text


def test_numbers_are_those_of_the_report(scored: Result) -> None:  # noqa: F811
    built = build(read_models([scored.folder]))
    known, scores = scored.report, scored.report["scores"]
    size, quality, speed = built.facts
    assert (
        size.value == f"{known['sizes']['ratio_to_fp32']:.1f} ×"
        and f"{known['sizes']['ratio_to_fp16']:.1f} ×" in size.note
    )
    teacher, student = (scores[who]["values"]["rougeL"] for who in ("teacher", "student"))
    assert quality.value == f"{100 * student / teacher:.1f} %" and "{:.2f}, {:.2f}".format(
        *scores["student"]["intervals"]["rougeL"]
    ) in quality.note  # fmt: skip
    assert speed.value == "" and "benchmarks/latency.py" in speed.note
    html = page.render(built, {"size-quality": PNG})
    text = Reader(html).text
    for said in (
        scores["student"]["definition"], "num_beams 2", known["environment"]["processor"], known["run"]["teacher"],
        f"torch {known['environment']['packages']['torch']}", known["run"]["data"], "seed 28", "encoder [0, 2]",
        f"{known['sizes']['file_bytes']:,}",
    ):  # fmt: skip
        assert said in text, said
    assert html.count("<dt>teacher</dt>") == len(scores["outputs"])


def test_hostile_texts_stay_text(values: dict[str, Any], tmp_path: Path) -> None:
    for row in values["scores"]["outputs"]:
        row.update(dict.fromkeys(("source", "reference", "teacher", "student"), HOSTILE))
    values["scores"]["outputs"][1]["student"] = ""
    values["data"] = {"name": HOSTILE}
    values["sizes"]["groups"][HOSTILE] = 1
    values["sensitivity"] = [{"part": HOSTILE, "bits": HOSTILE, "drop": 0.5}, {"part": "b", "bits": None, "drop": -0.1}]
    odd = {"shape": HOSTILE, "device": HOSTILE}
    values["speed"] = {"environment": values["environment"], "rows": [
        times(HOSTILE, 3.0, **odd), times("dqbart torch", 2.0, bits=HOSTILE, **odd),
        times("x", None, error=HOSTILE, **odd)]}  # fmt: skip
    out = tmp_path / "out.html"
    done = report([put(tmp_path / "<b>$x$", values)], out)
    assert [Path(file).stem for file in done["plots"]] == ["size-quality", "latency-1", "sensitivity"]
    read = Reader(out.read_text(encoding="utf-8"))
    assert "script" not in read.tags and "b" in read.tags and read.tags.count("style") == 1
    assert read.tags.count("img") == 3 and all(reference.startswith("data:") for reference in read.references)
    assert read.text.count(HOSTILE.replace("`", "")) + read.text.count(HOSTILE) >= 3 * len(values["scores"]["outputs"])
    assert "nothing" in read.text and "<b>$x$" in read.text


def test_words_that_the_teacher_has_not_are_marked() -> None:
    html = page._compared("a cat & a dog", "a cow & a dog <i>")
    assert html == "a <mark>cow</mark> &amp; a dog <mark>&lt;i&gt;</mark>"
    assert page._compared("same words", "same words") == "same words" and page._compared("x", "") == ""


# --- several folders


def test_folders_are_found_once_and_the_smallest_good_one_speaks(values: dict[str, Any], tmp_path: Path) -> None:
    for name, kept, size in (("good", 0.97, 100), ("better", 0.99, 200), ("bad", 0.5, 10)):
        changed = copy.deepcopy(values)
        changed["scores"]["teacher"]["values"]["rougeL"] = 40.0
        changed["scores"]["student"]["values"]["rougeL"] = 40.0 * kept
        changed["sizes"]["file_bytes"] = size
        changed["recipe"]["bits"] = {"good": "4-4-8", "better": "8-8-8", "bad": "1-1-8"}[name]
        put(tmp_path / "all" / name, changed)
    models = read_models([tmp_path / "all", tmp_path / "all" / "good", tmp_path / "all" / "good" / ".." / "bad"])
    assert [m.name for m in models] == ["bad", "better", "good"]
    built = build(models)
    assert built.facts[1].value == "97.0 %" and "`good`" in built.lead and "keeps 95 %" in built.lead
    assert {p.task for p in model_points(models)} == {f"train.jsonl, {values['scores']['examples']} examples"}
    built = build([m for m in models if m.name == "bad"] + [m for m in models if m.name == "bad"])
    assert "keeps most" in built.lead


def test_folders_of_one_name_keep_apart(values: dict[str, Any], tmp_path: Path) -> None:
    models = read_models([put(tmp_path / "a" / "small", values), put(tmp_path / "b" / "small", values)])
    assert [m.name for m in models] == ["a/small", "b/small"]


def test_models_of_another_teacher_or_metric_are_not_compared(values: dict[str, Any], tmp_path: Path) -> None:
    other = copy.deepcopy(values)
    other["run"]["teacher"] = "feedbeef"
    decoded = copy.deepcopy(values)
    decoded["scores"]["student"]["generation"]["num_beams"] = 1
    models = read_models([put(tmp_path / "a", values), put(tmp_path / "b", other), put(tmp_path / "c", decoded)])
    assert len({p.task for p in model_points(models)}) == 3


def test_no_scores_and_a_teacher_that_scores_nothing(values: dict[str, Any], tmp_path: Path) -> None:
    zero = copy.deepcopy(values)
    for who in ("teacher", "student"):
        zero["scores"][who]["values"]["rougeL"] = 0.0
        zero["scores"][who]["intervals"]["rougeL"] = [0.0, 0.0]
    assert report([put(tmp_path / "zero", zero)], tmp_path / "a.html")["plots"]
    fact = build(read_models([tmp_path / "zero"])).facts[1]
    assert (fact.value, fact.note) == ("", "The teacher itself scores 0.")
    del values["scores"], values["seconds"]["training"]
    done = report([put(tmp_path / "none", values)], tmp_path / "b.html")
    assert done["plots"] == [] and len(done["missing"]) == 5
    text = (tmp_path / "b.html").read_text()
    assert "--dev-data" in text and "quantized without training" in text


# --- what can't be reported


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent", None, "absent: no such folder; expected a folder that 'dqbart compress' wrote"),
        ("empty", {}, "empty: no report.json in it or in a folder of it"),
        ("broken", {"report.json": "{"}, "not a report of 'dqbart compress'"),
        ("list", {"report.json": "[1]"}, "not a report of 'dqbart compress'"),
        ("other", {"report.json": '{"recipe": {}}'}, "not a report of 'dqbart compress' (KeyError"),
    ],
)
def test_wrong_folders_are_named(name: str, content: Any, words: str, tmp_path: Path, capsys) -> None:
    if content is not None:
        (tmp_path / name).mkdir()
        for file, text in content.items():
            (tmp_path / name / file).write_text(text)
    assert main(["report", str(tmp_path / name), "--out", str(tmp_path / "x.html")]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and words in error[0] and str(tmp_path / name) in error[0]
    assert not (tmp_path / "x.html").exists()


def test_a_report_cut_short_is_named(values: dict[str, Any], tmp_path: Path) -> None:
    for part in ("sizes", "gate", "seconds", "layer_maps", "environment", "teacher"):
        folder = put(tmp_path / part, {name: value for name, value in values.items() if name != part})
        with pytest.raises(ValueError, match=f"report.json: not a report of .*{part}"):
            read_models([folder])
    values["sizes"]["file_bytes"] = 0
    with pytest.raises(ValueError, match="report.json: not a report of .*division by zero"):
        read_models([put(tmp_path / "nothing", values)])


def test_out_is_a_folder_and_a_file_is_no_folder(scored: Result, tmp_path: Path, capsys) -> None:  # noqa: F811
    assert main(["report", str(scored.folder), "--out", str(tmp_path)]) == 2
    assert "expected a file to write, such as report.html" in capsys.readouterr().err
    assert main(["report", str(scored.folder / "report.json")]) == 2
    assert "report.json: a file; expected a folder" in capsys.readouterr().err


def test_without_matplotlib_one_line_says_how_to_get_it(
    scored: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys  # noqa: F811
) -> None:  # fmt: skip
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else found(name, *a))
    assert main(["report", str(scored.folder), "--out", str(tmp_path / "x.html")]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and 'pip install "dqbart[report]"' in error[0] and not list(tmp_path.iterdir())


# --- speed and layers


def test_speed_is_against_the_fastest_peer_and_slower_is_called_slower() -> None:
    rows = [times("transformers fp32", 100.0), times("ctranslate2 int8", 25.0), times("onnxruntime int8", None)]
    rows += [times("ctranslate2 int8", 1.0, layers="3-1"), times("dqbart torch", 1.0, layers="3-1", bits="2-2-8")]
    rows += [times("dqbart torch", 50.0, bits="8-8-8"), times("dqbart torch", 60.0, bits="2-2-8")]
    rows += [times("torch.compile", 0.1, run=7)]  # another day: not side by side, no ratio
    fact = sections.speed_fact(rows, "my machine", "how")
    assert fact.value == "2.0 × slower" and fact.what == "than ctranslate2 int8, the fastest of 2 peers"
    assert "8-8-8, 6-6 layers: 50 ms; ctranslate2 int8, 6-6 layers: 25 ms. bart-base, greedy" in fact.note
    assert fact.note.endswith("my machine")
    student = sections.speed_fact([rows[0], rows[4]], "", "how", as_deep=False)  # a folder against its teacher
    assert (student.value, student.what) == ("100.0 × faster", "than transformers fp32")
    assert "2-2-8, 3-1 layers: 1 ms; transformers fp32, 6-6 layers: 100 ms" in student.note
    faster = sections.speed_fact([*rows, times("dqbart cpu", 5.0, bits="2-2-8")], "", "how")
    assert faster.value == "5.0 × faster"
    own = times("dqbart torch", 50.0, bits="8-8-8") | {"vs_ctranslate2 int8": 0.4, "run": 3}
    assert sections.speed_fact([*rows[:2], own], "", "how").value == "2.5 × slower"  # round by round, as the row says
    for alone in ([], rows[:3], rows[-2:]):  # no peers, or nothing of ours: no number
        assert sections.speed_fact(alone, "", "how").value == ""


def test_latency_shows_every_case_and_every_gap() -> None:
    rows = [times("transformers fp32", 100.0, mode=m, batch=b) for m in ("greedy", "beam 4") for b in (1, 8)]
    rows += [
        times("onnxruntime int8", None, error="not installed"),
        times("dqbart torch", 50.0, threads=None, device="cuda"),
    ]
    section = sections.latency_section(rows, "", "how")
    tables = [b for b in section.blocks if isinstance(b, page.Table)]
    assert sum(len(table.rows) for table in tables) == len(rows)
    assert [row[-1] for row in tables[0].rows] == ["100", "100", "100", "100", "not installed"]
    assert [b.draw()[:6] for b in section.blocks if isinstance(b, page.Picture)] == [PNG, PNG]


def test_layers_are_ranked_by_score_else_by_loss_else_not_at_all() -> None:
    rows = [{"part": f"encoder.{i}", "bits": "2-2-8", "kl": 0.1, "loss": 2.0 + i, "loss_float": 2.0, "drop": -float(i)}
            for i in range(40)]  # fmt: skip

    def ranked(rows: list[dict[str, Any]]) -> tuple[str, list[str]]:
        section = sections.sensitivity_section(rows, "BLEU", "how")
        (picture,) = (b for b in section.blocks if isinstance(b, page.Picture))
        panels, unit = picture.draw.args  # type: ignore[attr-defined]
        assert "worst 30 of 40" in panels[0][0]
        return unit, [name for name, _ in panels[0][1]]

    assert ranked(rows) == ("BLEU points lost", [f"encoder.{i}" for i in range(30)])
    assert ranked([r | {"drop": None} for r in rows]) == (
        "more loss, nats per token",
        [f"encoder.{i}" for i in range(39, 9, -1)],
    )
    assert sections.sensitivity_section([{"part": "a"}], "BLEU", "how").missing == "how"


# --- benchmarks/report.py


def run_benchmarks(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
    return benchmark_report.main()


def test_ledgers_become_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    key = dict(task="tatoeba", layers="6-6", numerics="integer", distillation="distilled", seed=1, metric="bleu")
    quality = ledger.Ledger(tmp_path / "quality.json", ["task", "bits", "layers", "numerics", "distillation", "seed"])
    teacher = key | dict(bits="32-32-32", numerics="float", distillation="teacher", score=40.0, teacher_score=40.0)
    quality.add(teacher | dict(file_bytes=1000, definition="BLEU|tok:13a", generation={"num_beams": 5}, examples=9))
    for seed, score in ((1, 38.0), (2, 40.0), (3, None)):
        row = key | dict(bits="2-2-8", seed=seed, teacher_score=40.0, file_bytes=50, interval=[37.0, 41.0])
        row |= dict(seeds=[1, 2], seeds_interval=[37.5, 40.5])
        quality.add(row | (dict(score=score) if score else dict(error="killed <b>")))
    quality.add(key | dict(bits="2-2-8", layers="3-1", numerics="paper", distillation="none", score=10.0,
                           teacher_score=40.0, file_bytes=20, interval=[9.0, 11.0]))  # fmt: skip
    latency = ledger.Ledger(tmp_path / "latency.json", ["device", "shape", "layers", "system", "bits", "mode"])
    for row in (times("ctranslate2 int8", 10.0), times("dqbart torch", 20.0, bits="2-2-8")):
        latency.add(row)
    points = benchmark_report.quality_points(benchmark_report.read_results(tmp_path)["quality"].rows)
    main_point, paper = points
    assert (main_point.score, main_point.seeds, main_point.interval) == (39.0, 2, [37.5, 40.5])
    assert (main_point.teacher_bytes, main_point.variant, main_point.metric) == (1000, "", "BLEU")
    assert (paper.variant, paper.interval) == ("paper numerics, no training", [9.0, 11.0])

    out = tmp_path / "bench.html"
    assert run_benchmarks("--results", str(tmp_path), "--out", str(out), monkeypatch=monkeypatch) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [Path(p).stem for p in answer["plots"]] == ["size-quality", "latency-1", "layers-bits"]
    assert set(answer["missing"]) == {"What each layer costs", "Outputs beside the teacher's", "File sizes"}
    read = Reader(out.read_text(encoding="utf-8"))
    run = latency.runs[0]
    for said in ("20.0 ×", "97.5 %", "2.0 × slower", "BLEU|tok:13a", "num_beams 5", "killed <b>", run["command"],
                 str(run["commit"]), "python benchmarks/size.py", "--sensitivity"):  # fmt: skip
        assert said in read.text, said


def test_committed_results_can_be_shown(tmp_path: Path) -> None:
    built = benchmark_report.build(benchmark_report.read_results(ledger.RESULTS))
    assert built.facts[0].value.endswith("×")
    page.write(built, tmp_path / "x.html")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (None, "expected a folder with one of size.json"),
        ("{", "not a results file"),
        ('{"rows": 1}', "not a results file"),
    ],
)
def test_wrong_results_are_one_line(
    file: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    if file is not None:
        (tmp_path / "quality.json").write_text(file)
    out = tmp_path / "x.html"
    assert run_benchmarks("--results", str(tmp_path), "--out", str(out), monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and words in error[0] and str(tmp_path) in error[0] and not out.exists()
