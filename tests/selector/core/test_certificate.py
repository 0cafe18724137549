"""Ladders from calibration rows, on rows whose outcome can be worked out by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosel.modality import parse_set, subsets
from selector.core.certificate import CalibrationRows, Certificates, Ladder, accuracy_ladder, loss_ladder
from selector.core.quantiles import beta_quantile

SETS = subsets(["a", "b"])
A, B, AB = SETS
SENT = parse_set("a+b")


def rows(
    certify: dict[str, float], design: dict[str, float] | None = None, count: int = 400, groups: int | None = None
) -> CalibrationRows:
    """As many design rows as certify rows, of each set the first so many right; whole groups, if there are any."""
    shares = [design or certify, certify]
    answers = np.ones((2 * count, 3), np.int32)
    for half, of_half in enumerate(shares):
        for column, name in enumerate(("a", "b", "a+b")):
            answers[half * count : half * count + round(of_half[name] * count), column] = 0
    group = np.arange(2 * count) if groups is None else np.arange(2 * count) % count * groups // count
    return CalibrationRows(
        SETS,
        answers,
        np.zeros(2 * count, np.int32),
        group.astype(np.int32)[:, None],
        np.arange(2 * count) >= count,
    )


def accuracy(calibration: CalibrationRows, confidence: float = 0.95) -> Ladder:
    ladder = accuracy_ladder(calibration, SENT, confidence)
    assert ladder is not None
    return ladder


def loss(calibration: CalibrationRows) -> Ladder:
    ladder = loss_ladder(calibration, SENT, 0.95)
    assert ladder is not None
    return ladder


def test_the_reference_has_the_bound_of_clopper_and_pearson() -> None:
    ladder = accuracy(rows({"a": 0.8, "b": 0.6, "a+b": 0.95}))
    assert ladder.reference == AB
    assert ladder.best == pytest.approx(float(beta_quantile(0.05, np.array(380.0), np.array(21.0))), abs=1e-4)
    assert ladder.least(ladder.best + 1e-6) is None
    assert ladder.least(ladder.best) == pytest.approx(0.95)


def test_a_lower_floor_needs_a_lower_score_and_what_a_score_guarantees_meets_the_floor() -> None:
    ladder = accuracy(rows({"a": 0.8, "b": 0.6, "a+b": 0.95}))
    scores = [ladder.least(floor) for floor in (0.9, 0.85, 0.75, 0.5)]
    for floor, score in zip((0.9, 0.85, 0.75, 0.5), scores, strict=True):
        assert score is not None
        assert score > floor or score == min(ladder.scores.values())
        assert ladder.guaranteed(score) >= floor
    assert all(more > less for more, less in itertools.pairwise(filter(None, scores)))


def test_levels_are_those_of_design_rows_and_what_certifies_is_tested_in_their_order() -> None:
    ladder = accuracy(rows({"a": 0.5, "b": 0.9, "a+b": 0.95}, design={"a": 0.9, "b": 0.5, "a+b": 0.95}))
    assert ladder.scores == pytest.approx({A: 0.9, B: 0.5, AB: 0.95})
    assert ladder.guaranteed(0.9) < 0.5, "a, which the design rows praise, is poor"
    assert ladder.guaranteed(0.5) <= ladder.guaranteed(0.9), "no level has more than one before it"


def test_the_most_accurate_set_is_the_reference_even_if_it_is_not_everything() -> None:
    ladder = accuracy(rows({"a": 0.9, "b": 0.5, "a+b": 0.8}))
    assert ladder.reference == A
    assert ladder.levels[0] == pytest.approx(0.9)


def test_items_of_one_group_say_less() -> None:
    shares = {"a": 0.8, "b": 0.6, "a+b": 0.95}
    alone, alike, few = accuracy(rows(shares)), accuracy(rows(shares, groups=40)), accuracy(rows(shares, groups=8))
    assert alone.best > alike.best > few.best
    assert few.approximate
    assert not alike.approximate
    assert accuracy_ladder(rows(shares, groups=1), SENT, 0.95) is None, "one group says nothing of others"


def test_more_confidence_guarantees_less() -> None:
    calibration = rows({"a": 0.8, "b": 0.6, "a+b": 0.95})
    assert accuracy(calibration, 0.99).best < accuracy(calibration, 0.95).best < accuracy(calibration, 0.6).best


def test_everything_loses_nothing_against_itself() -> None:
    ladder = loss(rows({"a": 1.0, "b": 0.6, "a+b": 1.0}))
    assert ladder.best == 1.0
    least = ladder.least(1.0)
    assert least == ladder.scores[AB] == 1.0
    assert ladder.scores[A] < least, "it always agreed, but that is not certain"


def test_a_small_share_of_another_set_loses_at_most_that_share_of_what_it_may_lose() -> None:
    calibration = rows({"a": 0.8, "b": 0.6, "a+b": 1.0}, count=1000)
    ladder = loss(calibration)
    agrees = float(beta_quantile(0.05, np.array(800.0), np.array(201.0)))
    least = ladder.least(1 - 0.02)
    assert least is not None
    share = (1 - least) / 0.2
    assert share * (1 - agrees) <= 0.02 + 1e-9
    assert share > 0.02 / (1 - agrees) - 0.02, "no less than the levels are apart"


def test_without_labels_there_is_no_floor_of_accuracy() -> None:
    known = rows({"a": 0.8, "b": 0.6, "a+b": 0.9})
    unlabelled = CalibrationRows(known.sets, known.answers, None, known.groups, known.certify)
    certificates = Certificates(unlabelled, 0.95)
    assert certificates.of_accuracy(SENT) is None
    found = certificates.of_loss(SENT)
    assert found is not None
    assert found is certificates.of_loss(SENT), "it is made once"
    assert found.scores == pytest.approx({A: 0.9, B: 0.7, AB: 1.0})


def test_what_was_sent_decides_what_the_ladder_is_of() -> None:
    ladder = Certificates(rows({"a": 0.8, "b": 0.6, "a+b": 0.95}), 0.95).of_accuracy(A)
    assert ladder is not None
    assert (ladder.reference, [*ladder.scores]) == (A, [A])


def test_of_very_many_sets_those_are_mixed_that_no_smaller_one_beats() -> None:
    sets = subsets("abcdef")
    rng = np.random.default_rng(0)
    answers = (rng.random((900, len(sets))) > [0.5 + 0.08 * len(s) for s in sets]).astype(np.int32)
    certify = np.arange(900) >= 300
    calibration = CalibrationRows(sets, answers, np.zeros(900, np.int32), np.zeros((900, 0), np.int32), certify)
    ladder = accuracy_ladder(calibration, sets[-1], 0.95)
    assert ladder is not None
    assert len(ladder.scores) <= 18
    assert {ladder.reference, sets[-1]} <= ladder.scores.keys()


@settings(max_examples=60)
@given(data=st.data())
def test_bounds_fall_with_levels_and_stay_below_what_was_measured(data: st.DataObject) -> None:
    share = st.floats(0, 1)
    shares = [{name: data.draw(share) for name in ("a", "b", "a+b")} for _ in range(2)]
    groups = data.draw(st.sampled_from([None, 2, 10, 50]))
    calibration = rows(shares[0], shares[1], count=100, groups=groups)
    for make in (accuracy_ladder, loss_ladder):
        ladder = make(calibration, SENT, 0.95)
        assert ladder is not None
        assert (np.diff(ladder.levels) < 0).all()
        assert (np.diff(ladder.bounds) <= 0).all()
        assert ((ladder.bounds >= 0) & (ladder.bounds <= 1)).all()
        for floor in data.draw(st.lists(share, min_size=1)):
            least = ladder.least(floor)
            assert (least is None) == (ladder.best < floor - 1e-9)
            assert least is None or ladder.guaranteed(least) >= floor - 1e-9
