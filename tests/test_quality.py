"""The quality grid: what its file says, which cells run, what their rows say, and one whole run with a stop in it."""

import json
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quality
import quality_cell
import yaml
from ledger import Ledger, fingerprint
from quality_grid import KEYS, MAIN, Cell, read_grid
from quality_score import intervals
from quality_tables import interval_of

from dqbart.data.splits import read_split
from dqbart.evaluation import metrics
from dqbart.fitting import LEARNING_RATE
from dqbart.methods import METHODS
from dqbart.recipe import Recipe

TASK = {"teacher": "small", "data": "pairs", "recipe": {"max_steps": 40, "batch_size": 4}}
GRID: dict[str, Any] = {
    "tasks": {"copy": TASK},
    "numerics": {"paper": {"preset": "paper-2-2-8", "learning_rate": None, "batch_size": 2}},
    "distillation": {"none": {"epochs": 0, "max_steps": 0}},
    "cuda": {"batch_size": 16, "bf16": True},
    "blocks": [{"bits": ["4-4-8", "2-2-8"], "layers": ["3-3", "2-1"], "numerics": ["integer", "paper"]}],
}
SCORED = {"score": 20.0, "metric": "bleu", "interval": [19, 21], "retention": 0.8, "retention_interval": [0.7, 0.9],
          "teacher_score": 25.0, "file_bytes": 2**20, "teacher_bytes": 2**24, "ratio_to_fp32": 16.0, "minutes": 3.0,
          "steps": 40, "device": "abacus"}  # fmt: skip


@pytest.fixture
def places(teacher_folder: Path, pairs_file: Path, tmp_path: Path) -> Path:
    """A folder with teachers/small and data/pairs."""
    (tmp_path / "teachers").mkdir()
    (tmp_path / "teachers" / "small").symlink_to(teacher_folder)
    (tmp_path / "data" / "pairs").mkdir(parents=True)
    for split in ("train", "validation", "test"):
        (tmp_path / "data" / "pairs" / f"{split}.jsonl").write_text(pairs_file.read_text())
    return tmp_path


def cells_of(grid: dict[str, Any], folder: Path, **options: Any) -> list[Cell]:
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    return read_grid(folder / "grid.yaml", folder / "teachers", folder / "data", **options)


def block(**axes: Any) -> dict[str, Any]:
    return {"bits": ["2-2-8"], "layers": ["2-1"]} | axes


def one(cells: list[Cell], text: str) -> Cell:
    (found,) = [cell for cell in cells if text in cell.slug]
    return found


def test_the_first_grid() -> None:
    """18 combinations, six not defined for three tasks; three seeds where it matters; both ablations."""
    cells = read_grid(quality.HERE / "grids" / "first.yaml", Path("none"), Path("none"))
    assert [cell.is_teacher for cell in cells].index(False) == 3 == sum(cell.is_teacher for cell in cells)
    students = [cell for cell in cells if not cell.is_teacher and cell.key["task"] == "tatoeba-en-fr"]
    assert len({cell.slug for cell in cells}) == len(cells)
    whole = [c for c in students if c.key["distillation"] == "distilled" and c.key["bits"] != "32-32-32"]
    assert len({(c.key["bits"], c.key["layers"], c.key["numerics"]) for c in whole}) == 18
    refused = [cell for cell in students if cell.refused]
    assert {(c.key["bits"], c.key["numerics"]) for c in refused} == {("4-4-8", "paper")} and len(refused) == 3
    main = [c for c in whole if (c.key["layers"], c.key["numerics"], c.key["bits"]) == ("6-6", "integer", "2-2-8")]
    assert sorted(cell.key["seed"] for cell in main) == [28, 29, 30]
    recipes = {cell.slug: Recipe.from_dict(cell.recipe) for cell in students if not cell.refused}
    assert {recipe.target_lang for recipe in recipes.values()} == {"fr_XX"}
    paper = next(r for r in recipes.values() if r.numerics == "paper")
    assert paper.learning_rate is None and paper.batch_size * paper.gradient_accumulation == 64
    assert {r.max_steps for r in recipes.values()} == {0, 2000}
    assert all(r.losses.logits == 0 for name, r in recipes.items() if "task-loss-only" in name)
    assert {cell.key["layers"] for cell in students if cell.key["bits"] == "32-32-32"} == {"6-3", "3-1"}
    quick = read_grid(quality.HERE / "grids" / "quick.yaml", Path("none"), Path("none"))
    assert any(c.refused for c in quick) and {c.key["distillation"] for c in quick} >= {"distilled", "none", "teacher"}


def test_recipe_keys_lie_over_each_other(places: Path) -> None:
    """task < cuda < numerics < block < key; the step scale acts on all."""
    cells = cells_of(GRID, places, steps_scale=0.25)
    assert one(cells, "2-2-8_2-1_integer").recipe["batch_size"] == 4
    assert {cell.recipe["max_steps"] for cell in cells if not cell.is_teacher} == {10}
    cells = cells_of(GRID, places, cuda=True)
    assert one(cells, "2-2-8_2-1_integer").recipe["batch_size"] == 16
    assert one(cells, "2-2-8_2-1_paper").recipe["batch_size"] == 2
    assert one(cells, "2-2-8_2-1_paper").recipe["bf16"] is True
    blocks = [block(recipe={"batch_size": 7, "max_steps": 3}, seeds=[1, 2])]
    for cell in cells_of(GRID | {"blocks": blocks}, places)[1:]:
        assert (cell.recipe["batch_size"], cell.recipe["max_steps"]) == (7, 3)
        assert cell.recipe["seed"] == cell.key["seed"]
    assert cells_of(GRID, places, steps_scale=1e-9)[1].recipe["max_steps"] == 1
    assert cells_of(GRID | {"blocks": [block(distillation=["none"])]}, places)[1].recipe["max_steps"] == 0


def test_the_same_cell_twice_is_one(places: Path) -> None:
    blocks = [block(), block(seeds=[28, 29])]
    assert len(cells_of(GRID | {"blocks": blocks}, places)) == 1 + 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"taks": {}}, "unknown key 'taks'"),
        ({"tasks": ["copy"]}, "expected 'key: value' lines"),
        ({"tasks": {"copy": {"teacher": "small", "data": "pairs"}}}, "task 'copy': no 'recipe'"),
        ({"tasks": {"copy": TASK | {"recipe": {"epochs": 3}}}}, "block 1: task 'copy' has no max_steps"),
        ({"tasks": {"copy": TASK | {"recipe": {"max_steps": 4, "bach_size": 8}}}}, "did you mean 'batch_size'"),
        ({"tasks": {"copy": TASK | {"train_examples": -5}}}, "train_examples -5: expected a count above 0"),
        ({"blocks": []}, "no 'blocks'"),
        ({"blocks": [block(bits="2-2-8")]}, "bits '2-2-8': expected a list"),
        ({"blocks": [block(bits=["2-2"])]}, "bits '2-2': expected W-E-A"),
        ({"blocks": [block(layers=["0-1"])]}, "layers '0-1'"),
        ({"blocks": [block(numerics=["papper"])]}, "numerics 'papper': expected one of integer, paper"),
        ({"blocks": [block(seeds=[])]}, "seeds .*: expected a list"),
        ({"blocks": [block(seeds=["many"])]}, "seed 'many'"),
        ({"blocks": [block(losses={})]}, "unknown key 'losses'"),
        ({"blocks": [block(), block(recipe={"warmup_ratio": 0.5})]}, "block 2: .* in an earlier block"),
    ],
)
def test_a_wrong_grid_is_an_error_and_no_hole_in_it(places: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        cells_of(GRID | changes, places)
    assert "\n" not in str(caught.value)


def test_settings_tell_rows_apart(places: Path, teacher_folder: Path) -> None:
    before = {cell.slug: cell.settings for cell in cells_of(GRID, places)}
    assert {cell.slug: cell.settings for cell in cells_of(GRID, places)} == before
    longer = GRID | {"tasks": {"copy": TASK | {"recipe": {"max_steps": 41}}}}
    after = {cell.slug: cell.settings for cell in cells_of(longer, places)}
    assert after.keys() == before.keys()
    assert [slug for slug in after if after[slug] == before[slug]] == ["copy_teacher"]
    decoding = GRID | {"tasks": {"copy": TASK | {"recipe": {"max_steps": 40, "generation": {"num_beams": 3}}}}}
    assert cells_of(decoding, places)[0].settings != before["copy_teacher"]
    fewer = {
        cell.slug: cell.settings for cell in cells_of(GRID | {"tasks": {"copy": TASK | {"train_examples": 9}}}, places)
    }
    assert [slug for slug in fewer if fewer[slug] == before[slug]] == ["copy_teacher"]
    other = places / "teachers" / "other"
    other.mkdir()
    for file in teacher_folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "model.safetensors").write_bytes(b"retrained")
    retrained = GRID | {"tasks": {"copy": TASK | {"teacher": "other"}}}
    assert cells_of(retrained, places)[0].settings != before["copy_teacher"]


def test_an_error_never_replaces_a_score(places: Path) -> None:
    cell = one(cells_of(GRID, places), "2-2-8_2-1_integer")
    ledger, work = Ledger(places / "out.json", KEYS), places / "work"
    cell.folder(work).mkdir(parents=True)
    (cell.folder(work) / "log.txt").write_text("step 1\r 50 %\nOutOfMemoryError: no room\n\n")
    assert quality.state(ledger, cell) == "missing"
    assert not quality.collect(cell, -9, ledger, work)
    assert quality.state(ledger, cell) == "failed"
    assert ledger.rows[0]["error"] == "exit code -9: OutOfMemoryError: no room"
    (cell.folder(work) / "row.json").write_text(json.dumps(SCORED))
    made_by = ledger.own | {"commit": "an older one"}  # and was killed before it could write the row down
    (cell.folder(work) / "cell.json").write_text(json.dumps({"run": made_by}))
    assert quality.collect(cell, 0, ledger, work) and quality.state(ledger, cell) == "done"
    assert ledger.runs[ledger.rows[0]["run"]] == made_by
    assert not quality.collect(cell, 1, ledger, work) and ledger.rows[0]["score"] == 20.0
    assert len(ledger.rows) == 1 and "error" not in ledger.rows[0]
    (longer,) = [c for c in cells_of(GRID, places, steps_scale=2) if c.slug == cell.slug]
    assert quality.state(ledger, longer) == "other settings"


def test_rows_of_other_settings_are_not_touched(places: Path) -> None:
    cells = cells_of(GRID, places)
    ledger = Ledger(places / "out.json", KEYS)
    ledger.add(one(cells, "2-2-8_2-1_integer").key | SCORED | {"settings": "another"})
    args = Namespace(only="2-2-8_2-1_integer", again=False, work=places / "work", jobs=1)
    with pytest.raises(ValueError, match="2-2-8_2-1_integer_distilled_28: .*--again replaces such rows"):
        quality.run_grid(cells, ledger, args)
    assert ledger.rows[0]["settings"] == "another" and not args.work.exists()


def test_interval_of_a_run() -> None:
    """Equal outputs are 100 % whatever examples are drawn; a teacher that scores nothing has no ratio."""
    references = ["the cat sees a dog", "a big house by the river", "birds walk at night too", "she reads a book"]
    worse = ["the cat sees a", "a small house by the river", "birds walk at night", "he reads a book"]
    for metric in ("rouge", "bleu"):
        recipe = Recipe(metric=metric)
        score, kept = intervals(recipe, [worse], worse, references)
        assert kept == [1, 1] and score == metrics.score(metric, worse, references).intervals[MAIN[metric]]
        low, high = intervals(recipe, [worse], references, references)[1] or [0, 0]
        assert 0 < low < high <= 1
        assert intervals(recipe, [worse], ["x y z v"] * 4, references)[1] is None


def test_interval_of_several_seeds() -> None:
    """Of their mean: the same thrice changes nothing, and one that is perfect moves it up."""
    references = ["the cat sees a dog", "a big house by the river", "birds walk at night too", "she reads a book"]
    worse = ["the cat sees a", "a small house by the river", "birds walk at night", "he reads a book"]
    recipe = Recipe(metric="bleu")
    once = intervals(recipe, [worse], references, references)
    assert np.allclose(intervals(recipe, [worse] * 3, references, references), once)
    (low, high), kept = intervals(recipe, [worse, references], references, references)
    assert low == pytest.approx((once[0][0] + 100) / 2, abs=10) and low > once[0][0] and high > once[0][1]
    assert kept == pytest.approx([low / 100, high / 100])
    with pytest.raises(ValueError):
        intervals(recipe, [worse[:3]], references, references)


def test_seeds_are_joined_where_all_outputs_are_there(places: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Rows of one recipe get the interval of their mean, once; with a seed more, the old one stands no longer."""
    blocks = [block(seeds=[28, 29]), block(bits=["8-8-8"])]
    cells = cells_of(GRID | {"blocks": blocks}, places)
    ledger, work = Ledger(places / "out.json", KEYS), places / "work"
    targets = read_split(places / "data" / "pairs", Recipe(), "test").targets or []
    for cell in cells:
        ledger.add(cell.key | SCORED | {"settings": cell.settings})
        cell.folder(work).mkdir(parents=True)
        lines = [json.dumps({"output": text if n % 2 else "nothing"}) for n, text in enumerate(targets)]
        (cell.folder(work) / "outputs.jsonl").write_text("\n".join(lines))
    quality.join_seeds(cells, ledger, work)
    rows = [row for row in ledger.rows if row["bits"] == "2-2-8"]
    assert [row["seeds"] for row in rows] == [[28, 29]] * 2 and [row["run"] for row in rows] == [0, 0]
    low, high = interval_of(rows, "interval") or [0, 0]
    assert 0 < low < high < 100 and interval_of(rows, "retention_interval") == [1, 1]
    assert not any("seeds" in row for row in ledger.rows if row not in rows)
    other = rows[0] | {"seed": 30, "seeds": None}
    assert interval_of([*rows, other], "interval") is None and interval_of(rows[:1], "interval") == [19, 21]
    rows[0]["seeds"] = [28]
    (cells[1].folder(work) / "outputs.jsonl").unlink()
    quality.join_seeds(cells, ledger, work)
    assert f"no interval over seeds for {cells[1].slug}" in capfd.readouterr().err


def test_settings_are_all_that_decides(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A default of the code, the rows of a data set, the teacher: a row made with others is not done."""

    def settings() -> str:
        fingerprint.cache_clear()
        return one(cells_of(GRID, places), "2-2-8_2-1_integer").settings

    found = [settings()]
    assert settings() == found[0]
    method = METHODS["dq"]
    monkeypatch.setitem(METHODS, "dq", replace(method, settings=method.settings | {"dropout": 0.25}))
    found.append(settings())
    with (places / "data" / "pairs" / "train.jsonl").open("a") as file:
        file.write("\n")
    found.append(settings())
    monkeypatch.setitem(LEARNING_RATE, 2, 1.0)
    found.append(settings())
    assert len({*found}) == 4


def student(bits: str, layers: str = "6-6", numerics: str = "integer", seed: int = 28, **fields: Any) -> dict[str, Any]:
    key = {"task": "t", "bits": bits, "layers": layers, "numerics": numerics, "distillation": "distilled", "seed": seed}
    return key | fields


def test_table() -> None:
    rows = [
        student("8-8-8") | SCORED | {"distillation": "none"},
        student("2-2-8", seed=28) | SCORED,
        student("2-2-8", seed=29) | SCORED | {"score": 22.0, "retention": 0.84},
        student("2-2-8", "3-1") | SCORED,
        student("32-32-32", "3-1") | SCORED,
        student("4-4-8", numerics="paper", not_defined="no such thing"),
        student("2-2-8", numerics="paper", error="exit code 1: broke"),
        student("8-8-8") | SCORED | {"retention": None},
        student("32-32-32", numerics="float", seed=0, definition="BLEU|13a", generation={"num_beams": 4}, examples=9)
        | SCORED | {"distillation": "teacher", "score": 25.0},
    ]  # fmt: skip
    text = quality.table(rows)
    lines = text.splitlines()
    assert lines[0].startswith("**t**: teacher with 6-6 layers, 1.0 MiB in fp32, BLEU 25.00") and "beam 4" in lines[0]
    matrix = [line for line in lines if line.startswith("|")][: 2 + 6]
    assert matrix[0] == "| training | numerics | bits | 6-6 layers | 3-1 layers |"
    assert matrix[2] == "| distilled | integer | 8-8-8 | – | – |"
    assert matrix[3] == "| distilled | integer | 2-2-8 | 82.0 ± 2.8 (n 2) % | 80.0 % [70.0, 90.0] |"
    assert matrix[4] == "| distilled | paper | 4-4-8 | not defined | – |"
    assert matrix[5] == "| distilled | paper | 2-2-8 | failed: exit code 1: broke | – |"
    assert matrix[6] == "| distilled |  | 32-32-32 | – | 80.0 % [70.0, 90.0] |"
    assert matrix[7] == "| none | integer | 8-8-8 | 80.0 % [70.0, 90.0] | – |"
    assert (
        "| distilled | integer | 2-2-8 | 6-6 | 21.00 ± 1.41 (n 2) | 82.0 ± 2.8 (n 2) % | 1.00 | 16.0 | 40 | 3.0 |"
        in text
    )
    assert text == quality.table(list(reversed(rows))) and "abacus" in text
    assert quality.table([]) == "No rows." == quality.sensitivity_table([])


def test_sensitivity_from_the_command(places: Path) -> None:
    """In this process: rows once for each width, then not again."""
    cells = cells_of(GRID | {"blocks": [block(bits=["2-2-8", "32-32-32", "8-8-8"])]}, places)
    ledger = Ledger(places / "parts.json", quality.PART_KEYS)
    quality.run_sensitivity(cells, ledger, "2-2-8")
    assert {row["bits"] for row in ledger.rows} == {"2-2-8"}
    assert [row["part"] for row in ledger.rows] == [
        "embedding", "encoder.0", "encoder.1", "encoder.2", "decoder.0", "decoder.1", "decoder.2",
    ]  # fmt: skip
    assert all({"kl", "loss", "loss_float", "score", "drop", "task"} <= row.keys() for row in ledger.rows)
    written = (places / "parts.json").stat().st_mtime_ns
    quality.run_sensitivity(cells, ledger, "2-2-8")
    assert (places / "parts.json").stat().st_mtime_ns == written
    worst = max(ledger.rows, key=lambda row: row["kl"])["part"]
    assert quality.sensitivity_table(ledger.rows).splitlines()[4].startswith(f"| {worst} |")


def test_a_cell_that_cannot_be_says_why(places: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its last line is what becomes the row's error."""
    (places / "row.json").write_text(json.dumps({"score": 1.0, "generation": {}}))
    orders = {"recipe": {"layers": "9-9", "max_steps": 4}, "teacher": str(places / "teachers" / "small"), "keep": False}
    orders |= {"data": str(places / "data" / "pairs"), "teacher_folder": str(places), "jobs": 1, "test_examples": None}
    orders |= {"train_examples": None}
    (places / "cell.json").write_text(json.dumps(orders))
    assert quality_cell.main(places) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("ValueError: encoder layers 9: the teacher's stack has 3")
    assert "score" in json.loads((places / "row.json").read_text())


def test_a_whole_run_stopped_and_continued(places: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C while a cell trains; the same command goes on from its checkpoint."""
    task = TASK | {"recipe": {"max_steps": 150, "batch_size": 4, "evaluations": 1, "dev_subset": 4}, "test_examples": 8}
    task |= {"train_examples": 40}
    (places / "grid.yaml").write_text(yaml.safe_dump({"tasks": {"copy": task}, "blocks": [block()]}))
    words = [str(places / "grid.yaml"), "--teachers", str(places / "teachers"), "--data", str(places / "data")]
    words += ["--work", str(places / "work"), "--out", str(places / "out.json"), "--threads", "1"]
    process = subprocess.Popen([sys.executable, quality.__file__, *words], stderr=subprocess.PIPE, text=True)
    log, deadline = places, time.monotonic() + 300
    while not (log.is_file() and "step 3/" in log.read_text()) and time.monotonic() < deadline:
        log = next((places / "work").glob("copy_2-2-8_2-1*/log.txt"), places)
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "the same command goes on" in process.communicate(timeout=300)[1] and process.returncode == 130
    assert "a checkpoint is saved" in log.read_text() and not list((places / "work").glob("*_2-1*/row.json"))
    assert [row["distillation"] for row in json.loads((places / "out.json").read_text())["rows"]] == ["teacher"]

    assert quality.main(words) == 0
    said = capfd.readouterr()
    assert json.loads(said.out.splitlines()[-1]) == {"rows": 2, "failed": 0}
    assert "resuming from" in log.read_text() and "start copy_teacher" not in said.err
    teacher, row = json.loads((places / "out.json").read_text())["rows"]
    assert row["steps"] == 150 and row["minutes"] > 0 and row["device"] and row["examples"] == 8
    assert row["retention"] == pytest.approx(row["score"] / teacher["score"], rel=1e-4) and row["metric"] == "rougeL"
    assert row["teacher_bytes"] == teacher["file_bytes"] and row["interval"] == row["intervals"]["rougeL"]
    kept = {file.name for file in log.parent.iterdir()}
    assert kept == {"cell.json", "log.txt", "outputs.jsonl", "report.json", "row.json"}
    report = json.loads((log.parent / "report.json").read_text())
    assert row["file_bytes"] == report["sizes"]["file_bytes"] and report["data"]["train"] == 40
    assert quality.main([*words, "--list"]) == 0
    assert "done            copy_2-2-8_2-1_integer_distilled_28" in capfd.readouterr().out


def test_wrong_use(places: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (places / "grid.yaml").write_text(yaml.safe_dump(GRID))
    words = [str(places / "grid.yaml"), "--teachers", "x", "--data", "x", "--work", str(places / "w")]
    for chosen, said in (
        ([], "GRID.yaml is missing"),
        (words[:1], "--teachers is missing"),
        (words[:5], "--work is missing"),
        (["nowhere.yaml", "--list"], "nowhere.yaml: no such"),
        ([*words, "--out", str(places / "out.json")], "no checkpoint there; train it"),
    ):
        assert quality.main(chosen) == 2
        error = capfd.readouterr().err
        assert said in error and error.count("\n") == 1
