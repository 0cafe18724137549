"""What a client asks for, and the messages that say it."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from mosel.client.arrays import Payload, as_array
from mosel.errors import InvalidRequest, PayloadTooLarge
from mosel.tensors import to_proto
from mosel.v1 import gateway_pb2, tensor_pb2

_MIB = 1024 * 1024
# What the rest of a request may take beside its payloads.
_ENVELOPE_BYTES = 64 * 1024
# Payloads that are given at once travel in batches of about this size, so that checking them overlaps with sending.
_BATCH_BYTES = 4 * _MIB

_EFFORTS = {None: gateway_pb2.EFFORT_UNSPECIFIED, "cheapest": gateway_pb2.CHEAPEST, "best": gateway_pb2.BEST}

Payloads = Mapping[str, Payload]


class Demand(TypedDict, total=False):
    """What a job may demand.

    Attributes:
        min_accuracy: the least expected accuracy, 0..1; without it all that was sent is used if time allows.
        latency_slo_ms: when the answer is no longer wanted, in milliseconds from now.
        modalities: only these may be run; without a floor exactly these are run.
        effort: what happens to time that a floor leaves unused: `cheapest` (with a floor, the default) saves it,
            `best` spends it on accuracy.
        late_ok: a late answer is wanted, too: `latency_slo_ms` orders and plans, and the timeout alone ends the job.
        priority: 1 goes first, 9 last; without it 5.
    """

    min_accuracy: float | None
    latency_slo_ms: float | None
    modalities: Iterable[str]
    effort: Literal["cheapest", "best"] | None
    late_ok: bool
    priority: int


def predict_request(model: str, payloads: Payloads, demand: Demand, max_message_mib: int) -> gateway_pb2.PredictRequest:
    """The request for one job.

    Raises:
        PayloadTooLarge: it is beyond the message limit.
        InvalidRequest: an array cannot be sent, or the effort is unknown.
    """
    return gateway_pb2.PredictRequest(
        model=model,
        payloads=_tensors(_arrays(payloads), max_message_mib),
        min_accuracy=demand.get("min_accuracy"),
        latency_slo_ms=demand.get("latency_slo_ms"),
        modalities=demand.get("modalities", ()),
        effort=_effort(demand),
        late_ok=demand.get("late_ok", False),
        priority=demand.get("priority", 0),
    )


def spec_of(model: str, size: int, demand: Demand) -> gateway_pb2.JobSpec:
    """What a job asks for, without its items.

    Raises:
        InvalidRequest: the effort is unknown.
    """
    return gateway_pb2.JobSpec(
        model=model,
        size=size,
        min_accuracy=demand.get("min_accuracy"),
        latency_slo_ms=demand.get("latency_slo_ms"),
        modalities=demand.get("modalities", ()),
        effort=_effort(demand),
        late_ok=demand.get("late_ok", False),
        priority=demand.get("priority", 0),
    )


class Upload:
    """The messages that bring a job.

    Args:
        model: its name.
        items: payloads, all at once or in batches.
        size: items of the job; needed if they come in batches.
        demand: what is asked for.
        max_message_mib: the largest message.

    Attributes:
        error: why the messages ended early, if they did.

    Raises:
        InvalidRequest: the size is missing, or the effort is unknown.
    """

    def __init__(
        self,
        model: str,
        items: Payloads | Iterable[Payloads] | AsyncIterable[Payloads],
        size: int | None,
        demand: Demand,
        max_message_mib: int,
    ) -> None:
        self.error: Exception | None = None
        self._max_message_mib = max_message_mib
        if isinstance(items, Mapping):
            arrays = _arrays(_chosen(items, demand))
            demand = Demand(**{**demand, "modalities": list(arrays)})
            size = _size(arrays) if size is None else size
            items = _batches(arrays)
        if size is None:
            raise InvalidRequest("size is missing; expected the number of items, as they come in batches")
        self._items = items
        self._spec = spec_of(model, size, demand)

    def requests(self) -> Iterator[gateway_pb2.SubmitJobRequest]:
        """The messages, to be iterated once."""
        yield gateway_pb2.SubmitJobRequest(job=self._spec)
        assert isinstance(self._items, Iterable), "only AsyncClient takes items that come asynchronously"
        try:
            for payloads in self._items:
                yield self._batch(payloads)
        except Exception as error:  # noqa: BLE001 (grpc would hide it; the caller gets it when the call has failed)
            self.error = error

    async def async_requests(self) -> AsyncIterator[gateway_pb2.SubmitJobRequest]:
        """As `requests`, for items that may come asynchronously."""
        if isinstance(self._items, Iterable):
            for request in self.requests():
                yield request
            return
        yield gateway_pb2.SubmitJobRequest(job=self._spec)
        try:
            async for payloads in self._items:
                yield self._batch(payloads)
        except Exception as error:  # noqa: BLE001 (as above)
            self.error = error

    def _batch(self, payloads: Payloads) -> gateway_pb2.SubmitJobRequest:
        tensors = _tensors(_arrays(payloads), self._max_message_mib)
        return gateway_pb2.SubmitJobRequest(items=gateway_pb2.ItemBatch(payloads=tensors))


def _arrays(payloads: Payloads) -> dict[str, NDArray[np.generic]]:
    return {name: as_array(value, f"payloads.{name}") for name, value in payloads.items()}


def _chosen(payloads: Payloads, demand: Demand) -> Payloads:
    modalities = list(demand.get("modalities", ())) or list(payloads)
    for name in modalities:
        if name not in payloads:
            raise InvalidRequest(f"modalities has '{name}'; expected some of the payloads: {', '.join(payloads)}")
    return {name: payloads[name] for name in modalities}


def _size(arrays: Mapping[str, NDArray[np.generic]]) -> int:
    sizes = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise InvalidRequest(f"payloads have {sorted(sizes)} items; expected the same number in all, at least one")
    return sizes.pop()


def _batches(arrays: Mapping[str, NDArray[np.generic]]) -> Iterator[Payloads]:
    size = _size(arrays)
    item_bytes = sum(array.nbytes for array in arrays.values()) // size
    step = max(_BATCH_BYTES // max(item_bytes, 1), 1)
    for start in range(0, size, step):
        yield {name: array[start : start + step] for name, array in arrays.items()}


def _tensors(arrays: Mapping[str, NDArray[np.generic]], max_message_mib: int) -> dict[str, tensor_pb2.Tensor]:
    nbytes = sum(array.nbytes for array in arrays.values())
    if nbytes > max_message_mib * _MIB - _ENVELOPE_BYTES:
        raise PayloadTooLarge(
            f"the payloads have {nbytes / _MIB:.1f} MiB; expected less than {max_message_mib} MiB "
            "(setting transport.max_message_mib): send fewer items"
        )
    return {name: to_proto(array, f"payloads.{name}") for name, array in arrays.items()}


def _effort(demand: Demand) -> gateway_pb2.Effort.ValueType:
    effort = demand.get("effort")
    if effort not in _EFFORTS:
        raise InvalidRequest(f"effort is '{effort}'; expected cheapest or best")
    return _EFFORTS[effort]
