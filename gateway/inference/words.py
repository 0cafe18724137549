"""What the Open Inference Protocol says, whether it came as protobuf or as JSON. Knows neither."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Parameter = bool | int | float | str
Parameters = Mapping[str, Parameter]


@dataclass(frozen=True)
class InputTensor:
    """One input as the caller sent it; nothing of it is checked yet.

    Attributes:
        name: of a modality.
        datatype: as the protocol writes it, `FP32`.
        shape: [B, ...].
        raw: its bytes, little endian and row-major; None if they came as values.
        values: its elements, flat and row-major; empty if they came as bytes.
        parameters: of this input.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: bytes | memoryview | None = None
    values: Sequence[object] | NDArray[np.generic] = ()
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class OutputTensor:
    """One output.

    Attributes:
        name: see `gateway.inference.responses.output_tensors`.
        datatype: as the protocol writes it.
        array: [B, ...]; BF16 as uint16; BYTES as an object array of bytes.
    """

    name: str
    datatype: str
    array: NDArray[np.generic]


@dataclass(frozen=True)
class InferRequest:
    """A request to infer.

    Attributes:
        model, version: which model; an empty version means whichever is served.
        id: echoed.
        parameters: of the request, see `gateway.inference.requests`.
        inputs: any subset of the model's modalities.
        outputs: names that are asked for; empty: the model's output.
        output_parameters: of those that have any, by name.
    """

    model: str
    version: str = ""
    id: str = ""
    parameters: Parameters = field(default_factory=dict)
    inputs: Sequence[InputTensor] = ()
    outputs: Sequence[str] = ()
    output_parameters: Mapping[str, Parameters] = field(default_factory=dict)


@dataclass(frozen=True)
class InferResponse:
    """The answer to one; attributes as there."""

    model: str
    version: str
    id: str
    parameters: Parameters
    outputs: Sequence[OutputTensor]
