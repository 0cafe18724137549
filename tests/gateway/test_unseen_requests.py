"""What is refused before it is a job counts and is logged like every other request, in every protocol."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from tests.gateway.inference.http_support import INFER, Http, speaking_http
from tests.gateway.scripted import Gateway
from tests.mosel.observability.test_metrics import key, samples

GARBAGE = b"\xff\xff no message"


@pytest.fixture
async def http(gateway: Gateway) -> AsyncIterator[Http]:
    async with speaking_http(gateway, max_json_mib=1) as http:
        yield http


async def unary(gateway: Gateway, method: str) -> None:
    call: Any = gateway.channel.unary_unary(method)
    with pytest.raises(grpc.aio.AioRpcError):
        await call(GARBAGE, timeout=30)


async def stream(gateway: Gateway, method: str) -> None:
    call: Any = gateway.channel.stream_stream(method)
    try:
        async for _ in call(iter([GARBAGE]), timeout=30):
            pass
    except grpc.aio.AioRpcError:
        pass


Ask = Callable[[Gateway, Http], Awaitable[object]]
REQUESTS: dict[str, tuple[Ask, str, str, str, str]] = {
    "Predict": (
        lambda gateway, http: unary(gateway, "/mosel.v1.Gateway/Predict"),
        "Predict",
        "",
        "INVALID_ARGUMENT",
        "the request's bytes are no message that Predict knows",
    ),
    "SubmitJob": (
        lambda gateway, http: stream(gateway, "/mosel.v1.Gateway/SubmitJob"),
        "SubmitJob",
        "",
        "INVALID_ARGUMENT",
        "the stream has bytes that are no message",
    ),
    "ModelInfer": (
        lambda gateway, http: unary(gateway, "/inference.GRPCInferenceService/ModelInfer"),
        "ModelInfer",
        "",
        "INVALID_ARGUMENT",
        "the request's bytes are no message that ModelInfer knows",
    ),
    "ModelStreamInfer": (
        lambda gateway, http: stream(gateway, "/inference.GRPCInferenceService/ModelStreamInfer"),
        "ModelStreamInfer",
        "",
        "INVALID_ARGUMENT",
        "a request's bytes are no message that ModelStreamInfer knows",
    ),
    "JSON that ends early": (
        lambda gateway, http: http.client.post(INFER, content=b"{"),
        f"POST {INFER}",
        "fruit",
        "INVALID_ARGUMENT",
        "",
    ),
    "too much JSON": (
        lambda gateway, http: http.client.post(INFER, content=b" " * (2 << 20)),
        f"POST {INFER}",
        "fruit",
        "INVALID_ARGUMENT",
        "the body has",
    ),
    "a body that is not compressed": (
        lambda gateway, http: http.client.post(INFER, content=b"{", headers={"content-encoding": "gzip"}),
        f"POST {INFER}",
        "fruit",
        "INVALID_ARGUMENT",
        "the body ends before its gzip data does",
    ),
    "no such model": (
        lambda gateway, http: http.client.post("/v2/models/pear/infer", content=b"{"),
        "POST /v2/models/pear/infer",
        "",
        "NOT_FOUND",
        "model is 'pear'; expected one of fruit",
    ),
}


@pytest.mark.parametrize(("ask", "method", "model", "status", "reason"), REQUESTS.values(), ids=REQUESTS.keys())
async def test_a_request_that_is_refused_unread_is_seen_once(
    gateway: Gateway,
    http: Http,
    caplog: pytest.LogCaptureFixture,
    ask: Ask,
    method: str,
    model: str,
    status: str,
    reason: str,
) -> None:
    caplog.set_level(logging.INFO, "gateway.requests")
    await ask(gateway, http)
    (line,) = [vars(record) for record in caplog.records if record.name == "gateway.requests"]
    assert (line["method"], line["status"], line["size"]) == (method, status, 0)
    assert line["reason"].startswith(reason)
    found = samples(await gateway.data_plane.metrics.page())
    assert found[key("mosel_requests_total", model=model, status=status, service="gateway")] == 1
    assert sum(count for (name, _), count in found.items() if name == "mosel_refused_total") == 1
    counts = gateway.data_plane.statistics()
    assert (counts["requests"], counts["jobs_remembered"]) == (1, 0)
