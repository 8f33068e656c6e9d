"""The command line as a user meets it: flags, files, exit codes, the last line, and one-line errors."""

import json
import shutil
from pathlib import Path

import pytest
from test_generate import mbart_tokenizer
from tiny_models import tiny_seq2seq
from transformers import MBart50Tokenizer, MBartForConditionalGeneration

import dqbart
from dqbart.cli import main, parser, recipe_and_run
from dqbart.data.files import load_rows


def last_json(text: str) -> dict:
    return json.loads(text.splitlines()[-1])


@pytest.fixture(scope="module")
def packed(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "small"
    assert main(["compress", str(teacher_folder), "--epochs", "0", "--layers", "2-1", "--out", str(folder)]) == 0
    return folder


def test_flag_over_file_over_preset(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("teacher: here\noutput: there\nbits: 4-4-8\nlayers: 3-1\nlosses:\n  task: 0.5\n")
    args = parser().parse_args(
        ["compress", "--config", str(file), "--preset", "int8", "--layers", "6-3", "--max-steps", "7"]
    )
    recipe, run = recipe_and_run(args)
    assert (recipe.bits.text, recipe.layers.text, recipe.epochs, recipe.losses.task) == ("4-4-8", "6-3", 1.0, 0.5)
    assert run == {"teacher": "here", "output": "there"} and recipe.max_steps == 7


def test_every_recipe_flag_is_a_recipe_field() -> None:
    import dataclasses

    from dqbart.cli import RECIPE_FLAGS
    from dqbart.recipe import Recipe

    assert set(RECIPE_FLAGS) <= {f.name for f in dataclasses.fields(Recipe)}


def test_verbs_end_in_json(packed: Path, pairs_file: Path, tmp_path: Path, capsys) -> None:
    assert main(["info", str(packed)]) == 0
    info = last_json(capsys.readouterr().out)
    assert info["file_bytes"] == (packed / "model.safetensors").stat().st_size
    assert main(["verify", str(packed)]) == 0
    assert last_json(capsys.readouterr().out)["architecture"] == "BartForConditionalGeneration"
    assert (
        main(["generate", str(packed), "--text", "the cat", "--text", "a dog", "--generation", '{"num_beams": 1}']) == 0
    )
    out = capsys.readouterr().out
    assert last_json(out)["outputs"] == out.splitlines()[:-1] and len(out.splitlines()) == 3
    rows = tmp_path / "rows.jsonl"
    assert main(["eval", str(packed), "--data", str(pairs_file), "--limit", "5", "--out", str(rows)]) == 0
    score = last_json(capsys.readouterr().out)
    assert score["n"] == 5 and score["metric"] == "rouge" and len(rows.read_text().splitlines()) == 5
    assert main(["doctor"]) == 0
    doctor = capsys.readouterr().out
    assert last_json(doctor)["engines"][-1] == "torch"
    assert "engine cpu: " in doctor and "integer products on this CPU" in doctor


def test_eval_and_generate_take_mbart_s_languages(tmp_path: Path, pairs_file: Path, capsys) -> None:
    tokenizer = mbart_tokenizer(MBart50Tokenizer)
    config = tiny_seq2seq("mbart").config
    config.vocab_size = len(tokenizer)
    MBartForConditionalGeneration(config).save_pretrained(tmp_path / "mbart")
    tokenizer.save_pretrained(tmp_path / "mbart")
    codes = ["--source-lang", "en_XX", "--target-lang", "de_DE"]
    words = ["eval", str(tmp_path / "mbart"), "--data", str(pairs_file), "--limit", "3", "--metric", "bleu"]
    assert main([*words, "--generation", '{"max_length": 8}']) == 2
    assert "--source-lang" in capsys.readouterr().err
    assert main([*words, *codes, "--generation", '{"max_length": 8}']) == 0
    score = last_json(capsys.readouterr().out)
    assert score["language"] == "de_DE" and score["generation"]["forced_bos_token_id"] is not None
    assert main([*words, *codes, "--language", "zh", "--generation", '{"max_length": 8}']) == 0
    assert "tok:zh" in last_json(capsys.readouterr().out)["definition"]
    assert main(["generate", str(tmp_path / "mbart"), "--text", "the cat", *codes]) == 0


def test_eval_takes_a_plain_checkpoint(teacher_folder: Path, pairs_file: Path, capsys) -> None:
    assert main(["eval", str(teacher_folder), "--data", str(pairs_file), "--limit", "3", "--metric", "bleu"]) == 0
    assert "bleu" in last_json(capsys.readouterr().out)["values"]


BAD_FILES = {
    "empty.jsonl": "",
    "broken.jsonl": '{"source": "a", "target": "b"}\n{"source": \n',
    "list.jsonl": '["a"]\n',
    "ragged.csv": "source,target\na,b\nc\n",
    "words.doc": "x",
}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bits", "2-5-8"], "bits '2-5-8': expected W-E-A"),
        (["--bits", "two"], "bits 'two': expected W-E-A"),
        (["--layers", "4-1"], "encoder layers 4: the teacher's stack has 3; expected 1 to 3"),
        (["--layers", "3"], "a bart model has 2 stacks; expected E-D"),
        (["--layers", "0-1"], "at least 1 each"),
        (["--metric", "meteor"], "metric 'meteor': expected one of accuracy, bleu"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--config", "none.yaml"], "none.yaml: no such recipe file"),
        (["--epochs", "1"], "data is missing"),
        (["--epochs", "1", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--epochs", "1", "--data", "empty.jsonl"], "empty.jsonl: the file is empty"),
        (["--epochs", "1", "--data", "broken.jsonl"], "broken.jsonl line 2: invalid JSON"),
        (["--epochs", "1", "--data", "list.jsonl"], "list.jsonl line 1"),
        (["--epochs", "1", "--data", "ragged.csv"], "ragged.csv line 3"),
        (["--epochs", "1", "--data", "words.doc"], "words.doc"),
        (["--epochs", "1", "--data", "good.csv", "--source-column", "txt"], "column 'txt' (--source-column)"),
        (["--epochs", "1", "--data", "good.csv", "--target-lang", "de_DE"], "has no language codes"),
        (["--device", "tpu"], "device 'tpu'"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, teacher_folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in BAD_FILES.items():
        Path(name).write_text(text)
    Path("good.csv").write_text("source,target\n" + "".join(f"the cat {i},a dog\n" for i in range(20)))
    before = sorted(p.name for p in tmp_path.iterdir())
    epochs = [] if "--epochs" in arguments else ["--epochs", "0"]
    assert main(["compress", str(teacher_folder), "--out", "out", *epochs, *arguments]) == 2
    captured = capsys.readouterr()
    error = captured.err.splitlines()[-1]
    assert error.startswith("dqbart: error: ") and words in error, error
    assert captured.out == "" and sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "small", "--data", "d.csv", "--device", "gpu"], "device 'gpu': expected 'cpu' or 'cuda', or"),
        (["generate", "small", "--text", "x", "--device", "gpu"], "device 'gpu': expected 'cpu' or 'cuda', or"),
        (["bench", "small", "--device", "gpu"], "device 'gpu': expected 'cpu'"),
        (["bench", "small", "--threads", "0"], "threads 0: expected at least 1"),
        (
            ["eval", "small", "--data", "folder", "--split", "spring"],
            "split 'spring': expected one of train, validation",
        ),
        (["eval", "nowhere/", "--data", "d.csv"], "model 'nowhere/': no such folder; expected a checkpoint folder or"),
        (
            ["compress", "small/", "--data", "none.txt", "--out", "x"],
            "teacher 'small/' is quantized already; give the full",
        ),
        (["demo", "--bits", "foo"], "bits 'foo': expected W-E-A"),
    ],
)
def test_what_other_verbs_refuse(
    arguments: list[str], words: str, packed: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d.csv").write_text("source,target\nthe cat,a dog\n")
    Path("small").symlink_to(packed)
    Path("folder").mkdir()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("dqbart: error: ") and words in captured.err
    assert captured.out == "" and not Path("demo-out").exists()


def test_calls_that_are_refused(packed: Path, teacher_folder: Path, tmp_path: Path) -> None:
    for threads in (0, -1, 1.5, "2", True):
        with pytest.raises(ValueError, match=f"threads {threads!r}: expected a whole number of at least 1"):
            dqbart.load(packed, threads=threads)
    with pytest.raises(ValueError, match=r"device 'quantum': expected 'cpu' or 'cuda', or 'cuda:1'"):
        dqbart.load(packed, device="quantum")
    with pytest.raises(ValueError, match=r"recipe of type dict: expected a dqbart.Recipe or a preset's name"):
        dqbart.compress(teacher_folder, recipe={"bits": "8-8-8"}, output=tmp_path / "out")  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file: is a file; expected a folder to write"):
        dqbart.compress(teacher_folder, output=tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="data 'nowhere.txt': no such file or folder"):
        load_rows("nowhere.txt")


def test_unsuitable_teachers(tmp_path: Path, packed: Path, capsys) -> None:
    from transformers import T5Config

    T5Config().save_pretrained(tmp_path / "t5")
    (tmp_path / "nothing").mkdir()
    for folder, words in (
        (tmp_path / "t5", "architecture 't5' is not supported; expected bart or mbart or bert"),
        (tmp_path / "nothing", "no config.json there"),
        (tmp_path / "absent" / "deeper", "no such folder"),
        (packed, "is quantized already"),
    ):
        assert main(["compress", str(folder), "--epochs", "0", "--out", str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("names", ["absent", None, [], ["os.system"]])
def test_info_of_a_folder_without_a_class(names: object, packed: Path, tmp_path: Path, capsys) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "small"))
    config = json.loads((folder / "config.json").read_text()) | {"architectures": names}
    if names == "absent":
        del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["info", str(folder)]) == 2
    assert "architectures" in capsys.readouterr().err.splitlines()[-1]


def test_a_packed_folder_without_its_recipe(packed: Path, pairs_file: Path, tmp_path: Path, capsys) -> None:
    """save_pretrained, and save_packed without recipe=, leave such folders."""
    folder = Path(shutil.copytree(packed, tmp_path / "small"))
    (folder / "recipe.yaml").unlink()
    assert main(["generate", str(packed), "--text", "the cat"]) == main(["generate", str(folder), "--text", "the cat"])
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines()[1::2])
    assert first["outputs"] == second["outputs"]
    assert main(["eval", str(folder), "--data", str(pairs_file), "--limit", "3", "--task", "text"]) == 2
    assert "task 'text': a bart model is an encoder-decoder" in capsys.readouterr().err


def test_damaged_folders(packed: Path, tmp_path: Path, capsys) -> None:
    weights = (packed / "model.safetensors").read_bytes()
    flipped = bytearray(weights)
    flipped[-3000] ^= 1
    for content in (weights[:-50], bytes(flipped), b""):
        folder = tmp_path / "damaged"
        shutil.copytree(packed, folder)
        (folder / "model.safetensors").write_bytes(content)
        for verb in (["verify", str(folder)], ["generate", str(folder), "--text", "the cat"]):
            assert main(verb) == 2
            assert "model.safetensors" in capsys.readouterr().err.splitlines()[-1]
        shutil.rmtree(folder)
