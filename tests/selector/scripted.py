"""A selector, among services that are real servers and answer as they are told."""

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mosel.config import Settings
from mosel.modality import FUSION
from mosel.runtime.channels import open_channel
from mosel.runtime.health import Context, Health
from mosel.v1 import arena_pb2, encoder_pb2, fusion_pb2, selector_pb2, selector_pb2_grpc, service_pb2, tensor_pb2
from selector.core.stages import service_name

Answer = Callable[[Any], Message]
# What Fuse counts as where nobody waits for it.
OBSERVE = "Fuse, answers only"


async def until(condition: Callable[[], bool], what: str) -> None:
    """Waits until a condition holds; fails the test after a generous time."""
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up, f"still not: {what}"
        await asyncio.sleep(0.005)


class ScriptedService:
    """An encoder or fusion; a context manager that listens inside.

    Attributes:
        called: how often each method was called.
        waiting: calls that are held now, by method.
        failing: methods that fail with INTERNAL.
        resource: what it says it computes on.
        ms: what it says a batch takes.
        joined: of fusion: the modalities that it says it encodes itself.
        models: those that it has.
        in_slots: whether embeddings are in slots, numbered from 1.
        acquired: the last of these numbers.
        released: the slots that it was told nobody reads.
        arenas: the nonces of the arenas that it can open, by id.
        announcement: of its own arenas.
    """

    def __init__(self, settings: Settings, lane: str) -> None:
        at = settings.fusion_address if lane == FUSION else settings.encoder_addresses(lane)[lane]
        self.lane, self._address = lane, at
        self.called: Counter[str] = Counter()
        self.waiting: Counter[str] = Counter()
        self.failing: set[str] = set()
        self.resource, self.ms = "cpu", 1.0
        self.models: set[str] = set()
        self.joined: set[str] = set()
        self.in_slots, self.acquired = False, 0
        self.released: list[int] = []
        self.arenas: dict[int, bytes] = {}
        self.announcement = arena_pb2.Announcement()
        self._held: set[str] = set()
        self._go_on = asyncio.Event()

    def hold(self, *methods: str) -> None:
        """These methods do not answer from now on; without any: it is as good as stopped."""
        self._held |= set(methods or _METHODS)
        self._go_on.clear()

    def go_on(self) -> None:
        """It answers again, also what was asked meanwhile."""
        self._held.clear()
        self._go_on.set()

    async def pass_gate(self, method: str) -> None:
        """Waits where the method is held."""
        self.called[method] += 1
        self.waiting[method] += 1
        try:
            while method in self._held:
                await self._go_on.wait()
        finally:
            self.waiting[method] -= 1

    async def __aenter__(self) -> "ScriptedService":
        kind = "Fusion" if self.lane == FUSION else "Encoder"
        self._server, self._health = grpc.aio.server(), _GatedHealth(self)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        answers = self._answers()
        methods = _METHODS | ({"Profile": fusion_pb2.ProfileFusionRequest} if self.lane == FUSION else {})
        handlers = {name: self._handler(name, request, answers[name]) for name, request in methods.items() if request}
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(f"mosel.v1.{kind}", handlers)])
        self._server.add_insecure_port(self._address)
        self._health.set(f"mosel.v1.{kind}", True)
        await self._server.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.go_on()
        await self.die()

    async def die(self) -> None:
        """Ends with what it has not answered."""
        self._health.stop()
        await self._server.stop(None)

    def _handler(self, name: str, request: type[Message], answer: Answer) -> "grpc.RpcMethodHandler[Any, Any]":
        async def handle(message: Message, context: Context) -> Message:
            gate = OBSERVE if isinstance(message, fusion_pb2.FuseRequest) and message.answers_only else name
            await self.pass_gate(gate)
            if gate in self.failing:
                await context.abort(grpc.StatusCode.INTERNAL, "as it was told")
            return answer(message)

        return grpc.unary_unary_rpc_method_handler(handle, request.FromString, lambda reply: reply.SerializeToString())

    def _answers(self) -> dict[str, Answer]:
        return {
            "Status": lambda _: service_pb2.ServiceStatus(
                name=service_name(self.lane),
                ready=True,
                resource=self.resource,
                models=self.models,
                joined_modalities=self.joined,
            ),
            "Announce": lambda _: self.announcement,
            "OpenArena": lambda r: arena_pb2.PreflightReport(nonce=self.arenas.get(r.arena.arena_id, b""), reason="no"),
            "CloseArena": lambda _: arena_pb2.CloseArenaReply(),
            "Load": self._load,
            "Unload": self._unload,
            "Profile": self._profile,
            "Metrics": lambda _: service_pb2.ServiceMetrics(),
            "Release": self._release,
            "Encode": self._encode,
            "Fuse": self._fuse,
        }

    def _profile(self, request: encoder_pb2.ProfileEncoderRequest | fusion_pb2.ProfileFusionRequest) -> Message:
        times = [service_pb2.LatencyPoint(batch_size=n, p50_ms=self.ms, p95_ms=self.ms) for n in request.batch_sizes]
        return service_pb2.ProfileReply(points=times)

    def _load(self, request: service_pb2.LoadRequest) -> Message:
        self.models.add(request.model)
        return service_pb2.LoadReply()

    def _unload(self, request: service_pb2.UnloadRequest) -> Message:
        self.models.discard(request.model)
        return service_pb2.UnloadReply()

    def _encode(self, request: encoder_pb2.EncodeRequest) -> Message:
        embeddings = tensor_pb2.TensorRef(dtype=tensor_pb2.FP32)
        if self.in_slots:
            self.acquired += 1
            embeddings.slot.slot = self.acquired
        return encoder_pb2.EncodeReply(embeddings=embeddings, compute_us=1000)

    def _fuse(self, request: fusion_pb2.FuseRequest) -> Message:
        if not request.answers_only:
            return fusion_pb2.FuseReply(outputs=[tensor_pb2.Tensor() for _ in request.groups])
        # They say how many modalities were fused.
        reply = fusion_pb2.FuseReply(compute_us=1000)
        for group in request.groups:
            rows = sum(part.row_count for part in next(iter(group.rows.values())).rows)
            count = len(group.rows)
            reply.answers.add(labels=[count] * rows, confidences=[count / 4] * rows)
        return reply

    def _release(self, request: tensor_pb2.ReleaseSlots) -> Message:
        self.released += [slot.slot for slot in request.slots]
        return tensor_pb2.ReleaseReply()


# The requests by method; health is asked otherwise.
_METHODS: dict[str, type[Message] | None] = {
    "Watch": None,
    "Status": service_pb2.StatusRequest,
    "Announce": arena_pb2.AnnounceRequest,
    "OpenArena": arena_pb2.OpenArenaRequest,
    "CloseArena": arena_pb2.CloseArenaRequest,
    "Load": service_pb2.LoadRequest,
    "Unload": service_pb2.UnloadRequest,
    "Profile": encoder_pb2.ProfileEncoderRequest,
    "Metrics": service_pb2.MetricsRequest,
    "Release": tensor_pb2.ReleaseSlots,
    "Encode": encoder_pb2.EncodeRequest,
    "Fuse": fusion_pb2.FuseRequest,
}


class _GatedHealth(Health):
    def __init__(self, service: ScriptedService) -> None:
        super().__init__()
        self._service = service

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:  # noqa: N802
        await self._service.pass_gate("Watch")
        await super().Watch(request, context)


class Stream:
    """A gateway's stream to the selector.

    Attributes:
        said: what the selector said so far.
    """

    def __init__(self, stub: "selector_pb2_grpc.SelectorAsyncStub") -> None:
        self.said: list[selector_pb2.SelectorMessage] = []
        self.call = stub.Connect(wait_for_ready=True)

    async def send(self, **message: object) -> None:
        await self.call.write(selector_pb2.GatewayMessage(**message))  # type: ignore[arg-type]

    async def read(self) -> None:
        """Keeps what the selector says, for as long as it says something."""
        with contextlib.suppress(asyncio.CancelledError):
            async for message in self.call:
                self.said.append(message)

    def over(self, job_id: bytes) -> bool:
        """Whether a job is answered."""
        return any(message.result.job_id == job_id for message in self.said)

    def models(self) -> dict[str, selector_pb2.ModelState]:
        """The models as they were told last."""
        states = [message.models for message in self.said if message.HasField("models")]
        return {state.model: state for state in states[-1].models} if states else {}


class Selector:
    """A selector that serves, and its process."""

    def __init__(self, stub: "selector_pb2_grpc.SelectorAsyncStub", process: asyncio.subprocess.Process) -> None:
        self.stub, self.process = stub, process

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Stream]:
        """A gateway that reads what the selector says."""
        stream = Stream(self.stub)
        reading = asyncio.create_task(stream.read())
        try:
            await until(lambda: bool(stream.said), "the selector is there")
            yield stream
        finally:
            stream.call.cancel()
            await asyncio.wait([reading])

    async def own(self) -> service_pb2.ServiceStatus:
        """What the selector says of itself."""
        reply = await self.stub.Status(service_pb2.StatusRequest(), wait_for_ready=True)
        return reply.services[0]

    async def counter(self, name: str) -> int:
        return (await self.own()).counters[name]

    async def has_counted(self, name: str, count: int) -> None:
        """Waits until a counter is at least so high."""
        async with asyncio.timeout(60):
            # Nobody tells when it changes.
            while await self.counter(name) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.005)


def job(job_id: int, model: str, *modalities: str) -> selector_pb2.JobDescription:
    """A job of one item with small payloads."""
    payload = tensor_pb2.TensorRef(dtype=tensor_pb2.FP32, shape=[1, 6], inline=b"\0" * 24)
    return selector_pb2.JobDescription(
        job_id=job_id.to_bytes(16, "big"),
        model=model,
        size=1,
        payloads=dict.fromkeys(modalities, payload),
        modalities=modalities,
        budget_us=60_000_000,
    )


@contextlib.asynccontextmanager
async def selector_of(settings: Settings) -> AsyncIterator[Selector]:
    """A selector that serves inside the block, as a process of its own."""
    environment = os.environ | settings.as_environment()
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "selector", env=environment)
    async with open_channel(settings, settings.selector_address) as channel:
        try:
            yield Selector(selector_pb2_grpc.SelectorStub(channel), process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


@contextlib.contextmanager
def private_folder() -> Any:
    """A short path for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="mt-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
