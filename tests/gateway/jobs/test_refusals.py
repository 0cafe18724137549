import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
import pytest
from numpy.typing import NDArray

from gateway.jobs.checks import CheckedJob
from gateway.jobs.refusals import Refusals
from mosel.deadline import Deadline
from mosel.errors import Overloaded
from mosel.packages.model_package import ModelPackage
from mosel.status import error_from_rpc, status_number
from mosel.tensors import to_proto
from mosel.v1 import gateway_pb2, selector_pb2
from tests.gateway.scripted import Gateway, release_of

LONG_MS = 60_000
ANY = gateway_pb2.EFFORT_UNSPECIFIED


@pytest.fixture
def job(fruit: ModelPackage) -> CheckedJob:
    return CheckedJob(fruit, 4, ("photo", "scent"), 0.8, None, exact=False, effort=ANY, late_ok=False, priority=3)


def refused(job: CheckedJob, seconds: float = 1.0, hint_ms: int = LONG_MS) -> Refusals:
    refusals = Refusals()
    refusals.note(job, Deadline.after(seconds), Overloaded("behind what is queued", hint_ms))
    return refusals


@pytest.mark.parametrize(
    "no_less",
    [{}, {"size": 5}, {"min_accuracy": 0.9}, {"effort": 2}, {"latency_slo_ms": 900.0}],
    ids=str,
)
def test_jobs_that_ask_for_no_less_are_refused_with_a_hint(job: CheckedJob, no_less: dict[str, object]) -> None:
    refusals = refused(job)
    with pytest.raises(Overloaded, match="cannot be met behind what is queued") as again:
        refusals.check(replace(job, **no_less), Deadline.after(1.0))  # type: ignore[arg-type]
    assert again.value.retry_after_ms == pytest.approx(LONG_MS, rel=0.1)
    assert refusals.statistics() == {"jobs_refused_unasked": 1}


@pytest.mark.parametrize(
    "less",
    [
        {"size": 3},
        {"min_accuracy": 0.7},
        {"min_accuracy": None},
        {"modalities": ("scent",)},
        {"available": ("photo", "scent", "taste")},
        {"exact": True},
        {"priority": 2},
        {"late_ok": True},
    ],
    ids=str,
)
def test_others_are_for_the_selector_to_decide(job: CheckedJob, less: dict[str, object]) -> None:
    refusals = refused(job)
    refusals.check(replace(job, **less), Deadline.after(1.0))  # type: ignore[arg-type]
    assert refusals.statistics() == {"jobs_refused_unasked": 0}


def test_whoever_has_the_time_is_not_refused(job: CheckedJob) -> None:
    refusals = refused(job, seconds=1.0, hint_ms=LONG_MS)
    refusals.check(job, Deadline.after(1.5 + LONG_MS / 1000))


def test_a_refusal_holds_until_its_hint(job: CheckedJob) -> None:
    refusals = refused(job, hint_ms=20)
    time.sleep(0.05)
    refusals.check(job, Deadline.after(0.001))


def test_another_model_is_another_matter(job: CheckedJob) -> None:
    refused(job).check(replace(job, package=replace(job.package, name="pear")), Deadline.after(1.0))


def test_jobs_without_a_floor_are_alike(job: CheckedJob) -> None:
    plain = replace(job, min_accuracy=None)
    with pytest.raises(Overloaded):
        refused(plain).check(plain, Deadline.after(1.0))
    refused(plain).check(job, Deadline.after(1.0))


def test_jobs_that_may_be_late_say_nothing_about_others(job: CheckedJob) -> None:
    refused(replace(job, late_ok=True)).check(job, Deadline.after(1.0))


def test_any_of_the_last_few_refusals_counts(job: CheckedJob) -> None:
    refusals = Refusals()
    for size in (2, 9, 7, 8):
        refusals.note(replace(job, size=size), Deadline.after(1.0), Overloaded("full", LONG_MS))
    with pytest.raises(Overloaded):
        refusals.check(replace(job, size=2), Deadline.after(1.0))
    for _ in range(100):
        refusals.note(replace(job, size=9), Deadline.after(1.0), Overloaded("full", LONG_MS))
    refusals.check(replace(job, size=2), Deadline.after(1.0))


async def test_the_selector_is_not_asked_again_before_its_hint(
    gateway: Gateway, draw: Callable[..., dict[str, NDArray[Any]]]
) -> None:
    payloads = {name: to_proto(array) for name, array in draw(2).items()}
    request = gateway_pb2.PredictRequest(model="fruit", payloads=payloads, latency_slo_ms=5000)
    asking = asyncio.ensure_future(gateway.stub.Predict(request, timeout=30))
    description = await gateway.job_at_selector()
    error = Overloaded("behind what is queued", LONG_MS)
    failure = selector_pb2.JobFailure(
        job_id=description.job_id,
        status_code=status_number(error),
        message=str(error),
        retry_after_ms=error.retry_after_ms,
    )
    gateway.selector.say(failure=failure)
    gateway.selector.say(release=release_of(description))
    with pytest.raises(grpc.RpcError) as first:
        await asking
    assert first.value.details() == "behind what is queued"
    with pytest.raises(grpc.RpcError) as second:
        await gateway.stub.Predict(request, timeout=30)
    assert second.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "a job that asked for no more was refused a moment ago" in (second.value.details() or "")
    hint = error_from_rpc(second.value, "gateway")
    assert isinstance(hint, Overloaded)
    assert 0 < hint.retry_after_ms <= LONG_MS
    assert gateway.selector.received.empty()
    await gateway.idle()


def test_a_floor_of_zero_is_a_floor(job: CheckedJob) -> None:
    refusals = refused(replace(job, min_accuracy=0.0))
    for floor in (0.0, 0.5, 1.0):
        with pytest.raises(Overloaded):
            refusals.check(replace(job, min_accuracy=floor), Deadline.after(1.0))
    refusals.check(replace(job, min_accuracy=None), Deadline.after(1.0))


def test_floors_of_one_kind_say_nothing_of_the_other(job: CheckedJob) -> None:
    losing = replace(job, min_accuracy=None, max_accuracy_loss=0.02)
    plain = replace(job, min_accuracy=None)
    for mine, others in ((losing, (job, plain)), (job, (losing, plain)), (plain, (losing, job))):
        for other in others:
            refused(mine).check(other, Deadline.after(1.0))


def test_who_may_lose_less_asks_for_more(job: CheckedJob) -> None:
    losing = replace(job, min_accuracy=None, max_accuracy_loss=0.02)
    refusals = refused(losing)
    for loss in (0.0, 0.01, 0.02):
        with pytest.raises(Overloaded):
            refusals.check(replace(losing, max_accuracy_loss=loss), Deadline.after(1.0))
    refusals.check(replace(losing, max_accuracy_loss=0.03), Deadline.after(1.0))
