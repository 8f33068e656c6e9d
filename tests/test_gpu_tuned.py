"""Tables of tuned launches: what is found, what is refused, and that they change the cut and never the result."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from dqbart_kernels.gpu import products, tuned  # noqa: E402
from dqbart_kernels.gpu.products import Tiles, int8_matmul, int8_matmul_reference  # noqa: E402
from test_gpu_products import random_case  # noqa: E402

GPU = "NVIDIA H200 (test)"
FIELDS = dict(bm=16, bn=32, bw=64, splits=3, swap=False, warps=2, stages=2)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    return tmp_path


def write(folder: Path, entries: Any, **changes: Any) -> Path:
    path = tuned.path_of(GPU, folder)
    path.write_text(json.dumps({"format": 1, "gpu": GPU, "kernels": {"int8_matmul": entries}} | changes))
    return path


def find(m: int = 5, n: int = 40, k: int = 700) -> Tiles | None:
    return tuned.find(GPU, "int8_matmul", Tiles, n, k, 2, m)


def test_rows_find_their_bucket() -> None:
    assert [tuned.bucket(m) for m in (1, 2, 4, 5, 16, 17, 4096, 9999)] == [1, 4, 4, 16, 16, 64, 4096, 4096]
    assert tuned.path_of(GPU, Path("x")) == Path("x/NVIDIA_H200_test_.json")


def test_what_the_table_has_is_found(folder: Path) -> None:
    write(folder, {"n40 k700 bits2 m16": FIELDS})
    assert find() == find(16) == Tiles(**FIELDS)  # type: ignore[arg-type]
    assert find(17) is None and find(n=41) is None
    assert tuned.find(None, "int8_matmul", Tiles, 40, 700, 2, 5) is None
    assert tuned.find("another", "int8_matmul", Tiles, 40, 700, 2, 5) is None
    assert tuned.find(GPU, "another", Tiles, 40, 700, 2, 5) is None


def test_a_product_takes_its_tiles_from_the_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, {"n40 k700 bits2 m16": FIELDS})
    monkeypatch.setattr(products, "_gpu_name", lambda device: GPU)
    monkeypatch.setattr(products, "choose_tiles", None)  # called, it would fail
    a, scale, weight, _ = random_case(5, 40, 700, 2)
    assert torch.equal(int8_matmul(a, scale, weight), int8_matmul_reference(a, scale, weight))
    a, scale, weight, _ = random_case(5, 41, 700, 2)
    with pytest.raises(TypeError):
        int8_matmul(a, scale, weight)


@pytest.mark.parametrize(
    ("entries", "changes", "words"),
    [
        (
            {"n40 k700 bits2 m5": FIELDS},
            {},
            "int8_matmul 'n40 k700 bits2 m5': expected a key like 'n768 k768 bits2 m16",
        ),
        ({"40,700": FIELDS}, {}, "int8_matmul '40,700': expected a key like"),
        ({"n40 k700 bits2 m16": {"bm": 16}}, {}, "m16': {'bm': 16}, expected the fields bm, bn, bw, splits, swap"),
        ({"n40 k700 bits2 m16": 3}, {}, "m16': 3, expected the fields"),
        ({"n40 k700 bits2 m16": FIELDS | {"bn": 0}}, {}, "m16': bn 0, expected a whole number from 1 on"),
        ({"n40 k700 bits2 m16": FIELDS | {"bn": True}}, {}, "m16': bn True, expected a whole number"),
        ({"n40 k700 bits2 m16": FIELDS | {"swap": 1}}, {}, "m16': swap 1, expected true or false"),
        ({}, {"format": 2}, "format 2, this version reads 1"),
        ({}, {"kernels": []}, "not a table of tuned launches"),
    ],
)
def test_a_damaged_table_is_refused_with_file_and_key(folder: Path, entries: Any, changes: Any, words: str) -> None:
    path = write(folder, entries, **changes)
    with pytest.raises(ValueError) as found:
        find()
    text = str(found.value)
    assert text.startswith(f"{path}: ") and words in text and "python benchmarks/tune.py" in text


def test_half_a_file_is_refused(folder: Path) -> None:
    path = write(folder, {})
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match=r"\.json: not a table of tuned launches \(JSONDecodeError"):
        find()


def test_tables_that_are_shipped_can_be_read_and_wheels_carry_them() -> None:
    for path in tuned.FOLDER.glob("*.json"):
        assert tuned.read(path, "int8_matmul", Tiles)
        assert tuned.path_of(json.loads(path.read_text())["gpu"]) == path
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert "gpu/configs/*.json" in settings["tool"]["setuptools"]["package-data"]["dqbart_kernels"]
