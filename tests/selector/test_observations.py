"""A selector whose model is observed, among services that are real servers and answer as they are told."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import numpy as np
import pytest

from mosel.config import Settings
from mosel.modality import FUSION
from mosel.v1 import gateway_pb2, selector_pb2
from tests.selector.conftest import Services
from tests.selector.scripted import OBSERVE, Selector, Stream, job, selector_of, until

SETS = ["photo", "photo+scent", "scent"]
# A scripted fusion says how many modalities it fused.
ROW = [1, 2, 1]


class Observer:
    """Whoever observes the model, and what was told so far."""

    def __init__(self, selector: Selector, model: str, share: float = 1.0) -> None:
        self.events: list[gateway_pb2.ObserveEvent] = []
        self.call = selector.stub.Observe(gateway_pb2.ObserveRequest(model=model, share=share))
        self.reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for event in self.call:
            self.events.append(event)

    @property
    def items(self) -> int:
        return sum(len(items.answers) // 3 for event in self.events for items in event.observed)

    async def __aenter__(self) -> "Observer":
        await until(lambda: bool(self.events) or self.reading.done(), "it begins")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.call.cancel()
        await asyncio.wait([self.reading])
        # Whoever ends it this way hears nothing more.
        if not self.reading.cancelled():
            assert isinstance(self.reading.exception(), grpc.RpcError | None)

    async def error(self) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await self.reading
        return ended.value.code(), ended.value.details() or ""


@contextlib.asynccontextmanager
async def observing(selector: Selector) -> AsyncIterator[tuple[Stream, str, Observer]]:
    """A gateway, the model, and whoever observes it; at the end nothing is held."""
    async with selector.connected() as stream:
        (state,) = stream.models().values()
        model = f"{state.model}@{state.revision}"
        async with Observer(selector, model) as observer:
            yield stream, model, observer
        await nothing_is_held(selector)


async def nothing_is_held(selector: Selector) -> None:
    names = ("jobs", "jobs_held", "slots_held", "samples_held", "calls_in_flight.fusion")
    async with asyncio.timeout(60):
        # Nobody tells when they change.
        while any([(await selector.own()).counters[name] for name in names]):  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def floored(number: int, model: str, floor: float = 0.0, **fields: object) -> selector_pb2.JobDescription:
    description = job(number, model, "photo", "scent")
    description.MergeFrom(selector_pb2.JobDescription(min_accuracy=floor, **fields))  # type: ignore[arg-type]
    return description


async def answered(stream: Stream, *numbers: int) -> None:
    for number in numbers:
        job_id = number.to_bytes(16, "big")
        await until(lambda job_id=job_id: stream.over(job_id), f"job {number} is answered")  # type: ignore[misc]


def sets_of(stream: Stream, number: int) -> list[str]:
    results = [m.result for m in stream.said if m.result.job_id == number.to_bytes(16, "big")]
    return [group.modality_set for result in results for group in result.groups]


async def test_jobs_run_everything_and_samples_hold_what_they_need_until_they_are_complete(
    selector: Selector, scripted: Services
) -> None:
    fusion, photo, scent = scripted[FUSION], scripted["photo"], scripted["scent"]
    photo.in_slots = scent.in_slots = True
    async with observing(selector) as (stream, model, observer):
        fusion.hold(OBSERVE)
        await stream.send(job=floored(1, model))
        await answered(stream, 1)
        assert sets_of(stream, 1) == ["photo+scent"]
        await until(lambda: fusion.waiting[OBSERVE] == 1, "its items are fused again")
        own = (await selector.own()).counters
        assert (own["jobs"], own["samples_held"], own["slots_held"]) == (0, 1, 2)
        # One call for all samples; others wait for nothing.
        for number in range(2, 9):
            await stream.send(job=floored(number, model))
            await answered(stream, number)
        own = (await selector.own()).counters
        assert fusion.waiting[OBSERVE] == 1
        assert (own["samples_held"], own["slots_held"]) == (4, 8)
        await until(lambda: len(photo.released) == len(scent.released) == 4, "what no sample needs is free")
        fusion.go_on()
        await until(lambda: observer.items == 4, "all samples are complete")
        assert fusion.called[OBSERVE] == 4 * 3
        await until(lambda: sorted(photo.released) == sorted(scent.released) == list(range(1, 9)), "all slots are free")
        told = [items for event in observer.events for items in event.observed]
        assert [items.job for items in told] == [1, 2, 3, 4]
        for items in told:
            assert (items.size, list(items.answers)) == (1, ROW)
            np.testing.assert_array_equal(items.confidences, [n / 4 for n in ROW])
        last = observer.events[-1]
        assert all(list(event.modality_sets) == SETS for event in observer.events)
        assert (last.jobs, last.items, last.others) == (8, 8, 0)
        assert (last.compute_ms, last.observing_ms) == (16, 12)
    await stream_runs_what_floors_ask_for(selector, model)


async def stream_runs_what_floors_ask_for(selector: Selector, model: str) -> None:
    async with selector.connected() as stream:
        await stream.send(job=floored(99, model))
        await answered(stream, 99)
        # Both take the same time here.
        assert sets_of(stream, 99) in (["photo"], ["scent"])


async def test_who_fixed_its_modalities_or_sent_less_is_not_observed(selector: Selector, scripted: Services) -> None:
    async with observing(selector) as (stream, model, observer):
        exact, less = job(1, model, "photo", "scent"), job(2, model, "photo")
        exact.exact = True
        only = floored(3, model)
        del only.modalities[:]
        only.modalities.append("scent")
        for number, description in enumerate((exact, less, only), 1):
            await stream.send(job=description)
            await answered(stream, number)
        await until(lambda: observer.events[-1].jobs == 3, "they are counted")
        assert observer.events[-1].others == 3
        assert scripted[FUSION].called[OBSERVE] == 0


async def test_what_was_on_its_way_as_a_path_when_it_began_is_not_observed(
    settings: Settings, scripted: Services, measured: None
) -> None:
    fusion = scripted[FUSION]
    fusion.joined = {"photo", "scent"}
    async with selector_of(settings) as selector, selector.connected() as stream:
        await until(lambda: all(state.ready for state in stream.models().values()), "the model is ready")
        (state,) = stream.models().values()
        model = f"{state.model}@{state.revision}"
        fusion.hold("Fuse")
        await stream.send(job=job(1, model, "photo", "scent"))
        await until(lambda: fusion.waiting["Fuse"] == 1, "it is on its way")
        assert scripted["photo"].called["Encode"] + scripted["scent"].called["Encode"] == 0
        async with Observer(selector, model) as observer:
            fusion.go_on()
            await answered(stream, 1)
            await stream.send(job=floored(2, model))
            await answered(stream, 2)
            await until(lambda: observer.items == 1, "what came afterwards is observed")
            await until(lambda: observer.events[-1].jobs == 2, "both are counted")
            assert sets_of(stream, 1) == sets_of(stream, 2) == ["photo+scent"]
            assert observer.events[-1].others == 1
        await nothing_is_held(selector)


async def test_no_sample_is_fused_while_a_job_waits_for_fusion(selector: Selector, scripted: Services) -> None:
    fusion = scripted[FUSION]
    async with observing(selector) as (stream, model, observer):
        fusion.hold(OBSERVE)
        await stream.send(job=floored(1, model))
        await until(lambda: fusion.waiting[OBSERVE] == 1, "a sample is fused")
        fusion.hold("Fuse", OBSERVE)
        # With two tokens, one is left for jobs; the second job has to wait for it.
        await stream.send(job=floored(2, model))
        await until(lambda: fusion.waiting["Fuse"] == 1, "a job is fused")
        await stream.send(job=floored(3, model))
        fusion.go_on()
        await answered(stream, 2, 3)
        await until(lambda: observer.items == 3, "then samples go on")


async def test_where_jobs_always_wait_samples_get_their_least_share(selector: Selector, scripted: Services) -> None:
    fusion = scripted[FUSION]
    async with observing(selector) as (stream, model, observer):
        fusion.hold("Fuse")
        for number in (1, 2):
            await stream.send(job=floored(number, model))
            await until(lambda number=number: fusion.waiting["Fuse"] == number, "a job has a token")  # type: ignore[misc]
        # Whatever else gets a token keeps it.
        encoders = scripted["photo"], scripted["scent"]
        for encoder in encoders:
            encoder.hold("Encode")
        for number in (3, 4):
            await stream.send(job=floored(number, model))
        fusion.go_on()
        await answered(stream, 1, 2)
        await until(lambda: fusion.called[OBSERVE] == 1, "a sample goes before jobs")
        await until(lambda: sum(encoder.waiting["Encode"] for encoder in encoders) == 2, "jobs go on")
        assert (fusion.called[OBSERVE], stream.over((3).to_bytes(16, "big"))) == (1, False)
        for encoder in encoders:
            encoder.go_on()
        await answered(stream, 3, 4)
        await until(lambda: observer.items == 4, "all samples are complete")


async def test_a_fusion_that_fails_or_hangs_costs_samples_and_no_job(selector: Selector, scripted: Services) -> None:
    fusion = scripted[FUSION]
    async with observing(selector) as (stream, model, observer):
        fusion.failing.add(OBSERVE)
        for number in range(1, 6):
            await stream.send(job=floored(number, model))
            await answered(stream, number)
        await nothing_is_held(selector)
        assert observer.items == 0
        fusion.failing.clear()
        fusion.hold(OBSERVE)
        await stream.send(job=floored(6, model))
        await until(lambda: fusion.waiting[OBSERVE] == 1, "a call hangs")
        # Two seconds later it is given up.
        await nothing_is_held(selector)
        fusion.go_on()
        await stream.send(job=floored(7, model))
        await until(lambda: observer.items == 1, "the next is complete")


async def test_an_encoder_that_goes_away_harms_no_job_with_a_floor(selector: Selector, scripted: Services) -> None:
    photo, fusion = scripted["photo"], scripted[FUSION]
    photo.in_slots = True
    async with observing(selector) as (stream, model, observer):
        fusion.hold(OBSERVE)
        await stream.send(job=floored(1, model))
        await until(lambda: fusion.waiting[OBSERVE] == 1, "a sample is under way")
        await photo._server.stop(None)
        await until(lambda: not all(info.available for info in stream.models()["fruit"].sets), "it is known to be away")
        await stream.send(job=floored(2, model))
        await answered(stream, 2)
        assert sets_of(stream, 2) == ["scent"]
        fusion.go_on()
        await until(lambda: observer.items == 1, "what was encoded before is complete")
        assert observer.events[-1].others == 1


async def test_one_observes_a_model_at_a_time_and_wrong_requests_are_refused(
    selector: Selector, scripted: Services
) -> None:
    async with observing(selector) as (_, model, _):
        async with Observer(selector, model) as second:
            assert await second.error() == (
                grpc.StatusCode.FAILED_PRECONDITION,
                "model 'fruit' is observed already; expected one who observes it at a time",
            )
        async with Observer(selector, "tree@1") as unknown:
            assert (await unknown.error())[0] is grpc.StatusCode.NOT_FOUND
        async with Observer(selector, model, share=1.5) as wrong:
            code, details = await wrong.error()
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert details.startswith("share is 1.5; expected")
    async with observing(selector):
        pass


async def test_it_ends_when_the_model_is_unloaded(selector: Selector, scripted: Services) -> None:
    async with observing(selector) as (stream, model, observer):
        scripted[FUSION].hold(OBSERVE)
        await stream.send(job=floored(1, model))
        await until(lambda: scripted[FUSION].waiting[OBSERVE] == 1, "a sample is under way")
        unloading = asyncio.ensure_future(selector.stub.UnloadModel(gateway_pb2.UnloadModelRequest(model="fruit")))
        await stream.send(models=selector_pb2.ModelsInUse(models=[]))
        code, details = await observer.error()
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert details == "model 'fruit' was loaded anew or unloaded while it was observed"
        # Its networks are not freed under a call.
        assert scripted[FUSION].models
        scripted[FUSION].go_on()
        await unloading
        assert not scripted[FUSION].models


async def test_it_ends_when_the_selector_stops(settings: Settings, scripted: Services, measured: None) -> None:
    async with selector_of(settings) as selector, selector.connected() as stream:
        await until(lambda: all(state.ready for state in stream.models().values()), "the model is ready")
        observer = Observer(selector, f"fruit@{stream.models()['fruit'].revision}")
        async with observer:
            selector.process.terminate()
            assert await observer.error() == (grpc.StatusCode.UNAVAILABLE, "service selector is stopping")
