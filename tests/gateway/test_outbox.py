"""What waits to be sent to the selector, without one."""

import asyncio

import pytest

from gateway.outbox import Outbox
from mosel.errors import Overloaded
from mosel.transport.host import monotonic_ns
from mosel.v1 import selector_pb2


def job(number: int) -> selector_pb2.JobDescription:
    return selector_pb2.JobDescription(job_id=bytes([number] * 16))


def models(*names: str) -> selector_pb2.ModelsInUse:
    return selector_pb2.ModelsInUse(models=names)


async def sent(outbox: Outbox, count: int) -> list[str]:
    """The next messages: their kind, and which job or models they are about."""
    told = []
    async with asyncio.timeout(30):
        for _ in range(count):
            message = await anext(outbox)
            kind = message.WhichOneof("message") or ""
            about = {"job": message.job.job_id[:1].hex(), "cancel": message.cancel.job_id[:1].hex()}
            told.append(f"{kind} {about.get(kind, ' '.join(message.models.models))}")
    return told


async def test_cancels_overtake_jobs_and_models_stay_in_line() -> None:
    outbox = Outbox()
    outbox.put_models(models("old"))
    for number in (1, 2):
        outbox.put_job(job(number))
    outbox.put_models(models("old", "new"))
    outbox.put_job(job(3))
    assert not outbox.cancel(bytes([9] * 16))
    assert outbox.statistics() == {"outbox.urgent": 1, "outbox.jobs": 4}
    assert await sent(outbox, 5) == ["cancel 09", "job 01", "job 02", "models old new", "job 03"]
    assert outbox.statistics() == {"outbox.urgent": 0, "outbox.jobs": 0}


async def test_a_job_that_was_not_sent_is_taken_back_and_never_cancelled() -> None:
    outbox = Outbox()
    outbox.put_job(job(1))
    outbox.put_job(job(2))
    assert outbox.cancel(job(1).job_id)
    assert await sent(outbox, 1) == ["job 02"]
    assert not outbox.cancel(job(2).job_id)
    assert await sent(outbox, 1) == ["cancel 02"]


async def test_a_full_box_refuses_jobs_and_nothing_else() -> None:
    outbox = Outbox(most_jobs=2)
    outbox.put_job(job(1))
    outbox.put_job(job(2))
    with pytest.raises(Overloaded, match=r"^2 jobs wait to be sent to service selector, which does not read$"):
        outbox.put_job(job(3))
    outbox.put_models(models("new"))
    outbox.cancel(bytes([9] * 16))
    assert await sent(outbox, 4) == ["cancel 09", "job 01", "job 02", "models new"]
    outbox.put_job(job(3))
    assert await sent(outbox, 1) == ["job 03"]


async def test_who_waits_for_a_message_gets_it_or_the_end() -> None:
    outbox = Outbox()
    waiting = asyncio.create_task(sent(outbox, 1))
    await asyncio.sleep(0)
    outbox.put_job(job(1))
    assert await waiting == ["job 01"]
    ending = asyncio.create_task(anext(outbox, None))
    await asyncio.sleep(0)
    assert outbox.close() == []
    assert await ending is None


async def test_closing_returns_the_jobs_that_were_not_sent() -> None:
    outbox = Outbox()
    outbox.put_job(job(1))
    outbox.put_models(models("new"))
    assert outbox.close() == [job(1)]
    assert await anext(outbox, None) is None


async def test_what_is_left_of_a_job_s_time_is_said_when_it_is_sent() -> None:
    outbox, due = Outbox(), monotonic_ns() + 60_000_000_000
    description = selector_pb2.JobDescription(job_id=bytes(16), deadline_ns=due, expiry_us=5_000_000)
    outbox.put_job(description)
    waited = monotonic_ns()
    message = await anext(outbox)
    assert 0 < message.job.budget_us * 1000 <= due - waited
    assert message.job.expiry_us == message.job.budget_us + 5_000_000
    outbox.put_job(selector_pb2.JobDescription(job_id=bytes(16), deadline_ns=1))
    assert (await anext(outbox)).job.budget_us == 0
