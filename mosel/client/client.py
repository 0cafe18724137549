"""The Python client: numpy arrays or tensors in, dataclasses out. Needs grpcio, protobuf and numpy only."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable, Iterator
from typing import Self, TypeVar, Unpack

import grpc

from mosel.client import calls
from mosel.client.answers import (
    JobEvent,
    JobInfo,
    ModelInfo,
    PlanInfo,
    Prediction,
    ServiceInfo,
    event_from,
)
from mosel.client.calls import UnaryCall
from mosel.client.checks import seconds
from mosel.client.connection import Connection
from mosel.client.demands import Demand, Payloads, Upload
from mosel.client.observed import ObserveEvent, observed_from
from mosel.client.retry import Retry
from mosel.errors import InvalidRequest
from mosel.tls import Tls
from mosel.v1 import gateway_pb2, gateway_pb2_grpc

Found = TypeVar("Found")

_LOAD_TIMEOUT_S = 600.0
_RETRY = Retry()


class Client:
    """Calls a gateway; usable from several threads; a context manager.

    Args:
        address: `host:port` or `unix:/path`.
        token: says who calls, where the gateway asks for it.
        tls: what to trust, and how to show who calls; None: plain text.
        max_message_mib: the largest message in either direction; the gateway has the same setting.
        retries: which calls are made again; None: none.

    Raises:
        InvalidRequest: the token cannot be sent.
        ConfigError: a file of `tls` is wrong.

    Example:
        >>> with Client("127.0.0.1:8001") as client:
        ...     prediction = client.predict("digits", {"image": images, "pen": pens}, min_accuracy=0.85)
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        max_message_mib: int = 64,
        retries: Retry | None = _RETRY,
    ) -> None:
        self._connection = at = Connection(address, token, tls, max_message_mib, retries)
        if (credentials := at.credentials) is None:
            self._channel = grpc.insecure_channel(address, at.options)
        else:
            self._channel = grpc.secure_channel(address, credentials, at.options)
        self._stub = gateway_pb2_grpc.GatewayStub(self._channel)

    def predict(
        self, model: str, payloads: Payloads, *, timeout_s: float = 30.0, **demand: Unpack[Demand]
    ) -> Prediction:
        """Predicts one job.

        Args:
            model: its name.
            payloads: arrays or tensors [items, ...] by modality; any non-empty subset of the model's.
            timeout_s: seconds after which the call is given up, further attempts included.
            demand: floor, deadline and more, see `Demand`; a deadline counts from the first attempt.

        Raises:
            MoselError: the kind says what went wrong (see mosel.errors).
        """
        return self._call(calls.predict(model, payloads, demand, self._connection.max_message_mib), timeout_s)

    def submit_job(
        self,
        model: str,
        items: Payloads | Iterable[Payloads],
        *,
        size: int | None = None,
        timeout_s: float = 30.0,
        **demand: Unpack[Demand],
    ) -> Generator[JobEvent, None, None]:
        """Predicts one job and gives its results as they finish. Closing the iterator cancels the job.

        It is sent once, whatever `retries` say: its items may be gone.

        Args:
            model: its name.
            items: arrays or tensors [items, ...] by modality, all at once or in batches, all of the same modalities.
            size: items of the job; needed if they come in batches.
            timeout_s: seconds after which the call is given up.
            demand: floor, deadline and more, see `Demand`; without `modalities`, batches bring all of the model's.

        Yields:
            JobAccepted, then ItemResults until each item is in one, then JobSummary.

        Raises:
            MoselError: the kind says what went wrong (see mosel.errors).
        """
        upload = Upload(model, items, size, demand, self._connection.max_message_mib)
        return self._events(upload, upload.requests(), seconds("timeout_s", timeout_s))

    def plan(self, model: str, size: int, *, timeout_s: float = 5.0, **demand: Unpack[Demand]) -> PlanInfo:
        """What a job of so many items would get if it were sent now; runs nothing.

        Raises:
            MoselError: the kind says what went wrong (see mosel.errors).
        """
        return self._call(calls.plan(model, size, demand), timeout_s)

    def job(self, job_id: str, timeout_s: float = 5.0) -> JobInfo:
        """Where a job is. Where the address stands for several gateways, each is asked until one knows the job.

        Raises:
            JobNotFound: there is no such job.
            MoselError: the kind says what else went wrong (see mosel.errors).
        """
        return self._call(calls.job(job_id), timeout_s)

    def cancel(self, job_id: str, timeout_s: float = 5.0) -> JobInfo:
        """Ends a job unless it is over, and says where it is then; errors as of `job`."""
        return self._call(calls.cancel(job_id), timeout_s)

    def models(self, timeout_s: float = 5.0) -> list[ModelInfo]:
        """The served models.

        Raises:
            MoselError: the gateway cannot be reached.
        """
        return self._call(calls.models(), timeout_s)

    def load_model(self, name: str, timeout_s: float = _LOAD_TIMEOUT_S) -> ModelInfo:
        """Has a model loaded from the server's models folder, or loaded anew; returns when new jobs get it.

        Nothing is interrupted: jobs under way end with what they began with.

        Args:
            name: the model's.
            timeout_s: seconds after which the call is given up; the server goes on.

        Raises:
            ModelNotFound: the folder has no such package.
            PackageError: it is wrong; the model stays as it was.
            MoselError: the kind says what else went wrong (see mosel.errors).
        """
        return self._call(calls.load_model(name), timeout_s)

    def unload_model(self, name: str, timeout_s: float = _LOAD_TIMEOUT_S) -> None:
        """Has the server take no more jobs for a model; returns when those under way are over and its memory is free.

        Args:
            name: the model's.
            timeout_s: seconds after which the call is given up; the server goes on.

        Raises:
            ModelNotFound: it is not loaded.
            MoselError: the kind says what else went wrong (see mosel.errors).
        """
        self._call(calls.unload_model(name), timeout_s)

    def observe(
        self, name: str, *, share: float = 1.0, timeout_s: float | None = None
    ) -> Generator[ObserveEvent, None, None]:
        """Has a model run everything that callers send, and tells what cheaper modality sets would have answered.

        It goes on until the iterator is closed; callers wait for nothing, and no floor saves anything meanwhile.

        Args:
            name: the model's.
            share: of the items that are observed, as far as there is time for them.
            timeout_s: seconds after which the call is given up; None: never.

        Yields:
            The first event at once, others a few times a second.

        Raises:
            ModelNotFound: it is not loaded.
            Unreachable: somebody observes it already, or it was loaded anew or unloaded meanwhile.
            MoselError: the kind says what else went wrong (see mosel.errors).
        """
        return self._observed(
            calls.observe(name, share), None if timeout_s is None else seconds("timeout_s", timeout_s)
        )

    def status(self, timeout_s: float = 5.0) -> list[ServiceInfo]:
        """The state of every service.

        Raises:
            MoselError: the gateway cannot be reached.
        """
        return self._call(calls.status(), timeout_s)

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _call(self, call: UnaryCall[Found], timeout_s: float) -> Found:
        attempts = self._connection.attempts(call.request, timeout_s)
        method = getattr(self._stub, call.method)
        while True:
            try:
                reply = method(call.request, timeout=attempts.begin(), metadata=self._connection.metadata)
            except grpc.RpcError as error:
                if (wait_s := attempts.wait_s(error)) is None:
                    raise self._connection.error(error, call.instead) from None
            else:
                return call.read(reply)
            time.sleep(wait_s)

    def _events(
        self, upload: Upload, requests: Iterator[gateway_pb2.SubmitJobRequest], timeout_s: float
    ) -> Generator[JobEvent, None, None]:
        call = self._stub.SubmitJob(requests, timeout=timeout_s, metadata=self._connection.metadata)
        try:
            yield from map(event_from, call)
        except grpc.RpcError as error:
            raise upload.error or self._connection.error(error) from None
        finally:
            call.cancel()

    def _observed(
        self, request: gateway_pb2.ObserveRequest, timeout_s: float | None
    ) -> Generator[ObserveEvent, None, None]:
        call = self._stub.Observe(request, timeout=timeout_s, metadata=self._connection.metadata)
        try:
            yield from map(observed_from, call)
        except grpc.RpcError as error:
            raise self._connection.error(error) from None
        finally:
            call.cancel()


class AsyncClient:
    """As `Client`, for asyncio; an async context manager, and with `tls` it is connected when it is entered."""

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        max_message_mib: int = 64,
        retries: Retry | None = _RETRY,
    ) -> None:
        self._connection = Connection(address, token, tls, max_message_mib, retries)
        self._channel: grpc.aio.Channel | None = None
        if tls is None:
            self._open(None)

    async def predict(
        self, model: str, payloads: Payloads, *, timeout_s: float = 30.0, **demand: Unpack[Demand]
    ) -> Prediction:
        """As `Client.predict`; cancelling the task cancels the job."""
        return await self._call(calls.predict(model, payloads, demand, self._connection.max_message_mib), timeout_s)

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

    async def load_model(self, name: str, timeout_s: float = _LOAD_TIMEOUT_S) -> ModelInfo:
        """As `Client.load_model`."""
        return await self._call(calls.load_model(name), timeout_s)

    async def unload_model(self, name: str, timeout_s: float = _LOAD_TIMEOUT_S) -> None:
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
