"""The Python client for asyncio. Needs grpcio, protobuf and numpy only."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from typing import Self, TypeVar, Unpack

import grpc

from mosel.client import calls
from mosel.client.answers import JobEvent, JobInfo, ModelInfo, PlanInfo, Prediction, ServiceInfo, event_from
from mosel.client.calls import LOAD_TIMEOUT_S, UnaryCall
from mosel.client.checks import flag, seconds
from mosel.client.connection import Connection
from mosel.client.demands import Demand, Payloads, Upload
from mosel.client.observed import ObserveEvent, observed_from
from mosel.client.retry import DEFAULT_RETRY, Retry
from mosel.client.uploads import PlannedUpload, UploadPlans
from mosel.errors import InvalidRequest, Unreachable
from mosel.tls import Tls
from mosel.v1 import gateway_pb2, gateway_pb2_grpc

Found = TypeVar("Found")


class AsyncClient:
    """As `Client`, for asyncio; an async context manager, and with `tls` it is connected when it is entered."""

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        max_message_mib: int = 64,
        retries: Retry | None = DEFAULT_RETRY,
    ) -> None:
        self._connection = Connection(address, token, tls, max_message_mib, retries)
        self._plans = UploadPlans()
        self._channel: grpc.aio.Channel | None = None
        if tls is None:
            self._open(None)

    async def predict(
        self,
        model: str,
        payloads: Payloads,
        *,
        plan_first: bool = False,
        timeout_s: float = 30.0,
        **demand: Unpack[Demand],
    ) -> Prediction:
        """As `Client.predict`; cancelling the task cancels the job."""
        limit_mib = self._connection.max_message_mib
        if not flag("plan_first", plan_first):
            return await self._call(calls.predict(model, payloads, demand, limit_mib), timeout_s)
        upload = PlannedUpload(self._plans, model, payloads, demand, limit_mib, timeout_s)
        while upload.answer is None:
            try:
                await self._call(upload.next_call(), upload.left_s)
            except Unreachable as error:
                upload.refused(error)
        return upload.answer

    def submit_job(
        self,
        model: str,
        items: Payloads | Iterable[Payloads] | AsyncIterable[Payloads],
        *,
        size: int | None = None,
        timeout_s: float = 30.0,
        **demand: Unpack[Demand],
    ) -> AsyncGenerator[JobEvent, None]:
        """As `Client.submit_job`; cancelling the task cancels the job."""
        upload = Upload(model, items, size, demand, self._connection.max_message_mib)
        self._check_open()
        return self._events(upload, seconds("timeout_s", timeout_s))

    async def plan(self, model: str, size: int, *, timeout_s: float = 5.0, **demand: Unpack[Demand]) -> PlanInfo:
        """As `Client.plan`."""
        return await self._call(calls.plan(model, size, demand), timeout_s)

    async def job(self, job_id: str, timeout_s: float = 5.0) -> JobInfo:
        """As `Client.job`."""
        return await self._call(calls.job(job_id), timeout_s)

    async def cancel(self, job_id: str, timeout_s: float = 5.0) -> JobInfo:
        """As `Client.cancel`."""
        return await self._call(calls.cancel(job_id), timeout_s)

    async def models(self, timeout_s: float = 5.0) -> list[ModelInfo]:
        """As `Client.models`."""
        return await self._call(calls.models(), timeout_s)

    async def load_model(self, name: str, timeout_s: float = LOAD_TIMEOUT_S) -> ModelInfo:
        """As `Client.load_model`."""
        return await self._call(calls.load_model(name), timeout_s)

    async def unload_model(self, name: str, timeout_s: float = LOAD_TIMEOUT_S) -> None:
        """As `Client.unload_model`."""
        await self._call(calls.unload_model(name), timeout_s)

    def observe(
        self, name: str, *, share: float = 1.0, timeout_s: float | None = None
    ) -> AsyncGenerator[ObserveEvent, None]:
        """As `Client.observe`; cancelling the task ends it."""
        self._check_open()
        return self._observed(
            calls.observe(name, share), None if timeout_s is None else seconds("timeout_s", timeout_s)
        )

    async def status(self, timeout_s: float = 5.0) -> list[ServiceInfo]:
        """As `Client.status`."""
        return await self._call(calls.status(), timeout_s)

    async def close(self) -> None:
        """Closes the connection."""
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        if self._connection.tls is not None:
            # There are files to read.
            self._open(await asyncio.to_thread(lambda: self._connection.credentials))
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def _open(self, credentials: grpc.ChannelCredentials | None) -> None:
        at = self._connection
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(at.address, at.options)
        else:
            self._channel = grpc.aio.secure_channel(at.address, credentials, at.options)
        self._stub = gateway_pb2_grpc.GatewayStub(self._channel)

    def _check_open(self) -> None:
        if self._channel is None:
            raise InvalidRequest("a client with tls was not entered; expected `async with AsyncClient(...) as client`")

    async def _call(self, call: UnaryCall[Found], timeout_s: float) -> Found:
        self._check_open()
        attempts = self._connection.attempts(call.request, timeout_s)
        method = getattr(self._stub, call.method)
        while True:
            try:
                reply = await method(call.request, timeout=attempts.begin(), metadata=self._connection.metadata)
            except grpc.RpcError as error:
                if (wait_s := attempts.wait_s(error)) is None:
                    raise self._connection.error(error, call.instead) from None
            else:
                return call.read(reply)
            await asyncio.sleep(wait_s)

    async def _events(self, upload: Upload, timeout_s: float) -> AsyncGenerator[JobEvent, None]:
        call = self._stub.SubmitJob(upload.async_requests(), timeout=timeout_s, metadata=self._connection.metadata)
        try:
            async for event in call:
                yield event_from(event)
        except grpc.RpcError as error:
            raise upload.error or self._connection.error(error) from None
        finally:
            call.cancel()

    async def _observed(
        self, request: gateway_pb2.ObserveRequest, timeout_s: float | None
    ) -> AsyncGenerator[ObserveEvent, None]:
        call = self._stub.Observe(request, timeout=timeout_s, metadata=self._connection.metadata)
        try:
            async for event in call:
                yield observed_from(event)
        except grpc.RpcError as error:
            raise self._connection.error(error) from None
        finally:
            call.cancel()
