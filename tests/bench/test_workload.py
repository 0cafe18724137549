import itertools
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.workload import Arrival, Demands, from_trace, mean_size, poisson, read_trace
from mosel.errors import ConfigError

DEMANDS = Demands(((1, 10.0), (2, 14.0), (8, 50.0)), full_accuracy=0.74, least_accuracy=0.66, slack=3.3, t=0.03)


def draw(demands: Demands, jobs: int, seed: int = 0) -> list[Arrival]:
    return list(demands.arrivals([0.0] * jobs, seed))


@pytest.mark.parametrize(("size", "ms"), [(1, 10.0), (2, 14.0), (5, 32.0), (8, 50.0), (10, 62.0)])
def test_full_latency_is_interpolated_and_extrapolated_along_a_line(size: int, ms: float) -> None:
    assert DEMANDS.full_latency_ms(size) == pytest.approx(ms)


def test_full_latency_of_a_single_point_is_in_proportion() -> None:
    assert Demands(((4, 20.0),), 0.7, 0.6).full_latency_ms(6) == pytest.approx(30.0)


def test_deadline_is_the_full_latency_and_the_slack_of_one_item() -> None:
    assert DEMANDS.deadline_ms(8) == pytest.approx(50.0 + 3.3 * 10.0)
    assert all(a.deadline_ms == DEMANDS.deadline_ms(a.size) for a in draw(DEMANDS, 100))


def test_sizes_are_those_of_a_normal_distribution_cut_at_one() -> None:
    sizes = [arrival.size for arrival in draw(DEMANDS, 20_000)]
    assert min(sizes) == 1
    assert statistics.mean(sizes) == pytest.approx(mean_size(), rel=0.03)
    # P(Normal(1, 6) < 2)
    assert sizes.count(1) / len(sizes) == pytest.approx(0.566, abs=0.02)


def test_floors_are_uniform_between_full_accuracy_minus_t_and_full_accuracy() -> None:
    floors = [arrival.min_accuracy or 0.0 for arrival in draw(DEMANDS, 5_000)]
    assert 0.71 <= min(floors) < 0.7105
    assert 0.7395 < max(floors) <= 0.74
    assert statistics.mean(floors) == pytest.approx(0.725, abs=0.001)


def test_no_floor_is_below_the_least_accurate_set() -> None:
    assert min(arrival.min_accuracy or 0.0 for arrival in draw(DEMANDS.asking(3.3, 0.12), 1_000)) == 0.66


def test_the_same_seed_gives_the_same_jobs_at_every_rate() -> None:
    slow, fast = ([*DEMANDS.arrivals(poisson(rate, 10, 7), 7)] for rate in (10, 100))
    without_time = [[(a.size, a.min_accuracy) for a in jobs] for jobs in (slow, fast)]
    assert without_time[1][: len(slow)] == without_time[0]
    assert draw(DEMANDS, 10, seed=1) != draw(DEMANDS, 10, seed=2)


@given(st.integers(0, 2**32), st.floats(0.1, 200), st.floats(1, 20))
def test_poisson_times_rise_and_stay_inside(seed: int, rate: float, seconds: float) -> None:
    times = list(poisson(rate, seconds, seed))
    assert times == sorted(times)
    assert all(0 < at < seconds for at in times)


def test_poisson_has_its_rate() -> None:
    gaps = [b - a for a, b in itertools.pairwise(poisson(50, 400, 0))]
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.05)


def test_a_trace_is_scaled_to_its_rate_and_keeps_its_shape() -> None:
    times = list(from_trace((10, 30, 0), rate=40, seconds=3, seed=0))
    assert times == sorted(times)
    seconds = [sum(int(at) == second for at in times) for second in range(3)]
    assert seconds == [30, 90, 0]


def test_a_trace_that_is_too_short_begins_again() -> None:
    times = list(from_trace((1, 3), rate=2, seconds=4, seed=0))
    assert [sum(int(at) == second for at in times) for second in range(4)] == [1, 3, 1, 3]


def test_fractions_of_jobs_are_rounded_up_or_down_by_chance() -> None:
    assert len(list(from_trace((1,), rate=0.25, seconds=4_000, seed=0))) == pytest.approx(1_000, rel=0.1)


def test_a_trace_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("second,requests\n0,5\n1,7\n")
    assert read_trace(file) == (5, 7)


@pytest.mark.parametrize("content", ["", "second,count\n0,1\n", "second,requests\n0,many\n", "second,requests\n0,0\n"])
def test_a_wrong_trace_file_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"trace .*trace\.csv"):
        read_trace(file)


def test_a_missing_trace_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.csv: No such file"):
        read_trace(tmp_path / "none.csv")
