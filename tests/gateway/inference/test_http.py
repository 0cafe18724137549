"""The Open Inference Protocol over HTTP, with a selector that does what the test says."""

import asyncio
import gzip
import json
import logging
import random
import zlib
from collections.abc import Callable
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from gateway.inference import http as module
from gateway.inference import metadata
from mosel.v1 import selector_pb2
from tests.gateway.inference.http_support import INFER, Http, refusal, under_way
from tests.gateway.inference.json_support import LENGTH, Body, infer_body, outputs_of
from tests.gateway.scripted import Gateway, group, release_of

Payloads = dict[str, NDArray[Any]]
Draw = Callable[..., Payloads]


async def test_a_request_becomes_a_job_and_its_result_the_response(gateway: Gateway, http: Http, draw: Draw) -> None:
    parameters: dict[str, Any] = {"min_accuracy": 0.5, "latency_slo_ms": 9_000, "priority": 3, "effort": "best"}
    body = infer_body(draw(3), id="7", outputs=["modalities", "probabilities", "labels"], policy="all", **parameters)
    call, description = await under_way(gateway, http.infer(body))
    assert description.model == gateway.data_plane.packages["fruit"].id
    assert (description.size, list(description.modalities)) == (3, ["photo", "scent"])
    assert (description.min_accuracy, description.exact, description.priority) == (0.5, True, 3)
    assert 0 < description.budget_us <= 9_000_000
    gateway.selector.say(part=selector_pb2.JobPart(job_id=description.job_id, group=group("scent", 1)))
    groups = [group("photo+scent", 0, 2)]
    result = selector_pb2.JobResult(job_id=description.job_id, groups=groups, expected_accuracy=0.875, queue_us=1500)
    gateway.selector.say(result=result)
    gateway.selector.say(release=release_of(description))
    response = await call
    assert response.headers["content-type"] == "application/json"
    content = response.json()
    assert (content["id"], content["model_name"], content["model_version"]) == ("7", "fruit", "1")
    assert [(output["name"], output["shape"]) for output in content["outputs"]] == [
        ("modalities", [3]),
        ("probabilities", [3, 3]),
        ("labels", [3]),
    ]
    said = content["parameters"]
    assert 0 < said.pop("deadline_slack_ms") < 9_000
    assert said == {
        "job_id": description.job_id.hex(),
        "modalities_used": "photo+scent,scent",
        "expected_accuracy": 0.875,
        "queue_ms": 1.5,
        "compute_ms": 0.0,
    }
    outputs = outputs_of(response)
    assert outputs["modalities"].tolist() == ["photo+scent", "scent", "photo+scent"]
    np.testing.assert_array_equal(outputs["probabilities"][:, 1], [1, 2, 3])
    assert outputs["labels"].tolist() == ["lemon"] * 3
    await gateway.idle()


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("binary_output", [False, True])
@pytest.mark.parametrize("binary", [False, True])
async def test_tensors_as_json_and_as_bytes(
    gateway: Gateway,
    http: Http,
    draw: Draw,
    monkeypatch: pytest.MonkeyPatch,
    binary: bool,
    binary_output: bool,
    large: bool,
) -> None:
    if large:
        monkeypatch.setattr(module, "_OFF_LOOP_JSON_BYTES", 0)
        monkeypatch.setattr(module, "_OFF_LOOP_OUTPUTS", 0)
    payloads = draw(2)
    outputs = ["probabilities", {"name": "labels", "parameters": {"binary_data": not binary_output}}]
    body = infer_body(payloads, binary=binary, outputs=outputs, binary_data_output=binary_output)
    call, description = await under_way(gateway, http.infer(body, "/v2/models/fruit/versions/1/infer"))
    assert {name: list(ref.shape) for name, ref in description.payloads.items()} == {
        "photo": [2, 24, 24, 3],
        "scent": [2, 6],
    }
    gateway.answer(description)
    response = await call
    raw = {output["name"]: "data" not in output for output in json_of(response)["outputs"]}
    assert raw == {"probabilities": binary_output, "labels": not binary_output}
    assert response.headers["content-type"] == "application/octet-stream"
    outputs_read = outputs_of(response)
    np.testing.assert_array_equal(outputs_read["probabilities"][:, 1], [1, 2])
    assert outputs_read["labels"].tolist() == ["lemon"] * 2
    await gateway.idle()


def json_of(response: httpx.Response) -> Any:
    return json.loads(response.content[: int(response.headers[LENGTH])])


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_bodies_may_be_compressed_both_ways(
    gateway: Gateway, http: Http, draw: Draw, encoding: str, compress: Callable[[bytes], bytes]
) -> None:
    body = infer_body(draw(150), binary=True, outputs=["probabilities", "modalities"])
    sent = Body(compress(body.content), body.headers)
    headers = {"Content-Encoding": encoding, "Accept-Encoding": f"br, {encoding};q=0.5"}
    call, description = await under_way(gateway, http.infer(sent, **headers))
    assert description.size == 150
    gateway.answer(description)
    response = await call
    assert response.headers["content-encoding"] == encoding
    np.testing.assert_array_equal(outputs_of(response)["probabilities"][:, 1], np.arange(1, 151))
    await gateway.idle()


@pytest.mark.parametrize("accepted", ["identity", "gzip;q=0", "br", "gzip; q=0.0, identity"])
async def test_nobody_gets_a_compressed_body_unasked(gateway: Gateway, http: Http, draw: Draw, accepted: str) -> None:
    body = infer_body(draw(150), binary=True)
    call, description = await under_way(gateway, http.infer(body, **{"Accept-Encoding": accepted}))
    gateway.answer(description)
    assert "content-encoding" not in (await call).headers


# What is there


async def test_health(gateway: Gateway, http: Http, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {"/v2/health/live": "live", "/v2/health/ready": "ready", "/v2/models/fruit/ready": "ready"}
    paths["/v2/models/fruit/versions/1/ready"] = "ready"
    for path, word in paths.items():
        response = await http.client.get(path)
        assert (response.status_code, response.json()[word]) == (200, True)
    monkeypatch.setattr(gateway.data_plane, "is_ready", lambda model: False)
    for path, word in paths.items():
        response = await http.client.get(path)
        expected = (200, True) if word == "live" else (503, False)
        assert (response.status_code, response.json()[word]) == expected


async def test_metadata(gateway: Gateway, http: Http) -> None:
    assert (await http.client.get("/v2")).json() == metadata.server_metadata()
    fruit = gateway.data_plane.packages["fruit"]
    for path in ("/v2/models/fruit", "/v2/models/fruit/versions/1"):
        assert (await http.client.get(path)).json() == metadata.model_metadata(fruit)
        assert (await http.client.get(f"{path}/config")).json() == metadata.model_config(gateway.data_plane, fruit)
    index = [{"name": "fruit", "version": "1", "state": "READY", "reason": ""}]
    for body in (b"", b"{}", b'{"ready": true}'):
        assert (await http.client.post("/v2/repository/index", content=body)).json() == index
    for path in ("/v2", "/v2/models/fruit"):
        headed = await http.client.head(path)
        assert (headed.status_code, headed.content) == (200, b"")


async def test_statistics(gateway: Gateway, http: Http, draw: Draw) -> None:
    call, description = await under_way(gateway, http.infer(infer_body(draw(3))))
    gateway.answer(description)
    await call
    assert (await http.infer(infer_body({}))).status_code == 400
    for path in ("/v2/models/stats", "/v2/models/fruit/stats", "/v2/models/fruit/versions/1/stats"):
        (counted,) = (await http.client.get(path)).json()["model_stats"]
        assert (counted["name"], counted["inference_count"], counted["execution_count"]) == ("fruit", 3, 1)
        counts = {name: total["count"] for name, total in counted["inference_stats"].items()}
        assert (counts["success"], counts["fail"]) == (1, 1)


@pytest.mark.parametrize("verb", ["load", "unload"])
async def test_models_are_loaded_and_unloaded(
    gateway: Gateway, http: Http, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    asked = []

    async def ask(model: str) -> None:
        asked.append(model)

    monkeypatch.setattr(gateway.data_plane, verb, ask, raising=False)
    path = f"/v2/repository/models/pear/{verb}"
    for body in (b"", b"{}", b'{"parameters": {}}'):
        response = await http.client.post(path, content=body)
        assert (response.status_code, response.json()) == (200, {})
    assert asked == ["pear"] * 3
    refused = await http.client.post(path, json={"parameters": {"config": "{}"}})
    assert refusal(refused) == (400, "parameters has 'config'; expected none: a model's folder says all")
    dependents = await http.client.post(path, json={"parameters": {"unload_dependents": False}})
    assert dependents.status_code == (200 if verb == "unload" else 400)


# What is refused


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/", 404, "path is /; expected one of those that /openapi.json lists"),
        ("GET", "/v2/", 404, "path is /v2/; expected one of those that /openapi.json lists"),
        ("GET", "/v2/models", 404, "path is /v2/models; expected one of those that /openapi.json lists"),
        ("GET", "/v2/models/a/b/c", 404, "path is /v2/models/a/b/c; expected"),
        ("POST", "/v2/logging", 404, "path is /v2/logging; expected one of those that /openapi.json lists"),
        ("DELETE", "/v2/models/fruit", 405, "method of /v2/models/fruit is DELETE; expected GET, HEAD"),
        ("GET", INFER, 405, f"method of {INFER} is GET; expected POST"),
        ("GET", "/v2/models/pear", 404, "model is 'pear'; expected one of fruit"),
        ("GET", "/v2/models/pear/ready", 404, "model is 'pear'; expected one of fruit"),
        ("GET", "/v2/models/pear/stats", 404, "model is 'pear'; expected one of fruit"),
        ("GET", "/v2/models/%ff%0a", 404, "model is '\ufffd\\n'; expected one of fruit"),
        ("POST", "/v2/models/pear/infer", 404, "model is 'pear'; expected one of fruit"),
        ("POST", "/v2/models/fruit/versions/7/infer", 404, "version of model 'fruit' is '7'; expected '1' or none"),
        ("POST", INFER, 400, "the JSON is wrong at character 0: Expecting value"),
    ],
)
async def test_paths_and_methods(http: Http, method: str, path: str, status: int, message: str) -> None:
    response = await http.client.request(method, path)
    code, error = refusal(response)
    assert code == status
    if status == 405:
        allowed = {name.strip() for name in response.headers["allow"].split(",")}
        assert all(name in error for name in allowed)
        message = message.partition("expected")[0]
    assert error.startswith(message)


WRONG: dict[str, tuple[Body, dict[str, str], int, str]] = {
    "json": (Body(b'{"inputs": [}', {}), {}, 400, "the JSON is wrong at character 12: Expecting value"),
    "nothing to run": (infer_body({}), {}, 400, "inputs is empty; expected some of photo, scent"),
    "name": (
        infer_body({"taste": np.zeros((1, 6), np.float32)}),
        {},
        400,
        "inputs has 'taste'; expected some of photo, scent",
    ),
    "shape": (
        infer_body({"scent": np.zeros((1, 7), np.float32)}),
        {},
        400,
        "inputs[0] 'scent'.shape is [1, 7]; expected [items, 6]",
    ),
    "dtype": (infer_body({"scent": np.zeros((1, 6))}), {}, 400, "inputs[0] 'scent'.datatype is FP64; expected FP32"),
    "too few values": (
        Body(b'{"inputs": [{"name": "scent", "datatype": "FP32", "shape": [1, 6], "data": [1, 2]}]}', {}),
        {},
        400,
        "inputs[0] 'scent' has 2 values; FP32 [1, 6] expects 6",
    ),
    "too large a value": (
        Body(
            b'{"inputs": [{"name": "scent", "datatype": "FP32", "shape": [1, 6], "data": [1e999, 1, 1, 1, 1, 1]}]}', {}
        ),
        {},
        400,
        "inputs[0] 'scent' has inf in item 0; expected finite numbers",
    ),
    "parameter": (infer_body({}, accuracy=1), {}, 400, "parameters has 'accuracy'; expected some of min_accuracy"),
    "floor": (
        infer_body({"scent": np.zeros((1, 6), np.float32)}, min_accuracy=2),
        {},
        400,
        "min_accuracy is 2.0; expected a number from 0 to 1",
    ),
    "items": (
        infer_body({"scent": np.zeros((1025, 6), np.float32)}, binary=True),
        {},
        413,
        "inputs[0] 'scent'.shape is [1025, 6]: 1025 items; expected at most 1024 in one job",
    ),
    "length of the JSON": (
        Body(b"{}", {}),
        {LENGTH: "3"},
        400,
        "header inference-header-content-length is '3'; expected at most the body's 2 bytes",
    ),
    "encoding": (
        Body(b"{}", {}),
        {"Content-Encoding": "br"},
        400,
        "header content-encoding is 'br'; expected one of gzip, deflate, or none",
    ),
    "no gzip": (Body(b"{}", {}), {"Content-Encoding": "gzip"}, 400, "the body is no gzip data: Error -3"),
    "half of gzip": (
        Body(gzip.compress(b"{}")[:-1], {}),
        {"Content-Encoding": "gzip"},
        400,
        "the body ends before its gzip data does",
    ),
    "more than gzip": (
        Body(gzip.compress(b"{}") + b"x", {}),
        {"Content-Encoding": "gzip"},
        400,
        "the body goes on behind the end of its gzip data; expected nothing there",
    ),
    "nothing as gzip": (Body(b"", {}), {"Content-Encoding": "gzip"}, 400, "the body ends before its gzip data does"),
}


@pytest.mark.parametrize(("body", "headers", "status", "message"), WRONG.values(), ids=WRONG.keys())
async def test_a_wrong_request_is_refused_before_anything_is_run(
    gateway: Gateway, http: Http, body: Body, headers: dict[str, str], status: int, message: str
) -> None:
    code, error = refusal(await http.infer(body, **headers))
    assert (code, error.startswith(message)) == (status, True), error
    assert gateway.selector.received.empty()
    await gateway.idle()


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (grpc.StatusCode.FAILED_PRECONDITION, 422),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 429),
        (grpc.StatusCode.UNAVAILABLE, 503),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 504),
        (grpc.StatusCode.INTERNAL, 500),
        (grpc.StatusCode.CANCELLED, 499),
    ],
)
async def test_what_the_selector_refuses_with_is_the_status(
    gateway: Gateway, http: Http, draw: Draw, code: grpc.StatusCode, status: int
) -> None:
    call, description = await under_way(gateway, http.infer(infer_body(draw(1))))
    number, wait = int(code.value[0]), 1070 if status == 429 else 0
    failure = selector_pb2.JobFailure(
        job_id=description.job_id, status_code=number, message="as scripted", retry_after_ms=wait
    )
    gateway.selector.say(failure=failure)
    response = await call
    assert refusal(response) == (status, "as scripted")
    hints = response.headers.get("retry-after"), response.headers.get("retry-after-ms")
    assert hints == (("2", "1070") if status == 429 else (None, None))
    gateway.selector.say(release=release_of(description))
    await gateway.idle()


async def test_a_bug_is_logged_and_not_shown(
    http: Http, draw: Draw, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(module, "infer", broken)
    with caplog.at_level(logging.ERROR):
        assert refusal(await http.infer(infer_body(draw(1)))) == (500, "internal error in infer; the log has more")
    assert "secret" in caplog.text


async def test_a_job_ends_with_its_timeout(gateway: Gateway, http: Http, draw: Draw) -> None:
    call, description = await under_way(gateway, http.infer(infer_body(draw(1), timeout=200_000)))
    assert refusal(await call) == (504, "the deadline passed before the answer was there")
    assert await gateway.cancelled_at_selector() == description.job_id
    gateway.selector.say(release=release_of(description))
    await gateway.idle()


async def test_random_damage_is_refused_and_the_next_request_is_answered(
    gateway: Gateway, http: Http, draw: Draw
) -> None:
    rng = random.Random(5)
    for binary in (False, True):
        good = infer_body({"scent": draw(2)["scent"]}, binary=binary, min_accuracy=0.5)
        for _ in range(50):
            content = bytearray(good.content)
            for _ in range(rng.randint(1, 4)):
                # Behind the tensors' own bytes everything is a good tensor, so that only the JSON is damaged.
                at = rng.randrange(int(good.headers.get(LENGTH, len(content))))
                content[at : at + rng.randint(0, 2)] = rng.choice(
                    [b"", b"[", b"}", b'"', b",", b"\xff", b"9e9", b"null"]
                )
            call = asyncio.create_task(http.infer(Body(bytes(content), good.headers)))
            while not call.done():
                if not gateway.selector.received.empty():
                    gateway.answer(await gateway.job_at_selector())
                await asyncio.sleep(0)
            assert call.result().status_code in (200, 400), call.result().text
        call, description = await under_way(gateway, http.infer(good))
        gateway.answer(description)
        assert outputs_of(await call)["probabilities"].shape == (2, 3)
    await gateway.idle()
