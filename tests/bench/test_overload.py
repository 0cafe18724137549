"""Several times the load that can be served, for a few seconds: goodput stays, and the others are refused soon."""

from pathlib import Path

import pytest

from bench.outcomes import Ending
from bench.overload import Options, measure, served
from mosel import Client
from mosel.errors import DeadlineExceeded, Overloaded

OPTIONS = Options(busy_ms=20.0, slo_ms=1000.0, loads=(1.2,), step_s=4.0, overload_s=8.0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_overload_costs_little_goodput_and_no_promises(tmp_path: Path) -> None:
    with served(tmp_path, OPTIONS) as (launcher, package):
        result = measure(launcher, package, OPTIONS)
        assert launcher.ended() == []
        with Client(launcher.address) as client:
            held = {service.name: service.counters for service in client.status()}["gateway"]
    if max(result.others.values()) > 0.15:
        pytest.skip(f"other programs had their share of the cores: {result.others}")
    overload = result.overload
    if len(overload.outcomes) < 100:
        pytest.skip(f"the services had next to nothing of the cores: a peak of {result.peak:.2f} requests/s")
    assert overload.goodput > 0.75 * result.peak
    assert result.useful > 0.7
    admitted = overload.count(Ending.ANSWERED) + overload.count(Ending.EXPIRED)
    in_time = sum(outcome.in_time for outcome in overload.outcomes)
    assert in_time > 0.9 * admitted
    # Most are refused, and those who are hear it long before their deadline.
    assert overload.count(Ending.REFUSED) > 0.4 * len(overload.outcomes)
    assert overload.ms(50, Ending.REFUSED) < 0.5 * OPTIONS.slo_ms
    errors = [outcome.error for outcome in overload.outcomes if outcome.error is not None]
    assert {type(error) for error in errors} <= {Overloaded, DeadlineExceeded}
    assert all(error.retry_after_ms > 0 for error in errors if isinstance(error, Overloaded))
    assert not any(held[name] for name in ("jobs_in_flight", "jobs_at_selector", "slots_published", "slots_filling"))
