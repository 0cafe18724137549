"""A gateway in this process, and a selector that says what a test tells it to; both are real gRPC servers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import numpy as np

from gateway.data_plane import DataPlane
from mosel.client import AsyncClient, JobInfo
from mosel.config import Settings
from mosel.errors import ServiceUnavailable
from mosel.packages.model_package import ModelPackage, load_package
from mosel.runtime.service import Context
from mosel.tensors import to_proto
from mosel.v1 import gateway_pb2, gateway_pb2_grpc, selector_pb2, selector_pb2_grpc, service_pb2, tensor_pb2

Messages = AsyncIterator[selector_pb2.GatewayMessage]
METRICS = b"# HELP scripted A metric.\n# TYPE scripted gauge\nscripted 3\n"


def group(modality_set: str, *items: int) -> selector_pb2.ItemGroup:
    """Items whose output says who they are."""
    output = np.zeros((len(items), 3), np.float32)
    output[:, 1] = [1 + item for item in items]
    return selector_pb2.ItemGroup(modality_set=modality_set, items=items, output=to_proto(output))


def release_of(description: selector_pb2.JobDescription) -> tensor_pb2.ReleaseSlots:
    return tensor_pb2.ReleaseSlots(slots=[ref.slot for ref in description.payloads.values()])


class ScriptedSelector(selector_pb2_grpc.SelectorServicer):
    """Says that the model `fruit` is ready; what else it says is up to the test."""

    def __init__(self, fruit: ModelPackage) -> None:
        self.fruit = selector_pb2.ModelState(model="fruit", ready=True, revision=fruit.revision)
        self.observing, self.gone = 0, asyncio.Event()
        self.planned: list[selector_pb2.JobDescription] = []
        self.upload: gateway_pb2.UploadAdvice | None = None
        self.received: asyncio.Queue[selector_pb2.GatewayMessage] = asyncio.Queue()
        self.announced: asyncio.Queue[selector_pb2.GatewayMessage] = asyncio.Queue()
        self.named: asyncio.Queue[list[str]] = asyncio.Queue()
        self.outbox: asyncio.Queue[selector_pb2.SelectorMessage | None] = asyncio.Queue()

    async def Connect(  # noqa: N802 (named by the proto)
        self, request_iterator: Messages, context: Context
    ) -> AsyncIterator[selector_pb2.SelectorMessage]:
        reading = asyncio.create_task(self._read(request_iterator))
        try:
            yield selector_pb2.SelectorMessage(models=selector_pb2.ModelStates(models=[self.fruit]))
            while (message := await self.outbox.get()) is not None:
                yield message
        finally:
            reading.cancel()

    async def Plan(  # noqa: N802 (named by the proto)
        self, request: selector_pb2.JobDescription, context: Context
    ) -> gateway_pb2.PlanReply:
        self.planned.append(request)
        return gateway_pb2.PlanReply(refusal=f"as scripted for {request.size} items", upload=self.upload)

    async def LoadModel(  # noqa: N802 (named by the proto)
        self, request: gateway_pb2.LoadModelRequest, context: Context
    ) -> selector_pb2.ModelState:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{request.model}/model.toml: as scripted")

    async def UnloadModel(  # noqa: N802 (named by the proto)
        self, request: gateway_pb2.UnloadModelRequest, context: Context
    ) -> gateway_pb2.UnloadModelReply:
        await context.abort(grpc.StatusCode.NOT_FOUND, f"model '{request.model}' is not loaded")

    async def Observe(  # noqa: N802 (named by the proto)
        self, request: gateway_pb2.ObserveRequest, context: Context
    ) -> AsyncIterator[gateway_pb2.ObserveEvent]:
        self.observing += 1
        try:
            for number in range(2):
                observed = gateway_pb2.ObservedItems(job=number, answers=[1, 2], confidences=[0.5, 0.75])
                yield gateway_pb2.ObserveEvent(
                    revision=request.model, modality_sets=["photo", "scent"], observed=[observed]
                )
            await self.gone.wait()
            await context.abort(grpc.StatusCode.UNAVAILABLE, "selector is as good as gone")
        finally:
            self.observing -= 1

    async def Status(  # noqa: N802 (named by the proto)
        self, request: service_pb2.StatusRequest, context: Context
    ) -> service_pb2.StatusReply:
        return service_pb2.StatusReply(services=[service_pb2.ServiceStatus(name="selector", ready=True)])

    async def Metrics(  # noqa: N802 (named by the proto)
        self, request: service_pb2.MetricsRequest, context: Context
    ) -> service_pb2.MetricsReply:
        own = service_pb2.ServiceMetrics(service="selector", text=METRICS)
        return service_pb2.MetricsReply(services=[own, service_pb2.ServiceMetrics(service="fusion")])

    async def _read(self, messages: Messages) -> None:
        async for message in messages:
            if message.HasField("models"):
                self.named.put_nowait(list(message.models.models))
                continue
            kept = self.announced if message.HasField("announcement") else self.received
            kept.put_nowait(message)

    def say(self, **message: object) -> None:
        self.outbox.put_nowait(selector_pb2.SelectorMessage(**message))  # type: ignore[arg-type]


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[ScriptedSelector]:
    fruit = await asyncio.to_thread(load_package, settings.models_dir / "fruit")
    selector, server = ScriptedSelector(fruit), grpc.aio.server()
    selector_pb2_grpc.add_SelectorServicer_to_server(selector, server)
    server.add_insecure_port(settings.selector_address)
    await server.start()
    try:
        yield selector
    finally:
        await server.stop(None)


async def nowhere(encoder: str) -> str:
    """Every encoder is on this machine."""
    raise ServiceUnavailable(f"nothing leads to {encoder}")


class Gateway:
    """A gateway in this process, its selector, and clients."""

    def __init__(
        self, address: str, selector: ScriptedSelector, rungs: "asyncio.Queue[int]", data_plane: DataPlane
    ) -> None:
        self.address, self.selector, self.rungs, self.data_plane = address, selector, rungs, data_plane
        self.client = AsyncClient(address, retries=None)
        self.channel = grpc.aio.insecure_channel(address)
        self.stub = gateway_pb2_grpc.GatewayStub(self.channel)

    async def job_at_selector(self) -> selector_pb2.JobDescription:
        message = await self.selector.received.get()
        assert message.HasField("job")
        return message.job

    async def cancelled_at_selector(self) -> bytes:
        message = await self.selector.received.get()
        assert message.HasField("cancel")
        return message.cancel.job_id

    def answer(self, description: selector_pb2.JobDescription, **result: float) -> None:
        """Lets the selector answer a job, and forget it."""
        groups = [group("photo+scent", *range(description.size))]
        fields = {"job_id": description.job_id, "groups": groups} | result
        self.selector.say(result=selector_pb2.JobResult(**fields))  # type: ignore[arg-type]
        self.selector.say(release=release_of(description))

    async def told(self, rung: tensor_pb2.Rung.ValueType) -> None:
        """Lets the selector say how payloads travel."""
        self.selector.say(transport=selector_pb2.PayloadTransport(rung=rung))
        async with asyncio.timeout(30):
            while await self.rungs.get() != rung:
                pass

    async def held(self) -> int:
        """Jobs, slots and bytes that this gateway holds."""
        reply = await self.stub.Status(service_pb2.StatusRequest())
        counters = reply.services[0].counters
        names = ("jobs_in_flight", "jobs_at_selector", "arriving_bytes", "slots_published", "slots_filling")
        return sum(counters[name] for name in names)

    async def named(self) -> list[str]:
        """The models that jobs of this gateway will name, as it said next."""
        async with asyncio.timeout(30):
            return await self.selector.named.get()

    async def idle(self) -> None:
        async with asyncio.timeout(30):
            while await self.held():
                pass

    async def reached(self, job_id: str, state: str) -> JobInfo:
        async with asyncio.timeout(30):
            while (info := await self.client.job(job_id)).state != state:
                pass
        return info
