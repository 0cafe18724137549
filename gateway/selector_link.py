"""The gateway's one long-lived stream to the selector: jobs out, answers back, in any order."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from typing import NoReturn

import grpc

from gateway.outbox import Outbox, slots_of, stamp
from mosel.config import Settings
from mosel.deadline import Deadline
from mosel.errors import InputsNeeded, InternalError, MoselError, PackageError, ServiceUnavailable, Unreachable
from mosel.runtime.background import Background
from mosel.runtime.channels import open_channel
from mosel.runtime.service import MAX_DEADLINE_S
from mosel.status import error_from_number, error_from_rpc
from mosel.v1 import arena_pb2, gateway_pb2, selector_pb2, selector_pb2_grpc, service_pb2, tensor_pb2

_RECONNECT_S = 0.1
_STATUS_TIMEOUT_S = 2.0
# How long the stream may be behind the answer to a call.
_HEARD_S = 1.0

# What is said of a job; the last is a result or an error.
Word = selector_pb2.JobPart | selector_pb2.JobResult | MoselError

log = logging.getLogger(__name__)


class Answers:
    """What the selector says of one job. Iterating, once, gives the groups of items that are done, as they finish.

    Iterating raises the MoselError that the job ended with. No more waits here than the job has items.

    Args:
        size: items of the job.

    Attributes:
        over: whether the last of it has been said.
        result: what was said last, once the iteration is through.
    """

    def __init__(self, size: int) -> None:
        self.over = False
        self.result = selector_pb2.JobResult()
        self._missing, self._read_all = size, False
        self._words: deque[Word] = deque()
        self._said = asyncio.Event()

    def put(self, word: Word) -> None:
        """Adds what the selector said; nothing after its last word."""
        if self.over:
            return
        if isinstance(word, selector_pb2.JobPart):
            items = len(word.group.items)
            if not 0 < items <= self._missing:
                word = InternalError(f"service selector answered {items} items of a job of which {self._missing} miss")
            self._missing -= items
        self.over = not isinstance(word, selector_pb2.JobPart)
        self._words.append(word)
        self._said.set()

    @property
    def waiting(self) -> int:
        """What was said and is not read yet."""
        return len(self._words)

    def __aiter__(self) -> "Answers":
        return self

    async def __anext__(self) -> Sequence[selector_pb2.ItemGroup]:
        if self._read_all:
            raise StopAsyncIteration
        while not self._words:
            self._said.clear()
            await self._said.wait()
        word = self._words.popleft()
        if isinstance(word, MoselError):
            raise word
        if isinstance(word, selector_pb2.JobPart):
            return [word.group]
        self.result, self._read_all = word, True
        return word.groups


class SelectorLink:
    """Keeps the stream up and matches answers to jobs; a context manager.

    Attributes:
        models: what the selector last said of each model; empty while there is no selector.
        refused: why no job may be sent although the selector is there; empty if it may.

    Args:
        settings: the selector's address.
        announcement: the gateway's arena, told to each selector first.
        release: takes back payload slots that nobody reads any more.
        transport_changed: called when the selector says how payloads reach the encoders.
        models_changed: called when the selector says which models are ready.
        fetch_address: opens a listener from which the encoder at an address can fetch payloads, and says where.
    """

    def __init__(
        self,
        settings: Settings,
        announcement: arena_pb2.Announcement,
        release: Callable[[Iterable[tensor_pb2.ArenaSlot]], None],
        transport_changed: Callable[[tensor_pb2.Rung.ValueType], None],
        models_changed: Callable[[], None],
        fetch_address: Callable[[str], Awaitable[str]],
    ) -> None:
        self.models: dict[str, selector_pb2.ModelState] = {}
        self.refused = ""
        self._settings, self._announcement = settings, announcement
        self._release, self._transport_changed, self._models_changed = release, transport_changed, models_changed
        self._fetch_address = fetch_address
        self._work = Background()
        self._outbox: Outbox | None = None
        self._answers: dict[bytes, Answers] = {}
        self._said = asyncio.Event()

    async def __aenter__(self) -> "SelectorLink":
        self._channel = open_channel(self._settings, self._settings.selector_address)
        self._stub = selector_pb2_grpc.SelectorStub(self._channel)
        self._work.forever(self._stay_connected, "selector link")
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._work.close()
        await self._channel.close()

    def statistics(self) -> dict[str, int]:
        """Jobs that wait for the selector, what it said that nobody has read, and messages that wait for it."""
        waiting = sum(answers.waiting for answers in self._answers.values())
        outbox = (self._outbox or Outbox()).statistics()
        return {"jobs_at_selector": len(self._answers), "answers_waiting": waiting} | outbox

    @property
    def connected(self) -> bool:
        """Whether the selector is there."""
        return self._outbox is not None

    def check_connected(self) -> None:
        """Raises ServiceUnavailable unless the selector is there and takes jobs."""
        if not self.connected:
            raise ServiceUnavailable("service selector is not reachable")
        if self.refused:
            raise ServiceUnavailable(f"service gateway must not send payloads: {self.refused}")

    @contextlib.contextmanager
    def submit(self, description: selector_pb2.JobDescription) -> Iterator[Answers]:
        """Sends a job; what the selector says of it can be had inside the block, which cancels it if it is not over.

        Args:
            description: the job; its slots are the selector's from now on.

        Raises:
            ServiceUnavailable: the selector is away.
            Overloaded: it does not read, and too many jobs wait for it already.
        """
        try:
            self.check_connected()
            assert self._outbox is not None, "there is one while the selector is there"
            outbox = self._outbox
            outbox.put_job(description)
        except MoselError:
            self._release(slots_of(description))
            raise
        answers = self._answers[description.job_id] = Answers(description.size)
        try:
            yield answers
        finally:
            del self._answers[description.job_id]
            if not answers.over and outbox.cancel(description.job_id):
                self._release(slots_of(description))

    async def plan(self, description: selector_pb2.JobDescription, deadline: Deadline) -> gateway_pb2.PlanReply:
        """What a job without payloads would get.

        Raises:
            MoselError: whatever the selector answered.
            ServiceUnavailable: the selector is away.
        """
        self.check_connected()
        stamp(description)
        try:
            return await self._stub.Plan(description, timeout=deadline.remaining)
        except grpc.RpcError as error:
            raise error_from_rpc(error, "selector") from None

    def name_models(self, models: Iterable[str]) -> None:
        """Says which models, as `name@revision`, jobs will name from now on."""
        named = selector_pb2.ModelsInUse(models=sorted(models))
        if self._outbox is not None:
            self._outbox.put_models(named)

    async def load(self, model: str) -> None:
        """Has a model loaded, or loaded anew; afterwards `models` says so.

        Raises:
            ModelNotFound, PackageError, ServiceUnavailable.
        """
        self.check_connected()
        try:
            request = gateway_pb2.LoadModelRequest(model=model)
            state = await self._stub.LoadModel(request, timeout=MAX_DEADLINE_S)
        except grpc.RpcError as error:
            raise error_from_rpc(error, "selector", {Unreachable: PackageError}) from None
        await self._heard(lambda: model in self.models and self.models[model].revision == state.revision)

    async def unload(self, model: str) -> None:
        """Has a model unloaded once its last job is over; afterwards `models` does not have it.

        Raises:
            ModelNotFound: it is not loaded.
            ServiceUnavailable: the selector is away.
        """
        self.check_connected()
        try:
            await self._stub.UnloadModel(gateway_pb2.UnloadModelRequest(model=model), timeout=MAX_DEADLINE_S)
        except grpc.RpcError as error:
            raise error_from_rpc(error, "selector") from None
        await self._heard(lambda: model not in self.models)

    async def observe(self, request: gateway_pb2.ObserveRequest) -> AsyncGenerator[gateway_pb2.ObserveEvent, None]:
        """Has a model, named as `name@revision`, observed until it is closed; gives what the selector says.

        Raises:
            MoselError: whatever the selector answered.
            ServiceUnavailable: the selector is away.
        """
        self.check_connected()
        call = self._stub.Observe(request)
        try:
            async for event in call:
                yield event
        except grpc.RpcError as error:
            raise error_from_rpc(error, "selector") from None
        finally:
            call.cancel()

    async def _heard(self, said: Callable[[], bool]) -> None:
        """Waits for what the selector says on its stream when it answers a call, unless something newer came first."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_HEARD_S):
                while not said():
                    self._said.clear()
                    await self._said.wait()

    async def statuses(self) -> list[service_pb2.ServiceStatus]:
        """The state of the selector and of the services behind it; of a selector that does not answer, why."""
        try:
            return list((await self._stub.Status(service_pb2.StatusRequest(), timeout=_STATUS_TIMEOUT_S)).services)
        except grpc.RpcError as error:
            detail = f"does not answer: {error.code().name}"
            address = self._settings.selector_address
            return [service_pb2.ServiceStatus(name="selector", address=address, detail=detail)]

    async def metrics(self) -> list[service_pb2.ServiceMetrics]:
        """The metrics of the selector and of the services behind it; those of one that does not answer have no text."""
        try:
            return list((await self._stub.Metrics(service_pb2.MetricsRequest(), timeout=_STATUS_TIMEOUT_S)).services)
        except grpc.RpcError:
            return [service_pb2.ServiceMetrics(service="selector")]

    async def _stay_connected(self) -> NoReturn:
        while True:
            outbox = Outbox()
            outbox.put(selector_pb2.GatewayMessage(announcement=self._announcement))
            call = self._stub.Connect(outbox)
            try:
                async for message in call:
                    # The first message says that the selector is there.
                    self._outbox = outbox
                    self._receive(message)
            except grpc.RpcError as error:
                log.debug("selector not reachable", extra={"reason": error.code().name})
            finally:
                call.cancel()
                # grpc leaves the reader of it waiting for ever.
                unsent = outbox.close()
                self._disconnected()
                for description in unsent:
                    self._release(slots_of(description))
            await asyncio.sleep(_RECONNECT_S)

    def _receive(self, message: selector_pb2.SelectorMessage) -> None:
        kind = message.WhichOneof("message")
        if kind == "part":
            self._answer(message.part.job_id, message.part)
        elif kind == "result":
            self._answer(message.result.job_id, message.result)
        elif kind == "failure":
            failure = message.failure
            error = error_from_number(failure.status_code, failure.message, failure.retry_after_ms)
            self._answer(failure.job_id, InputsNeeded(failure.message, failure.send) if failure.send else error)
        elif kind == "release":
            self._release(message.release.slots)
        elif kind == "transport":
            self.refused = message.transport.refused
            self._transport_changed(message.transport.rung)
        elif kind == "fetch_question":
            self._work.start(self._say_where(message.fetch_question.encoder))
        elif kind == "models":
            self.models = {state.model: state for state in message.models.models}
            self._said.set()
            self._models_changed()

    async def _say_where(self, encoder: str) -> None:
        answer = selector_pb2.FetchAddress(encoder=encoder)
        try:
            answer.address = await self._fetch_address(encoder)
        except MoselError as error:
            answer.reason = str(error)
        if self._outbox is not None:
            self._outbox.put(selector_pb2.GatewayMessage(fetch_address=answer))

    def _answer(self, job_id: bytes, message: Word) -> None:
        if job_id in self._answers:
            self._answers[job_id].put(message)

    def _disconnected(self) -> None:
        """Fails what was under way. Payload slots stay until their leases end: encoders may still read them."""
        if self._outbox is not None:
            log.warning("selector went away", extra={"jobs_lost": len(self._answers)})
        self._outbox = None
        # Another selector knows nothing of this gateway's arena yet.
        self._transport_changed(tensor_pb2.INLINE)
        for answers in self._answers.values():
            answers.put(ServiceUnavailable("service selector went away"))
        if self.models:
            self.models = {}
            self._models_changed()
