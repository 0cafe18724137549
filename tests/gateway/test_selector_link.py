"""The gateway's stream, against a selector that is a real gRPC server in this process."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import grpc
import pytest

from gateway.selector_link import SelectorLink
from mosel.config import Settings
from mosel.deadline import Deadline
from mosel.errors import InternalError, MoselError, Overloaded, ServiceUnavailable, Unreachable
from mosel.v1 import arena_pb2, selector_pb2, tensor_pb2
from tests.gateway.scripted import serving

ANNOUNCEMENT = arena_pb2.Announcement(arenas=[arena_pb2.AnnouncedArena(nonce=b"n" * 16)])


class Recorder:
    """What the link reports."""

    def __init__(self) -> None:
        self.released: list[tensor_pb2.ArenaSlot] = []
        self.something_released = asyncio.Event()
        self.models_changed = asyncio.Event()
        self.rungs: asyncio.Queue[int] = asyncio.Queue()
        self.ways = {"10.0.0.2:7": "10.0.0.1:9"}

    async def fetch_address(self, encoder: str) -> str:
        if encoder not in self.ways:
            raise ServiceUnavailable("no way there")
        return self.ways[encoder]

    def release(self, slots: Iterable[tensor_pb2.ArenaSlot]) -> None:
        self.released.extend(slots)
        self.something_released.set()


@pytest.fixture
def settings(settings_with: Callable[..., Settings], tmp_path: Path) -> Settings:
    return settings_with(selector={"address": f"unix:{tmp_path}/s.sock"})


@asynccontextmanager
async def linked(settings: Settings, recorder: Recorder) -> AsyncIterator[SelectorLink]:
    async with SelectorLink(
        settings,
        ANNOUNCEMENT,
        recorder.release,
        recorder.rungs.put_nowait,
        recorder.models_changed.set,
        recorder.fetch_address,
    ) as link:
        yield link


async def connected(link: SelectorLink, recorder: Recorder) -> None:
    async with asyncio.timeout(30):
        while not link.models:
            recorder.models_changed.clear()
            await recorder.models_changed.wait()


def job(number: int) -> selector_pb2.JobDescription:
    slot = tensor_pb2.ArenaSlot(arena_id=1, epoch=2, slot=number, generation=1)
    payloads = {"photo": tensor_pb2.TensorRef(slot=slot), "scent": tensor_pb2.TensorRef(inline=b"..")}
    return selector_pb2.JobDescription(job_id=bytes([number] * 16), model="fruit", size=4, payloads=payloads)


def group(*items: int) -> selector_pb2.ItemGroup:
    return selector_pb2.ItemGroup(modality_set="scent", items=items)


async def answer(link: SelectorLink, number: int) -> tuple[list[Sequence[selector_pb2.ItemGroup]], int]:
    """Sends a job and reads what is said of it: the items as they came, and the microseconds in the queue."""
    with link.submit(job(number)) as answers:
        came = [groups async for groups in answers]
        return came, answers.result.queue_us


def in_flight(link: SelectorLink) -> int:
    return link.statistics()["jobs_at_selector"]


async def test_answers_find_their_jobs_in_any_order(settings: Settings) -> None:
    recorder = Recorder()
    async with serving(settings) as selector, linked(settings, recorder) as link:
        await connected(link, recorder)
        assert link.models["fruit"].ready
        calls = [asyncio.create_task(answer(link, n)) for n in range(5)]
        for n in range(5):
            assert (await selector.received.get()).job == job(n)
        assert in_flight(link) == 5
        for n in range(5):
            selector.say(part=selector_pb2.JobPart(job_id=job(n).job_id, group=group(n, n + 1)))
        for n in reversed(range(5)):
            selector.say(result=selector_pb2.JobResult(job_id=job(n).job_id, groups=[group(0), group(9)], queue_us=n))
        expected = [([[group(n, n + 1)], [group(0), group(9)]], n) for n in range(5)]
        assert await asyncio.gather(*calls) == expected
        assert in_flight(link) == 0
        assert selector.received.empty()


@pytest.mark.parametrize(
    ("status", "kind", "retry"),
    [
        (grpc.StatusCode.FAILED_PRECONDITION, Unreachable, 0),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Overloaded, 250),
        (grpc.StatusCode.UNAVAILABLE, ServiceUnavailable, 0),
    ],
)
async def test_a_failure_is_raised_as_what_it_is(
    settings: Settings, status: grpc.StatusCode, kind: type[MoselError], retry: int
) -> None:
    recorder = Recorder()
    async with serving(settings) as selector, linked(settings, recorder) as link:
        await connected(link, recorder)
        call = asyncio.create_task(answer(link, 1))
        await selector.received.get()
        selector.say(
            failure=selector_pb2.JobFailure(
                job_id=job(1).job_id, status_code=int(status.value[0]), message="service x", retry_after_ms=retry
            )
        )
        with pytest.raises(kind, match=r"^service x$") as raised:
            await call
        assert getattr(raised.value, "retry_after_ms", 0) == retry


@pytest.mark.parametrize("items", [(), (0, 1, 2, 3, 4)])
async def test_no_more_is_kept_of_a_job_than_it_has_items(settings: Settings, items: tuple[int, ...]) -> None:
    recorder = Recorder()
    async with serving(settings) as selector, linked(settings, recorder) as link:
        await connected(link, recorder)
        with link.submit(job(1)) as answers:
            await selector.received.get()
            for part in (group(3), group(*items), group(0)):
                selector.say(part=selector_pb2.JobPart(job_id=job(1).job_id, group=part))
            assert await anext(answers) == [group(3)]
            with pytest.raises(InternalError, match=f"answered {len(items)} items of a job of which 3 miss"):
                await anext(answers)
            assert link.statistics()["answers_waiting"] == 0


async def test_jobs_beyond_the_outbox_are_refused_and_those_not_sent_are_taken_back(settings: Settings) -> None:
    recorder = Recorder()
    async with serving(settings) as selector, linked(settings, recorder) as link:
        await connected(link, recorder)
        with ExitStack() as waiting:
            # Nothing is sent while nobody lets the loop go on.
            for number in range(128):
                waiting.enter_context(link.submit(job(number)))
            with pytest.raises(Overloaded, match=r"^128 jobs wait to be sent"), link.submit(job(200)):
                pass
            assert [slot.slot for slot in recorder.released] == [200]
            assert link.statistics()["outbox.jobs"] == 128
        assert link.statistics() == {"jobs_at_selector": 0, "answers_waiting": 0, "outbox.urgent": 0, "outbox.jobs": 0}
        assert sorted(slot.slot for slot in recorder.released) == [*range(128), 200]
        call = asyncio.create_task(answer(link, 1))
        assert (await selector.received.get()).job == job(1)
        call.cancel()


async def test_an_error_in_what_the_selector_says_ends_the_stream_and_not_the_link(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    recorder, failed = Recorder(), asyncio.Event()

    def changed() -> None:
        if not failed.is_set():
            failed.set()
            raise ValueError("broken")
        recorder.models_changed.set()

    async with serving(settings):
        arguments = ANNOUNCEMENT, recorder.release, recorder.rungs.put_nowait, changed, recorder.fetch_address
        async with SelectorLink(settings, *arguments) as link:
            async with asyncio.timeout(30):
                await failed.wait()
                recorder.models_changed.clear()
                while not link.connected:
                    await recorder.models_changed.wait()
            link.check_connected()
    [record] = [record for record in caplog.records if record.exc_info]
    assert vars(record)["loop"] == "selector link"


async def test_a_job_that_nobody_waits_for_is_cancelled_there(settings: Settings) -> None:
    recorder = Recorder()
    async with serving(settings) as selector, linked(settings, recorder) as link:
        await connected(link, recorder)
        given_up = asyncio.create_task(answer(link, 1))
        assert (await selector.received.get()).job == job(1)
        selector.say(part=selector_pb2.JobPart(job_id=job(1).job_id, group=group(0)))
        given_up.cancel()
        assert (await selector.received.get()).cancel.job_id == job(1).job_id
        # An answer that comes too late is passed over.
        selector.say(result=selector_pb2.JobResult(job_id=job(1).job_id))
        assert in_flight(link) == 0


async def test_plans_are_passed_on(settings: Settings) -> None:
    recorder = Recorder()
    async with linked(settings, recorder) as link:
        with pytest.raises(ServiceUnavailable, match=r"^service selector is not reachable$"):
            await link.plan(job(1), Deadline.after(30))
        async with serving(settings) as selector:
            await connected(link, recorder)
            assert (await link.plan(job(1), Deadline.after(30))).refusal == "as scripted for 4 items"
            assert selector.planned == [job(1)]


async def test_the_arena_is_announced_first_and_the_transport_is_as_the_selector_says(settings: Settings) -> None:
    recorder = Recorder()
    async with serving(settings) as selector, linked(settings, recorder) as link:
        await connected(link, recorder)
        assert (await selector.announced.get()).announcement == ANNOUNCEMENT
        selector.say(transport=selector_pb2.PayloadTransport(rung=tensor_pb2.POSIX_SHM))
        await told(recorder, tensor_pb2.POSIX_SHM)
        link.check_connected()
        selector.say(transport=selector_pb2.PayloadTransport(rung=tensor_pb2.INLINE, refused="too slow a path"))
        await told(recorder, tensor_pb2.INLINE)
        with pytest.raises(ServiceUnavailable, match="too slow a path"):
            link.check_connected()


async def test_the_selector_is_told_where_an_encoder_elsewhere_can_fetch(settings: Settings) -> None:
    recorder = Recorder()
    async with serving(settings) as selector, linked(settings, recorder) as link:
        await connected(link, recorder)
        for encoder, answer in (("10.0.0.2:7", {"address": "10.0.0.1:9"}), ("10.0.0.3:7", {"reason": "no way there"})):
            selector.say(fetch_question=selector_pb2.FetchQuestion(encoder=encoder))
            expected = selector_pb2.FetchAddress(encoder=encoder, **answer)
            assert (await selector.received.get()).fetch_address == expected


async def told(recorder: Recorder, rung: int) -> None:
    async with asyncio.timeout(30):
        while await recorder.rungs.get() != rung:
            pass


async def test_releases_are_handed_on(settings: Settings) -> None:
    recorder = Recorder()
    async with serving(settings) as selector, linked(settings, recorder) as link:
        await connected(link, recorder)
        assert (await link.statuses())[0].name == "selector"
        slots = [tensor_pb2.ArenaSlot(arena_id=1, epoch=2, slot=n, generation=4) for n in range(3)]
        selector.say(release=tensor_pb2.ReleaseSlots(slots=slots))
        async with asyncio.timeout(30):
            await recorder.something_released.wait()
        assert recorder.released == slots


async def test_without_a_selector_jobs_are_refused_and_their_slots_given_back(settings: Settings) -> None:
    recorder = Recorder()
    async with linked(settings, recorder) as link:
        with pytest.raises(ServiceUnavailable, match=r"^service selector is not reachable$"):
            link.check_connected()
        with pytest.raises(ServiceUnavailable, match=r"^service selector is not reachable$"):
            await answer(link, 7)
        assert [slot.slot for slot in recorder.released] == [7]
        assert in_flight(link) == 0


async def test_a_selector_that_goes_fails_its_jobs_and_is_found_again(settings: Settings) -> None:
    recorder = Recorder()
    async with linked(settings, recorder) as link:
        async with serving(settings) as selector:
            await connected(link, recorder)
            call = asyncio.create_task(answer(link, 1))
            await selector.received.get()
        with pytest.raises(ServiceUnavailable, match=r"^service selector went away$"):
            await call
        assert link.models == {}
        async with serving(settings) as selector:
            await connected(link, recorder)
            call = asyncio.create_task(answer(link, 2))
            await selector.received.get()
            selector.say(result=selector_pb2.JobResult(job_id=job(2).job_id))
            assert await call == ([[]], 0)
        # Encoders may still read the lost job's payloads, so its slots wait for the end of their leases.
        assert recorder.released == []
