"""The product benchmark: wrong kernels are found, nothing is measured twice, and every gap shows."""

import dataclasses
import json

import matmul
import products
import pytest
import torch
from products import KERNELS, SHAPES, Kernel, Shape, error_of, random_activations, random_codes

CPU = torch.device("cpu")
TINY = {"bart-base fc1": Shape(24, 40, 4000), "bart-base fc2": Shape(9, 24, 4000)}


def exact_product(codes_NK, bits):
    return (lambda a_MK: (a_MK.long() @ codes_NK.long().T).int()), codes_NK.nbytes


def saturating(codes_NK, bits):
    return (lambda a_MK: (a_MK.long() @ codes_NK.long().T).clamp(-32768, 32767).int()), codes_NK.nbytes


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A bench of two small matrices; call it with arguments to get exit code and rows."""
    for module in (matmul, products):
        monkeypatch.setattr(module, "SHAPES", TINY)
    monkeypatch.setattr(matmul, "ARRAY", 1024)
    monkeypatch.setattr(matmul, "SIDE", {"cpu": 32})
    monkeypatch.setattr(matmul, "SPAN", 1e-5)
    monkeypatch.setattr(
        matmul, "KERNELS", [kernel for kernel in KERNELS if kernel.name in ("torch fp32", "dqbart integer_matmul")]
    )
    threads, out = torch.get_num_threads(), tmp_path / "matmul.json"

    def run(*arguments):
        words = ["matmul.py", "--threads", "1", "--rounds", "2", "--device", "cpu", "--out", str(out), *arguments]
        monkeypatch.setattr("sys.argv", words)
        code = matmul.main()
        return code, json.loads(out.read_text())["rows"] if out.exists() else []

    yield run
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("m", [1, 5])
def test_kernels_are_right_on_ragged_shapes(kernel, m):
    if reason := kernel.missing(CPU):
        pytest.skip(reason)
    for bits in kernel.bits:
        codes, a = random_codes(37, 72, min(bits, 8)), random_activations(m, 72)
        product, weight_bytes = kernel.make(codes, bits)
        cut_off = 2 if kernel.name.endswith(("bf16 out", "weight_only_matmul")) else 1  # the interpreter truncates bf16
        assert error_of(product(a.to(getattr(torch, kernel.activations))), a, codes) <= cut_off * kernel.tolerance
        assert weight_bytes >= codes.numel() * min(bits, 8) / 8


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_codes_span_their_range(bits):
    codes = random_codes(50, 64, bits)
    largest = products.LARGEST[bits]
    assert codes.max() == largest and codes.min() == -largest and (codes[0] == largest).all()
    assert set(codes.unique().tolist()) <= set(range(-largest, largest + 1)) and (bits > 1 or 0 not in codes)
    assert random_codes(1, 64, bits).shape == (1, 64)


def test_one_wrong_value_is_found_wherever_it_is_looked_for():
    codes, a = random_codes(40, 64, 8), random_activations(6, 64)
    right = (a.long() @ codes.long().T).int()
    assert error_of(right, a, codes) == 0
    for place in ((0, 0), (5, 39), (3, 17)):
        wrong = right.clone()
        wrong[place] += 100
        assert error_of(wrong, a, codes) > 1e-5
    nan = right.float()
    nan[2, 2] = torch.nan
    assert not error_of(nan, a, codes) <= 1e9
    assert error_of(right[:, :-1], a, codes) == float("inf")


def test_saturation_is_found():
    codes, a = random_codes(40, 64, 2), random_activations(6, 64)
    assert error_of(exact_product(codes, 2)[0](a), a, codes) == 0
    codes = random_codes(40, 1024, 2)  # 127 * 1024 > 2^15
    a = random_activations(6, 1024)
    assert error_of(saturating(codes, 2)[0](a), a, codes) > 0.1


def test_a_full_run_and_its_table(tiny, capsys):
    code, rows = tiny("--rows", "1", "4")
    cases = [row for row in rows if row["shape"] in TINY]
    assert code == 0 and len(cases) == 2 * 2 * 5
    assert {(row["kernel"], row["bits"]) for row in cases} == {
        ("torch fp32", 32), *(("dqbart integer_matmul", bits) for bits in (8, 4, 2, 1))
    }  # fmt: skip
    for row in cases:
        assert row["operations"] == 2 * row["m"] * row["n"] * row["k"] and row["rounds"] == 2 and row["error"] <= 1e-6
        assert row["fastest"] <= row["seconds"] <= row["slowest"] and row["ratio"] > 0
        assert row["copies"] == round(4000 / (row["n"] * row["k"]))
    fp32 = next(row for row in cases if row["kernel"] == "torch fp32" and row["m"] == 4 and row["n"] == 24)
    assert fp32["bytes"] == 4 * (24 * 40 + 4 * 40 + 4 * 24) and fp32["ratio"] == 1
    text = matmul.table(rows)
    assert "bandwidth" in text and text.count("| torch fp32 |") == 2 and "| M=1 | M=4 |" in text
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1]) == {"rows": len(rows), "wrong": 0} and "bart-base fc2 M=4" in err


def test_a_rerun_measures_only_what_is_missing(tiny, monkeypatch):
    _, first = tiny("--rows", "1")
    monkeypatch.setattr(matmul, "bandwidth", None)  # called again, it would fail
    assert tiny("--rows", "1") == (0, first)


def test_a_new_kernel_is_measured_against_the_baseline_alone(tiny, monkeypatch):
    _, first = tiny("--rows", "2")
    new = Kernel("new", (2, 1), "int8", "int8", exact_product)
    monkeypatch.setattr(matmul, "KERNELS", [*matmul.KERNELS, new])
    code, rows = tiny("--rows", "2")
    assert code == 0 and len(rows) == len(first) + 2 * 2
    old = [row for row in first if row["shape"] in TINY]
    assert all(any(row | {"run": 0} == kept | {"run": 0} for kept in rows) for row in old)


def test_a_wrong_kernel_fails_until_it_is_mended(tiny, monkeypatch, capsys):
    codes_of = [*matmul.KERNELS, Kernel("broken", (8,), "int8", "int8", saturating)]
    monkeypatch.setattr(matmul, "KERNELS", codes_of)
    code, rows = tiny("--rows", "3")
    broken = [row for row in rows if row["kernel"] == "broken" and row["shape"] in TINY]
    assert code == 1 and len(broken) == 2 and all("wrong" in row and "seconds" not in row for row in broken)
    assert "WRONG" in matmul.table(rows) and "broken at 8 bits is wrong" in capsys.readouterr().err
    assert tiny("--rows", "3")[0] == 1
    monkeypatch.setattr(matmul, "KERNELS", [*codes_of[:-1], dataclasses.replace(codes_of[-1], make=exact_product)])
    code, rows = tiny("--rows", "3")
    assert code == 0 and "WRONG" not in matmul.table(rows)


def test_what_takes_too_long_is_skipped_visibly_and_measured_under_a_higher_limit(tiny, monkeypatch):
    code, rows = tiny("--rows", "1", "4", "--max-seconds", "1e-9")
    skipped = [row for row in rows if "predicted" in row]
    assert code == 0 and len(skipped) == 10 and all(row["m"] == 4 for row in skipped)
    assert "skipped: " in matmul.table(rows)
    _, rows = tiny("--rows", "1", "4", "--max-seconds", "60")
    assert not any("predicted" in row for row in rows)


@pytest.mark.parametrize("where", ["make", "call"])
def test_what_a_partial_kernel_raises_stands_in_its_cells_and_ours_ends_the_run(tiny, monkeypatch, where):
    def make(codes_NK, bits):
        def product(a_MK):
            raise RuntimeError("no kernel\n for this")

        return product("") if where == "make" else (product, 1)

    kernels = [*matmul.KERNELS, Kernel("peer", (2,), "int8", "int8", make, partial=True)]
    monkeypatch.setattr(matmul, "KERNELS", kernels)
    code, rows = tiny("--rows", "1", "2")
    failed = [row for row in rows if "failed" in row]
    assert code == 0 and len(failed) == 4 and {row["failed"] for row in failed} == {"RuntimeError: no kernel for this"}
    assert "failed: RuntimeError: no kernel for this" in matmul.table(rows)
    assert tiny("--rows", "1", "2") == (0, rows)  # tried, so not due
    monkeypatch.setattr(matmul, "KERNELS", [*kernels[:-1], dataclasses.replace(kernels[-1], partial=False)])
    with pytest.raises(RuntimeError, match="no kernel"):
        tiny("--rows", "1", "2", "--again")


def test_without_fp32_the_first_kernel_is_the_baseline(tiny, monkeypatch):
    """As on a GPU, where it is bf16."""
    first = dataclasses.replace(matmul.KERNELS[0], missing=lambda device: "no peer")
    bf16 = next(kernel for kernel in KERNELS if kernel.name == "torch bf16")
    monkeypatch.setattr(matmul, "KERNELS", [first, bf16, *matmul.KERNELS[1:]])
    _, rows = tiny("--rows", "1")
    assert all(row["ratio"] == 1 for row in rows if row["kernel"] == "torch bf16" and "ratio" in row)
    text = matmul.table(rows)
    assert "torch fp32: no peer" in text
    lines = [line for line in text.splitlines() if "| torch bf16 |" in line]
    assert lines and all(" ms, " in line for line in lines)


def test_the_gpu_s_kernels_are_listed_with_their_peers():
    """Same name as the op; what can't run here says so, with the command that mends it."""
    kernels = {kernel.name: kernel for kernel in KERNELS}
    assert kernels["dqbart int8_matmul"].bits == (8, 4, 2, 1)
    gpu = torch.device("cuda")
    assert kernels["torch fp32"].missing(gpu) and kernels["torch bf16"].missing(gpu) is None
    if kernels["gemlite"].missing(gpu):
        assert kernels["gemlite"].missing(gpu) == "not installed: pip install gemlite"
    if not torch.cuda.is_available():
        assert "torch sees no GPU" in kernels["dqbart int8_matmul"].missing(gpu)


def test_a_kernel_that_cannot_run_says_why(tiny, monkeypatch):
    absent = Kernel("absent", (2,), "int8", "int8", exact_product, missing=lambda device: f"needs more than a {device}")
    monkeypatch.setattr(matmul, "KERNELS", [*matmul.KERNELS, absent])
    _, rows = tiny("--rows", "1")
    assert "Not measured: absent: needs more than a cpu." in matmul.table(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "bert"], r"shapes \['bert'\]: expected a part of one of bart-base fc1"),
        (["--kernels", "nvidia"], "kernel 'nvidia': expected one of 'torch fp32', 'dqbart integer_matmul'"),
        (["--rows", "0"], r"rows \(0,\)"),
        (["--threads", "0"], r"threads \[0\]"),
    ],
)
def test_wrong_arguments(tiny, capsys, arguments, message):
    code, rows = tiny(*arguments)
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and not rows and len(lines) == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(lines[0])


def test_a_decode_step_reads_as_many_weights_as_the_model_has():
    assert SHAPES["bart-base fc1"].step == 49_545_216 + 50_265 * 768
    assert SHAPES["mbart-large-cc25 vocabulary"].step == 176_160_768 + 250_027 * 1024
    assert SHAPES["MiniLM-L12-H384 fc1"].step == 21_233_664
