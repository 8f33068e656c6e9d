"""The gate experiment: chains end in the number that every phase made, what compilers make of them, and the rule."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

import gate  # noqa: E402
from gate import BARRIER, GRAPH, GRAPH_PDL, Chain, table, verdict  # noqa: E402
from test_gpu_compile import compiled  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Elsewhere than on a GPU programs run one after the other: a barrier of several would wait for ever.
WAYS = [(GRAPH, 3), (BARRIER, 1)] if DEVICE.type == "cpu" else [(GRAPH, 132), (GRAPH_PDL, 132), (BARRIER, 132)]


@pytest.mark.parametrize(("what", "programs"), WAYS)
@pytest.mark.parametrize("reload", [False, True])
def test_chains_count_their_phases(what: str, programs: int, reload: bool) -> None:
    """Also when launched again: the barrier's counter goes on from where it stands."""
    chain = Chain(what, reload, 4, programs, DEVICE)
    for launches in (1, 2, 3):
        chain.launch()
        assert chain.is_right(launches)
    assert not reload or not chain.is_right(4)
    assert int(chain.arrived) == (12 * programs if what == BARRIER else 0)


def test_a_program_that_reads_too_early_shows() -> None:
    chain = Chain(BARRIER, True, 2, 1, DEVICE)
    chain.numbers[0, 5] = -1  # as if one part were of an earlier phase
    chain.launch()
    assert not chain.is_right(1)


def test_every_number_is_some_program_s() -> None:
    for programs in (1, 3, 108, 132, 200):
        assert gate.sizes(programs)["PART"] * programs >= gate.NUMBERS <= gate.sizes(programs)["BN"]


def rows(barrier: Any, node: Any = 2.0) -> list[dict[str, Any]]:
    one = dict(device="H", phases=40, programs=132)
    return [
        one | dict(what=what, reload=reload) | (dict(wrong=True) if us is None else dict(us=us))
        for what, us in ((GRAPH_PDL, node), (BARRIER, barrier))
        for reload in (False, True)
    ]


def test_the_rule() -> None:
    assert verdict(rows(1.19)).startswith(
        "build the megakernel: barrier + reload takes 1.19 us a phase, the limit is 1"
    )
    assert verdict(rows(1.2)).startswith("do not build the megakernel") and "takes 2.00 us" in verdict(rows(1.2))
    assert verdict(rows(None)).startswith("no verdict") and verdict([]).startswith("no verdict")
    text = table(rows(1.0) + rows(None))
    assert "H: 40 phases of 132 programs" in text and "| barrier |" in text


def test_compiled_for_hopper() -> None:
    found = {row["kernel"]: row for row in compiled("gpu_compile_benchmarks.py")}
    for reload in (False, True):
        assert found[f"node {reload} pdl True"]["seen"] == [
            "griddepcontrol.wait", "griddepcontrol.launch_dependents"
        ]  # fmt: skip
        assert found[f"node {reload} pdl False"]["seen"] == []
        # arrives by a release, polls by reads that acquire
        assert set(found[f"barriers {reload}"]["seen"]) == {"ld.global.gpu.acquire", "atom.global.gpu.release"}
    for row in found.values():
        assert row["spills"] == 0 and row["shared"] <= 227 * 1024, row
    assert found["tune m 1024"]["matrix"] == ["wgmma.mma_async"] and found["tune m 4"]["matrix"] == ["mma.sync"]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
def test_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate.main(["--out", str(tmp_path / "gate.json")]) == 2
    assert gate.main(["--phases", "3"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "gate.py measures on a GPU, and torch sees none here", "phases 3: expected an even number from 2 on"
    ]  # fmt: skip


def test_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock of our own and nothing captured: every way has its row, and a wrong chain has no time."""
    launched: list[Any] = []

    def by_our_clock(run: Any, replays: int) -> float:
        for _ in range(replays):
            run()
        return 8.0

    monkeypatch.setattr(gate, "ROUNDS", 1)
    monkeypatch.setattr(gate, "REPLAYS", 1)
    monkeypatch.setattr(gate, "WAYS", (GRAPH, BARRIER))
    monkeypatch.setattr(gate, "microseconds", by_our_clock)
    monkeypatch.setattr(gate, "replay", lambda launch: (launch(), launched.append(launch), launch)[-1])
    ledger = gate.Ledger(tmp_path / "gate.json", gate.KEYS)
    assert gate.measure(ledger, 2, 1, DEVICE, "H") == 0
    assert {(row["what"], row["reload"], row["us"]) for row in ledger.rows} == {
        (what, reload, 4.0) for what in (GRAPH, BARRIER) for reload in (False, True)
    }
    monkeypatch.setattr(gate, "REPLAYS", 2)
    monkeypatch.setattr(gate, "microseconds", lambda run, replays: 8.0)  # launches nothing
    assert gate.measure(ledger, 2, 1, DEVICE, "H") == 2  # those with a reload
    assert json.loads((tmp_path / "gate.json").read_text())["rows"] == ledger.rows
    assert "WRONG" in table(ledger.rows)
