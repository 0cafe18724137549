"""The Python client: numpy arrays in, dataclasses out. Needs grpcio, protobuf and numpy only."""

from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable, Mapping
from typing import Unpack

import grpc
from numpy.typing import ArrayLike

from mosel.answers import (
    EdgeInfo,
    ItemResults,
    JobAccepted,
    JobEvent,
    JobInfo,
    JobSummary,
    ModalityInfo,
    ModelInfo,
    PlanInfo,
    Prediction,
    ServiceInfo,
    SetInfo,
    StrategyInfo,
    event_from,
    job_from,
    models_from,
    plan_from,
    prediction_from,
    services_from,
)
from mosel.demands import Demand, Upload, predict_request, spec_of
from mosel.errors import JobNotFound, ModelNotFound, MoselError
from mosel.status import error_from_rpc
from mosel.v1 import gateway_pb2, gateway_pb2_grpc, service_pb2

__all__ = [
    "AsyncClient",
    "Client",
    "Demand",
    "EdgeInfo",
    "ItemResults",
    "JobAccepted",
    "JobEvent",
    "JobInfo",
    "JobSummary",
    "ModalityInfo",
    "ModelInfo",
    "PlanInfo",
    "Prediction",
    "ServiceInfo",
    "SetInfo",
    "StrategyInfo",
]

Payloads = Mapping[str, ArrayLike]


class Client:
    """Calls a gateway; usable from several threads; a context manager.

    Args:
        address: `host:port` or `unix:/path`.
        max_message_mib: the largest message in either direction; the gateway has the same setting.

    Example:
        >>> with Client("127.0.0.1:8001") as client:
        ...     prediction = client.predict("digits", {"image": images, "pen": pens}, min_accuracy=0.85)
    """

    def __init__(self, address: str, max_message_mib: int = 64) -> None:
        self._address, self._max_message_mib = address, max_message_mib
        self._channel = grpc.insecure_channel(address, _options(max_message_mib))
        self._stub = gateway_pb2_grpc.GatewayStub(self._channel)

    def predict(
        self, model: str, payloads: Payloads, *, timeout_s: float = 30.0, **demand: Unpack[Demand]
    ) -> Prediction:
        """Predicts one job.

        Args:
            model: its name.
            payloads: arrays [items, ...] by modality; any non-empty subset of the model's.
            timeout_s: seconds after which the call is given up.
            demand: floor, deadline and more, see `Demand`.

        Raises:
            MoselError: the kind says what went wrong (see mosel.errors).
        """
        request = predict_request(model, payloads, demand, self._max_message_mib)
        try:
            return prediction_from(self._stub.Predict(request, timeout=timeout_s))
        except grpc.RpcError as error:
            raise self._error(error) from None

    def submit(
        self,
        model: str,
        items: Payloads | Iterable[Payloads],
        *,
        size: int | None = None,
        timeout_s: float = 30.0,
        **demand: Unpack[Demand],
    ) -> Generator[JobEvent, None, None]:
        """Predicts one job and gives its results as they finish. Closing the iterator cancels the job.

        Args:
            model: its name.
            items: arrays [items, ...] by modality, all at once or in batches, which have the same modalities.
            size: items of the job; needed if they come in batches.
            timeout_s: seconds after which the call is given up.
            demand: floor, deadline and more, see `Demand`; without `modalities`, batches bring all of the model's.

        Yields:
            JobAccepted, then ItemResults until each item is in one, then JobSummary.

        Raises:
            MoselError: the kind says what went wrong (see mosel.errors).
        """
        upload = Upload(model, items, size, demand, self._max_message_mib)
        call = self._stub.SubmitJob(upload.requests(), timeout=timeout_s)
        try:
            yield from map(event_from, call)
        except grpc.RpcError as error:
            raise upload.error or self._error(error) from None
        finally:
            call.cancel()

    def plan(self, model: str, size: int, *, timeout_s: float = 5.0, **demand: Unpack[Demand]) -> PlanInfo:
        """What a job of so many items would get if it were sent now; runs nothing.

        Raises:
            MoselError: the kind says what went wrong (see mosel.errors).
        """
        request = gateway_pb2.PlanRequest(job=spec_of(model, size, demand))
        try:
            return plan_from(self._stub.Plan(request, timeout=timeout_s))
        except grpc.RpcError as error:
            raise self._error(error) from None

    def job(self, job_id: str, timeout_s: float = 5.0) -> JobInfo:
        """Where a job is.

        Raises:
            JobNotFound: there is no such job.
            MoselError: the kind says what else went wrong (see mosel.errors).
        """
        try:
            return job_from(self._stub.GetJob(gateway_pb2.GetJobRequest(job_id=job_id), timeout=timeout_s))
        except grpc.RpcError as error:
            raise _about_job(self._error(error)) from None

    def cancel(self, job_id: str, timeout_s: float = 5.0) -> JobInfo:
        """Ends a job unless it is over, whoever sent it, and says where it is then; errors as of `job`."""
        try:
            return job_from(self._stub.CancelJob(gateway_pb2.CancelJobRequest(job_id=job_id), timeout=timeout_s))
        except grpc.RpcError as error:
            raise _about_job(self._error(error)) from None

    def models(self, timeout_s: float = 5.0) -> list[ModelInfo]:
        """The served models.

        Raises:
            MoselError: the gateway cannot be reached.
        """
        try:
            return models_from(self._stub.ListModels(gateway_pb2.ListModelsRequest(), timeout=timeout_s))
        except grpc.RpcError as error:
            raise self._error(error) from None

    def status(self, timeout_s: float = 5.0) -> list[ServiceInfo]:
        """The state of every service.

        Raises:
            MoselError: the gateway cannot be reached.
        """
        try:
            return services_from(self._stub.Status(service_pb2.StatusRequest(), timeout=timeout_s))
        except grpc.RpcError as error:
            raise self._error(error) from None

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _error(self, error: grpc.RpcError) -> MoselError:
        return error_from_rpc(error, f"gateway at {self._address}")


class AsyncClient:
    """As `Client`, for asyncio; an async context manager."""

    def __init__(self, address: str, max_message_mib: int = 64) -> None:
        self._address, self._max_message_mib = address, max_message_mib
        self._channel = grpc.aio.insecure_channel(address, _options(max_message_mib))
        self._stub = gateway_pb2_grpc.GatewayStub(self._channel)

    async def predict(
        self, model: str, payloads: Payloads, *, timeout_s: float = 30.0, **demand: Unpack[Demand]
    ) -> Prediction:
        """As `Client.predict`; cancelling the task cancels the job."""
        request = predict_request(model, payloads, demand, self._max_message_mib)
        try:
            return prediction_from(await self._stub.Predict(request, timeout=timeout_s))
        except grpc.RpcError as error:
            raise self._error(error) from None

    async def submit(
        self,
        model: str,
        items: Payloads | Iterable[Payloads] | AsyncIterable[Payloads],
        *,
        size: int | None = None,
        timeout_s: float = 30.0,
        **demand: Unpack[Demand],
    ) -> AsyncGenerator[JobEvent, None]:
        """As `Client.submit`; cancelling the task cancels the job."""
        upload = Upload(model, items, size, demand, self._max_message_mib)
        call = self._stub.SubmitJob(upload.async_requests(), timeout=timeout_s)
        try:
            async for event in call:
                yield event_from(event)
        except grpc.RpcError as error:
            raise upload.error or self._error(error) from None
        finally:
            call.cancel()

    async def plan(self, model: str, size: int, *, timeout_s: float = 5.0, **demand: Unpack[Demand]) -> PlanInfo:
        """As `Client.plan`."""
        request = gateway_pb2.PlanRequest(job=spec_of(model, size, demand))
        try:
            return plan_from(await self._stub.Plan(request, timeout=timeout_s))
        except grpc.RpcError as error:
            raise self._error(error) from None

    async def job(self, job_id: str, timeout_s: float = 5.0) -> JobInfo:
        """As `Client.job`."""
        try:
            return job_from(await self._stub.GetJob(gateway_pb2.GetJobRequest(job_id=job_id), timeout=timeout_s))
        except grpc.RpcError as error:
            raise _about_job(self._error(error)) from None

    async def cancel(self, job_id: str, timeout_s: float = 5.0) -> JobInfo:
        """As `Client.cancel`."""
        try:
            return job_from(await self._stub.CancelJob(gateway_pb2.CancelJobRequest(job_id=job_id), timeout=timeout_s))
        except grpc.RpcError as error:
            raise _about_job(self._error(error)) from None

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._channel.close()

    def _error(self, error: grpc.RpcError) -> MoselError:
        return error_from_rpc(error, f"gateway at {self._address}")


def _options(max_message_mib: int) -> list[tuple[str, int | str]]:
    limit = max_message_mib * 1024 * 1024
    return [
        ("grpc.max_send_message_length", limit),
        ("grpc.max_receive_message_length", limit),
        # As short as among the services: a gateway that starts again is found at once.
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # With http_proxy set, grpc would look for 127.0.0.1 behind the proxy.
        ("grpc.enable_http_proxy", 0),
    ]


def _about_job(error: MoselError) -> MoselError:
    """What an error means in a call that names a job and no model."""
    return JobNotFound(str(error)) if isinstance(error, ModelNotFound) else error
