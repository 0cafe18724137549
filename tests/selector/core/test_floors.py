"""What a floor asks of the items of a job, and what its answer says."""

from dataclasses import replace

import numpy as np
import pytest

from bench.coverage import populations
from mosel.errors import FloorUnreachable
from mosel.modality import FUSION, parse_set
from selector.core.certificate import Certificates
from selector.core.floors import floor_of, mean_score
from selector.core.jobs import Effort, Guarantee, Job
from selector.core.profile import ModelProfile
from selector.core.scheduler import Scheduler
from tests.selector.support import profile_of

SENT = parse_set("audio+image+pen")
ACCURACY = {"audio": 0.86, "image": 0.66, "pen": 0.63, "audio+image": 0.95, "audio+pen": 0.94, "image+pen": 0.9}
JOB = Job(b"job", "model", 8, SENT, None, 1.0)


def known(*, labelled: bool = True, calibrated: bool = True) -> ModelProfile:
    profile = profile_of(ACCURACY | {"audio+image+pen": 0.98}, {"audio": 5.0, "image": 2.0, "pen": 1.0}, 0.1, 0.5)
    rows = populations()["independent rows"].calibration(np.random.default_rng(0))
    rows = rows if labelled else replace(rows, labels=None)
    profile.certificates = Certificates(rows, 0.95) if calibrated else None
    return profile


def accuracy_at_least(floor: float) -> Job:
    return replace(JOB, min_accuracy=floor)


def losing_at_most(loss: float) -> Job:
    return replace(JOB, max_accuracy_loss=loss)


def test_a_floor_that_rows_guarantee_asks_for_more_than_itself_and_says_what_it_guarantees() -> None:
    floor = floor_of(known(), accuracy_at_least(0.93))
    assert floor.least > 0.93
    said = floor.assurance({SENT: 8})
    assert said.guarantee is Guarantee.CALIBRATED
    assert said.accuracy is not None
    assert 0.93 < said.accuracy < 0.98
    assert (said.loss, said.confidence, said.note) == (None, 0.95, "")


def test_the_cheapest_mix_that_a_floor_allows_is_guaranteed_it() -> None:
    floor = floor_of(known(), accuracy_at_least(0.9))
    for other in ("image+pen", "pen", "audio"):
        counts = {SENT: 1000, parse_set(other): 0}
        while mean_score(floor.scores, counts) >= floor.least:
            counts = {SENT: counts[SENT] - 1, parse_set(other): counts[parse_set(other)] + 1}
        counts = {SENT: counts[SENT] + 1, parse_set(other): counts[parse_set(other)] - 1}
        said = floor.assurance(counts).accuracy
        assert said is not None
        assert 0.9 <= said < 0.9 + 0.01


def test_a_loss_needs_no_labels() -> None:
    for labelled in (True, False):
        floor = floor_of(known(labelled=labelled), losing_at_most(0.02))
        assert floor.scores[SENT] == 1.0 > floor.least >= 0.98
        assert floor.assurance({SENT: 8}).loss == 0.0
        said = floor.assurance({SENT: 95, parse_set("image+pen"): 5})
        assert said.guarantee is Guarantee.CALIBRATED
        assert said.loss is not None
        assert 0.004 < said.loss < 0.02


def test_a_floor_that_nothing_guarantees_runs_the_reference_and_tells_the_best_that_can_be() -> None:
    profile = known()
    floor = floor_of(profile, accuracy_at_least(0.979))
    assert floor.least == max(floor.scores.values()) == floor.scores[SENT]
    said = floor.assurance({SENT: 8})
    assert said.guarantee is Guarantee.NONE
    assert said.accuracy is not None
    assert f"the best floor that can be with audio+image+pen is {said.accuracy - 5e-5:.4f}" in said.note
    best = floor_of(profile, accuracy_at_least(float(said.note.rpartition(" ")[2])))
    assert best.assurance({SENT: 8}).guarantee is Guarantee.CALIBRATED
    with pytest.raises(FloorUnreachable, match=r"min_accuracy 0\.979 cannot be guaranteed; the best floor that can be"):
        floor_of(profile, accuracy_at_least(0.979), refuse=True)


def test_a_floor_that_is_not_even_expected_is_refused() -> None:
    for profile in (known(), known(calibrated=False)):
        with pytest.raises(FloorUnreachable, match=r"min_accuracy 0\.99 cannot be met with audio\+image\+pen"):
            floor_of(profile, accuracy_at_least(0.99))


def test_without_rows_expectations_are_all_there_is() -> None:
    profile = known(calibrated=False)
    floor = floor_of(profile, accuracy_at_least(0.93))
    assert (floor.scores, floor.least) == (profile.accuracy, 0.93)
    assert floor.assurance({SENT: 8}).guarantee is Guarantee.ESTIMATE
    assert floor_of(profile, losing_at_most(0.03)).least == pytest.approx(0.95)
    assert floor_of(known(labelled=False), accuracy_at_least(0.93)).assurance({SENT: 8}).guarantee is Guarantee.ESTIMATE


def test_whoever_asks_for_nothing_is_told_what_everything_has() -> None:
    labelled, unlabelled = floor_of(known(), JOB), floor_of(known(labelled=False), JOB)
    assert labelled.least == unlabelled.least == 0.5
    assert labelled.assurance({SENT: 8}).accuracy == pytest.approx(0.973, abs=0.01)
    assert unlabelled.assurance({SENT: 8}).loss == 0.0


def test_what_is_saved_is_counted_against_everything_that_was_sent() -> None:
    profile, pen = known(), parse_set("pen")
    assert profile.saved({SENT: 4}, SENT) == 0.0
    assert profile.saved({pen: 4}, SENT) == pytest.approx(1 - profile.cost_ms(pen, 4) / profile.cost_ms(SENT, 4))
    profile.encoders.pop("audio")
    assert profile.saved({pen: 4}, SENT) == 0.0, "nothing is known yet"


@pytest.mark.parametrize("size", [1, 3, 8])
def test_jobs_of_few_items_use_all_of_a_loss_together(size: int) -> None:
    profile, jobs = known(), 3000
    scheduler = Scheduler({"model": profile}, max_queued_items=size)
    for lane in ("audio", "image", "pen", FUSION):
        scheduler.lane(lane, True)
    needed = floor_of(profile, losing_at_most(0.03)).least
    scores = floor_of(profile, losing_at_most(0.03)).scores
    ran, saved, said = list[float](), list[float](), set[float | None]()
    for number in range(jobs):
        job = replace(losing_at_most(0.03), id=number.to_bytes(16, "big"), size=size, deadline=1e9)
        work = scheduler.submit(job, float(number))
        ran.append(mean_score(scores, work.counts))
        saved.append(work.outcome.saved)
        said.add(work.outcome.assurance.loss)
        scheduler.cancelled(job.id)
    spread = float(np.std(ran)) / jobs**0.5
    assert np.mean(ran) == pytest.approx(needed, abs=4 * spread)
    assert spread > 0, "they differ"
    (loss,) = said
    assert loss is not None
    assert loss <= 0.03
    plan = scheduler.plan(replace(losing_at_most(0.03), id=b"", size=size, deadline=1e9), float(jobs))
    assert plan.assurance is not None
    assert plan.assurance.loss == loss
    assert plan.saved == pytest.approx(float(np.mean(saved)), rel=0.15)


def test_what_a_caller_demands_of_its_own_job_is_not_drawn() -> None:
    profile = known()
    scheduler = Scheduler({"model": profile}, max_queued_items=1)
    for lane in ("audio", "image", "pen", FUSION):
        scheduler.lane(lane, True)
    demands = [accuracy_at_least(0.93), replace(losing_at_most(0.03), effort=Effort.BEST)]
    for demand in demands:
        ran = set()
        for number in range(50):
            work = scheduler.submit(replace(demand, id=number.to_bytes(16, "big"), size=1, deadline=1e9), float(number))
            assert work.strategy.accuracy >= floor_of(profile, demand).least
            ran.add(work.strategy)
            scheduler.cancelled(work.job.id)
        assert len(ran) == 1
