"""From the data plane's answer to a response of the Open Inference Protocol, whatever it is written as."""

import numpy as np
from numpy.typing import NDArray

from gateway.inference.words import InferRequest, InferResponse, OutputTensor, Parameter
from gateway.jobs.answers import Answer, labels_of, words_of
from mosel.errors import InvalidRequest
from mosel.packages.model_package import ModelPackage

# Outputs of every model, given only to those who ask for them. The model's own output wins if it has such a name.
_MODALITIES, _LABELS = "modalities", "labels"
_CLASSIFICATION = "classification"
# How tensors are written is not said here.
_IGNORED = {"binary_data", "content_type"}


def output_tensors(package: ModelPackage) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What may be asked of a model, its own output first: datatype and shape of one item by name."""
    own = package.output
    outputs = {own.name: (own.dtype, own.shape)}
    if own.labels:
        outputs.setdefault(_LABELS, ("BYTES", ()))
    outputs.setdefault(_MODALITIES, ("BYTES", ()))
    return outputs


def check_outputs(request: InferRequest, package: ModelPackage) -> None:
    """Checks what is asked for.

    Raises:
        InvalidRequest: there is no such output, it is asked for twice, or a parameter of it is wrong.
    """
    known = output_tensors(package)
    for index, name in enumerate(request.outputs):
        field = f"outputs[{index}] '{name}'"
        if name not in known:
            raise InvalidRequest(f"{field} is no output of '{package.name}'; expected some of {', '.join(known)}")
        if name in request.outputs[:index]:
            raise InvalidRequest(f"{field} was asked for already; expected each output once")
        for parameter, value in request.output_parameters.get(name, {}).items():
            if parameter == _CLASSIFICATION and name == package.output.name:
                _check_classes(field, value, package)
            elif parameter not in _IGNORED:
                raise InvalidRequest(f"{field} has the parameter '{parameter}'; expected none")


def respond(request: InferRequest, answer: Answer) -> InferResponse:
    """The response to a request whose outputs were checked."""
    package = answer.job.package
    own = package.output.name
    away = ",".join(answer.unavailable_modalities)
    return InferResponse(
        model=package.name,
        version=package.version,
        id=request.id,
        parameters={
            "job_id": answer.job_id.hex(),
            "modalities_used": ",".join(sorted(set(answer.modality_sets))),
            "expected_accuracy": answer.expected_accuracy,
            "queue_ms": answer.queue_ms,
            "compute_ms": answer.compute_ms,
            "deadline_slack_ms": answer.deadline_slack_ms,
            **({"modalities_unavailable": away} if away else {}),
            **({"upload": ",".join(answer.upload.modalities)} if answer.upload else {}),
            **words_of(answer.assurance),
        },
        outputs=[
            _output(name, request.output_parameters.get(name, {}).get(_CLASSIFICATION), answer)
            for name in request.outputs or (own,)
        ],
    )


def raw_of(tensor: OutputTensor) -> bytes:
    """The bytes of an output, little endian and row-major; before each element of BYTES its length as 4 bytes."""
    if tensor.datatype != "BYTES":
        return tensor.array.tobytes()
    elements: list[bytes] = tensor.array.ravel().tolist()
    return b"".join(len(element).to_bytes(4, "little") + element for element in elements)


def _check_classes(field: str, value: Parameter, package: ModelPackage) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidRequest(f"{field} has {_CLASSIFICATION} {value!r}; expected a whole number of at least 1")
    if len(package.output.shape) != 1:
        shape = list(package.output.shape)
        raise InvalidRequest(f"{field} has {_CLASSIFICATION}; its items have shape {shape}; expected one dimension")


def _output(name: str, classes: Parameter | None, answer: Answer) -> OutputTensor:
    package = answer.job.package
    if name != package.output.name:
        texts = labels_of(answer.job, answer.output) if name == _LABELS else answer.modality_sets
        return OutputTensor(name, "BYTES", _bytes(texts))
    if classes is None:
        return OutputTensor(name, package.output.dtype, answer.output)
    return OutputTensor(name, "BYTES", _largest(answer.output, int(classes), package.output.labels))


def _largest(output: NDArray[np.generic], count: int, labels: tuple[str, ...]) -> NDArray[np.object_]:
    """The largest values of each item as the classification extension writes them, `value:index:label`."""
    order = output.argsort(axis=-1, kind="stable")[:, ::-1][:, :count]
    texts = [
        f"{row[index]:f}:{index}{f':{labels[index]}' if labels else ''}"
        for row, indices in zip(output, order, strict=True)
        for index in indices
    ]
    return _bytes(texts).reshape(order.shape)


def _bytes(texts: list[str]) -> NDArray[np.object_]:
    array = np.empty(len(texts), object)
    array[:] = [text.encode() for text in texts]
    return array
