"""What clients ask for, as messages, without any service."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mosel.client.answers import JobSummary, Prediction, StrategyInfo, event_from, plan_from
from mosel.client.demands import Upload, predict_request, spec_of
from mosel.errors import InvalidRequest, PayloadTooLarge
from mosel.tensors import from_proto
from mosel.v1 import gateway_pb2

MIB = 1024 * 1024
Payloads = dict[str, NDArray[Any]]


def payloads_of(items: int, item_bytes: int = 4) -> Payloads:
    numbers = np.arange(items, dtype=np.int32)
    return {"pen": numbers, "image": np.zeros((items, item_bytes), np.uint8)}


def test_what_is_not_demanded_is_not_in_the_request() -> None:
    request = predict_request("digits", payloads_of(2), {}, 64)
    assert not request.HasField("min_accuracy")
    assert not request.HasField("latency_slo_ms")
    assert (list(request.modalities), request.effort, request.late_ok) == ([], 0, False)


def test_every_demand_is_in_both_requests() -> None:
    fields: dict[str, Any] = {"min_accuracy": 0.0, "latency_slo_ms": 5.0, "modalities": ["pen"], "late_ok": True}
    for effort, number in (("cheapest", gateway_pb2.CHEAPEST), ("best", gateway_pb2.BEST)):
        request = predict_request("digits", payloads_of(2), {**fields, "effort": effort}, 64)
        spec = spec_of("digits", 2, {**fields, "effort": effort})
        assert spec == gateway_pb2.JobSpec(model="digits", size=2, effort=number, **fields)
        request.payloads.clear()
        assert request == gateway_pb2.PredictRequest(model="digits", effort=number, **fields)


def test_an_unknown_effort_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"^effort is 'most'; expected cheapest or best$"):
        spec_of("digits", 2, {"effort": "most"})


def sent(upload: Upload) -> tuple[gateway_pb2.JobSpec, list[Payloads]]:
    first, *rest = upload.requests()
    batches = [{name: from_proto(t, name) for name, t in request.items.payloads.items()} for request in rest]
    return first.job, batches


@pytest.mark.parametrize(("items", "item_bytes", "batches"), [(1, 4, 1), (9, MIB - 4, 3), (3, 5 * MIB, 3), (5, 0, 1)])
def test_payloads_given_at_once_travel_in_batches(items: int, item_bytes: int, batches: int) -> None:
    spec, came = sent(Upload("digits", payloads_of(items, item_bytes), None, {}, 64))
    assert (spec.size, list(spec.modalities), len(came)) == (items, ["pen", "image"], batches)
    np.testing.assert_array_equal(np.concatenate([batch["pen"] for batch in came]), np.arange(items))
    assert all(sum(array.nbytes for array in batch.values()) <= max(4 * MIB, item_bytes + 4) for batch in came)


def test_only_what_may_be_run_is_sent() -> None:
    spec, came = sent(Upload("digits", payloads_of(3), None, {"modalities": ["pen"]}, 64))
    assert (list(spec.modalities), [list(batch) for batch in came]) == (["pen"], [["pen"]])
    with pytest.raises(InvalidRequest, match=r"^modalities has 'audio'; expected some of the payloads: pen, image$"):
        Upload("digits", payloads_of(3), None, {"modalities": ["audio"]}, 64)


@pytest.mark.parametrize(
    "payloads", [{}, {"pen": np.int32(3)}, {"pen": np.zeros(0)}, {"pen": np.zeros(2), "image": np.zeros(3)}]
)
def test_payloads_without_a_common_size_are_refused(payloads: Payloads) -> None:
    with pytest.raises(InvalidRequest, match=r"^payloads have \[.*\] items; expected the same number in all"):
        Upload("digits", payloads, None, {}, 64)


def test_batches_need_a_size_and_are_sent_as_they_are() -> None:
    with pytest.raises(InvalidRequest, match=r"^size is missing; expected the number of items"):
        Upload("digits", iter([payloads_of(2)]), None, {}, 64)
    spec, came = sent(Upload("digits", iter([payloads_of(2), payloads_of(3)]), 5, {}, 64))
    assert (spec.size, list(spec.modalities), [len(batch["pen"]) for batch in came]) == (5, [], [2, 3])


def broken() -> Iterator[Payloads]:
    yield payloads_of(2)
    yield payloads_of(3, MIB)


async def broken_asynchronously() -> AsyncIterator[Payloads]:
    for payloads in broken():
        yield payloads


async def test_a_batch_that_cannot_be_sent_ends_the_messages_and_is_remembered() -> None:
    upload = Upload("digits", broken(), 5, {}, 1)
    assert len(list(upload.requests())) == 2
    assert isinstance(upload.error, PayloadTooLarge)
    for items in (broken(), broken_asynchronously()):
        upload = Upload("digits", items, 5, {}, 1)
        assert len([request async for request in upload.async_requests()]) == 2
        assert isinstance(upload.error, PayloadTooLarge)


async def test_a_batch_that_is_none_is_named() -> None:
    for batch in (np.zeros(2), "pen", {1: np.zeros(2)}):
        upload = Upload("digits", [batch], 5, {}, 1)  # type: ignore[list-item]
        assert len(list(upload.requests())) == 1
        assert isinstance(upload.error, InvalidRequest)
        assert str(upload.error).startswith("a batch of items ")
        assert str(upload.error).endswith("; expected a mapping from modality to array, such as {'image': images}")


@pytest.mark.parametrize(("slack_ms", "met"), [(0.5, True), (0.0, True), (-0.5, False)])
def test_a_deadline_is_met_as_long_as_there_is_slack(slack_ms: float, met: bool) -> None:
    assert Prediction("", np.zeros(1), (), (), 1.0, 0.0, 0.0, slack_ms).deadline_met == met
    summary = event_from(gateway_pb2.JobEvent(summary=gateway_pb2.JobSummary(deadline_slack_ms=slack_ms)))
    assert isinstance(summary, JobSummary)
    assert summary.deadline_met == met


def test_a_plan_tells_what_is_chosen_from_what_is_refused() -> None:
    strategy = gateway_pb2.Strategy(items={"pen": 2, "image+pen": 1}, accuracy=0.75, cost_ms=2.0, latency_ms=3.0)
    info = StrategyInfo({"pen": 2, "image+pen": 1}, 0.75, 2.0, 3.0)
    plan = plan_from(gateway_pb2.PlanReply(frontier=[strategy], chosen=strategy))
    assert (plan.frontier, plan.chosen, plan.refusal) == ((info,), info, "")
    assert plan_from(gateway_pb2.PlanReply(refusal="too slow")).chosen is None
