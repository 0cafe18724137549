"""From request to checked job. Knows no gRPC and no sockets."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mosel.errors import InvalidRequest, ModelNotFound, PayloadTooLarge
from mosel.packages.manifest import ModalitySpec
from mosel.packages.model_package import ModelPackage
from mosel.tensors import DTYPES, byte_count, dtype_name, from_proto
from mosel.v1 import gateway_pb2, tensor_pb2

Payloads = Mapping[str, NDArray[np.generic]]
# What both say of a job.
JobFields = gateway_pb2.PredictRequest | gateway_pb2.JobSpec
_LAST_PRIORITY = 9
_EFFORTS = frozenset(gateway_pb2.Effort.values())


class SentPayload(NamedTuple):
    """One payload as its caller's protocol names and describes it; nothing of it is checked yet.

    Attributes:
        modality: its name.
        field: names it in messages.
        dtype_field: what the protocol calls its data type.
        dtype: the name of its data type, whatever the caller wrote.
        shape: [items, ...].
        read: its elements, once dtype and shape are known to be sound; raises InvalidRequest.
    """

    modality: str
    field: str
    dtype_field: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], NDArray[np.generic]]


@dataclass(frozen=True)
class CheckedJob:
    """What a caller asks for, known to be sound.

    Attributes:
        size: items.
        modalities: those that were sent and may be run, sorted.
        min_accuracy: the floor, 0..1, or None.
        latency_slo_ms: the caller's deadline in milliseconds, or None.
        exact: the caller named the modalities and gave no floor: all of them are run.
        late_ok: a late answer is wanted, too.
        priority: 1 to 9, or 0: the selector's default.
        max_accuracy_loss: the other kind of floor: the most accuracy that may be lost against running everything that
            was sent, 0..1, or None.
        floor_source: whose floor it is, once that is known (`gateway.jobs.floors`).
        available: what the caller has and may be run, `modalities` among it, sorted; empty: it did not say.
    """

    package: ModelPackage
    size: int
    modalities: tuple[str, ...]
    min_accuracy: float | None
    latency_slo_ms: float | None
    exact: bool
    effort: gateway_pb2.Effort.ValueType
    late_ok: bool
    priority: int = 0
    max_accuracy_loss: float | None = None
    floor_source: gateway_pb2.FloorSource.ValueType = gateway_pb2.FLOOR_SOURCE_UNSPECIFIED
    available: tuple[str, ...] = ()

    def payload_bytes(self) -> dict[str, int]:
        """Bytes of each payload."""
        specs = {name: self.package.modalities[name] for name in self.modalities}
        return {name: byte_count(spec.dtype, (self.size, *spec.shape)) for name, spec in specs.items()}


def check_request(
    request: gateway_pb2.PredictRequest, packages: Mapping[str, ModelPackage], max_items: int
) -> tuple[CheckedJob, Payloads]:
    """Checks every field of a request that brings its items along.

    Args:
        request: what the caller sent.
        packages: the models by name.
        max_items: bound on the items of one job.

    Returns:
        The job, and arrays [size, *shape] by modality over the bytes of the request.

    Raises:
        ModelNotFound: there is no such model.
        PayloadTooLarge: more items than one job may have.
        InvalidRequest: names the field, what it holds and what was expected.
    """
    package = package_of(request.model, packages)
    payloads = check_payloads("payloads", sent_in("payloads", request.payloads), package, max_items)
    return check_fields("payloads", request, package, payloads), payloads


def check_fields(
    field: str, fields: gateway_pb2.PredictRequest, package: ModelPackage, payloads: Payloads
) -> CheckedJob:
    """Checks what is asked for items whose payloads are known to be sound.

    Args:
        field: names the payloads in messages.
        fields: what is asked for; the payloads in it do not matter.
        package: the model.
        payloads: by modality.

    Raises:
        InvalidRequest: names the field, what it holds and what was expected.
    """
    named = set(fields.modalities)
    allowed = named or payloads.keys()
    if available := tuple(fields.available):
        allowed = named or set(available)
        _check_available(field, available, package, payloads)
    for name in fields.modalities if named else ():
        if name not in (available or payloads):
            what = f"'available': {', '.join(available)}" if available else f"the {field}: {', '.join(payloads)}"
            raise InvalidRequest(f"modalities has '{name}'; expected some of {what}")
    modalities = tuple(sorted(allowed & payloads.keys()))
    if not modalities:
        raise InvalidRequest(f"{field} are {', '.join(payloads)}; expected some of the modalities: {', '.join(named)}")
    exact = bool(named) and not (fields.HasField("min_accuracy") or fields.HasField("max_accuracy_loss"))
    job = _job(fields, package, size_of(payloads), modalities, exact)
    return replace(job, available=tuple(sorted(allowed))) if available else job


def check_spec(spec: gateway_pb2.JobSpec, packages: Mapping[str, ModelPackage], max_items: int) -> CheckedJob:
    """Checks every field of a job whose items are elsewhere; arguments and errors as of `check_request`."""
    package = package_of(spec.model, packages)
    if spec.size < 1:
        raise InvalidRequest("size is 0; expected at least one item")
    if spec.size > max_items:
        raise PayloadTooLarge(
            f"size is {spec.size}; expected at most {max_items} in one job (setting gateway.max_items_per_job)"
        )
    for name in spec.modalities:
        if name not in package.modalities:
            raise InvalidRequest(f"modalities has '{name}'; expected some of {', '.join(package.modalities)}")
    modalities = tuple(sorted(set(spec.modalities) or package.modalities))
    return _job(spec, package, spec.size, modalities, exact=False)


def sent_in(field: str, tensors: Mapping[str, tensor_pb2.Tensor]) -> Iterator[SentPayload]:
    """The payloads of a `mosel.v1` message, whose field names them in messages."""
    for name in sorted(tensors):
        tensor, own = tensors[name], f"{field}.{name}"
        dtype = dtype_name(tensor.dtype) if tensor.dtype else "missing"
        yield SentPayload(name, own, "dtype", dtype, tuple(tensor.shape), partial(from_proto, tensor, own))


def check_payloads(field: str, sent: Iterable[SentPayload], package: ModelPackage, max_items: int) -> Payloads:
    """Checks payloads of the same items.

    Args:
        field: names all of them in messages.
        sent: the payloads, each of another modality.
        package: the model.
        max_items: bound on the items.

    Returns:
        Arrays [items, *shape] by modality, sorted, over the bytes of the tensors.

    Raises:
        PayloadTooLarge: there are more items.
        InvalidRequest: names the field, what it holds and what was expected.
    """
    payloads: dict[str, NDArray[np.generic]] = {}
    for payload in sent:
        if payload.modality not in package.modalities:
            known = ", ".join(package.modalities)
            raise InvalidRequest(f"{field} has '{payload.modality}'; expected some of {known}")
        payloads[payload.modality] = _payload(payload, package.modalities[payload.modality], max_items)
    if not payloads:
        raise InvalidRequest(f"{field} is empty; expected some of {', '.join(package.modalities)}")
    if len(set(map(len, payloads.values()))) != 1:
        listed = ", ".join(f"{name} {len(array)}" for name, array in payloads.items())
        raise InvalidRequest(f"{field} have different numbers of items ({listed}); expected the same in all")
    return dict(sorted(payloads.items()))


def size_of(payloads: Payloads) -> int:
    """Items of payloads that were checked."""
    return len(next(iter(payloads.values())))


def package_of(model: str, packages: Mapping[str, ModelPackage]) -> ModelPackage:
    """The model of this name.

    Raises:
        ModelNotFound: there is none.
    """
    package = packages.get(model)
    if package is None:
        raise ModelNotFound(f"model is '{model}'; expected one of {', '.join(sorted(packages))}")
    return package


def checked_priority(priority: int) -> int:
    """Returns the priority if it is one; raises InvalidRequest otherwise."""
    if not 0 <= priority <= _LAST_PRIORITY:
        raise InvalidRequest(f"priority is {priority}; expected 1 to {_LAST_PRIORITY}, or 0 for the default")
    return priority


def _job(
    request: JobFields,
    package: ModelPackage,
    size: int,
    modalities: tuple[str, ...],
    exact: bool,
) -> CheckedJob:
    floor, loss = _fraction(request, "min_accuracy"), _fraction(request, "max_accuracy_loss")
    if floor is not None and loss is not None:
        raise InvalidRequest("min_accuracy and max_accuracy_loss; expected one of them")
    slo = request.latency_slo_ms if request.HasField("latency_slo_ms") else None
    if slo is not None and not (slo > 0 and math.isfinite(slo)):
        raise InvalidRequest(f"latency_slo_ms is {slo}; expected a positive number of milliseconds")
    if (effort := request.effort) not in _EFFORTS:
        raise InvalidRequest(f"effort is {effort}; expected CHEAPEST, BEST or none")
    priority = checked_priority(request.priority)
    return CheckedJob(package, size, modalities, floor, slo, exact, effort, request.late_ok, priority, loss)


def _check_available(field: str, available: Sequence[str], package: ModelPackage, payloads: Payloads) -> None:
    """Checks what the caller says that it has."""
    for name in available:
        if name not in package.modalities:
            raise InvalidRequest(f"available has '{name}'; expected some of {', '.join(package.modalities)}")
    if missing := payloads.keys() - set(available):
        raise InvalidRequest(f"available lacks '{min(missing)}'; expected all of the {field}: {', '.join(payloads)}")


def _fraction(request: JobFields, field: Literal["min_accuracy", "max_accuracy_loss"]) -> float | None:
    value: float | None = getattr(request, field) if request.HasField(field) else None
    if value is not None and not 0 <= value <= 1:
        raise InvalidRequest(f"{field} is {value}; expected a number from 0 to 1")
    return value


def _payload(sent: SentPayload, spec: ModalitySpec, max_items: int) -> NDArray[np.generic]:
    if sent.dtype != spec.dtype:
        raise InvalidRequest(f"{sent.field}.{sent.dtype_field} is {sent.dtype}; expected {spec.dtype}")
    shape = sent.shape
    if not shape or shape[1:] != spec.shape or not 1 <= shape[0] <= max_items:
        raise _wrong_shape(sent.field, list(shape), spec, max_items)
    array = sent.read()
    _check_finite(sent.field, array, spec.dtype)
    return array


def _wrong_shape(field: str, shape: list[int], spec: ModalitySpec, max_items: int) -> InvalidRequest | PayloadTooLarge:
    expected = f"[{', '.join(map(str, ('items', *spec.shape)))}]"
    if tuple(shape[1:]) != spec.shape or not shape:
        return InvalidRequest(f"{field}.shape is {shape}; expected {expected}")
    if shape[0] < 1:
        return InvalidRequest(f"{field}.shape is {shape}, a batch of no items; expected {expected} with at least one")
    return PayloadTooLarge(
        f"{field}.shape is {shape}: {shape[0]} items; expected at most {max_items} "
        f"in one job (setting gateway.max_items_per_job)"
    )


def _check_finite(field: str, array: NDArray[np.generic], dtype: str) -> None:
    if dtype == "BF16":
        # The exponent bits of infinity and NaN are all ones.
        finite = np.bitwise_and(array.view(np.uint16), 0x7F80) != 0x7F80
    elif DTYPES[dtype].kind == "f":
        finite = np.isfinite(array)
    else:
        return
    if not finite.all():
        item = int(np.argwhere(~finite)[0][0])
        value = "a value" if dtype == "BF16" else str(array[tuple(np.argwhere(~finite)[0])])
        raise InvalidRequest(f"{field} has {value} in item {item}; expected finite numbers")
