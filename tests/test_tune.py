"""The tuner: candidates that are worth trying, the fastest right one wins, and a rerun goes on."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

import tune  # noqa: E402
from dqbart_kernels.gpu import products, tuned  # noqa: E402
from dqbart_kernels.gpu.products import Tiles, choose_tiles  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = "Test GPU"


def test_cases_are_the_engine_s_products_in_order_of_use() -> None:
    sizes = tune.sizes([""])
    assert {(768, 768), (2304, 768), (1536, 768), (3072, 768), (250027, 1024), (384, 1536)} <= set(sizes)
    found = tune.cases(["bart-base"], list(tune.ROWS), [2, 8])
    assert len({case.key for case in found}) == len(found) == 7 * 2 * 6
    assert found[0].m == 4 and found[0].bits == 2 and set(tune.ROWS) == set(tuned.BUCKETS)
    assert tune.Case(768, 384, 1, 4).w == 64  # 384 one-bit codes take two blocks


@pytest.mark.parametrize("m", tune.ROWS)
@pytest.mark.parametrize("bits", [8, 2, 1])
@pytest.mark.parametrize(("n", "k"), [(768, 768), (3072, 768), (384, 384), (250027, 1024)])
def test_candidates(m: int, bits: int, n: int, k: int) -> None:
    case = tune.Case(n, k, bits, m)
    found = tune.candidates(case, 132)
    assert found[0] == choose_tiles(m, n, case.w, bits, 132) and len(set(found)) == len(found)
    assert 4 <= len(found) <= 160
    for tiles in found[1:]:
        assert all(math.log2(x).is_integer() for x in (tiles.bm, tiles.bn, tiles.bw, tiles.warps))
        assert tiles.bw >= 32 and tiles.bm >= 16 and tiles.bn >= 16
        assert tiles.stages * (tiles.bn * tiles.bw + tiles.bm * tiles.bw * 8 // bits) <= tune.SHARED


def arguments(out: Path, *more: str) -> Any:
    return tune.parse_arguments(["--rows", "4", "--bits", "2", "--workers", "0", "--out", str(out), *more])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[Tiles]:
    """Two small matrices, and a clock by which narrow tiles are the fastest; what was timed, in order."""
    timed: list[Tiles] = []

    def timer(self: Any, tiles: Tiles) -> Any:
        timed.append(tiles)
        return lambda: tiles.bn * 1e-6 + tiles.splits * 1e-7

    monkeypatch.setattr(tune, "sizes", lambda parts: [(40, 256), (70, 256)])
    monkeypatch.setattr(tune.Operands, "timer", timer)
    cuts = [Tiles(16, bn, 64, splits, False, 2, 2) for bn, splits in ((64, 1), (32, 1), (16, 1), (16, 2))]
    monkeypatch.setattr(tune, "candidates", lambda case, processors: cuts)
    return timed


def test_the_fastest_is_written_and_the_engine_reads_it(small: list[Tiles], tmp_path: Path) -> None:
    path = tmp_path / "Test_GPU.json"
    assert tune.run(arguments(path), DEVICE, GPU, 132) == (2, 0, 0)
    table = tuned.read(path, "int8_matmul", Tiles)
    assert set(table) == {"n40 k256 bits2 m4", "n70 k256 bits2 m4"}
    assert {tiles.bn for tiles in table.values()} == {16} and {tiles.splits for tiles in table.values()} == {1}
    content = json.loads(path.read_text())
    assert content["measured"]["n40 k256 bits2 m4"] == dict(us=16.1, rule_us=64.1, tried=4, failed=0, copies=1)
    assert content["gpu"] == GPU and content["run"]["packages"]["torch"]


def test_a_rerun_goes_on(small: list[Tiles], tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    assert tune.run(arguments(path, "--seconds", "0"), DEVICE, GPU, 132) == (0, 2, 0) and not path.exists()
    tune.run(arguments(path), DEVICE, GPU, 132)
    before = path.read_text()
    small.clear()
    assert tune.run(arguments(path), DEVICE, GPU, 132) == (0, 0, 0)
    assert not small and path.read_text() == before


def test_wrong_and_impossible_cuts_are_never_chosen(
    small: list[Tiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = products.int8_matmul

    def broken(*arguments: Any, tiles: Tiles, **options: Any) -> Any:
        if tiles.splits == 2:
            raise RuntimeError("out of resource: shared memory")
        return right(*arguments, tiles=tiles, **options) + (tiles.bn == 16)

    monkeypatch.setattr(products, "int8_matmul", broken)
    path = tmp_path / "table.json"
    assert tune.run(arguments(path), DEVICE, GPU, 132) == (2, 0, 2)
    assert {tiles.bn for tiles in tuned.read(path, "int8_matmul", Tiles).values()} == {32}
    text = capsys.readouterr().err
    assert "is WRONG" in text and "RuntimeError: out of resource" in text


def test_a_cut_that_is_wrong_now_and_then_is_never_chosen(
    small: list[Tiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, calls = products.int8_matmul, [0]

    def broken(*arguments: Any, tiles: Tiles, **options: Any) -> Any:
        calls[0] += tiles.bn == 16
        return right(*arguments, tiles=tiles, **options) + (tiles.bn == 16 and calls[0] % 20 == 0)

    monkeypatch.setattr(products, "int8_matmul", broken)
    path = tmp_path / "table.json"
    done, _, wrong = tune.run(arguments(path), DEVICE, GPU, 132)
    assert done == 2 and wrong >= 2
    assert {tiles.bn for tiles in tuned.read(path, "int8_matmul", Tiles).values()} == {32}


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert capsys.readouterr().err == "tune.py measures on a GPU, and torch sees none here\n"
