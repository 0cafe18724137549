"""Messages of the Open Inference Protocol into its words, and back."""

from collections.abc import Mapping
from typing import Any

from gateway.inference.messages import ModelInferResponse
from gateway.inference.responses import raw_of
from gateway.inference.words import InferRequest, InferResponse, InputTensor, Parameter, Parameters
from mosel.errors import InvalidRequest

# Where the elements of a tensor are, unless they are raw bytes.
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
_PARAMETERS: Mapping[type, str] = {
    bool: "bool_param",
    int: "int64_param",
    float: "double_param",
    str: "string_param",
}


def request_from(message: Any) -> InferRequest:
    """A ModelInferRequest in words.

    Raises:
        InvalidRequest: the message contradicts itself.
    """
    # Once: protobuf copies the bytes at each access.
    raw = list(message.raw_input_contents)
    if raw and len(raw) != len(message.inputs):
        raise InvalidRequest(
            f"raw_input_contents has {len(raw)} entries; expected none, or one for each of {len(message.inputs)} inputs"
        )
    return InferRequest(
        model=message.model_name,
        version=message.model_version,
        id=message.id,
        parameters=_parameters("parameters", message.parameters),
        inputs=[
            _input(f"inputs[{index}] '{tensor.name}'", tensor, raw[index] if raw else None)
            for index, tensor in enumerate(message.inputs)
        ],
        outputs=[tensor.name for tensor in message.outputs],
        output_parameters={
            tensor.name: _parameters(f"outputs[{index}] '{tensor.name}'.parameters", tensor.parameters)
            for index, tensor in enumerate(message.outputs)
            if tensor.parameters
        },
    )


def message_from(response: InferResponse) -> Any:
    """A response in words as a ModelInferResponse."""
    message = ModelInferResponse(model_name=response.model, model_version=response.version, id=response.id)
    for name, value in response.parameters.items():
        setattr(message.parameters[name], _PARAMETERS[type(value)], value)
    for tensor in response.outputs:
        message.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.array.shape)
        message.raw_output_contents.append(raw_of(tensor))
    return message


def _input(field: str, tensor: Any, raw: bytes | None) -> InputTensor:
    filled = [entry.name for entry, _ in tensor.contents.ListFields()]
    if filled and raw is not None:
        raise InvalidRequest(f"{field} has contents beside raw_input_contents; expected one of them")
    expected = _CONTENTS.get(tensor.datatype)
    if expected and filled not in ([], [expected]):
        raise InvalidRequest(f"{field}.contents has {', '.join(filled)}; {tensor.datatype} expects {expected}")
    return InputTensor(
        name=tensor.name,
        datatype=tensor.datatype,
        shape=tuple(tensor.shape),
        raw=raw,
        values=getattr(tensor.contents, expected) if expected else (),
        parameters=_parameters(f"{field}.parameters", tensor.parameters),
    )


def _parameters(field: str, parameters: Mapping[str, Any]) -> Parameters:
    found: dict[str, Parameter] = {}
    for name, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise InvalidRequest(
                f"{field} has '{name}' without a value; expected one of {', '.join(_PARAMETERS.values())}"
            )
        found[name] = getattr(parameter, kind)
    return found
