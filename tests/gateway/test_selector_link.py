"""The gateway's stream, against a selector that is a real gRPC server in this process."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from gateway.selector_link import SelectorLink
from mosel.config import Settings
from mosel.deadline import Deadline
from mosel.errors import DeadlineExceeded, MoselError, Overloaded, ServiceUnavailable, Unreachable
from mosel.service import Context
from mosel.v1 import arena_pb2, selector_pb2, selector_pb2_grpc, service_pb2, tensor_pb2

Messages = AsyncIterator[selector_pb2.GatewayMessage]


class ScriptedSelector(selector_pb2_grpc.SelectorServicer):
    """Says that the model `fruit` is ready; what else it says is up to the test."""

    def __init__(self) -> None:
        self.received: asyncio.Queue[selector_pb2.GatewayMessage] = asyncio.Queue()
        self.announced: asyncio.Queue[selector_pb2.GatewayMessage] = asyncio.Queue()
        self.outbox: asyncio.Queue[selector_pb2.SelectorMessage | None] = asyncio.Queue()

    async def Connect(  # noqa: N802 (named by the proto)
        self, request_iterator: Messages, context: Context
    ) -> AsyncIterator[selector_pb2.SelectorMessage]:
        reading = asyncio.create_task(self._read(request_iterator))
        try:
            states = [selector_pb2.ModelState(model="fruit", ready=True)]
            yield selector_pb2.SelectorMessage(models=selector_pb2.ModelStates(models=states))
            while (message := await self.outbox.get()) is not None:
                yield message
        finally:
            reading.cancel()

    async def Status(  # noqa: N802 (named by the proto)
        self, request: service_pb2.StatusRequest, context: Context
    ) -> service_pb2.StatusReply:
        return service_pb2.StatusReply(services=[service_pb2.ServiceStatus(name="selector", ready=True)])

    async def _read(self, messages: Messages) -> None:
        async for message in messages:
            kept = self.announced if message.HasField("announcement") else self.received
            kept.put_nowait(message)

    def say(self, **message: object) -> None:
        self.outbox.put_nowait(selector_pb2.SelectorMessage(**message))  # type: ignore[arg-type]


ANNOUNCEMENT = arena_pb2.Announcement(arenas=[arena_pb2.AnnouncedArena(nonce=b"n" * 16)])


class Recorder:
    """What the link reports."""

    def __init__(self) -> None:
        self.released: list[tensor_pb2.ArenaSlot] = []
        self.something_released = asyncio.Event()
        self.models_changed = asyncio.Event()
        self.rungs: asyncio.Queue[int] = asyncio.Queue()

    def release(self, slots: Iterable[tensor_pb2.ArenaSlot]) -> None:
        self.released.extend(slots)
        self.something_released.set()


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[ScriptedSelector]:
    selector, server = ScriptedSelector(), grpc.aio.server()
    selector_pb2_grpc.add_SelectorServicer_to_server(selector, server)
    server.add_insecure_port(settings.selector_address)
    await server.start()
    try:
        yield selector
    finally:
        await server.stop(None)


@pytest.fixture
def settings(settings_with: Callable[..., Settings], tmp_path: Path) -> Settings:
    return settings_with(selector={"address": f"unix:{tmp_path}/s.sock"})


@asynccontextmanager
async def linked(settings: Settings, recorder: Recorder) -> AsyncIterator[SelectorLink]:
    async with SelectorLink(
        settings, ANNOUNCEMENT, recorder.release, recorder.rungs.put_nowait, recorder.models_changed.set
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
    return selector_pb2.JobDescription(job_id=bytes([number] * 16), model="fruit", size=1, payloads=payloads)


async def test_answers_find_their_jobs_in_any_order(settings: Settings) -> None:
    recorder = Recorder()
    async with serving(settings) as selector, linked(settings, recorder) as link:
        await connected(link, recorder)
        assert link.models["fruit"].ready
        calls = [asyncio.create_task(link.predict(job(n), Deadline.after(30))) for n in range(5)]
        for n in range(5):
            assert (await selector.received.get()).job == job(n)
        assert link.jobs_in_flight == 5
        for n in reversed(range(5)):
            selector.say(result=selector_pb2.JobResult(job_id=job(n).job_id, queue_us=n))
        assert [result.queue_us for result in await asyncio.gather(*calls)] == list(range(5))
        assert link.jobs_in_flight == 0
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
        call = asyncio.create_task(link.predict(job(1), Deadline.after(30)))
        await selector.received.get()
        selector.say(
            failure=selector_pb2.JobFailure(
                job_id=job(1).job_id, status_code=int(status.value[0]), message="service x", retry_after_ms=retry
            )
        )
        with pytest.raises(kind, match=r"^service x$") as raised:
            await call
        assert getattr(raised.value, "retry_after_ms", 0) == retry


async def test_a_job_that_is_late_or_cancelled_is_cancelled_there(settings: Settings) -> None:
    recorder = Recorder()
    async with serving(settings) as selector, linked(settings, recorder) as link:
        await connected(link, recorder)
        with pytest.raises(DeadlineExceeded, match="the deadline passed before the answer was there"):
            await link.predict(job(1), Deadline.after(0.05))
        given_up = asyncio.create_task(link.predict(job(2), Deadline.after(30)))
        received = [await selector.received.get() for _ in range(3)]
        given_up.cancel()
        received.append(await selector.received.get())
        assert [message.WhichOneof("message") for message in received] == ["job", "cancel", "job", "cancel"]
        assert received[1].cancel.job_id == job(1).job_id
        assert received[3].cancel.job_id == job(2).job_id
        # An answer that comes too late is passed over.
        selector.say(result=selector_pb2.JobResult(job_id=job(1).job_id))
        assert link.jobs_in_flight == 0


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


async def told(recorder: Recorder, rung: int) -> None:
    async with asyncio.timeout(30):
        while await recorder.rungs.get() != rung:
            pass


async def test_releases_are_handed_on(settings: Settings) -> None:
    recorder = Recorder()
    async with serving(settings) as selector, linked(settings, recorder) as link:
        await connected(link, recorder)
        assert (await link.statuses()).services[0].name == "selector"
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
            await link.predict(job(7), Deadline.after(30))
        assert [slot.slot for slot in recorder.released] == [7]
        assert link.jobs_in_flight == 0


async def test_a_selector_that_goes_fails_its_jobs_and_is_found_again(settings: Settings) -> None:
    recorder = Recorder()
    async with linked(settings, recorder) as link:
        async with serving(settings) as selector:
            await connected(link, recorder)
            call = asyncio.create_task(link.predict(job(1), Deadline.after(30)))
            await selector.received.get()
        with pytest.raises(ServiceUnavailable, match=r"^service selector went away$"):
            await call
        assert link.models == {}
        async with serving(settings) as selector:
            await connected(link, recorder)
            call = asyncio.create_task(link.predict(job(2), Deadline.after(30)))
            await selector.received.get()
            selector.say(result=selector_pb2.JobResult(job_id=job(2).job_id))
            assert (await call).job_id == job(2).job_id
        # Encoders may still read the lost job's payloads, so its slots wait for the end of their leases.
        assert recorder.released == []
