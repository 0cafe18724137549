"""The JSON that callers of the Open Inference Protocol send: what may be in it, and how it is read."""

import json
import reprlib
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from gateway.inference.words import Parameter
from mosel.errors import InvalidRequest
from mosel.tensors import MAX_RANK

M = TypeVar("M", bound="Message")

_MAX_TEXT = 1024
# Of one object; each that is wrong costs the time of an error.
_MAX_MEMBERS = 256
_INT64 = range(-(2**63), 2**63)


def _parameter(value: object) -> Parameter:
    # Their ranges are those of the same parameters over gRPC.
    if isinstance(value, bool | float) or (isinstance(value, int) and value in _INT64):
        return value
    if isinstance(value, str) and len(value) <= _MAX_TEXT and not any("\ud800" <= c <= "\udfff" for c in value):
        return value
    raise PydanticCustomError("parameter", "Input should be true, false, a number of 64 bits or a short text")


def _without_nulls(members: object) -> object:
    if not isinstance(members, dict):
        return members
    return {name: value for name, value in members.items() if value is not None}


# The bound also has the text checked for characters that UTF-8 cannot hold.
Text = Annotated[str, Field(max_length=_MAX_TEXT)]
Dimension = Annotated[int, Field(ge=_INT64.start, lt=_INT64.stop)]
ParameterJson = Annotated[
    Any, PlainValidator(_parameter), WithJsonSchema({"type": ["boolean", "integer", "number", "string"]})
]
ParametersJson = Annotated[dict[Text, ParameterJson], BeforeValidator(_without_nulls)]


class Message(BaseModel):
    """A JSON object that a caller sends.

    What is null is absent, and what the protocol does not have is ignored: KServe's own client sends both.
    """

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)
    _null_is_absent = model_validator(mode="before")(_without_nulls)


class InputJson(Message):
    """One input; its elements are `data`, or bytes behind the JSON that `parameters.binary_data_size` counts."""

    name: Text
    datatype: Text
    shape: Annotated[list[Dimension], FailFast(), Field(max_length=MAX_RANK)]
    data: list[Any] | None = Field(None, description="Row-major: flat, or nested as the shape says.")
    parameters: ParametersJson = {}


class RequestedOutputJson(Message):
    """One output that is asked for."""

    name: Text
    parameters: ParametersJson = {}


class InferRequestJson(Message):
    """A request to infer."""

    id: Text = ""
    parameters: ParametersJson = {}
    inputs: Annotated[list[InputJson], FailFast()]
    outputs: Annotated[list[RequestedOutputJson], FailFast()] = []


class IndexRequestJson(Message):
    """Which models to list."""

    ready: bool = False


class LoadRequestJson(Message):
    """A request to load or unload a model."""

    parameters: ParametersJson = {}


def read(data: bytes | bytearray | memoryview, message: type[M]) -> M:
    """Reads JSON.

    Args:
        data: UTF-8.
        message: what it should be.

    Raises:
        InvalidRequest: it is not; says where, what is there and what was expected.
    """
    content = _parse(data)
    try:
        return message.model_validate(content)
    except ValidationError as error:
        raise InvalidRequest(_told(error.errors(include_url=False)[0])) from None


def _parse(data: bytes | bytearray | memoryview) -> object:
    try:
        return _DECODER.decode(str(data, "utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the JSON is no UTF-8: byte {error.start} is {data[error.start]:#04x}") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"the JSON is wrong at character {error.pos}: {error.msg}") from None
    except RecursionError:
        raise InvalidRequest(f"the JSON is nested too deeply; expected at most {MAX_RANK} dimensions of data") from None
    except ValueError:
        raise InvalidRequest("the JSON has a whole number of too many digits") from None


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(pairs) > _MAX_MEMBERS:
        raise InvalidRequest(f"the JSON has an object of {len(pairs)} members; expected at most {_MAX_MEMBERS}")
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"the JSON has {reprlib.repr(twice)} twice in one object; expected it once")
    return members


def _no_number(name: str) -> NoReturn:
    raise InvalidRequest(f"the JSON has {name}; expected numbers as JSON knows them")


def _float(digits: str) -> float:
    return float(digits)


def _int(digits: str) -> int:
    return int(digits)


# Numbers go through Python functions, though C is faster: other threads get their turn between them, and never while C
# parses. So a large request holds up no other.
_DECODER = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_constant=_no_number,
    parse_float=_float,
    parse_int=_int,
)


def _told(error: ErrorDetails) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    field, message = f"{path or 'the JSON'} is {reprlib.repr(error['input'])}", error["msg"]
    match error["type"]:
        case "missing":
            return f"{path} is missing"
        case "model_type":
            return f"{field}; expected an object"
        case "string_unicode":
            return f"{field}; expected text that UTF-8 can hold"
    expected = message.removeprefix("Input should be ")
    return f"{field}: {message}" if expected == message else f"{field}; expected {expected}"
