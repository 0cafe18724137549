"""What the gateway counts and logs of requests, with a selector that does what the test says."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from gateway.metrics_page import MetricsPage
from mosel.errors import DeadlineExceeded, InvalidRequest, ModelNotFound, MoselError, Overloaded, Unreachable
from mosel.status import status_number
from mosel.tensors import to_proto
from mosel.v1 import gateway_pb2, selector_pb2
from tests.gateway.scripted import Gateway
from tests.mosel.observability.test_metrics import Samples, key, samples

Draw = Callable[..., dict[str, NDArray[Any]]]
HERE = {"service": "gateway"}


async def page(gateway: Gateway) -> Samples:
    return samples(await gateway.data_plane.metrics.page())


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [vars(record) for record in caplog.records if record.name == "gateway.requests"]


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gateway.requests")


async def answer(gateway: Gateway, sets: dict[str, int]) -> selector_pb2.JobDescription:
    """Lets the selector answer the next job."""
    description = await gateway.job_at_selector()
    groups, first = [], 0
    for name, count in sets.items():
        items = range(first, first + count)
        output = to_proto(np.zeros((count, 3), np.float32))
        groups.append(selector_pb2.ItemGroup(modality_set=name, items=items, output=output))
        first += count
    result = selector_pb2.JobResult(job_id=description.job_id, groups=groups, queue_us=2000, compute_us=5000)
    gateway.selector.say(result=result)
    return description


async def test_an_answered_request(gateway: Gateway, draw: Draw, caplog: pytest.LogCaptureFixture) -> None:
    call = asyncio.create_task(gateway.client.predict("fruit", draw(3)))
    description = await answer(gateway, {"photo+scent": 3})
    await call
    mixed = asyncio.create_task(gateway.client.predict("fruit", draw(3)))
    await answer(gateway, {"photo": 1, "scent": 2})
    await mixed
    found = await page(gateway)
    for modality_set in ("photo+scent", "mixed"):
        labels = {"model": "fruit", "modality_set": modality_set, **HERE}
        assert found[key("mosel_request_duration_seconds_count", **labels)] == 1
        assert found[key("mosel_request_duration_seconds_sum", **labels)] > 0
    assert found[key("mosel_requests_total", model="fruit", status="OK", **HERE)] == 2
    assert found[key("mosel_missed_total", model="fruit", how="late", **HERE)] == 0
    triton = {"model": "fruit", "version": "1"}
    assert found[key("nv_inference_request_success", **triton)] == 2
    assert found[key("nv_inference_request_failure", **triton)] == 0
    assert found[key("nv_inference_count", **triton)] == 6
    assert found[key("nv_inference_queue_duration_us", **triton)] == 4000
    assert found[key("nv_inference_compute_infer_duration_us", **triton)] == 10000
    assert found[key("nv_inference_request_duration_us", **triton)] > 0
    first, second = lines(caplog)
    assert first["job_id"] == description.job_id.hex()
    assert first["job_id"] != second["job_id"]
    named = ("method", "model", "size", "status", "modality_sets", "queue_ms", "compute_ms")
    assert [first[name] for name in named] == ["Predict", "fruit", 3, "OK", {"photo+scent": 3}, 2.0, 5.0]
    assert second["modality_sets"] == {"photo": 1, "scent": 2}
    assert first["ms"] > 0
    assert first["slack_ms"] > 0


@pytest.mark.parametrize(
    ("model", "payloads", "label", "reason", "status"),
    [
        ("pear", {"scent": np.zeros((1, 6), np.float32)}, "", "model_not_found", "NOT_FOUND"),
        ("fruit", {"scent": np.zeros((1, 7), np.float32)}, "fruit", "invalid_request", "INVALID_ARGUMENT"),
        ("fruit", {"scent": np.zeros((2000, 6), np.float32)}, "fruit", "payload_too_large", "INVALID_ARGUMENT"),
    ],
)
async def test_a_request_that_is_refused_at_the_gateway(
    gateway: Gateway,
    caplog: pytest.LogCaptureFixture,
    model: str,
    payloads: dict[str, NDArray[Any]],
    label: str,
    reason: str,
    status: str,
) -> None:
    with pytest.raises((InvalidRequest, ModelNotFound)) as refused:
        await gateway.client.predict(model, payloads)
    found = await page(gateway)
    assert found[key("mosel_refused_total", model=label, reason=reason, **HERE)] == 1
    assert found[key("mosel_requests_total", model=label, status=status, **HERE)] == 1
    assert found[key("nv_inference_request_failure", model="fruit", version="1")] == (model == "fruit")
    (line,) = lines(caplog)
    assert (line["model"], line["size"], line["status"], line["reason"]) == (model, 0, status, str(refused.value))
    assert len(line["job_id"]) == 32


@pytest.mark.parametrize("error", [Overloaded("full", 7), Unreachable("not so accurate")])
async def test_what_the_selector_refuses_is_the_selector_s_to_count(
    gateway: Gateway, draw: Draw, caplog: pytest.LogCaptureFixture, error: MoselError
) -> None:
    call = asyncio.create_task(gateway.client.predict("fruit", draw(1)))
    description = await gateway.job_at_selector()
    gateway.selector.say(
        failure=selector_pb2.JobFailure(job_id=description.job_id, status_code=status_number(error), message=str(error))
    )
    with pytest.raises(type(error)):
        await call
    found = await page(gateway)
    assert not any(name == "mosel_refused_total" for name, _ in found)
    (line,) = lines(caplog)
    assert found[key("mosel_requests_total", model="fruit", status=line["status"], **HERE)] == 1
    assert found[key("nv_inference_request_failure", model="fruit", version="1")] == 1
    assert line["reason"] == str(error)


async def test_jobs_that_miss_their_deadline(gateway: Gateway, draw: Draw, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DeadlineExceeded):
        await gateway.client.predict("fruit", draw(1), latency_slo_ms=500.0)
    await gateway.job_at_selector()
    await gateway.cancelled_at_selector()
    # The caller's own deadline counts as much.
    with pytest.raises(DeadlineExceeded):
        await gateway.client.predict("fruit", draw(1), timeout_s=0.5)
    await gateway.job_at_selector()
    await gateway.cancelled_at_selector()
    late = asyncio.create_task(gateway.client.predict("fruit", draw(1), latency_slo_ms=0.001, late_ok=True))
    await answer(gateway, {"photo+scent": 1})
    await late
    found = await page(gateway)
    assert found[key("mosel_missed_total", model="fruit", how="expired", **HERE)] == 2
    assert found[key("mosel_missed_total", model="fruit", how="late", **HERE)] == 1
    assert [line["status"] for line in lines(caplog)] == ["DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", "OK"]
    assert lines(caplog)[-1]["slack_ms"] < 0


async def test_a_caller_that_goes_away_has_missed_nothing(
    gateway: Gateway, draw: Draw, caplog: pytest.LogCaptureFixture
) -> None:
    call = asyncio.create_task(gateway.client.predict("fruit", draw(1)))
    await gateway.job_at_selector()
    call.cancel()
    await gateway.cancelled_at_selector()
    found = await page(gateway)
    assert found[key("mosel_missed_total", model="fruit", how="expired", **HERE)] == 0
    assert found[key("mosel_requests_total", model="fruit", status="CANCELLED", **HERE)] == 1
    assert not any(name == "mosel_refused_total" for name, _ in found)
    assert [line["status"] for line in lines(caplog)] == ["CANCELLED"]


async def test_a_streamed_job_is_one_request(gateway: Gateway, draw: Draw, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> list[object]:
        return [event async for event in gateway.client.submit_job("fruit", draw(4))]

    job = asyncio.create_task(run())
    description = await answer(gateway, {"photo": 4})
    await job
    found = await page(gateway)
    labels = {"model": "fruit", "modality_set": "photo", **HERE}
    assert found[key("mosel_request_duration_seconds_count", **labels)] == 1
    (line,) = lines(caplog)
    named = ("method", "model", "size", "status", "modality_sets", "job_id")
    expected = ["SubmitJob", "fruit", 4, "OK", {"photo": 4}, description.job_id.hex()]
    assert [line[name] for name in named] == expected


async def test_a_streamed_job_whose_items_do_not_come_in_time(gateway: Gateway) -> None:
    async def nothing() -> AsyncIterator[gateway_pb2.SubmitJobRequest]:
        spec = gateway_pb2.JobSpec(model="fruit", size=1, latency_slo_ms=50.0)
        yield gateway_pb2.SubmitJobRequest(job=spec)
        await asyncio.sleep(60)

    with pytest.raises(grpc.aio.AioRpcError) as expired:
        async for _ in gateway.stub.SubmitJob(nothing()):
            pass
    assert expired.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    found = await page(gateway)
    assert found[key("mosel_missed_total", model="fruit", how="expired", **HERE)] == 1


async def test_what_the_gateway_holds(gateway: Gateway, draw: Draw) -> None:
    call = asyncio.create_task(gateway.client.predict("fruit", draw(1)))
    await gateway.job_at_selector()
    found = await page(gateway)
    assert found[key("mosel_jobs_in_flight", **HERE)] == 1
    assert found[key("mosel_jobs_at_selector", **HERE)] == 1
    waiting = ("mosel_jobs_waiting_for_slots", "mosel_answers_waiting")
    lanes = [key("mosel_outbox_messages", lane=lane, **HERE) for lane in ("jobs", "urgent")]
    assert [found[name] for name in [*(key(name, **HERE) for name in waiting), *lanes]] == [0, 0, 0, 0]
    assert found[key("mosel_model_ready", model="fruit", **HERE)] == 1
    assert found[key("mosel_arena_slots", arena="shared_memory", state="published", **HERE)] == 2
    assert found[key("mosel_tensors_total", rung="posix_shm", **HERE)] == 2
    call.cancel()
    await gateway.cancelled_at_selector()


async def test_off_no_trace_goes_to_the_selector(gateway: Gateway, draw: Draw) -> None:
    payloads = {name: to_proto(array) for name, array in draw(1).items()}
    request = gateway_pb2.PredictRequest(model="fruit", payloads=payloads)
    metadata = [("traceparent", f"00-{'ab' * 16}-{'cd' * 8}-01")]
    call = asyncio.ensure_future(gateway.stub.Predict(request, metadata=metadata))
    assert (await answer(gateway, {"photo+scent": 1})).traceparent == ""
    await call


async def test_the_page_of_all_services(gateway: Gateway) -> None:
    page = MetricsPage(gateway.data_plane.metrics, gateway.data_plane.link)
    for text in await asyncio.gather(page.text(), page.text()):
        found = samples(text)
        up = {service: found[key("mosel_up", service=service)] for service in ("gateway", "selector", "fusion")}
        assert up == {"gateway": 1, "selector": 1, "fusion": 0}
        assert found[key("mosel_jobs_in_flight", **HERE)] == 0
        assert found[key("scripted")] == 3


async def test_what_answers_stand_on_and_what_they_saved(
    gateway: Gateway, draw: Draw, caplog: pytest.LogCaptureFixture
) -> None:
    loss = gateway_pb2.Assurance(guarantee=gateway_pb2.CALIBRATED, guaranteed_loss=0.25, confidence=0.95, saved=0.5)
    loss.floor_source = gateway_pb2.MODEL
    estimate = gateway_pb2.Assurance(guarantee=gateway_pb2.ESTIMATE, saved=0.25)
    for assurance in (loss, loss, estimate, None):
        call = asyncio.create_task(gateway.client.predict("fruit", draw(3)))
        description = await gateway.job_at_selector()
        output = to_proto(np.zeros((3, 3), np.float32))
        groups = [selector_pb2.ItemGroup(modality_set="scent", items=range(3), output=output)]
        result = selector_pb2.JobResult(job_id=description.job_id, groups=groups, assurance=assurance)
        gateway.selector.say(result=result)
        await call
    found = await page(gateway)
    assert found[key("mosel_answered_items_total", model="fruit", guarantee="calibrated", **HERE)] == 6
    assert found[key("mosel_answered_items_total", model="fruit", guarantee="estimate", **HERE)] == 3
    assert found[key("mosel_saved_items_total", model="fruit", **HERE)] == 3 * (0.5 + 0.5 + 0.25)
    first, _, third, last = lines(caplog)
    assert (first["guarantee"], first["guaranteed_loss"], first["confidence"]) == ("calibrated", 0.25, 0.95)
    assert (first["saved"], first["floor_source"]) == (0.5, "model")
    assert third["guarantee"] == "estimate"
    assert third.keys().isdisjoint({"guaranteed_loss", "confidence", "floor_source"})
    assert "guarantee" not in last
