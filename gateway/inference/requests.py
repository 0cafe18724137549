"""From a request of the Open Inference Protocol to a checked job, whether it came as protobuf or as JSON."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gateway.inference.responses import check_outputs
from gateway.inference.words import InferRequest, InputTensor, Parameter, Parameters
from gateway.jobs.checks import (
    CheckedJob,
    Payloads,
    SentPayload,
    check_fields,
    check_payloads,
    checked_priority,
    package_of,
)
from mosel.config import Settings
from mosel.deadline import Deadline
from mosel.errors import InvalidRequest, ModelNotFound
from mosel.packages.model_package import ModelPackage
from mosel.tensors import DTYPES, from_bytes
from mosel.v1 import gateway_pb2

T = TypeVar("T")

# Gives up no modality: exactly all that was sent is run.
_RUN_ALL = "all"
_EFFORTS = {"cheapest": gateway_pb2.CHEAPEST, "best": gateway_pb2.BEST}
_FLAGS = {True: True, False: False}
_KNOWN = (
    *("min_accuracy", "latency_slo_ms", "modalities", "policy", "priority", "timeout", "effort", "late_ok"),
    *("max_accuracy_loss", "available"),
)
# The protocol's own, and MLServer's, which say how tensors are written or ask for what every answer is.
_IGNORED = {
    *("binary_data", "binary_data_size", "binary_data_output", "content_type"),
    "triton_enable_empty_final_response",
}
# What would change the meaning of a request if it were ignored; what is false, zero or empty asks for nothing.
_SEQUENCE = {"sequence_id", "sequence_start", "sequence_end"}
# numpy's kinds of arrays that values of a data type may come as.
_KINDS = {"b": "b", "i": "iu", "u": "iu", "f": "fiu"}
_NOT_AS_VALUES = {"FP16", "BF16"}


def check(
    request: InferRequest, packages: Mapping[str, ModelPackage], settings: Settings
) -> tuple[CheckedJob, Payloads]:
    """Checks every field of a request.

    Args:
        request: what the caller sent.
        packages: the models by name.
        settings: limits, and the policy.

    Returns:
        The job, and arrays [size, *shape] by modality over the bytes of the request.

    Raises:
        ModelNotFound: there is no such model, or not in this version.
        PayloadTooLarge: more items than one job may have.
        InvalidRequest: names the field, what it holds and what was expected.
    """
    package = served(request.model, request.version, packages)
    check_outputs(request, package)
    _refuse_unknown(request.parameters)
    payloads = check_payloads("inputs", _sent(request), package, settings.gateway.max_items_per_job)
    return _job(request.parameters, package, payloads, settings.selector.policy), payloads


def served(model: str, version: str, packages: Mapping[str, ModelPackage]) -> ModelPackage:
    """The model of this name; an empty version means whichever is served.

    Raises:
        ModelNotFound: there is none, or not in this version.
    """
    package = package_of(model, packages)
    if version not in ("", package.version):
        raise ModelNotFound(f"version of model '{model}' is '{version}'; expected '{package.version}' or none")
    return package


def call_deadline(request: InferRequest, call: Deadline, came: float) -> Deadline:
    """When the caller's own call ends: its parameter `timeout`, in microseconds, may be sooner than the call itself.

    Args:
        request: what the caller sent.
        call: when the call itself ends.
        came: when the request came, in seconds of `time.monotonic()`.

    Raises:
        InvalidRequest: `timeout` is no whole number of at least 0; 0 states none.
    """
    timeout = _whole("timeout", request.parameters.get("timeout", 0))
    if timeout < 0:
        raise InvalidRequest(f"timeout is {timeout}; expected microseconds, at least 0")
    # Not any number: a float has an end.
    return min(call, Deadline(came + min(timeout, 2**53) / 1e6), key=attrgetter("at")) if timeout else call


def elements_of(request: InferRequest) -> int:
    """How many elements the inputs have, as their caller says."""
    return sum(math.prod(tensor.shape) for tensor in request.inputs)


def _job(parameters: Parameters, package: ModelPackage, payloads: Payloads, own_policy: str) -> CheckedJob:
    readers: Mapping[str, Callable[[str, Parameter], Any]] = {
        "min_accuracy": _number,
        "max_accuracy_loss": _number,
        "latency_slo_ms": _number,
        "modalities": _names,
        "available": _names,
        "priority": lambda name, value: checked_priority(_whole(name, value)),
        "effort": partial(_one_of, _EFFORTS),
        "late_ok": partial(_one_of, _FLAGS),
    }
    fields = {name: read(name, parameters[name]) for name, read in readers.items() if name in parameters}
    job = check_fields("inputs", gateway_pb2.PredictRequest(model=package.name, **fields), package, payloads)
    policy = _one_of({name: name for name in (_RUN_ALL, own_policy)}, "policy", parameters.get("policy", own_policy))
    return replace(job, exact=job.exact or policy == _RUN_ALL)


def _refuse_unknown(parameters: Parameters) -> None:
    for name, value in parameters.items():
        if name in _SEQUENCE:
            if value:
                raise InvalidRequest(f"{name} is {value!r}; expected none: requests here are not parts of a sequence")
        elif name not in _KNOWN and name not in _IGNORED:
            raise InvalidRequest(f"parameters has '{name}'; expected some of {', '.join(_KNOWN)}")


def _sent(request: InferRequest) -> Iterator[SentPayload]:
    """The inputs, each once."""
    seen: dict[str, int] = {}
    for index, tensor in enumerate(request.inputs):
        field = f"inputs[{index}] '{tensor.name}'"
        if tensor.name in seen:
            raise InvalidRequest(f"{field} was sent as inputs[{seen[tensor.name]}] already; expected each input once")
        seen[tensor.name] = index
        if unknown := [parameter for parameter in tensor.parameters if parameter not in _IGNORED]:
            raise InvalidRequest(
                f"{field} has the parameter '{unknown[0]}'; expected its data in the request, and none"
            )
        dtype = tensor.datatype or "missing"
        yield SentPayload(tensor.name, field, "datatype", dtype, tensor.shape, partial(_read, tensor, field))


def _read(tensor: InputTensor, field: str) -> NDArray[np.generic]:
    """The elements of a tensor whose datatype and shape are known to be sound."""
    if tensor.raw is not None:
        return from_bytes(tensor.datatype, tensor.shape, tensor.raw, field, field)
    if tensor.datatype in _NOT_AS_VALUES:
        raise InvalidRequest(f"{field} has no bytes; {tensor.datatype} can be sent as raw bytes only")
    expected = math.prod(tensor.shape)
    if len(tensor.values) != expected:
        raise InvalidRequest(
            f"{field} has {len(tensor.values)} values; {tensor.datatype} {list(tensor.shape)} expects {expected}"
        )
    return _typed(tensor, field).reshape(tensor.shape)


def _typed(tensor: InputTensor, field: str) -> NDArray[np.generic]:
    dtype = DTYPES[tensor.datatype]
    try:
        # An array already, or a protobuf's own kind of list.
        values = np.asarray(tensor.values if isinstance(tensor.values, np.ndarray) else list(tensor.values))
    except (ValueError, OverflowError):
        values = np.empty((), object)
    if values.ndim != 1 or values.dtype.kind not in _KINDS[dtype.kind]:
        raise InvalidRequest(f"{field} has values that are no {tensor.datatype}; expected a flat list of such")
    if dtype.kind in "iu":
        limits, least, most = np.iinfo(dtype.str), values.min(), values.max()
        if least < limits.min or most > limits.max:
            outside = least if least < limits.min else most
            raise InvalidRequest(
                f"{field} has the value {outside}; {tensor.datatype} expects {limits.min} to {limits.max}"
            )
    with np.errstate(over="ignore"):  # what is too large becomes infinite, which is refused
        return values.astype(dtype)


def _number(name: str, value: Parameter) -> float:
    """A number, or its decimal form: some clients know parameters of text only."""
    try:
        if not isinstance(value, bool):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise InvalidRequest(f"{name} is {value!r}; expected a number")


def _whole(name: str, value: Parameter) -> int:
    try:
        if isinstance(value, int | str) and not isinstance(value, bool):
            return int(value)
    except ValueError:
        pass
    raise InvalidRequest(f"{name} is {value!r}; expected a whole number")


def _names(name: str, value: Parameter) -> list[str]:
    if isinstance(value, str):
        names = [part.strip() for part in value.split(",")]
        if all(names):
            return names
    raise InvalidRequest(f"{name} is {value!r}; expected names separated by commas")


def _one_of(choices: Mapping[Any, T], name: str, value: Parameter) -> T:
    if value in choices:
        return choices[value]
    raise InvalidRequest(f"{name} is {value!r}; expected {' or '.join(map(str, choices)).lower()}")
