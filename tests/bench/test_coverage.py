"""Guaranteed floors are met as often as they say, on populations whose accuracies are known."""

from collections.abc import Callable

import pytest

from bench.coverage import Coverage, Population, coverage_of_accuracy, coverage_of_loss, populations

Measure = Callable[[Population, int], dict[float, Coverage]]

# 0.95, less what so many calibrations may differ from it by chance.
LEAST, CALIBRATIONS = 0.936, 250


@pytest.mark.parametrize("measure", [coverage_of_accuracy, coverage_of_loss])
@pytest.mark.parametrize("name", populations())
def test_a_guaranteed_floor_is_met_and_a_measured_one_is_not(name: str, measure: Measure) -> None:
    for drop, coverage in measure(populations()[name], CALIBRATIONS).items():
        assert coverage.met >= LEAST, f"at {drop}"
        assert coverage.met_by_expectation < 0.75, "the comparison has power"
        assert coverage.certified > (0.4 if drop < 0.02 else 0.9), "what is never promised is never broken"
        assert coverage.saving > (0.4 if drop < 0.02 else 0.9)
