"""The selector's stream to gateways, and models that cannot be loaded, among services that are real servers."""

import asyncio
import shutil
from pathlib import Path

import grpc
import pytest

from mosel.config import Settings
from mosel.packages.model_package import ModelPackage
from mosel.v1 import arena_pb2, gateway_pb2, selector_pb2, service_pb2, tensor_pb2
from tests.fruit_on_disk import measured as measured_anew
from tests.selector.conftest import Services
from tests.selector.scripted import ScriptedService, Selector, Stream, job, selector_of, until

ARENA = arena_pb2.AnnouncedArena(
    arena=arena_pb2.ArenaDescription(arena_id=1, epoch=1, rung=tensor_pb2.POSIX_SHM), nonce=b"n" * 16
)


def model_of(stream: Stream) -> str:
    (state,) = stream.models().values()
    return f"{state.model}@{state.revision}"


async def test_while_an_encoder_hangs_jobs_and_cancels_of_a_new_gateway_go_on(
    selector: Selector, scripted: Services
) -> None:
    photo, scent = scripted["photo"], scripted["scent"]
    photo.hold("OpenArena")
    async with selector.connected() as stream:
        model = model_of(stream)
        await stream.send(announcement=arena_pb2.Announcement(arenas=[ARENA]))
        await until(lambda: photo.waiting["OpenArena"] == 1, "the encoder is asked")
        await stream.send(job=job(1, model, "scent"))
        await until(lambda: stream.over((1).to_bytes(16, "big")), "a job is answered")
        scent.hold("Encode")
        await stream.send(job=job(2, model, "scent"))
        await until(lambda: scent.waiting["Encode"] == 1, "another is under way")
        await stream.send(cancel=selector_pb2.CancelJob(job_id=(2).to_bytes(16, "big")))
        await selector.has_counted("jobs_cancelled", 1)
        assert photo.waiting["OpenArena"] == 1
        assert await selector.counter("jobs_held") == 1
        scent.go_on()
        photo.go_on()


async def test_the_session_of_a_gateway_that_does_not_read_is_ended(selector: Selector, scripted: Services) -> None:
    scripted["scent"].hold("Encode")
    async with selector.connected() as stream:
        model = model_of(stream)
    deaf = Stream(selector.stub)
    await deaf.send(job=job(1, model, "scent"))
    await until(lambda: scripted["scent"].waiting["Encode"] == 1, "its job is under way")
    with pytest.raises(grpc.RpcError) as ended:
        await send_until_the_end(deaf, selector)
    assert isinstance(ended.value, grpc.aio.AioRpcError)
    # grpc.aio's client says INTERNAL where a message that it was sending met the end of the call.
    assert ended.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL)
    counters = (await selector.own()).counters
    assert (counters["gateways_overflowed"], counters["jobs_cancelled"], counters["jobs"]) == (1, 1, 0)
    assert (counters["gateways"], counters["outbox_messages"]) == (0, 0)
    scripted["scent"].go_on()
    async with selector.connected() as stream:
        await stream.send(job=job(1, model, "scent"))
        await until(lambda: stream.over((1).to_bytes(16, "big")), "a job of another gateway is answered")


async def send_until_the_end(deaf: Stream, selector: Selector) -> None:
    """Sends jobs that are refused, and reads nothing, until the selector ends the session; then it reads that."""
    for number in range(2, 50_000):
        if number % 500 == 0 and await selector.counter("gateways_overflowed"):
            break
        await deaf.send(job=job(number, "m" * 1000, "scent"))
    await deaf.read()


@pytest.fixture
def models_of_two(models_dir: Path, tmp_path: Path, fruit: ModelPackage) -> Path:
    """A folder with `fruit`, and aside the same with a modality that no other has, as `nut`."""
    shutil.copytree(fruit.folder, tmp_path / "models" / "fruit")
    nut = shutil.copytree(fruit.folder, tmp_path / "aside" / "nut")
    for file in ("model.toml", "accuracy.json"):
        text = (nut / file).read_text().replace('"fruit"', '"nut"').replace("scent", "taste")
        (nut / file).write_text(text)
    measured_anew(nut)
    return tmp_path / "models"


async def test_nothing_is_left_of_a_model_that_could_not_be_loaded(
    settings: Settings, scripted: Services, measured: None, models_of_two: Path
) -> None:
    settings = settings.model_copy(update={"models_dir": models_of_two})
    request = gateway_pb2.LoadModelRequest(model="nut")
    async with selector_of(settings) as selector, selector.connected() as stream:
        await until(lambda: bool(stream.models()) and stream.models()["fruit"].ready, "the first model is ready")
        before = await names(selector)
        shutil.copytree(models_of_two.parent / "aside" / "nut", models_of_two / "nut")
        with pytest.raises(grpc.RpcError, match="service encoder/taste does not answer"):
            await selector.stub.LoadModel(request)
        await names_are(selector, before)
        taste = ScriptedService(settings, "taste")
        async with taste:
            taste.failing.add("Load")
            with pytest.raises(grpc.RpcError):
                await selector.stub.LoadModel(request)
            await names_are(selector, before)
            assert all(len(scripted[lane].models) == 1 for lane in scripted)
            taste.failing.clear()
            assert (await selector.stub.LoadModel(request)).ready
            assert "encoder/taste" in await names(selector)


async def names(selector: Selector) -> set[str]:
    """The services that are followed, and the lanes in the scheduler."""
    reply = await selector.stub.Status(service_pb2.StatusRequest())
    lanes = {name for name in reply.services[0].counters if name.startswith("calls_in_flight.")}
    return lanes | {service.name for service in reply.services}


async def names_are(selector: Selector, expected: set[str]) -> None:
    async with asyncio.timeout(60):
        # Nobody tells when they change.
        while await names(selector) != expected:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
