"""The Python client: numpy arrays in, dataclasses out. Needs grpcio, protobuf and numpy only."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import grpc
import numpy as np
from numpy.typing import ArrayLike, NDArray

from mosel.errors import MoselError, PayloadTooLarge
from mosel.status import error_from_rpc
from mosel.tensors import dtype_name, from_proto, to_proto
from mosel.v1 import gateway_pb2, gateway_pb2_grpc, service_pb2, tensor_pb2

_MIB = 1024 * 1024
# What the rest of a request may take beside its payloads.
_ENVELOPE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Prediction:
    """The answer to one job.

    Attributes:
        job_id: 32 hexadecimal digits; also in the services' logs.
        output: the model's output, [items, ...].
        labels: the label of each item's largest output; empty if the model names none.
        modality_sets: the modality set that each item used, such as `audio+image`.
        expected_accuracy: over the job's items, 0..1, from the model's measured profile.
        queue_ms: milliseconds before the first encoder call.
        compute_ms: milliseconds from then on.
        deadline_slack_ms: milliseconds that were left.
    """

    job_id: str
    output: NDArray[np.generic]
    labels: tuple[str, ...]
    modality_sets: tuple[str, ...]
    expected_accuracy: float
    queue_ms: float
    compute_ms: float
    deadline_slack_ms: float


@dataclass(frozen=True)
class ModalityInfo:
    """Data type name and shape of one item."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SetInfo:
    """Measured accuracy, 0..1, predicted milliseconds for one item, and whether the set can be run now."""

    accuracy: float
    latency_ms: float
    available: bool


@dataclass(frozen=True)
class ModelInfo:
    """One served model."""

    name: str
    version: str
    description: str
    ready: bool
    modalities: dict[str, ModalityInfo]
    sets: dict[str, SetInfo]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class EdgeInfo:
    """How tensors get from a producer to a consumer (`inline`, `posix_shm`, `cuda_ipc`), and why not better."""

    producer: str
    consumer: str
    rung: str
    reason: str


@dataclass(frozen=True)
class ServiceInfo:
    """State and counters of one service; `edges` are those that the selector knows of."""

    name: str
    address: str
    ready: bool
    detail: str
    pid: int
    counters: dict[str, int]
    edges: tuple[EdgeInfo, ...] = ()


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
        self,
        model: str,
        payloads: Mapping[str, ArrayLike],
        *,
        min_accuracy: float | None = None,
        latency_slo_ms: float | None = None,
        modalities: Iterable[str] = (),
        timeout_s: float = 30.0,
    ) -> Prediction:
        """Predicts one job.

        Args:
            model: its name.
            payloads: arrays [items, ...] by modality; any non-empty subset of the model's.
            min_accuracy: the least expected accuracy, 0..1; without it all that was sent is used if time allows.
            latency_slo_ms: when the answer is no longer wanted, in milliseconds from now.
            modalities: only these may be run; without a floor exactly these are run.
            timeout_s: seconds after which the call is given up.

        Raises:
            MoselError: the kind says what went wrong (see mosel.errors).
        """
        request = _request(model, payloads, min_accuracy, latency_slo_ms, modalities, self._max_message_mib)
        try:
            return _prediction(self._stub.Predict(request, timeout=timeout_s))
        except grpc.RpcError as error:
            raise self._error(error) from None

    def models(self, timeout_s: float = 5.0) -> list[ModelInfo]:
        """The served models.

        Raises:
            MoselError: the gateway cannot be reached.
        """
        try:
            return _models(self._stub.ListModels(gateway_pb2.ListModelsRequest(), timeout=timeout_s))
        except grpc.RpcError as error:
            raise self._error(error) from None

    def status(self, timeout_s: float = 5.0) -> list[ServiceInfo]:
        """The state of every service.

        Raises:
            MoselError: the gateway cannot be reached.
        """
        try:
            return _services(self._stub.Status(service_pb2.StatusRequest(), timeout=timeout_s))
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
        self,
        model: str,
        payloads: Mapping[str, ArrayLike],
        *,
        min_accuracy: float | None = None,
        latency_slo_ms: float | None = None,
        modalities: Iterable[str] = (),
        timeout_s: float = 30.0,
    ) -> Prediction:
        """As `Client.predict`; cancelling the task cancels the job."""
        request = _request(model, payloads, min_accuracy, latency_slo_ms, modalities, self._max_message_mib)
        try:
            return _prediction(await self._stub.Predict(request, timeout=timeout_s))
        except grpc.RpcError as error:
            raise error_from_rpc(error, f"gateway at {self._address}") from None

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._channel.close()


def _options(max_message_mib: int) -> list[tuple[str, int | str]]:
    limit = max_message_mib * _MIB
    return [
        ("grpc.max_send_message_length", limit),
        ("grpc.max_receive_message_length", limit),
        # As short as among the services: a gateway that starts again is found at once.
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # With http_proxy set, grpc would look for 127.0.0.1 behind the proxy.
        ("grpc.enable_http_proxy", 0),
    ]


def _request(
    model: str,
    payloads: Mapping[str, ArrayLike],
    min_accuracy: float | None,
    latency_slo_ms: float | None,
    modalities: Iterable[str],
    max_message_mib: int,
) -> gateway_pb2.PredictRequest:
    request = gateway_pb2.PredictRequest(
        model=model, modalities=modalities, min_accuracy=min_accuracy, latency_slo_ms=latency_slo_ms
    )
    arrays = {name: np.asarray(array) for name, array in payloads.items()}
    nbytes = sum(array.nbytes for array in arrays.values())
    if nbytes > max_message_mib * _MIB - _ENVELOPE_BYTES:
        raise PayloadTooLarge(
            f"the payloads have {nbytes / _MIB:.1f} MiB; expected less than {max_message_mib} MiB "
            "(setting transport.max_message_mib): send fewer items"
        )
    for name, array in arrays.items():
        request.payloads[name].CopyFrom(to_proto(array, f"payloads.{name}"))
    return request


def _prediction(reply: gateway_pb2.PredictReply) -> Prediction:
    return Prediction(
        job_id=reply.job_id,
        output=from_proto(reply.output, "output"),
        labels=tuple(reply.labels),
        modality_sets=tuple(reply.modality_sets),
        expected_accuracy=reply.expected_accuracy,
        queue_ms=reply.queue_ms,
        compute_ms=reply.compute_ms,
        deadline_slack_ms=reply.deadline_slack_ms,
    )


def _models(reply: gateway_pb2.ListModelsReply) -> list[ModelInfo]:
    return [
        ModelInfo(
            name=model.name,
            version=model.version,
            description=model.description,
            ready=model.ready,
            modalities={m.name: ModalityInfo(dtype_name(m.dtype), tuple(m.shape)) for m in model.modalities},
            sets={s.modality_set: SetInfo(s.accuracy, s.latency_ms, s.available) for s in model.sets},
            labels=tuple(model.labels),
        )
        for model in reply.models
    ]


def _services(reply: service_pb2.StatusReply) -> list[ServiceInfo]:
    return [
        ServiceInfo(s.name, s.address, s.ready, s.detail, s.pid, dict(s.counters), tuple(map(_edge, s.edges)))
        for s in reply.services
    ]


def _edge(edge: service_pb2.EdgeStatus) -> EdgeInfo:
    return EdgeInfo(edge.producer, edge.consumer, tensor_pb2.Rung.Name(edge.rung).lower(), edge.reason)
