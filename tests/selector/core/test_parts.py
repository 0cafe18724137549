"""Jobs whose callers send a part of what they have: floors count against all of it, and only the part is run."""

from dataclasses import replace

import numpy as np
import pytest

from bench.coverage import populations
from mosel.errors import FloorUnreachable, InputsNeeded, ServiceUnavailable
from mosel.modality import FUSION, ModalitySet, parse_set
from selector.core.certificate import Certificates
from selector.core.jobs import Effort, Guarantee, Job
from selector.core.profile import ModelProfile
from selector.core.scheduler import Scheduler
from selector.core.work import Work
from tests.selector.support import Driver, encode_call, profile_of

ALL, PEN, IMAGE = map(parse_set, ("audio+image+pen", "pen", "image"))
IMAGE_PEN, AUDIO_PEN = map(parse_set, ("image+pen", "audio+pen"))
ACCURACY = {"audio": 0.86, "image": 0.66, "pen": 0.63, "audio+image": 0.95, "audio+pen": 0.94, "image+pen": 0.9}
JOB = Job(b"job", "model", 8, ALL, None, 10.0)


def known(*, calibrated: bool = True) -> ModelProfile:
    """Audio costs much more than the others."""
    profile = profile_of(ACCURACY | {"audio+image+pen": 0.98}, {"audio": 20.0, "image": 2.0, "pen": 1.0}, 0.1, 0.5)
    rows = populations()["independent rows"].calibration(np.random.default_rng(0))
    profile.certificates = Certificates(rows, 0.95) if calibrated else None
    return profile


def scheduler_of(profile: ModelProfile, *, away: str = "", policy: str = "mosel") -> Scheduler:
    scheduler = Scheduler({"model": profile}, policy, tokens=1)
    for name in ("audio", "image", "pen", FUSION):
        scheduler.lane(name, name != away)
    return scheduler


def part(job: Job, sent: ModalitySet) -> Job:
    return replace(job, modalities=sent, available=job.modalities)


def run(job: Job, *, calibrated: bool = True) -> Work:
    return scheduler_of(known(calibrated=calibrated)).submit(job, 0.0)


DEMANDS = [
    {"min_accuracy": 0.85},
    {"min_accuracy": 0.85, "size": 1},
    {"min_accuracy": 0.93, "size": 13},
    {"max_accuracy_loss": 0.03},
    {"max_accuracy_loss": 0.08, "size": 1},
    {"max_accuracy_loss": 0.08, "size": 5},
    {"min_accuracy": 0.6, "effort": Effort.BEST},
    {},
]


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("demand", DEMANDS, ids=str)
def test_who_sends_what_is_wanted_gets_what_it_would_get_for_everything(
    demand: dict[str, float], *, calibrated: bool
) -> None:
    scheduler, whole = scheduler_of(known(calibrated=calibrated)), replace(JOB, **demand)  # type: ignore[arg-type]
    plan = scheduler.plan(whole, 0.0)
    assert plan.chosen is not None
    assert plan.wanted >= plan.chosen.modalities
    for number in range(20):
        job_id = number.to_bytes(16, "big")
        works = [run(replace(job, id=job_id), calibrated=calibrated) for job in (whole, part(whole, plan.wanted))]
        # Which jobs run a strategy a little too cheap, their ids say.
        assert works[0].counts == works[1].counts
        assert works[0].outcome == works[1].outcome
    assert scheduler.plan(part(whole, plan.wanted), 0.0).wanted == plan.wanted


def test_less_is_wanted_for_less() -> None:
    scheduler = scheduler_of(known())
    assert scheduler.plan(replace(JOB, min_accuracy=0.85), 0.0).wanted == IMAGE_PEN
    assert scheduler.plan(JOB, 0.0).wanted == ALL
    # Of jobs of one item some run the next cheaper set: what either runs is wanted.
    loss = replace(JOB, max_accuracy_loss=0.06, size=1)
    chosen, cheaper = (next(iter(strategy_sets(scheduler, loss, drawn=drawn))) for drawn in (False, True))
    assert chosen != cheaper
    assert scheduler.plan(loss, 0.0).wanted == chosen | cheaper


def strategy_sets(scheduler: Scheduler, job: Job, *, drawn: bool) -> set[ModalitySet]:
    """What the first of jobs runs, by rising id, that runs the cheaper strategy or does not."""
    for number in range(1000):
        work = scheduler.submit(replace(job, id=number.to_bytes(16, "big")), 0.0)
        scheduler.cancelled(work.job.id)
        if (work.floor.least < work.floor.over_all if work.floor.over_all else False) == drawn:
            return set(work.counts)
    raise AssertionError("no job was drawn so")


def test_a_loss_counts_against_what_the_caller_has() -> None:
    loss = replace(JOB, max_accuracy_loss=0.02)
    alone = run(replace(loss, modalities=IMAGE_PEN))
    assert alone.counts.keys() <= {IMAGE_PEN, IMAGE, PEN}
    with pytest.raises(InputsNeeded, match=r"image\+pen alone; send audio, image") as refused:
        run(part(loss, IMAGE_PEN))
    assert "audio" in refused.value.modalities


def test_what_is_saved_counts_against_what_the_caller_has() -> None:
    floor = replace(JOB, min_accuracy=0.85)
    assert run(part(floor, IMAGE_PEN)).outcome.saved > 0.5 > run(replace(floor, modalities=IMAGE_PEN)).outcome.saved


def test_only_what_was_sent_is_run() -> None:
    driver = Driver(scheduler := scheduler_of(known()), {"model": known()})
    job = part(replace(JOB, min_accuracy=0.8, effort=Effort.BEST), IMAGE_PEN)
    scheduler.submit(job, 0.0)
    driver.run()
    assert driver.fused[job.id] == {IMAGE_PEN: 8}


def test_a_floor_that_more_inputs_would_meet_names_them() -> None:
    floor = part(replace(JOB, min_accuracy=0.8), PEN)
    with pytest.raises(InputsNeeded, match="pen alone; send image, pen") as refused:
        run(floor)
    assert refused.value.modalities == ("image", "pen")
    with pytest.raises(FloorUnreachable, match=r"min_accuracy 0\.99 cannot be met with audio"):
        run(replace(floor, min_accuracy=0.99))
    with pytest.raises(InputsNeeded, match="send audio, image, pen"):
        run(part(replace(JOB, exact=True), PEN))


def test_while_an_encoder_is_away_others_are_wanted() -> None:
    floor = replace(JOB, min_accuracy=0.8)
    scheduler = scheduler_of(known(), away="image")
    plan = scheduler.plan(floor, 0.0)
    assert plan.wanted == AUDIO_PEN
    with pytest.raises(InputsNeeded) as refused:
        scheduler.submit(part(floor, IMAGE_PEN), 0.0)
    assert refused.value.modalities == ("audio", "pen")
    # It would have run image, which was not sent either.
    assert scheduler.submit(part(floor, AUDIO_PEN), 0.0).without == {"image"}
    scheduler.lane("image", True)
    assert scheduler.plan(floor, 0.0).wanted == IMAGE_PEN
    only = scheduler_of(known(), away="audio")
    with pytest.raises(ServiceUnavailable, match="encoder/audio is away"):
        only.submit(part(replace(JOB, min_accuracy=0.93), IMAGE_PEN), 0.0)


def test_a_job_that_loses_its_encoder_is_told_what_to_send() -> None:
    scheduler, away = scheduler_of(known()), ServiceUnavailable("service encoder/image went away")
    work = scheduler.submit(part(replace(JOB, min_accuracy=0.8), IMAGE_PEN), 0.0)
    assert encode_call(scheduler).rows[0].job_id == work.job.id
    assert scheduler.lane("image", False) == [work.job.id]
    lost = scheduler.lost(work, away)
    assert isinstance(lost, InputsNeeded)
    assert lost.modalities == ("audio", "pen")
    whole = scheduler.submit(replace(JOB, id=b"whole", min_accuracy=0.93, modalities=ALL), 0.0)
    scheduler.lane("audio", False)
    assert scheduler.lost(whole, away) is away
    assert scheduler.lost(work, away) is away


def test_what_a_job_ran_for_want_of_time_is_wanted_by_the_next() -> None:
    scheduler = scheduler_of(known(calibrated=False))
    job = replace(JOB, id=b"hurried", size=1, deadline=0.008)
    hurried = scheduler.submit(replace(job, min_accuracy=0.6, effort=Effort.BEST), 0.0)
    assert hurried.counts.keys() == {IMAGE_PEN}
    assert scheduler.wanted(hurried) == ALL


def test_under_policy_all_everything_is_wanted() -> None:
    scheduler = scheduler_of(known(calibrated=False), policy="all")
    floor = replace(JOB, min_accuracy=0.6)
    assert scheduler.plan(floor, 0.0).wanted == ALL
    with pytest.raises(InputsNeeded):
        scheduler.submit(part(floor, IMAGE_PEN), 0.0)


def test_an_observed_model_wants_everything() -> None:
    profile = known()
    profile.observed = True
    floor = replace(JOB, min_accuracy=0.8)
    scheduler = scheduler_of(profile)
    assert scheduler.submit(part(floor, IMAGE_PEN), 0.0).strategy.modalities == IMAGE_PEN
    assert scheduler.plan(part(floor, IMAGE_PEN), 0.0).wanted == ALL


def test_the_guarantee_is_that_of_everything() -> None:
    work = run(part(replace(JOB, min_accuracy=0.85), IMAGE_PEN))
    assert work.outcome.assurance.guarantee is Guarantee.CALIBRATED
    assert work.outcome.assurance.accuracy is not None
    assert work.outcome.assurance.accuracy >= 0.85
