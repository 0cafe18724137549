"""Random halves of calibration rows: which rows they take, and what they show of guarantees."""

import numpy as np
import pytest

from bench.exchangeable import half_calibrated, halves
from bench.halves import POINTS, cheapest_mix, measured
from mosel.config import reference_models
from mosel.errors import DatasetError
from mosel.packages.calibration import Calibration
from mosel.packages.model_package import load_package

ONE, OTHER, BOTH = frozenset(["one"]), frozenset(["other"]), frozenset(["one", "other"])


def test_no_group_is_in_both_halves() -> None:
    random = np.random.default_rng(0)
    groups = np.stack([random.integers(20, size=2_000), random.integers(50, size=2_000), np.arange(2_000)], 1)
    one, other = halves(groups.astype(np.int32), random)
    assert one.sum() > 300
    assert other.sum() > 300
    for column in groups.T[:2]:
        assert not set(column[one].tolist()) & set(column[other].tolist())


def test_the_cheapest_mix_scores_what_it_must() -> None:
    scores = {ONE: 0.8, OTHER: 0.7, BOTH: 0.95}
    assert cheapest_mix(scores, 0.75) == pytest.approx({ONE: 0.5, OTHER: 0.5})
    assert cheapest_mix(scores, 0.875) == pytest.approx({BOTH: 0.5, ONE: 0.5})
    assert cheapest_mix(scores, 0.95) == {BOTH: 1.0}


def test_items_are_measured_that_share_no_group_with_those_that_certify() -> None:
    package = load_package(reference_models() / "digits")
    try:
        with half_calibrated(package, None, seed=3) as (half, items):
            kept, whole = half.calibration, package.calibration
            assert kept is not None
            assert whole is not None
            assert half.folder != package.folder
            assert half.content_hash == package.content_hash
            assert (~kept.certify).sum() == (~whole.certify).sum()
            assert 0 < kept.certify.sum() < whole.certify.sum()
            certifying = kept.groups[kept.certify]
            for column in range(2):
                assert not set(certifying[:, column].tolist()) & set(items.groups[:, column].tolist())
            assert items.labels is not None
            assert len(items.labels) > 500
    except DatasetError as error:
        pytest.skip(f"the recordings are not here: {error}")


def population(rows: int) -> Calibration:
    """Rows of which both are right 19 times of 20, one alone 17 times, the other 16; in groups that say nothing."""
    random = np.random.default_rng(1)
    wrong = [random.random(rows) < chance for chance in (0.15, 0.2, 0.05)]
    return Calibration(
        content_hash="",
        sets=[ONE, OTHER, BOTH],
        answers=np.stack(wrong, 1).astype(np.int32),
        confidence=np.ones((rows, 3), np.float32),
        labels=np.zeros(rows, np.int32),
        groups=np.stack([np.arange(rows) % 100, np.arange(rows) // 100 % 100], 1).astype(np.int32),
        group_names=["a", "b"],
        certify=np.arange(rows) % 5 > 0,
    )


def test_guaranteed_floors_are_met_on_the_other_half() -> None:
    kept = measured(population(8_000), splits=40, seed=0)
    assert len(kept) == len(POINTS)
    lax = kept[-1]
    assert lax.floor == pytest.approx(0.95 - 0.12, abs=0.01)
    assert lax.guaranteed == 40
    assert lax.met >= 32
    assert kept[0].guaranteed < lax.guaranteed
