"""Jobs through all services: items in batches, results as they finish, plans, status, cancels."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mosel.client import AsyncClient, Client, ItemResults, JobAccepted, JobEvent, JobSummary
from mosel.errors import (
    DeadlineExceeded,
    InvalidRequest,
    JobCancelled,
    JobNotFound,
    ModelNotFound,
    MoselError,
    Unreachable,
)
from mosel.launcher import Launcher
from mosel.modality import format_set, parse_set
from mosel.packages.model_package import ModelPackage

PLACEMENTS = ("single", "services")
Payloads = dict[str, NDArray[Any]]
Draw = Callable[..., Payloads]
Directly = Callable[[Payloads, Iterable[str]], NDArray[Any]]
Counters = Callable[[Client], dict[str, dict[str, int]]]
Until = Callable[..., None]

LABELS = ("apple", "lemon", "plum")
FLOORS = [0.0, 0.7, 0.75, 0.8, 0.85, 0.9]


@pytest.fixture(autouse=True)
def nothing_is_left(client: Client, gateway_holds: Callable[[Client], int], until: Until) -> Iterator[None]:
    yield
    until(lambda: not gateway_holds(client), "nothing is held")


def batches(payloads: Payloads, step: int) -> Iterator[Payloads]:
    size = len(next(iter(payloads.values())))
    for start in range(0, size, step):
        yield {name: array[start : start + step] for name, array in payloads.items()}


def results_of(events: Iterable[JobEvent]) -> tuple[str, list[ItemResults], JobSummary]:
    first, *between, last = events
    assert isinstance(first, JobAccepted)
    assert isinstance(last, JobSummary)
    return first.job_id, [event for event in between if isinstance(event, ItemResults)], last


def check(results: list[ItemResults], payloads: Payloads, directly: Directly) -> None:
    """Every item is there once, with what the networks make of it and the set it says."""
    size, done = len(next(iter(payloads.values()))), 0
    for part in results:
        done += len(part.items)
        assert part.items_done == done
        assert list(part.items) == sorted(part.items)
        rows = {name: array[list(part.items)] for name, array in payloads.items()}
        expected = directly(rows, parse_set(part.modality_set))
        np.testing.assert_allclose(part.output.astype(np.float32), expected, atol=1e-5)
        assert part.labels == tuple(LABELS[i] for i in expected.argmax(-1))
    assert sorted(item for part in results for item in part.items) == list(range(size))


@pytest.mark.parametrize(("items", "step"), [(1, 1), (10, 3), (100, 64), (1024, 200)])
def test_a_job_in_batches_is_answered_as_a_prediction_is(
    client: Client, draw: Draw, directly: Directly, items: int, step: int
) -> None:
    payloads = draw(items, seed=items)
    _, results, summary = results_of(client.submit_job("fruit", batches(payloads, step), size=items))
    check(results, payloads, directly)
    prediction = client.predict("fruit", payloads)
    output = np.empty_like(prediction.output)
    for part in results:
        output[list(part.items)] = part.output
    np.testing.assert_allclose(output.astype(np.float32), prediction.output.astype(np.float32), atol=1e-5)
    assert summary.strategy == Counter(prediction.modality_sets) == {"photo+scent": items}
    assert summary.expected_accuracy == prediction.expected_accuracy
    assert (summary.deadline_met, prediction.deadline_met) == (True, True)


def test_results_of_a_large_job_arrive_before_its_end(client: Client, draw: Draw) -> None:
    _, results, _ = results_of(client.submit_job("fruit", draw(1024)))
    assert len(results) > 1
    assert results[0].items_done < 1024 == results[-1].items_done


@pytest.mark.parametrize("floor", FLOORS)
def test_the_floor_holds_over_what_was_sent_at_any_moment(
    client: Client, fruit: ModelPackage, draw: Draw, directly: Directly, floor: float
) -> None:
    payloads = draw(200, seed=7)
    _, results, summary = results_of(client.submit_job("fruit", payloads, min_accuracy=floor))
    check(results, payloads, directly)
    accuracies: list[float] = []
    for part in results:
        accuracies += [fruit.accuracy.sets[parse_set(part.modality_set)]] * len(part.items)
        assert np.mean(accuracies) >= floor - 1e-9
    assert summary.expected_accuracy == pytest.approx(np.mean(accuracies))
    counts: Counter[str] = Counter()
    for part in results:
        counts[part.modality_set] += len(part.items)
    assert summary.strategy == counts


async def test_asynchronous_batches_and_a_subset_of_the_modalities(
    services: Launcher, draw: Draw, directly: Directly
) -> None:
    payloads = {"scent": draw(20, seed=3)["scent"]}

    async def arriving() -> Any:
        for batch in batches(payloads, 6):
            yield batch

    async with AsyncClient(services.address) as client:
        events = [event async for event in client.submit_job("fruit", arriving(), size=20, modalities=["scent"])]
        job_id, results, summary = results_of(events)
        check(results, payloads, directly)
        assert summary.strategy == {"scent": 20}
        assert (await client.job(job_id)).state == "answered"


def waiting(payloads: Payloads, first: int, go_on: threading.Event) -> Iterator[Payloads]:
    """Some items at once, the others when they are asked for."""
    yield {name: array[:first] for name, array in payloads.items()}
    go_on.wait(60)
    yield {name: array[first:] for name, array in payloads.items()}


def test_a_job_tells_where_it_is(client: Client, draw: Draw, until: Until) -> None:
    go_on = threading.Event()
    events = client.submit_job("fruit", waiting(draw(5), 2, go_on), size=5)
    accepted = next(events)
    assert isinstance(accepted, JobAccepted)
    until(lambda: client.job(accepted.job_id).items_received == 2, "two items have arrived")
    info = client.job(accepted.job_id)
    assert (info.model, info.state, info.size, info.items_done) == ("fruit", "receiving", 5, 0)
    go_on.set()
    assert isinstance([*events][-1], JobSummary)
    info = client.job(accepted.job_id)
    assert (info.state, info.items_received, info.items_done, info.error) == ("answered", 5, 5, "")
    prediction = client.predict("fruit", draw(3))
    assert client.job(prediction.job_id).state == "answered"
    assert client.cancel(prediction.job_id).state == "answered"


def test_a_job_is_cancelled_by_another_client(client: Client, services: Launcher, draw: Draw) -> None:
    go_on = threading.Event()
    events = client.submit_job("fruit", waiting(draw(5), 2, go_on), size=5)
    accepted = next(events)
    assert isinstance(accepted, JobAccepted)
    with Client(services.address) as other:
        assert other.cancel(accepted.job_id).state == "cancelled"
    with pytest.raises(JobCancelled, match=f"^job {accepted.job_id} was cancelled$"):
        next(events)
    go_on.set()
    assert client.job(accepted.job_id).state == "cancelled"


def test_closing_the_iterator_cancels_the_job(client: Client, draw: Draw, until: Until) -> None:
    go_on = threading.Event()
    events = client.submit_job("fruit", waiting(draw(5), 2, go_on), size=5)
    accepted = next(events)
    assert isinstance(accepted, JobAccepted)
    events.close()
    go_on.set()
    until(lambda: client.job(accepted.job_id).state == "cancelled", "the job is cancelled")


BAD_JOBS: dict[str, tuple[Callable[[Payloads], dict[str, Any]], type[MoselError], str]] = {
    "model": (lambda p: {"model": "pear"}, ModelNotFound, "model is 'pear'; expected one of fruit"),
    "too few": (lambda p: {"size": 9}, InvalidRequest, "items: 5 have arrived when the stream ended"),
    "too many": (lambda p: {"size": 4}, InvalidRequest, "items: 5 have arrived; expected 4, the size of the job"),
    "beyond the limit": (lambda p: {"size": 2000}, InvalidRequest, "size is 2000; expected at most 1024 in one job"),
    "modality": (
        lambda p: {"items": {"taste": p["scent"]}},
        InvalidRequest,
        "modalities has 'taste'; expected some of photo, scent",
    ),
    "NaN": (
        lambda p: {"items": {"scent": p["scent"] * np.nan}},
        InvalidRequest,
        "items.payloads.scent has nan in item 0; expected finite numbers",
    ),
    "floor": (lambda p: {"min_accuracy": 1.0}, Unreachable, "min_accuracy 1 cannot be met"),
}


@pytest.mark.parametrize(("change", "kind", "message"), BAD_JOBS.values(), ids=BAD_JOBS.keys())
def test_a_bad_job_is_refused_with_one_line(
    client: Client, draw: Draw, change: Callable[[Payloads], dict[str, Any]], kind: type[MoselError], message: str
) -> None:
    payloads = draw(5)
    with pytest.raises(kind) as refused:
        list(client.submit_job(**({"model": "fruit", "items": payloads} | change(payloads))))
    assert str(refused.value).startswith(message), refused.value
    assert "\n" not in str(refused.value)


def test_jobs_that_nobody_knows(client: Client) -> None:
    with pytest.raises(JobNotFound, match=r"^job_id is '0{32}'; expected a job under way"):
        client.job("0" * 32)
    with pytest.raises(InvalidRequest, match="expected 32 hexadecimal digits"):
        client.cancel("fruit")


@pytest.mark.parametrize("effort", ["cheapest", "best", None])
@pytest.mark.parametrize("floor", [None, *FLOORS])
def test_a_plan_says_what_a_prediction_then_gets(client: Client, draw: Draw, floor: float | None, effort: Any) -> None:
    demand = {"min_accuracy": floor, "effort": effort, "latency_slo_ms": 20_000}
    plan = client.plan("fruit", 24, **demand)
    prediction = client.predict("fruit", draw(24), **demand)
    assert plan.chosen is not None
    assert plan.refusal == ""
    assert plan.chosen.items == Counter(prediction.modality_sets)
    assert plan.chosen.accuracy == pytest.approx(prediction.expected_accuracy)
    assert [s.cost_ms for s in plan.frontier] == sorted(s.cost_ms for s in plan.frontier)
    assert [s.accuracy for s in plan.frontier] == sorted(s.accuracy for s in plan.frontier)
    assert all(sum(strategy.items.values()) == 24 for strategy in plan.frontier)


def test_a_plan_for_what_cannot_be_had_says_why(client: Client, draw: Draw) -> None:
    plan = client.plan("fruit", 3, min_accuracy=0.999)
    assert plan.chosen is None
    with pytest.raises(Unreachable) as refused:
        client.predict("fruit", draw(3), min_accuracy=0.999)
    assert plan.refusal == str(refused.value)


def test_effort_is_what_happens_to_spare_time(client: Client, draw: Draw) -> None:
    cheapest = client.predict("fruit", draw(4), min_accuracy=0.5, effort="cheapest")
    best = client.predict("fruit", draw(4), min_accuracy=0.5, effort="best", latency_slo_ms=20_000)
    assert set(cheapest.modality_sets) == {format_set(["scent"])}
    assert set(best.modality_sets) == {format_set(["photo", "scent"])}


def test_a_late_answer_is_had_if_it_is_wanted(client: Client, draw: Draw, directly: Directly) -> None:
    payloads = draw(300, seed=5)
    with pytest.raises((Unreachable, DeadlineExceeded)):
        client.predict("fruit", payloads, latency_slo_ms=1)
    late = client.predict("fruit", payloads, latency_slo_ms=1, late_ok=True, modalities=["photo"])
    np.testing.assert_allclose(late.output.astype(np.float32), directly(payloads, ["photo"]), atol=1e-5)
    assert late.deadline_slack_ms < 0
    assert not late.deadline_met
    _, results, summary = results_of(client.submit_job("fruit", payloads, latency_slo_ms=1, late_ok=True))
    check(results, payloads, directly)
    assert not summary.deadline_met


async def test_a_deadline_that_passes_at_any_moment_ends_the_call(services: Launcher, draw: Draw) -> None:
    patience_s, payloads = 30.0, draw(1)

    async def outcome(client: AsyncClient, slo_ms: float) -> MoselError | None:
        try:
            async for _ in client.submit_job(
                "fruit", iter([payloads]), size=1, latency_slo_ms=slo_ms, timeout_s=patience_s
            ):
                pass
        except MoselError as error:
            return error
        return None

    started = time.monotonic()
    async with AsyncClient(services.address, retries=None) as client:
        for _ in range(4):
            await asyncio.gather(*(outcome(client, 0.3 + i / 2) for i in range(40)))
    assert time.monotonic() - started < patience_s, "a call was ended by its caller"
