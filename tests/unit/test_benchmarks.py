"""The benchmarks' figures: what they are divided by, and that a lost or doubled job gives none."""

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import peers, report, tools
from benchmarks.contenders import NotDoneOnceError, Peer

PEERS = Path(peers.__file__).parent


def measured(number: int, contender: str, rate: float, *, foreign: float = 0.0) -> report.Measurement:
    return report.Measurement(number, "drain", contender, {"jobs/s": rate}, {"foreign": foreign})


def test_a_ratio_is_one_of_the_same_round() -> None:
    """The machine was half as fast in the second round: the ratio is the same, and nobody's median is divided."""
    rounds = [measured(0, "plain", 100), measured(0, "jobstack", 90), measured(1, "jobstack", 45)]
    _, ours = report.lines([*rounds, measured(1, "plain", 50)])
    assert (ours.contender, ours.values, ours.ratios) == ("jobstack", [90, 45], {"plain": [0.9, 0.9]})


def test_a_round_that_was_not_ours_alone_is_counted() -> None:
    [line] = report.lines([measured(0, "plain", 100), measured(1, "plain", 50, foreign=1.5)])
    assert line.noisy == 1


@pytest.mark.parametrize("runs", [[0, 1], [0, 1, 2, 2], [0, 1, 1]], ids=["lost", "doubled", "lost and doubled"])
def test_a_drain_with_lost_or_doubled_jobs_has_no_figure(
    runs: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = tmp_path / "ledger"
    monkeypatch.setenv("BENCH_LEDGER", str(ledger))
    monkeypatch.setattr(peers, "_file", {})
    for number in runs:
        peers.done(number)
    bench: Any = SimpleNamespace(ledger=ledger)
    peer = Peer(bench, "plain")
    assert peer.over() == len(runs)
    with pytest.raises(NotDoneOnceError):
        peer.finishes(3)


def test_a_drain_with_every_job_once_has_its_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_LEDGER", str(tmp_path / "ledger"))
    monkeypatch.setattr(peers, "_file", {})
    for number in (2, 0, 1):
        peers.done(number)
    bench: Any = SimpleNamespace(ledger=tmp_path / "ledger")
    times = Peer(bench, "plain").finishes(3)
    assert len(times) == 3
    assert times == sorted(times)


@pytest.mark.parametrize("name", [*tools.WITH_THE_STACK, *tools.FURTHER])
def test_every_peer_has_its_commands(name: str) -> None:
    """Read and not imported: the further ones' libraries are elsewhere."""
    body = ast.parse((PEERS / f"{name}.py").read_text()).body
    assert {"fill", "work", "send"} <= {found.name for found in body if isinstance(found, ast.FunctionDef)}
    assert ast.unparse(body[-1]) == "peers.main(globals())"
