"""From request to checked job, and from result to reply. Knows no gRPC and no sockets."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mosel.errors import InvalidRequest, ModelNotFound, PayloadTooLarge
from mosel.model_package import ModalitySpec, ModelPackage
from mosel.tensors import DTYPES, dtype_name, from_proto
from mosel.v1 import gateway_pb2, selector_pb2, tensor_pb2


@dataclass(frozen=True)
class CheckedJob:
    """A request that is known to be sound.

    Attributes:
        payloads: arrays [size, *shape] by modality, over the bytes of the request.
        modalities: those that may be run.
        min_accuracy: the floor, 0..1, or None.
        latency_slo_ms: the caller's deadline in milliseconds, or None.
        exact: the caller named the modalities and gave no floor: all of them are run.
    """

    package: ModelPackage
    size: int
    payloads: Mapping[str, NDArray[np.generic]]
    modalities: tuple[str, ...]
    min_accuracy: float | None
    latency_slo_ms: float | None
    exact: bool


def check_request(
    request: gateway_pb2.PredictRequest, packages: Mapping[str, ModelPackage], max_items: int
) -> CheckedJob:
    """Checks every field of a request.

    Args:
        request: what the caller sent.
        packages: the models by name.
        max_items: bound on the items of one job.

    Raises:
        ModelNotFound: there is no such model.
        PayloadTooLarge: more items than one job may have.
        InvalidRequest: names the field, what it holds and what was expected.
    """
    package = packages.get(request.model)
    if package is None:
        raise ModelNotFound(f"model is '{request.model}'; expected one of {', '.join(sorted(packages))}")
    if not request.payloads:
        raise InvalidRequest(f"payloads is empty; expected some of {', '.join(package.modalities)}")
    payloads = {}
    for name in sorted(request.payloads):
        if name not in package.modalities:
            raise InvalidRequest(f"payloads has '{name}'; expected some of {', '.join(package.modalities)}")
        payloads[name] = _payload(f"payloads.{name}", request.payloads[name], package.modalities[name], max_items)
    sizes = {name: len(array) for name, array in payloads.items()}
    if len(set(sizes.values())) != 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InvalidRequest(f"payloads have different numbers of items ({listed}); expected the same in all")
    floor = request.min_accuracy if request.HasField("min_accuracy") else None
    if floor is not None and not 0 <= floor <= 1:
        raise InvalidRequest(f"min_accuracy is {floor}; expected a number from 0 to 1")
    slo = request.latency_slo_ms if request.HasField("latency_slo_ms") else None
    if slo is not None and not (slo > 0 and math.isfinite(slo)):
        raise InvalidRequest(f"latency_slo_ms is {slo}; expected a positive number of milliseconds")
    modalities = _modalities(request, payloads)
    exact = bool(request.modalities) and floor is None
    return CheckedJob(package, next(iter(sizes.values())), payloads, modalities, floor, slo, exact)


def reply_from(job: CheckedJob, result: selector_pb2.JobResult, slack_ms: float) -> gateway_pb2.PredictReply:
    """The answer to the caller.

    Args:
        job: the job.
        result: what the selector said; its groups cover every item once.
        slack_ms: milliseconds left until the deadline.
    """
    groups = sorted(result.groups, key=lambda group: group.row_start)
    outputs = [from_proto(group.output, "output") for group in groups]
    output = groups[0].output
    if len(groups) > 1:
        joined = np.concatenate(outputs)
        output = tensor_pb2.Tensor(dtype=groups[0].output.dtype, shape=joined.shape, data=joined.tobytes())
    labels = job.package.output.labels
    return gateway_pb2.PredictReply(
        job_id=result.job_id.hex(),
        output=output,
        labels=[labels[i] for part in outputs for i in part.argmax(axis=-1)] if labels else [],
        modality_sets=[group.modality_set for group in groups for _ in range(group.row_count)],
        expected_accuracy=result.expected_accuracy,
        queue_ms=result.queue_us / 1000,
        compute_ms=result.compute_us / 1000,
        deadline_slack_ms=slack_ms,
    )


def _payload(field: str, tensor: tensor_pb2.Tensor, spec: ModalitySpec, max_items: int) -> NDArray[np.generic]:
    name = dtype_name(tensor.dtype) if tensor.dtype else "missing"
    if name != spec.dtype:
        raise InvalidRequest(f"{field}.dtype is {name}; expected {spec.dtype}")
    shape = list(tensor.shape)
    expected = f"[items, {', '.join(map(str, spec.shape))}]"
    if tuple(shape[1:]) != spec.shape or not shape:
        raise InvalidRequest(f"{field}.shape is {shape}; expected {expected}")
    if shape[0] < 1:
        raise InvalidRequest(f"{field}.shape is {shape}, a batch of no items; expected {expected} with at least one")
    if shape[0] > max_items:
        raise PayloadTooLarge(
            f"{field}.shape is {shape}: {shape[0]} items; expected at most {max_items} "
            f"in one job (setting gateway.max_items_per_job)"
        )
    array = from_proto(tensor, field)
    _check_finite(field, array, spec.dtype)
    return array


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


def _modalities(request: gateway_pb2.PredictRequest, payloads: Mapping[str, object]) -> tuple[str, ...]:
    for name in request.modalities:
        if name not in payloads:
            raise InvalidRequest(f"modalities has '{name}'; expected some of the payloads: {', '.join(payloads)}")
    return tuple(sorted(set(request.modalities) or payloads))
