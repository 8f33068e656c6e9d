"""The study of encoder methods: its cells, and its tables from made-up rows. Nothing is trained here."""

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

import encoder_methods
import pytest
import torch
from encoder_methods import Workshop, grow, is_done, lengths, look_beside_, recipe_of, sample
from encoder_methods_cells import (
    ABLATION,
    METHODS,
    STAGES,
    STUDIES,
    Cell,
    Data,
    Study,
    cells,
    in_order,
    quantized,
)
from encoder_methods_tables import best, table
from ledger import Ledger
from transformers import BertConfig, BertForMaskedLM

from dqbart.fitting import resolve
from dqbart.recipe import Recipe

SMALL = STUDIES["small"]


def by_name(study: Study = SMALL) -> dict[str, Cell]:
    return {cell.name: cell for cell in cells(study)}


@pytest.mark.parametrize("size", STUDIES)
def test_every_cell_comes_once_after_what_it_needs_and_has_a_recipe(size: str) -> None:
    study = STUDIES[size]
    made = cells(study)
    made += quantized(study, made, STAGES)
    names = [cell.name for cell in made]
    assert len(set(names)) == len(names) == len({cell.settings for cell in made})
    for place, cell in enumerate(made):
        assert all(need.name in names[:place] for need in cell.needs)
        recipe = resolve(Recipe.from_dict(recipe_of(cell) | {"max_steps": 1}), BertConfig())  # nothing is unread
        assert ("mask_rate" in recipe_of(cell)) == (cell.shown["part"] == "text" and "task" in recipe.terms)
        assert len(cell.steps) == (2 if cell.recipe["method"] == "tinybert" and "prediction_epochs" not in cell.recipe
                                   and cell.shown["part"] != "text" else 1)  # fmt: skip
        assert recipe.max_source_length == study.teacher.length


def test_all_that_was_asked_for_is_there() -> None:
    found = by_name()
    for task in ("clinc150", "rt-polarity", "blimp"):
        for seed in (1, 2, 3):
            assert f"{task}/teacher/{seed}" in found
            for shape in ("narrow", "wide"):
                assert all(f"{task}/{shape}/{method}/{seed}" in found for method in (*METHODS, STAGES))
    assert all(f"clinc150/ablation/{without}/{seed}" in found for without in ABLATION for seed in (1, 2, 3))


def test_students_of_one_shape_differ_in_the_method_alone() -> None:
    found = by_name()
    for shape in ("narrow", "wide"):
        general = [found[f"{shape}/{method}"] for method in METHODS]
        assert (
            len({(cell.steps, cell.data, cell.recipe["batch_size"], cell.recipe["learning_rate"]) for cell in general})
            == 1
        )
    narrow = [found[f"narrow/{method}"] for method in METHODS]
    starts = {cell.model if cell.recipe["method"] == "finetune" else cell.student for cell in narrow}
    assert starts == {SMALL.narrow}  # the control begins where the others do
    tuned = [found[f"blimp/narrow/{method}/2"] for method in METHODS]
    assert len({json.dumps(cell.recipe) for cell in tuned}) == 1


def test_the_control_never_meets_a_teacher() -> None:
    control = by_name()["clinc150/narrow/scratch/1"]
    assert [cell.name for cell in in_order([control])] == ["narrow/scratch", control.name]


def test_the_ablation_takes_one_thing_away_in_both_stages() -> None:
    found = by_name()
    hidden, top = found["clinc150/ablation/no hidden loss/1"], found["clinc150/ablation/top layers/1"]
    for cell in (hidden, hidden.student):
        assert isinstance(cell, Cell) and set(Recipe.from_dict(cell.recipe).terms) == {"embedding", "scores"}
    for cell in (top, top.student):
        assert isinstance(cell, Cell) and cell.recipe["layer_map"] == "top"
    assert found["clinc150/ablation/no general stage/1"].student == SMALL.narrow
    assert found["clinc150/ablation/no augmentation/1"].data.writer is None
    labels = found["clinc150/ablation/no prediction loss/1"]
    inner = labels.needs[0]
    assert labels.recipe["method"] == "finetune" and labels.data.writer is not None
    assert len(Recipe.from_dict(inner.recipe | {"max_steps": 1, "task": "classification"}).stages()) == 1
    whole = found[f"clinc150/narrow/{STAGES}/1"]
    assert whole.steps == (*inner.steps, *labels.steps)  # as long without the teacher's predictions


def test_a_change_touches_what_stands_on_it_and_nothing_else() -> None:
    before = by_name()
    other = dataclasses.replace(SMALL, task_steps=SMALL.task_steps | {"blimp": 7})
    changed = {name for name, cell in by_name(other).items() if cell.settings != before[name].settings}
    assert changed and all(name.startswith("blimp/") for name in changed)
    longer = by_name(dataclasses.replace(SMALL, teacher_steps=SMALL.teacher_steps | {3: 7}))
    same = {name for name, cell in longer.items() if cell.settings == before[name].settings}
    assert same and all("scratch" in name for name in same)


def test_steps_by_a_factor() -> None:
    half = SMALL.times(0.5)
    assert half.teacher_steps[3] == SMALL.teacher_steps[3] / 2
    assert half.task_steps["blimp"] == SMALL.task_steps["blimp"] / 2
    assert min(SMALL.times(1e-9).task_steps.values()) == 1 and str(half) != str(SMALL)
    with pytest.raises(ValueError, match=r"--steps -1: expected a factor above 0, such as 0\.5"):
        SMALL.times(-1)


def test_steps_become_epochs_for_two_stages(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"sentence": "a", "label": 1}\n' * 33)
    cell = by_name()[f"clinc150/narrow/{STAGES}/1"]
    found = lengths(dataclasses.replace(cell, steps=(7, 3)), tmp_path)
    # as the trainer counts: ceil(epochs * batches), 33 rows being two batches
    assert [round(2 * found[name] + 0.4999) for name in ("epochs", "prediction_epochs")] == [7, 3]
    assert lengths(dataclasses.replace(cell, steps=(7,)), tmp_path) == {"max_steps": 7}


def test_samples_are_fixed_and_keep_all_that_is_asked_for(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for split, count in (("train", 50), ("validation", 5), ("test", 5)):
        rows = [{"sentence": f"s{i}", "label": i % 2, "more": i} for i in range(count)]
        (source / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        sample(source, Data("x", (10, None, 99)), tmp_path / name)
        texts.append((tmp_path / name / "train.jsonl").read_text())
    rows = [json.loads(line) for line in texts[0].splitlines()]
    assert texts[0] == texts[1] and len(rows) == 10 and set(rows[0]) == {"sentence", "label"}
    assert [row["sentence"] for row in rows] != [f"s{i}" for i in range(10)]
    assert len((tmp_path / "a" / "test.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize(("width", "heads"), [(64, 4), (60, 4), (128, 2)])  # heads of 16, 15 and 64
def test_heads_begin_by_looking_at_the_words_beside(width: int, heads: int) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=width, num_hidden_layers=2, num_attention_heads=heads, intermediate_size=8,
        max_position_embeddings=40,
    )  # fmt: skip
    model = BertForMaskedLM(config).eval()
    look_beside_(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        both = model(torch.randint(5, 50, (20, 40)), output_attentions=True).attentions
    for maps_BHQK in both:
        # how much goes to the word that lies so far away, on average
        shares = {o: maps_BHQK.diagonal(o, dim1=2, dim2=3)[:, :, 5:-5].mean((0, 2)) for o in range(-5, 6)}
        for head, offset in enumerate((-1, 1, -2, 2)[:heads]):
            assert max(shares, key=lambda o: float(shares[o][head])) == offset
            assert shares[offset][head] > 3 / 40
    assert model.bert.embeddings.position_embeddings.weight.std().item() == pytest.approx(
        config.initializer_range, rel=0.2
    )


def test_a_finished_cell_with_other_settings_is_not_done(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "rows.json", encoder_methods.KEYS)
    cell = by_name()["teacher"]
    ledger.rows.append({"study": str(SMALL), "cell": "teacher", "settings": cell.settings})
    assert is_done(cell, SMALL, ledger)
    assert not is_done(dataclasses.replace(cell, steps=(1,)), SMALL, ledger)


def test_folders_have_plain_names(tmp_path: Path) -> None:
    shop = Workshop(tmp_path, tmp_path, None, False)
    for cell in cells(STUDIES["quick"]):
        assert not set(str(shop.folder(cell))) & set(" ,'")
    with pytest.raises(FileNotFoundError, match="no such folder; --data is the folder of all data sets"):
        shop.rows(Data("no-such-set"))


def test_a_teacher_grows_by_its_own_layers(tmp_path: Path) -> None:
    few = BertForMaskedLM(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    )
    few.save_pretrained(tmp_path / "few")
    (tmp_path / "few" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\nc\nd\n")
    grow(tmp_path / "few", 5, tmp_path / "many")
    many = BertForMaskedLM.from_pretrained(tmp_path / "many")
    assert many.config.num_hidden_layers == 5
    state = few.state_dict()
    for name, tensor in many.state_dict().items():
        parts = name.split(".")
        if "layer" in parts:
            parts[3] = str(int(parts[3]) % 2)
        assert torch.equal(tensor, state[".".join(parts)]), name


def rows_of(scores: dict[str, list[float]], **more: object) -> list[dict[str, object]]:
    same: dict[str, object] = dict(
        study="a study", part="task", shape="4 x 128", task="clinc150", bits="32-32-32", minutes=2.0, file_bytes=2**20,
    )  # fmt: skip
    return [same | {"method": name, "seed": seed, "score": score, "validation": score} | more
            for name, found in scores.items() for seed, score in enumerate(found, 1)]  # fmt: skip


def text_row(shape: str, method: str, words: float | None) -> dict[str, object]:
    return dict(study="a study", part="text", shape=shape, method=method, words=words, minutes=61.4)


def test_table() -> None:
    main = {"scratch": [70.0, 72.0, 74.0], "minilm": [75.0], STAGES: [80.0, 82.0], "tinybert": [76.0, 77.0]}
    rows = [
        text_row("12 x 192", "teacher", 33.333), text_row("4 x 128", "scratch", 20.0),
        text_row("4 x 128", "minilm", None), text_row("4 x 128", "tinybert", None),
        text_row("4 x 128", "tinybert, no hidden loss", None),
        *rows_of({"teacher": [90.0]}, shape="12 x 192"), *rows_of(main),
        *rows_of({"no hidden loss": [79.0], "top layers": [81.5]}, part="ablation"),
        *rows_of({"inner layers": [1.0]}, part="step"),
        *rows_of({STAGES: [78.0]}, part="quantized", bits="2-2-8", file_bytes=2**18),
    ]  # fmt: skip
    text = table(rows)  # type: ignore[arg-type]
    lines = text.splitlines()
    assert lines[0] == "**A study**"
    assert "| 12 x 192 | (the teacher) | 61 | 33.3 | 90.0 |" in lines
    assert "| 4 x 128 | no teacher | 61 | 20.0 | 72.0 ± 2.0 |" in lines
    assert "| 4 x 128 | MiniLM | 61 |  | 75.0 (+3.0) |" in lines
    assert "| 4 x 128 | TinyBERT, both stages |  |  | 81.0 ± 1.4 (+9.0) |" in lines
    assert "DistilBERT" not in text and "inner layers" not in text
    assert "| everything | 81.0 ± 1.4 |" in lines
    assert "| no hidden loss | 79.0 (-2.0) |" in lines and "| no task stage | 76.5 ± 0.7 (-4.5) |" in lines
    assert lines.index("| no hidden loss | 79.0 (-2.0) |") < lines.index("| top layers | 81.5 (+0.5) |")
    assert "| 32-32-32 | 80.0 | 1.00 |" in lines and "| 2-2-8 | 78.0 (-2.0) | 0.25 |" in lines


def test_tables_of_little_and_of_two_studies() -> None:
    assert table([]) == ""
    small = str(STUDIES["small"])
    partly = table([text_row("12 x 192", "teacher", 26.0) | {"study": small}])
    wanted = Counter(cell.shown["part"] for cell in cells(STUDIES["small"]))
    missing = f"{wanted['text'] - 1} of {wanted['text']} (text), {wanted['task']} of {wanted['task']} (task)"
    assert f"Not run yet, of the study's cells: {missing}, " in partly
    first = rows_of({"scratch": [1.0]})
    both = table([text_row("4 x 128", "scratch", 5.0), *first, *(row | {"study": "b"} for row in first)])  # type: ignore[arg-type]
    assert both.count("**") == 4 and both.count("| 4 x 128 |") == 1


def test_the_best_method_is_that_of_the_mean() -> None:
    rows = rows_of({"minilm": [80.0, 90.0], "scratch": [86.0, 86.0]}) + rows_of({"teacher": [99.0]}, shape="12 x 192")
    rows[0]["score"] = 100.0  # on test, which chooses nothing
    rows += [text_row("4 x 128", "scratch", 20.0)]  # which has no task
    assert best(rows, "clinc150", "4 x 128") == "scratch"  # type: ignore[arg-type]
    assert best(rows, "blimp", "4 x 128") is None  # type: ignore[arg-type]
    found = quantized(SMALL, cells(SMALL), "scratch")
    assert [cell.recipe["bits"] for cell in found] == ["8-8-8", "2-2-8"]
    assert {cell.needs[0].name for cell in found} == {"clinc150/narrow/scratch/1"}


@pytest.mark.parametrize(
    "words, said",
    [
        (["--steps", "0", "--list"], "--steps 0.0: expected a factor above 0"),
        (["--work", "w", "--out", "bad.json"], "bad.json: not a results file"),
    ],
)
def test_wrong_use_is_one_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("[]")
    monkeypatch.setattr(sys, "argv", ["encoder_methods.py", "--data", str(tmp_path), *words])
    assert encoder_methods.main() == 2
    found = capsys.readouterr()
    assert said in found.err and found.err.count("\n") == 1 and not found.out


def test_only_names_cells_and_what_they_stand_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", "d", "--list", "--only", "task blimp/narrow/minilm2/3", "--out", str(tmp_path / "none.json")]
    monkeypatch.setattr(sys, "argv", ["encoder_methods.py", *words])
    assert encoder_methods.main() == 0
    assert capsys.readouterr().out.splitlines() == [
        "missing text teacher of 3 layers", "missing text teacher of 6 layers", "missing text teacher",
        "missing text narrow/minilm2", "missing task blimp/narrow/minilm2/3",
    ]  # fmt: skip
