"""The Open Inference Protocol over HTTP with real services."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from mosel.client import Client
from mosel.launcher import Launcher
from tests.gateway.inference.json_support import Body, infer_body, outputs_of

PLACEMENTS = ("single", "services")
Payloads = dict[str, NDArray[Any]]
Draw = Callable[..., Payloads]
Directly = Callable[[Payloads, Iterable[str]], NDArray[Any]]
Counters = Callable[[Client], dict[str, dict[str, int]]]
Until = Callable[..., None]

INFER = "/v2/models/fruit/infer"
SETS = [["photo"], ["scent"], ["photo", "scent"]]


@pytest.fixture
def held(client: Client, gateway_holds: Callable[[Client], int]) -> Callable[[], int]:
    """Jobs, slots and bytes that the gateway holds."""
    return lambda: gateway_holds(client)


@pytest.fixture(autouse=True)
def nothing_is_left(held: Callable[[], int], until: Until) -> Iterator[None]:
    yield
    until(lambda: not held(), "nothing is held")


@pytest.fixture
def http(services: Launcher) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{services.http_address}", timeout=60, trust_env=False) as client:
        yield client


def infer(http: httpx.Client, body: Body) -> httpx.Response:
    return http.post(INFER, content=body.content, headers=dict(body.headers))


@pytest.mark.parametrize("modalities", SETS, ids="+".join)
@pytest.mark.parametrize("items", [1, 5, 64])
@pytest.mark.parametrize("binary", [False, True])
def test_answers_are_what_the_networks_say(
    http: httpx.Client, draw: Draw, directly: Directly, modalities: list[str], items: int, binary: bool
) -> None:
    payloads = {name: array for name, array in draw(items, seed=items).items() if name in modalities}
    outputs = ["probabilities", "labels", "modalities"]
    body = infer_body(payloads, binary=binary, outputs=outputs, binary_data_output=binary, policy="all")
    response = outputs_of(infer(http, body))
    expected = directly(payloads, modalities)
    np.testing.assert_allclose(response["probabilities"], expected, atol=1e-5)
    assert response["modalities"].tolist() == ["+".join(modalities)] * items
    assert response["labels"].tolist() == [("apple", "lemon", "plum")[index] for index in expected.argmax(-1)]


def test_a_job_as_large_as_a_job_may_be(http: httpx.Client, draw: Draw, directly: Directly) -> None:
    payloads = draw(1024)
    response = infer(http, infer_body(payloads, binary=True, policy="all"))
    np.testing.assert_allclose(outputs_of(response)["probabilities"], directly(payloads, payloads), atol=1e-5)


def test_large_json(http: httpx.Client, draw: Draw, directly: Directly) -> None:
    payloads = draw(300)
    response = infer(http, infer_body(payloads, policy="all"))
    np.testing.assert_allclose(outputs_of(response)["probabilities"], directly(payloads, payloads), atol=1e-5)


def test_each_floor_gets_the_sets_that_meet_it(http: httpx.Client, draw: Draw, directly: Directly) -> None:
    payloads = draw(5, seed=4)
    # What mixes cost is measured, and some items with their photos alone do not take the mean below 0.9.
    for floor, allowed in ((0.9, {"photo", "photo+scent"}), (0.0, {"photo", "scent", "photo+scent"})):
        body = infer_body(payloads, outputs=["probabilities", "modalities"], min_accuracy=floor)
        response = infer(http, body)
        outputs, said = outputs_of(response), response.json()["parameters"]
        sets = outputs["modalities"]
        assert {*sets} <= allowed
        assert said["modalities_used"] == ",".join(sorted({*sets}))
        assert said["expected_accuracy"] >= floor
        for used in {*sets}:
            chosen = sets == used
            expected = directly(payloads, used.split("+"))[chosen]
            np.testing.assert_allclose(outputs["probabilities"][chosen], expected, atol=1e-5)


def test_what_cannot_be_had(http: httpx.Client, draw: Draw) -> None:
    scents = {"scent": draw(1)["scent"]}
    for body, status, message in (
        (infer_body(scents, min_accuracy=0.9), 422, "with photo as well, photo+scent has 0."),
        (infer_body({"taste": scents["scent"]}), 400, "inputs has 'taste'; expected some of photo, scent"),
    ):
        response = infer(http, body)
        assert response.status_code == status
        assert message in response.json()["error"]
    response = http.post(INFER, content=bytes(65 * 2**20))
    assert response.status_code == 413
    assert response.json()["error"] == (
        f"the body has {65 * 2**20} bytes; "
        "expected at most 67108864 bytes (setting transport.max_message_mib): send fewer items"
    )


def test_a_hundred_callers_that_go_away_leave_nothing(
    services: Launcher, http: httpx.Client, draw: Draw, held: Callable[[], int], until: Until
) -> None:
    """Some before, some while and some after their jobs are run; the next request is answered."""
    body = infer_body(draw(64), binary=True)
    head = [f"POST {INFER} HTTP/1.1", "Host: here", f"Content-Length: {len(body.content)}"]
    head += [f"{name}: {value}" for name, value in body.headers.items()]
    request = "\r\n".join([*head, "\r\n"]).encode() + body.content
    host, port = services.http_address.split(":")

    async def go_away(number: int) -> None:
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(request[: len(request) - (number % 3 == 0)])
        await writer.drain()
        await asyncio.sleep(number % 10 / 1000)
        writer.transport.abort()

    async def all_of_them() -> None:
        await asyncio.gather(*(go_away(number) for number in range(100)))

    asyncio.run(all_of_them())
    until(lambda: not held(), "nothing is held")
    assert infer(http, body).status_code == 200


def test_http_and_grpc_stop_together(settings_with: Callable[..., Any], draw: Draw) -> None:
    settings = settings_with(transport={"gateway_arena_mib": 16, "encoder_arena_mib": 16})
    with Launcher(settings) as launcher:
        launcher.wait_ready(120)
        with httpx.Client(base_url=f"http://{launcher.http_address}", timeout=60, trust_env=False) as http:
            assert infer(http, infer_body(draw(1))).status_code == 200
            gateway = launcher.children["gateway"].process
            gateway.terminate()
            # An open connection keeps it no longer than it takes.
            assert gateway.wait(30) == 0
            with pytest.raises(httpx.TransportError):
                http.get("/v2/health/live")
