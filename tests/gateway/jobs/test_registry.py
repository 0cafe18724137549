"""Where jobs are, and how they are ended from outside."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator

import pytest

from gateway.access.caller import calling
from gateway.jobs.checks import CheckedJob
from gateway.jobs.job import Job
from gateway.jobs.registry import JobRegistry
from mosel.deadline import Deadline
from mosel.errors import (
    DeadlineExceeded,
    InvalidRequest,
    JobCancelled,
    JobNotFound,
    Overloaded,
    PayloadTooLarge,
)
from mosel.packages.model_package import ModelPackage
from mosel.v1 import gateway_pb2

ID = bytes(range(16))
Admitted = Callable[..., contextlib.AbstractContextManager[Job]]


@pytest.fixture
def registry() -> JobRegistry:
    registry = JobRegistry(max_open=2, max_over=3)
    registry.gateway = ID[:4]
    return registry


@pytest.fixture
def admitted(registry: JobRegistry, fruit: ModelPackage) -> Admitted:
    """A job of five items that the current task serves."""
    asked = CheckedJob(fruit, 5, ("scent",), None, None, False, gateway_pb2.EFFORT_UNSPECIFIED, late_ok=True)

    @contextlib.contextmanager
    def admitted(job_id: bytes = ID, ends: Deadline | None = None) -> Iterator[Job]:
        job = Job(job_id)
        registry.admit(job, ends or Deadline.after(60))
        try:
            job.sound_as(asked, default_s=60)
            yield job
        except BaseException as error:
            registry.leave(job, error)
            raise
        registry.leave(job, None)

    return admitted


async def opened(admitted: Admitted, job_id: bytes = ID) -> "asyncio.Task[object]":
    """A task that serves a job until somebody ends it."""
    running = asyncio.Event()

    async def serve() -> None:
        with admitted(job_id):
            running.set()
            await asyncio.Event().wait()

    task: asyncio.Task[object] = asyncio.create_task(serve())
    await running.wait()
    return task


def state(registry: JobRegistry, job_id: bytes = ID) -> gateway_pb2.JobState.ValueType:
    return registry.status(job_id.hex()).state


async def test_a_job_goes_through_its_states(registry: JobRegistry, admitted: Admitted) -> None:
    with admitted() as job:
        job.status.items_received = 2
        expected = gateway_pb2.JobStatus(
            job_id=ID.hex(), model="fruit", state=gateway_pb2.RECEIVING, size=5, items_received=2
        )
        assert registry.status(ID.hex()) == expected
        assert registry.statistics() == {"jobs_in_flight": 1, "jobs_remembered": 0}
        job.under_way()
        assert state(registry) == gateway_pb2.UNDER_WAY
        assert registry.status(ID.hex().upper()).items_received == 5
    assert state(registry) == gateway_pb2.ANSWERED
    assert registry.statistics() == {"jobs_in_flight": 0, "jobs_remembered": 1}


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (PayloadTooLarge("too much"), "too much"),
        (PayloadTooLarge("x" * 9999), "x" * 400),
        (KeyError(), "internal error"),
    ],
)
async def test_a_job_that_fails_keeps_why(
    registry: JobRegistry, admitted: Admitted, error: Exception, kept: str
) -> None:
    with pytest.raises(type(error)), admitted():
        raise error
    assert (state(registry), registry.status(ID.hex()).error) == (gateway_pb2.FAILED, kept)


async def test_cancelling_ends_the_task_that_serves_the_job(registry: JobRegistry, admitted: Admitted) -> None:
    serving = await opened(admitted)
    assert registry.cancel(ID.hex()).state == gateway_pb2.CANCELLED
    registry.cancel(ID.hex())
    with pytest.raises(JobCancelled, match=f"^job {ID.hex()} was cancelled$"):
        await serving
    assert registry.cancel(ID.hex()).state == gateway_pb2.CANCELLED
    assert registry.status(ID.hex()).error == ""
    assert registry.statistics()["jobs_in_flight"] == 0


async def test_a_task_that_was_interrupted_can_go_on(registry: JobRegistry, admitted: Admitted) -> None:
    async def serve() -> str:
        try:
            with admitted():
                await asyncio.Event().wait()
        except JobCancelled:
            async with asyncio.timeout(60):
                await asyncio.sleep(0)
        return "went on"

    serving = asyncio.create_task(serve())
    await asyncio.sleep(0)
    registry.cancel(ID.hex())
    assert await serving == "went on"
    assert serving.cancelling() == 0


async def test_a_job_that_is_over_stays_as_it_is(registry: JobRegistry, admitted: Admitted) -> None:
    with admitted():
        pass
    assert registry.cancel(ID.hex()).state == gateway_pb2.ANSWERED


async def test_a_caller_that_goes_away_cancels_its_job(registry: JobRegistry, admitted: Admitted) -> None:
    serving = await opened(admitted)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert (state(registry), registry.status(ID.hex()).error) == (gateway_pb2.CANCELLED, "")


async def test_the_first_reason_to_end_counts(registry: JobRegistry, admitted: Admitted) -> None:
    async def serve() -> None:
        with admitted() as job:
            jobs.append(job)
            await asyncio.Event().wait()

    jobs: list[Job] = []
    serving = asyncio.create_task(serve())
    await asyncio.sleep(0)
    jobs[0].end(InvalidRequest("one message too many"))
    registry.cancel(ID.hex())
    with pytest.raises(InvalidRequest, match="one message too many"):
        await serving
    assert (state(registry), registry.status(ID.hex()).error) == (gateway_pb2.FAILED, "one message too many")


@pytest.mark.parametrize(
    ("under_way", "step"), [(False, "when 2 of 5 items had arrived"), (True, "before the answer was there")]
)
async def test_a_job_ends_when_nobody_waits_any_more(
    registry: JobRegistry, admitted: Admitted, under_way: bool, step: str
) -> None:
    async def serve() -> None:
        with admitted(ends=Deadline.after(0.02)) as job:
            job.status.items_received = 2
            if under_way:
                job.under_way()
            await asyncio.Event().wait()

    with pytest.raises(DeadlineExceeded, match=f"^the deadline passed {step}$"):
        await serve()
    assert (state(registry), registry.status(ID.hex()).error) == (gateway_pb2.FAILED, f"the deadline passed {step}")


async def test_both_kinds_of_jobs_are_bounded(registry: JobRegistry, admitted: Admitted) -> None:
    names = [bytes([n] * 16) for n in range(6)]
    serving = [await opened(admitted, name) for name in names[:2]]
    with pytest.raises(Overloaded, match=r"^2 jobs are in flight, the most that gateway\.max_jobs_in_flight allows$"):
        registry.check_room()
    for name in names[:2]:
        registry.cancel(name.hex())
    await asyncio.gather(*serving, return_exceptions=True)
    registry.check_room()
    for name in names[2:]:
        with admitted(name):
            pass
    assert registry.statistics() == {"jobs_in_flight": 0, "jobs_remembered": 3}
    assert [state(registry, name) for name in names[3:]] == [gateway_pb2.ANSWERED] * 3
    with pytest.raises(
        JobNotFound, match=f"job_id is '{names[2].hex()}'; expected a job under way or one of the last 3"
    ):
        registry.status(names[2].hex())


@pytest.mark.parametrize("job_id", ["", "abc", "g" * 32, "0" * 31, "0" * 33, "00 " * 11, "０" * 32, "x" * 10_000])
def test_what_is_no_job_id_is_refused(registry: JobRegistry, job_id: str) -> None:
    for ask in (registry.status, registry.cancel):
        with pytest.raises(InvalidRequest, match=r"^job_id is '.{0,40}'; expected 32 hexadecimal digits$"):
            ask(job_id)


async def test_a_job_is_known_to_its_tenant_alone(registry: JobRegistry, admitted: Admitted) -> None:
    with calling("alice"):
        task = await opened(admitted)
        assert state(registry) == gateway_pb2.RECEIVING
    with calling("bob"):
        for ask in (registry.status, registry.cancel):
            with pytest.raises(JobNotFound, match=f"job_id is '{ID.hex()}'; expected a job under way or one of the"):
                ask(ID.hex())
    # Nobody who has to say who it is: on this machine, or without tokens.
    assert state(registry) == gateway_pb2.RECEIVING
    with calling("alice"):
        registry.cancel(ID.hex())
        with pytest.raises(JobCancelled):
            await task
        assert state(registry) == gateway_pb2.CANCELLED
    with calling("bob"), pytest.raises(JobNotFound):
        registry.status(ID.hex())
    assert state(registry) == gateway_pb2.CANCELLED


async def test_what_was_sent_without_a_tenant_is_no_tenant_s(registry: JobRegistry, admitted: Admitted) -> None:
    with admitted(), calling("alice"), pytest.raises(JobNotFound):
        registry.status(ID.hex())
