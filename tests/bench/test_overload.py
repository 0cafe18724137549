"""Several times the load that can be served: some calls are answered in time, and all others end by their deadline."""

from dataclasses import replace

import grpc
import pytest

from bench.open_loop import Window
from bench.overload import Measured, Options, measure, served
from mosel import Client

OPTIONS = Options(seconds=1.0, factors=(0.5,), slo_ms=2000.0)
_ANSWERED, _REFUSED, _EXPIRED, _UNREACHABLE = (
    code.value[0]
    for code in (
        grpc.StatusCode.OK,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.FAILED_PRECONDITION,
    )
)


def run(options: Options) -> tuple[Measured, dict[str, int]]:
    """The only load, and what the gateway counts afterwards."""
    with served(options) as (launcher, package):
        rate, (found,) = measure(launcher, package, options)
        assert rate > 0
        assert launcher.ended() == []
        with Client(launcher.address) as client:
            return found, {service.name: dict(service.counters) for service in client.status()}["gateway"]


def assert_sound(window: Window) -> None:
    assert set(window.codes.tolist()) <= {_ANSWERED, _REFUSED, _EXPIRED, _UNREACHABLE}
    assert len(window.codes) == len(window.took_s) == len(window.lag_s) > 0
    # Whatever the generator was late with, it was late with.
    assert (window.took_s >= window.lag_s).all()


@pytest.mark.timeout(300)
def test_below_the_limit_calls_are_answered() -> None:
    found, held = run(OPTIONS)
    for window in (found.window, found.bare):
        assert_sound(window)
        assert window.goodput > 0
    assert 0 < found.before_mib <= found.after_mib
    assert held["jobs_in_flight"] == held["jobs_at_selector"] == held["jobs_waiting_for_slots"] == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("items", [1, 4])
def test_under_overload_much_is_answered_and_what_is_refused_hears_it_soon(items: int) -> None:
    options = replace(OPTIONS, items=items, factors=(4.0,), slo_ms=500.0, seconds=8.0)
    found, held = run(options)
    assert_sound(found.window)
    if not (found.window.is_held and found.bare.is_held):
        pytest.skip(f"the generator did not hold the rate: {found.window.lag_ms:.0f} ms behind")
    assert found.window.goodput > 0.3 * found.bare.goodput
    assert found.window.refused > found.window.goodput
    assert found.window.refused_p99_ms < 0.5 * options.slo_ms
    assert held["jobs_in_flight"] == held["jobs_at_selector"] == 0
