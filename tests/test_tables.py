"""The benchmarks' README: its tables are what the results say, and nothing else in it is touched."""

import json

import pytest
import tables
from ledger import Ledger
from tables import README, RESULTS, SOURCES, blocks, fill, machines

RUN = {
    "command": "python benchmarks/matmul.py", "commit": "abc", "date": "2026-01-02", "flags": ["avx2"],
    "python": "3.11", "packages": {"torch": "2.13.0", "transformers": "5.23.0"}, "system": "Linux x86_64",
    "processor": "Z80", "cores": 2, "instructions": "AVX2", "gpu": None,
}  # fmt: skip
PAGE = "Intro\n<!-- a -->\nold\n\nlines\n<!-- end a -->\nbetween\n<!-- b -->\n<!-- end b -->\nafter\n"


def call(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["tables.py", *map(str, arguments)])
    return tables.main()


def test_the_readme_is_up_to_date(monkeypatch, capsys):
    assert call(monkeypatch, "--check") == 0, capsys.readouterr().err


def test_every_source_has_its_place_and_its_command_in_the_readme():
    text = README.read_text(encoding="utf-8")
    for name in [*SOURCES, tables.MACHINES]:
        assert text.count(f"<!-- {name} -->") == text.count(f"<!-- end {name} -->") == 1
    for script in RESULTS.parent.glob("*.py"):
        if "__main__" in script.read_text(encoding="utf-8") and script.name != "peer_runner.py":
            documented = f"benchmarks/{script.name}" in text
            assert documented or script.name in ("quality_cell.py",), f"{script.name} is not in benchmarks/README.md"


def test_only_what_is_between_markers_changes():
    filled = fill(PAGE, {"a": "| x |", "b": "y"})
    assert filled == "Intro\n<!-- a -->\n| x |\n<!-- end a -->\nbetween\n<!-- b -->\ny\n<!-- end b -->\nafter\n"
    assert fill(filled, {"a": "| x |"}) == filled
    assert r"\1 \g<0>" in fill(PAGE, {"a": r"\1 \g<0>"})  # no template


@pytest.mark.parametrize(
    "text",
    [
        "nothing", "<!-- a -->\n", "<!-- end a -->\n<!-- a -->\n", PAGE + PAGE,
        "<!-- a -->\n<!-- a -->\n<!-- end a -->\n", "<!-- a --> x\n<!-- end a -->\n",
    ],
)  # fmt: skip
def test_markers_that_do_not_pair_are_refused(text):
    with pytest.raises(ValueError, match="<!-- a --> and <!-- end a -->: expected once each"):
        fill(text, {"a": "x"})


def test_results_that_are_not_there_leave_their_command(tmp_path):
    made = blocks(tmp_path)
    assert set(made) == {*SOURCES, "machines"}
    assert made["latency"] == "Not measured yet: `python benchmarks/latency.py`"
    assert made["machines"] == "No results yet."


def test_check_writes_nothing_and_a_run_mends(monkeypatch, tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text("".join(f"<!-- {name} -->\n<!-- end {name} -->\n" for name in [*SOURCES, "machines"]))
    place = ["--readme", page, "--results", tmp_path]
    before = page.read_text()
    assert call(monkeypatch, *place, "--check") == 1 and page.read_text() == before
    assert "README.md: out of date: size, latency" in capsys.readouterr().err
    assert call(monkeypatch, *place) == 0 and call(monkeypatch, *place, "--check") == 0
    row = dict.fromkeys(("device", "shape", "kernel"), "x") | dict(n=1, k=1, m=1, bits=8, threads=2, predicted=3.0)
    (tmp_path / "matmul.json").write_text(json.dumps({"runs": [RUN], "rows": [row]}))
    assert call(monkeypatch, *place, "--check") == 1
    assert call(monkeypatch, *place) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["changed"] == ["matmul", "machines"]
    assert "skipped: 3.0 s" in page.read_text() and "Z80" in page.read_text()


def test_a_damaged_results_file_and_a_missing_page_are_named(monkeypatch, tmp_path, capsys):
    assert call(monkeypatch, "--readme", tmp_path / "none.md") == 2
    assert "none.md" in capsys.readouterr().err
    (tmp_path / "size.json").write_text("{")
    assert call(monkeypatch, "--results", tmp_path) == 2
    assert "size.json: not a results file" in capsys.readouterr().err


def test_runs_of_one_machine_share_a_line():
    later = RUN | {"commit": "def+", "date": "2026-01-03", "command": "python benchmarks/matmul.py --again"}
    other = RUN | {"gpu": "H200"}
    lines = machines([("matmul", RUN), ("matmul", later), ("matmul", other)]).splitlines()
    assert len(lines) == 4 and lines[2].endswith("| abc, def+ | 2026-01-02, 2026-01-03 |") and "H200" in lines[3]
    assert "Z80, 2 cores, avx2, Linux x86_64 |" in lines[2] and "torch 2.13.0" in lines[2]


def test_committed_results_hold_no_path_of_a_machine():
    for path in RESULTS.glob("*.json"):
        commands = [word for run in Ledger(path, []).runs for word in run["command"].split()]
        assert not [word for word in commands if word.startswith("/")], f"{path.name}: a path from the root"
