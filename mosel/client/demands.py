"""What a client asks for, and the messages that say it."""

import difflib
import math
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from mosel.client.arrays import Payload, as_array
from mosel.client.checks import flag, names, number, shown, text, whole, wrong_kind
from mosel.errors import InvalidRequest, PayloadTooLarge
from mosel.tensors import to_proto
from mosel.v1 import gateway_pb2, tensor_pb2

_MIB = 1024 * 1024
# What the rest of a request may take beside its payloads.
_ENVELOPE_BYTES = 64 * 1024
# What the field holds; the server has a limit of its own.
_MOST_ITEMS = 2**32 - 1
# Payloads that are given at once travel in batches of about this size, so that checking them overlaps with sending.
_BATCH_BYTES = 4 * _MIB

_PAYLOADS = "a mapping from modality to array, such as {'image': images}"

Payloads = Mapping[str, Payload]
Batches = Iterable[Payloads] | AsyncIterable[Payloads]
Arrays = Mapping[str, NDArray[np.generic]]


class Demand(TypedDict, total=False):
    """What a job may demand; None demands nothing.

    Attributes:
        min_accuracy: the least accuracy, 0..1; without any floor all that was sent is used if time allows, unless the
            operator of the server states one.
        max_accuracy_loss: instead of it, the most accuracy that may be lost against running everything, 0..1.
        latency_slo_ms: when the answer is no longer wanted, in milliseconds from now.
        modalities: only these may be run; without a floor exactly these are run.
        effort: what happens to time that a floor leaves unused: `cheapest` (with a floor, the default) saves it,
            `best` spends it on accuracy.
        late_ok: a late answer is wanted, too: `latency_slo_ms` orders and plans, and the timeout alone ends the job.
        priority: 1 goes first, 9 last; without it 5.
    """

    min_accuracy: float | None
    max_accuracy_loss: float | None
    latency_slo_ms: float | None
    modalities: Iterable[str] | None
    effort: Literal["cheapest", "best"] | None
    late_ok: bool | None
    priority: int | None


def checked_demand(demand: Mapping[str, object]) -> Demand:
    """What is demanded, without what is None, each value as its type says; a demand comes from callers as it likes.

    Raises:
        InvalidRequest: a name is unknown, a value is of the wrong kind or out of range, or there are two floors.
    """
    for name, value in demand.items():
        if name not in _CHECKS:
            near = difflib.get_close_matches(name, [*_CHECKS, "timeout_s"], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            expected = f"some of {', '.join(_CHECKS)}{hint}"
            raise InvalidRequest(f"{name} is {shown(value)}, and no demand has that name; expected {expected}")
    checked = {name: _CHECKS[name](value) for name, value in demand.items() if value is not None}
    if "min_accuracy" in checked and "max_accuracy_loss" in checked:
        raise InvalidRequest("min_accuracy and max_accuracy_loss; expected one of them")
    # Each of the checks gives what its field is.
    return cast(Demand, checked)


def predict_request(
    model: str, payloads: Payloads, demand: Mapping[str, object], max_message_mib: int
) -> gateway_pb2.PredictRequest:
    """The request for one job.

    Raises:
        PayloadTooLarge: it is beyond the message limit.
        InvalidRequest: an array cannot be sent, or a demand is wrong.
    """
    checked = checked_demand(demand)
    return request_of(checked_model(model), arrays_of(payloads, "payloads"), checked, max_message_mib)


def request_of(
    model: str, arrays: Arrays, demand: Demand, max_message_mib: int, available: Iterable[str] = ()
) -> gateway_pb2.PredictRequest:
    """The request for one job of which all is checked.

    Args:
        model: its name.
        arrays: those that are sent, by modality.
        demand: what is asked for.
        max_message_mib: the largest message.
        available: the modalities that the caller has, if it says so.

    Raises:
        PayloadTooLarge: it is beyond the message limit.
        InvalidRequest: an array cannot be sent.
    """
    tensors = _tensors(arrays, max_message_mib)
    return gateway_pb2.PredictRequest(model=model, payloads=tensors, available=sorted(available), **_fields(demand))


def spec_of(model: str, size: int, demand: Mapping[str, object]) -> gateway_pb2.JobSpec:
    """What a job asks for, without its items.

    Raises:
        InvalidRequest: a value is wrong.
    """
    fields = _fields(checked_demand(demand))
    return gateway_pb2.JobSpec(model=checked_model(model), size=_items(size), **fields)


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
        InvalidRequest: the size is missing, or something is wrong with what is known of the items or with the demand.
    """

    def __init__(
        self,
        model: str,
        items: Payloads | Batches,
        size: int | None,
        demand: Mapping[str, object],
        max_message_mib: int,
    ) -> None:
        self.error: Exception | None = None
        self._max_message_mib = max_message_mib
        self._items: Batches
        if isinstance(items, Mapping):
            arrays = arrays_of(items, "items", checked_demand(demand).get("modalities"))
            demand = {**demand, "modalities": list(arrays)}
            size = size_of(arrays) if size is None else size
            self._items = _batches(arrays)
        else:
            self._items = _checked_batches(items)
        if size is None:
            raise InvalidRequest("size is missing; expected the number of items, as they come in batches")
        self._spec = spec_of(model, size, demand)

    def requests(self) -> Iterator[gateway_pb2.SubmitJobRequest]:
        """The messages, to be iterated once.

        Raises:
            InvalidRequest: the items come asynchronously.
        """
        if isinstance(self._items, AsyncIterable):
            raise wrong_kind("items", self._items, "no asynchronous iterator: AsyncClient takes these")
        return self._requests(self._items)

    async def async_requests(self) -> AsyncIterator[gateway_pb2.SubmitJobRequest]:
        """As `requests`, for items that may come asynchronously."""
        if not isinstance(self._items, AsyncIterable):
            for request in self._requests(self._items):
                yield request
            return
        yield gateway_pb2.SubmitJobRequest(job=self._spec)
        try:
            async for payloads in self._items:
                yield self._batch(payloads)
        except Exception as error:  # noqa: BLE001 (as above)
            self.error = error

    def _requests(self, items: Iterable[Payloads]) -> Iterator[gateway_pb2.SubmitJobRequest]:
        yield gateway_pb2.SubmitJobRequest(job=self._spec)
        try:
            for payloads in items:
                yield self._batch(payloads)
        except Exception as error:  # noqa: BLE001 (grpc would hide it; the caller gets it when the call has failed)
            self.error = error

    def _batch(self, payloads: Payloads) -> gateway_pb2.SubmitJobRequest:
        tensors = _tensors(arrays_of(payloads, "a batch of items"), self._max_message_mib)
        return gateway_pb2.SubmitJobRequest(items=gateway_pb2.ItemBatch(payloads=tensors))


def arrays_of(payloads: object, field: str, modalities: Iterable[str] | None = None) -> dict[str, NDArray[np.generic]]:
    """The arrays of these modalities, or of all.

    Raises:
        InvalidRequest: something is no array, or one is missing; `field` names the payloads.
    """
    if not isinstance(payloads, Mapping):
        raise wrong_kind(field, payloads, _PAYLOADS)
    for name in payloads:
        if not isinstance(name, str):
            raise InvalidRequest(f"{field} has the key {shown(name)}; expected {_PAYLOADS}")
    chosen = list(modalities or payloads)
    for name in chosen:
        if name not in payloads:
            raise InvalidRequest(f"modalities has '{name}'; expected some of the payloads: {', '.join(payloads)}")
    return {name: as_array(payloads[name], f"payloads.{name}") for name in chosen}


def _checked_batches(items: Batches) -> Batches:
    if isinstance(items, str | bytes) or not isinstance(items, Iterable | AsyncIterable):
        raise wrong_kind("items", items, f"{_PAYLOADS}, or several of these")
    return items


def size_of(arrays: Arrays) -> int:
    """Items of each; raises InvalidRequest unless all have the same number, at least one."""
    sizes = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise InvalidRequest(f"payloads have {sorted(sizes)} items; expected the same number in all, at least one")
    return sizes.pop()


def _batches(arrays: Arrays) -> Iterator[Payloads]:
    size = size_of(arrays)
    item_bytes = sum(array.nbytes for array in arrays.values()) // size
    step = max(_BATCH_BYTES // max(item_bytes, 1), 1)
    for start in range(0, size, step):
        yield {name: array[start : start + step] for name, array in arrays.items()}


def _tensors(arrays: Arrays, max_message_mib: int) -> dict[str, tensor_pb2.Tensor]:
    nbytes = sum(array.nbytes for array in arrays.values())
    if nbytes > max_message_mib * _MIB - _ENVELOPE_BYTES:
        raise PayloadTooLarge(
            f"the payloads have {nbytes / _MIB:.1f} MiB; expected less than {max_message_mib} MiB "
            "(setting transport.max_message_mib): send fewer items"
        )
    return {name: to_proto(array, f"payloads.{name}") for name, array in arrays.items()}


def checked_model(name: object) -> str:
    """The name; raises InvalidRequest for anything else."""
    return text("model", name, "the model's name")


def _items(size: object) -> int:
    expected = f"at least one item, and at most {_MOST_ITEMS}"
    return whole("size", size, expected, lambda items: 1 <= items <= _MOST_ITEMS)


def _fields(demand: Demand) -> dict[str, Any]:
    """The demand as both messages have it."""
    effort = demand.get("effort")
    return {**demand, "effort": effort and gateway_pb2.Effort.Value(effort.upper())}


def _effort(value: object) -> str:
    effort = text("effort", value, "cheapest or best")
    if effort not in ("cheapest", "best"):
        raise InvalidRequest(f"effort is '{effort}'; expected cheapest or best")
    return effort


def _fraction(field: str, value: object) -> float:
    return number(field, value, "a number from 0 to 1", lambda found: 0 <= found <= 1)


# How each demand is checked; what comes out is what the field takes.
_CHECKS: dict[str, Callable[[object], object]] = {
    "min_accuracy": lambda value: _fraction("min_accuracy", value),
    "max_accuracy_loss": lambda value: _fraction("max_accuracy_loss", value),
    "latency_slo_ms": lambda value: number(
        "latency_slo_ms", value, "a positive number of milliseconds", lambda slo_ms: 0 < slo_ms < math.inf
    ),
    "modalities": lambda value: names("modalities", value),
    "effort": _effort,
    "late_ok": lambda value: flag("late_ok", value),
    "priority": lambda value: whole(
        "priority", value, "a whole number from 1 (goes first) to 9", lambda priority: 1 <= priority <= 9
    ),
}
