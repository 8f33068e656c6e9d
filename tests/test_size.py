"""The size benchmark: formulas give the papers' figures, float sizes are exact, and nothing is measured twice."""

import json
import sys

import pytest
import size
import torch
from ledger import RESULTS, Ledger
from size import FORMATS, MIB, MODELS, PROMISED, Shape, build, fill, formulas, transformers_bytes
from transformers import AutoModel, AutoTokenizer

from dqbart.packed.checkpoint import save_packed
from dqbart.quant.layers import prepare

SEQ2SEQ = dict(
    vocab_size=90, d_model=32, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
    decoder_ffn_dim=48, max_position_embeddings=64,
)  # fmt: skip
ENCODER = dict(vocab_size=90, hidden_size=32, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64)
TINY = {
    "bart-base": Shape("BartForConditionalGeneration", SEQ2SEQ, ("2-2", "2-1")),
    "mbart-large-cc25": Shape("MBartForConditionalGeneration", SEQ2SEQ, ("2-2",)),
    "bert-base": Shape("BertModel", ENCODER, ("2", "1")),
    "xlm-roberta-base": Shape("XLMRobertaModel", ENCODER, ("2",)),
}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The script over tiny models; call it with arguments to get exit code and rows."""
    monkeypatch.setattr(size, "MODELS", TINY)
    monkeypatch.setattr(size, "PROMISED", {("2-1", "2-2-8", "trits"): 1.0})
    out = tmp_path / "size.json"

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["size.py", "--out", str(out), *arguments])
        code = size.main()
        return code, json.loads(out.read_text())["rows"] if out.exists() else []

    return run


@pytest.mark.parametrize(
    ("model", "layers", "bits", "a", "b"),
    [
        ("bart-base", "6-6", "32-32-32", 532.04, None),
        ("bart-base", "6-6", "8-8-8", 138.09, 137.61),
        ("bart-base", "6-6", "2-2-8", 39.61, 39.05),
        ("bart-base", "6-6", "1-1-8", 23.19, None),
        ("bart-base", "6-3", "2-2-8", 32.69, 32.24),
        ("bart-base", "6-1", "2-2-8", 28.08, 27.70),
        ("bart-base", "3-3", "2-2-8", 27.51, 27.14),
        ("bart-base", "3-1", "2-2-8", 22.90, 22.60),
        ("bart-base", "1-1", "2-2-8", 19.45, 19.20),
        ("bert-base", "12", "2-2-8", 27.95, None),
        ("mbart-large-cc25", "12-12", "2-2-8", 155.54, None),
    ],
)
def test_formulas_give_the_published_sizes(model, layers, bits, a, b):
    found = [value / MIB for value in formulas(build(model, layers), bits)]
    assert found[0] == pytest.approx(a, abs=0.006)
    assert b is None or found[1] == pytest.approx(b, abs=0.006)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("bart-base", 139_420_416), ("bart-large", 406_291_456), ("mbart-large-cc25", 610_851_840),
        ("bert-base", 109_482_240), ("MiniLM-L12-H384", 33_360_000), ("xlm-roberta-base", 278_043_648),
        ("MiniLM-L6-H384", 22_713_216), ("TinyBERT-4", 14_350_248), ("TinyBERT-6", 66_955_008),
        ("distilbert-base", 66_362_880), ("albert-base", 11_683_584),
    ],
)  # fmt: skip
def test_models_have_their_published_number_of_parameters(model, parameters):
    built = build(model, MODELS[model].depths[0])
    assert sum(p.numel() for p in built.parameters()) == parameters and all(p.is_meta for p in built.parameters())


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "F32"), (torch.float16, "F16")])
def test_float_size_is_what_save_pretrained_writes(monkeypatch, tmp_path, model, dtype, name):
    monkeypatch.setattr(size, "MODELS", TINY)
    build(model, TINY[model].depths[0], real=True).to(dtype).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert transformers_bytes(build(model, TINY[model].depths[0]), name) == file.stat().st_size


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize(("bits", "format"), FORMATS)
def test_size_does_not_depend_on_the_values(monkeypatch, tmp_path, model, bits, format):
    monkeypatch.setattr(size, "MODELS", TINY)
    depth = TINY[model].depths[-1]
    cheap = fill(build(model, depth))
    assert all(p.stride(0) == 0 for p in cheap.parameters() if p.dim() == 2)  # it takes no memory
    row = size.measure(model, depth, bits, format, prepare(cheap, bits))
    folder = save_packed(prepare(build(model, depth, real=True), bits), tmp_path / "real", storage=format)
    assert row["bytes"] == (folder / "model.safetensors").stat().st_size == sum(row[group] for group in size.GROUPS)


def test_a_run_is_whole_and_a_rerun_measures_nothing(tiny, monkeypatch, capsys):
    code, rows = tiny("--models", "bert-base")
    assert code == 0 and len(rows) == 2 * (len(FORMATS) + 2)
    assert {row["how"] for row in rows if row["format"].startswith("transformers")} == {"computed"}
    monkeypatch.setattr(size, "measure", None)  # called again, it would fail
    assert tiny("--models", "bert-base") == (0, rows)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"rows": len(rows), "over_the_limit": 0}
    with pytest.raises(TypeError):
        tiny("--again")


def test_a_broken_promise_fails(tiny, monkeypatch, capsys):
    monkeypatch.setattr(size, "PROMISED", {("2-1", "2-2-8", "trits"): 0.001})
    code, rows = tiny("--quick")
    assert code == 1 and [row["format"] for row in rows if "formula_a" in row] == ["trits"]
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("bart-base 2-1 2-2-8 trits: ") and last.endswith(" MiB, promised 0.001")


def test_quick_leaves_the_results_alone(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(size, "RESULTS", tmp_path / "results")
    monkeypatch.setattr("sys.argv", ["size.py", "--quick"])
    assert size.main() == 0 and not (tmp_path / "results").exists()


def program(file, text):
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


def peer(folder, name, body):
    """A Python whose environment holds a converter that does `body`."""
    program(folder / "python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    program(folder / name, f"#!{sys.executable}\nimport sys, pathlib\n{body}\n")
    return str(folder / "python")


@pytest.mark.parametrize("model", TINY)
def test_peers_get_a_model_they_can_read(monkeypatch, tmp_path, model):
    monkeypatch.setattr(size, "MODELS", TINY)
    size.save_dense(model, tmp_path)
    loaded, tokenizer = AutoModel.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == loaded.config.vocab_size == 90 and tokenizer.convert_tokens_to_ids("w85") == 89
    assert (tmp_path / "generation_config.json").exists() == ("-" in TINY[model].depths[0])  # what ort_bytes goes by


def test_a_peer_is_measured_and_the_other_one_is_a_visible_gap(tiny, monkeypatch, tmp_path):
    body = (
        "assert pathlib.Path(sys.argv[2], 'model.safetensors').exists() and 'int8' in sys.argv\n"
        "out = pathlib.Path(sys.argv[4])\n"
        "out.mkdir(); (out / 'model.bin').write_bytes(bytes(3 * 2**20))"
    )
    monkeypatch.setitem(size.PEERS, size.CT2, (size.ct2_bytes, ("transformers",)))
    code, rows = tiny("--quick", "--ct2-python", peer(tmp_path / "bin", "ct2-transformers-converter", body))
    (row,) = [row for row in rows if row["format"] == size.CT2]
    assert code == 0 and row["bytes"] == 3 * 2**20 and row["versions"].startswith("transformers ")
    assert "| 3.0 | not measured: `size.py --models bart-base --ort-python PATH` |" in size.table(rows)


def test_a_model_that_a_peer_cannot_read_is_a_gap_and_is_not_tried(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(size, "UNREADABLE", {("bert-base", size.CT2): "it has no BERT"})
    code, rows = tiny("--models", "bert-base", "--ct2-python", str(tmp_path / "none" / "python"))
    assert code == 0 and "| it has no BERT | not measured: `size.py --models bert-base --ort" in size.table(rows)
    parameters = sum(p.numel() for p in build("bert-base", "2").parameters())
    assert f"| bert-base | 2 | {parameters / 1e6:.1f} M |" in size.table(rows)


@pytest.mark.parametrize("case", ["absent", "failing", "incomplete"])
def test_a_peer_that_cannot_is_named_in_one_line(tiny, monkeypatch, tmp_path, capsys, case):
    monkeypatch.setitem(size.PEERS, size.CT2, (size.ct2_bytes, ("transformers",)))
    python = str(tmp_path / "none" / "python")
    if case != "absent":
        name = "ct2-transformers-converter" if case == "failing" else "another"
        python = peer(tmp_path / "bin", name, "sys.exit('no such architecture')")
    code, rows = tiny("--quick", "--ct2-python", python)
    last = capsys.readouterr().err.splitlines()[-1]
    expected = "no such architecture" if case == "failing" else "no such file; expected the Python of an environment"
    assert code == 2 and expected in last and rows  # what was measured before is kept


def test_the_committed_table_is_whole():
    ledger = Ledger(RESULTS / "size.json", size.KEYS)
    for name, shape in MODELS.items():
        for layers in shape.depths:
            for bits, format in [*FORMATS, *((bits, kind) for kind, (bits, _) in size.FLOATS.items())]:
                row = ledger.find(model=name, layers=layers, bits=bits, format=format)
                assert row is not None, f"{name} {layers} {bits} {format}: run python benchmarks/size.py"
                assert row["bytes"] <= (row.get("promised_mib") or 1e9) * MIB
    promised = {tuple(row[key] for key in size.KEYS[1:]): row["promised_mib"] for row in ledger.rows
                if row.get("promised_mib")}  # fmt: skip
    assert promised == PROMISED
