"""What callers get wrong is refused before anything is sent, with one kind of error and one clear line."""

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from mosel.client import AsyncClient, Client, Retry
from mosel.client.demands import spec_of
from mosel.errors import InvalidRequest
from mosel.v1 import gateway_pb2

# Nobody listens there: what is sent after all fails with another error.
NOWHERE = "127.0.0.1:1"
PEN = {"pen": np.zeros((2, 3), np.float32)}

Ask = Callable[..., Awaitable[object]]


async def _blocking(method: str, *arguments: Any, **more: Any) -> object:
    with Client(NOWHERE, retries=None) as client:
        return getattr(client, method)(*arguments, **more)


async def _asynchronous(method: str, *arguments: Any, **more: Any) -> object:
    async with AsyncClient(NOWHERE, retries=None) as client:
        found = getattr(client, method)(*arguments, **more)
        return await found if isinstance(found, Awaitable) else found


CLIENTS = pytest.mark.parametrize("call", [_blocking, _asynchronous], ids=["Client", "AsyncClient"])
METHODS = pytest.mark.parametrize(
    ("method", "arguments"),
    [("predict", ("digits", PEN)), ("plan", ("digits", 2)), ("submit_job", ("digits", PEN))],
    ids=["predict", "plan", "submit_job"],
)

NAMES = "min_accuracy, max_accuracy_loss, latency_slo_ms, modalities, effort, late_ok, priority"
WRONG = [
    ({"min_acuracy": 0.99}, f"min_acuracy is 0.99 (float), and no demand has that name; expected some of {NAMES}; "),
    ({"timeout": 3}, f"timeout is 3 (int), and no demand has that name; expected some of {NAMES}; did you mean timeo"),
    ({"voltage": None}, f"voltage is None (NoneType), and no demand has that name; expected some of {NAMES}"),
    ({"min_accuracy": "0.5"}, "min_accuracy is '0.5' (str); expected a number from 0 to 1"),
    ({"min_accuracy": True}, "min_accuracy is True (bool); expected a number from 0 to 1"),
    ({"min_accuracy": np.bool_(True)}, "min_accuracy is np.True_ (bool"),
    ({"min_accuracy": np.full(3, 0.5)}, "min_accuracy is ndarray of shape [3]; expected a number from 0 to 1"),
    ({"min_accuracy": [0.5]}, "min_accuracy is [0.5] (list); expected a number from 0 to 1"),
    ({"min_accuracy": math.nan}, "min_accuracy is nan; expected a number from 0 to 1"),
    ({"min_accuracy": 1.5}, "min_accuracy is 1.5; expected a number from 0 to 1"),
    ({"max_accuracy_loss": "0.5"}, "max_accuracy_loss is '0.5' (str); expected a number from 0 to 1"),
    ({"max_accuracy_loss": math.nan}, "max_accuracy_loss is nan; expected a number from 0 to 1"),
    ({"max_accuracy_loss": 0.1, "min_accuracy": 0.5}, "min_accuracy and max_accuracy_loss; expected one of them"),
    ({"min_accuracy": 10**400}, "min_accuracy is inf; expected a number from 0 to 1"),
    ({"latency_slo_ms": -1}, "latency_slo_ms is -1; expected a positive number of milliseconds"),
    ({"latency_slo_ms": 0}, "latency_slo_ms is 0; expected a positive number of milliseconds"),
    ({"latency_slo_ms": math.inf}, "latency_slo_ms is inf; expected a positive number of milliseconds"),
    ({"latency_slo_ms": "5"}, "latency_slo_ms is '5' (str); expected a positive number of milliseconds"),
    ({"modalities": "title"}, "modalities is 'title' (str); expected several names, such as ['image', 'pen']"),
    ({"modalities": 3}, "modalities is 3 (int); expected several names, such as ['image', 'pen']"),
    ({"modalities": np.array("pen")}, "modalities is array('pen', dtype="),
    ({"modalities": ["pen", 3]}, "modalities has 3 (int); expected several names, such as ['image', 'pen']"),
    ({"effort": "most"}, "effort is 'most'; expected cheapest or best"),
    ({"effort": ["best"]}, "effort is ['best'] (list); expected cheapest or best"),
    ({"late_ok": 1}, "late_ok is 1 (int); expected True or False"),
    ({"late_ok": "no"}, "late_ok is 'no' (str); expected True or False"),
    ({"priority": 0}, "priority is 0; expected a whole number from 1 (goes first) to 9"),
    ({"priority": 2.0}, "priority is 2.0 (float); expected a whole number from 1 (goes first) to 9"),
    ({"priority": True}, "priority is True (bool); expected a whole number from 1 (goes first) to 9"),
    ({"timeout_s": "5"}, "timeout_s is '5' (str); expected a positive number of seconds, at most 1e+09"),
    ({"timeout_s": None}, "timeout_s is None (NoneType); expected a positive number of seconds, at most 1e+09"),
    ({"timeout_s": 0}, "timeout_s is 0; expected a positive number of seconds, at most 1e+09"),
    ({"timeout_s": math.nan}, "timeout_s is nan; expected a positive number of seconds, at most 1e+09"),
    ({"timeout_s": math.inf}, "timeout_s is inf; expected a positive number of seconds, at most 1e+09"),
]


@CLIENTS
@METHODS
@pytest.mark.parametrize(("demand", "message"), WRONG, ids=[repr(demand) for demand, _ in WRONG])
async def test_a_wrong_demand_is_named(
    call: Ask, method: str, arguments: tuple[object, ...], demand: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await call(method, *arguments, **demand)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


@CLIENTS
@METHODS
@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [("min_acuracy", "min_accuracy"), ("modality", "modalities"), ("timeout", "timeout_s"), ("lateok", "late_ok")],
)
async def test_what_a_misspelt_name_may_mean_is_said(
    call: Ask, method: str, arguments: tuple[object, ...], misspelt: str, meant: str
) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{misspelt} is .*; did you mean {meant}\?$"):
        await call(method, *arguments, **{misspelt: 0.5})


@CLIENTS
@METHODS
async def test_the_model_is_a_name(call: Ask, method: str, arguments: tuple[object, ...]) -> None:
    with pytest.raises(InvalidRequest, match=r"^model is 3 \(int\); expected the model's name$"):
        await call(method, 3, *arguments[1:])


@CLIENTS
@pytest.mark.parametrize(("method", "field"), [("predict", "payloads"), ("submit_job", "items")])
async def test_payloads_are_in_a_mapping(call: Ask, method: str, field: str) -> None:
    for payloads, message in (("pen", r"'pen' \(str\)"), (3, r"3 \(int\)"), (None, r"None \(NoneType\)")):
        with pytest.raises(InvalidRequest, match=rf"^{field} is {message}; expected a mapping from modality to array"):
            await call(method, "digits", payloads)
    with pytest.raises(InvalidRequest, match=rf"^{field} has the key 0 \(int\); expected a mapping from modality"):
        await call(method, "digits", {0: PEN["pen"]})


@CLIENTS
async def test_predict_takes_no_batches(call: Ask) -> None:
    with pytest.raises(InvalidRequest, match=r"^payloads is ndarray of shape \[2, 3\]; expected a mapping"):
        await call("predict", "digits", PEN["pen"])
    with pytest.raises(InvalidRequest, match=r"^payloads is \[.*\] \(list\); expected a mapping from modality to"):
        await call("predict", "digits", [PEN])


@CLIENTS
@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0"), (-2, "-2"), (2**32, "4294967296"), (2.0, r"2\.0 \(float\)"), (True, r"True \(bool\)")],
)
async def test_sizes_are_whole_numbers(call: Ask, size: object, shown: str) -> None:
    for method, arguments, more in (("plan", (size,), {}), ("submit_job", ([PEN],), {"size": size})):
        with pytest.raises(
            InvalidRequest, match=rf"^size is {shown}; expected at least one item, and at most 4294967295$"
        ):
            await call(method, "digits", *arguments, **more)


async def _batches() -> AsyncIterator[dict[str, Any]]:
    yield PEN


async def test_a_blocking_client_takes_no_items_that_come_asynchronously() -> None:
    with pytest.raises(InvalidRequest, match=r"^items is .*\(async_generator\); expected .* AsyncClient takes these$"):
        await _blocking("submit_job", "digits", _batches(), size=2)


@CLIENTS
@pytest.mark.parametrize(
    ("method", "field"),
    [("job", "job_id"), ("cancel", "job_id"), ("load_model", "name"), ("unload_model", "name")],
)
async def test_ids_and_names_are_strings(call: Ask, method: str, field: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{field} is b'fruit' \(bytes\); expected "):
        await call(method, b"fruit")


@CLIENTS
@pytest.mark.parametrize("method", ["job", "cancel", "load_model", "unload_model", "models", "status"])
async def test_every_call_has_a_time_limit(call: Ask, method: str) -> None:
    arguments = () if method in ("models", "status") else ("fruit",)
    with pytest.raises(InvalidRequest, match=r"^timeout_s is -1; expected a positive number of seconds"):
        await call(method, *arguments, timeout_s=-1)


@pytest.mark.parametrize("client", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"address": 8001}, r"address is 8001 \(int\); expected host:port or unix:/path"),
        ({"token": 7}, r"token is a int; expected a str or None"),
        ({"tls": True}, r"tls is a bool; expected a Tls or None"),
        ({"retries": 3}, r"retries is a int; expected a Retry or None"),
        ({"max_message_mib": "64"}, r"max_message_mib is '64' \(str\); expected 1 to 2047"),
        ({"max_message_mib": 2048}, r"max_message_mib is 2048; expected 1 to 2047"),
    ],
)
async def test_a_client_says_what_it_cannot_be_made_of(
    client: Callable[..., object], argument: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"^{message}$"):
        client(**({"address": NOWHERE} | argument))


@pytest.mark.parametrize("field", ["max_attempts", "wait_ms"])
def test_numbers_of_a_retry_are_numbers(field: str) -> None:
    arguments: dict[str, Any] = {field: "3"}
    with pytest.raises(InvalidRequest, match=rf"^{field} is '3' \(str\); expected"):
        Retry(**arguments)


def test_numbers_of_numpy_and_fractions_are_numbers() -> None:
    demand = {
        "min_accuracy": np.float32(0.5),
        "latency_slo_ms": Fraction(1, 2),
        "modalities": iter(np.array(["pen", "image"])),
        "late_ok": np.bool_(True),
        "priority": np.int64(2),
        "effort": None,
    }
    assert spec_of("digits", np.int32(3), demand) == gateway_pb2.JobSpec(  # type: ignore[arg-type]
        model="digits",
        size=3,
        min_accuracy=0.5,
        latency_slo_ms=0.5,
        modalities=["pen", "image"],
        late_ok=True,
        priority=2,
    )
