"""A short chaos run: `python -m tests.chaos` does a long one."""

from pathlib import Path

import pytest
from rich.console import Console

from tests.chaos.run import Options, chaos
from tests.chaos.tables import tables

# On a machine that is busy; `python -m tests.chaos` holds services to what is promised.
_LATE_S, _AGAIN_S = 20.0, 90.0


@pytest.mark.timeout(480)
@pytest.mark.parametrize(
    ("placement", "seconds"), [("single", 8), ("services", 8), pytest.param("services", 60, marks=pytest.mark.slow)]
)
def test_under_kills_every_request_ends_right_and_nothing_is_left(
    profiles_dir: Path, placement: str, seconds: float
) -> None:
    # With this seed, fusion is killed first, then the gateway while shared memory is full.
    report = chaos(Options(seconds=seconds, kills=2, load=0.25, placement=placement, seed=8))
    Console(width=160, highlight=False).print(tables(report))
    assert report.wrong() == []
    assert any(not ended.error and ended.full for ended in report.ended)
    assert len(report.recoveries) >= 2
    assert sum(report.restarts.values()) >= len(report.recoveries)
    assert all(late < _LATE_S for late, _ in report.overshoots)
    assert all(recovery.took_s < _AGAIN_S for recovery in report.recoveries)
