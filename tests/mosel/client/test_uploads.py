"""Plan first: what a client sends of what it has, and when it asks."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import numpy as np
import pytest

from mosel import AsyncClient, Client, Prediction, Retry
from mosel.client.uploads import UploadPlans
from mosel.errors import (
    DeadlineUnreachable,
    InputsNeeded,
    InvalidRequest,
    MoselError,
    Overloaded,
    ServiceUnavailable,
    Unreachable,
)
from mosel.v1 import gateway_pb2
from tests.mosel.refusing import Refusing

PAYLOADS = {name: np.zeros((2, 3), np.float32) for name in ("audio", "image", "pen")}
IMAGE_PEN = frozenset({"image", "pen"})


def advice(*modalities: str, valid_s: float = 1000.0, valid_jobs: int = 100) -> gateway_pb2.UploadAdvice:
    return gateway_pb2.UploadAdvice(modalities=modalities, valid_s=valid_s, valid_jobs=valid_jobs)


# What is remembered


def test_nobody_knows_at_first() -> None:
    assert UploadPlans().take("kind", 0.0) is None


def test_what_was_said_holds_for_so_many_jobs() -> None:
    plans = UploadPlans()
    plans.renew("kind", advice("image", "pen", valid_jobs=2), 0.0)
    assert [plans.take("kind", 1.0) for _ in range(3)] == [IMAGE_PEN, IMAGE_PEN, None]
    plans.renew("kind", advice("pen", valid_jobs=1), 2.0)
    assert plans.take("kind", 2.0) == frozenset({"pen"})


def test_what_was_said_holds_for_so_many_seconds() -> None:
    plans = UploadPlans()
    plans.renew("kind", advice("pen", valid_s=5.0), 10.0)
    assert plans.take("kind", 14.9) == frozenset({"pen"})
    assert plans.take("kind", 15.0) is None


def test_it_is_renewed_by_what_is_said_later() -> None:
    plans = UploadPlans()
    plans.renew("kind", advice("pen", valid_s=5.0, valid_jobs=1), 0.0)
    assert plans.take("kind", 4.0) == frozenset({"pen"})
    plans.renew("kind", advice("image", valid_s=5.0, valid_jobs=1), 4.0)
    assert plans.take("kind", 8.0) == frozenset({"image"})


def test_a_server_that_says_nothing_is_not_held_to_what_it_said() -> None:
    plans = UploadPlans()
    for silent in (None, advice()):
        plans.renew("kind", advice("pen"), 0.0)
        plans.renew("kind", silent, 0.0)
        assert plans.take("kind", 0.0) is None


def test_kinds_are_apart_and_those_not_used_for_longest_are_forgotten() -> None:
    plans = UploadPlans()
    for kind in range(256):
        plans.renew(kind, advice("pen"), 0.0)
    plans.take(0, 0.0)
    plans.renew(256, advice("image"), 0.0)
    assert plans.take(0, 0.0) == frozenset({"pen"})
    assert plans.take(1, 0.0) is None
    assert plans.take(256, 0.0) == frozenset({"image"})


# What is sent


@pytest.fixture
async def gateway() -> AsyncIterator[tuple[Refusing, str]]:
    servicer = Refusing()
    async with servicer.served() as address:
        yield servicer, address


class Caller:
    """Either client, and jobs that it plans first."""

    def __init__(self, kind: str, address: str, retries: Retry | None = None) -> None:
        self._kind = kind
        self._client = Client(address, retries=retries)
        self._async_client = AsyncClient(address, retries=retries)

    async def predict(self, payloads: Mapping[str, Any] = PAYLOADS, **demand: Any) -> Prediction:
        demand = {"plan_first": True} | demand
        if self._kind == "async":
            return await self._async_client.predict("digits", payloads, **demand)
        return await asyncio.to_thread(lambda: self._client.predict("digits", payloads, **demand))

    async def __aenter__(self) -> "Caller":
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._client.close()
        await self._async_client.close()


KINDS = pytest.mark.parametrize("kind", ["sync", "async"])


def sent(gateway: Refusing) -> list[set[str]]:
    return [set(request.payloads) for request in gateway.requests]


@KINDS
async def test_the_server_is_asked_once_and_only_what_it_wants_is_sent(
    gateway: tuple[Refusing, str], kind: str
) -> None:
    servicer, address = gateway
    servicer.advice = advice("image", "pen", valid_jobs=1)
    async with Caller(kind, address) as caller:
        for _ in range(4):
            await caller.predict(min_accuracy=0.85)
    (asked,) = servicer.planned
    assert (asked.model, asked.size, asked.min_accuracy) == ("digits", 2, 0.85)
    assert list(asked.modalities) == ["audio", "image", "pen"]
    assert sent(servicer) == [IMAGE_PEN] * 4
    assert all(list(request.available) == ["audio", "image", "pen"] for request in servicer.requests)


@KINDS
async def test_each_answer_says_what_the_next_job_brings(gateway: tuple[Refusing, str], kind: str) -> None:
    servicer, address = gateway
    servicer.advice = advice("pen")
    async with Caller(kind, address) as caller:
        await caller.predict()
        servicer.advice = advice("audio", "image")
        await caller.predict()
        await caller.predict()
    assert sent(servicer) == [{"pen"}, {"pen"}, {"audio", "image"}]
    assert len(servicer.planned) == 1


@KINDS
async def test_what_does_not_hold_any_more_is_asked_for_again(gateway: tuple[Refusing, str], kind: str) -> None:
    servicer, address = gateway
    servicer.advice = advice("pen", valid_jobs=1)
    async with Caller(kind, address) as caller:
        await caller.predict()
        # Taken by a job that has no answer.
        servicer.errors = [ServiceUnavailable("service encoder/pen went away")]
        with pytest.raises(ServiceUnavailable):
            await caller.predict()
        assert len(servicer.planned) == 1
        await caller.predict()
    assert len(servicer.planned) == 2


@KINDS
@pytest.mark.parametrize("error", [InputsNeeded("send audio, image", ["audio", "image"]), DeadlineUnreachable("no")])
async def test_where_that_does_not_do_everything_is_sent_once(
    gateway: tuple[Refusing, str], kind: str, error: MoselError
) -> None:
    servicer, address = gateway
    servicer.advice, servicer.errors = advice("pen"), [error]
    async with Caller(kind, address) as caller:
        assert (await caller.predict()).job_id == "well"
        assert sent(servicer) == [{"pen"}, PAYLOADS.keys()]
        servicer.errors = [error, error]
        with pytest.raises(Unreachable):
            await caller.predict()
    assert sent(servicer)[2:] == [{"pen"}, PAYLOADS.keys()]


@KINDS
async def test_a_refusal_names_what_to_send(gateway: tuple[Refusing, str], kind: str) -> None:
    servicer, address = gateway
    servicer.errors = [InputsNeeded("send audio, image", ["image", "audio"])]
    async with Caller(kind, address) as caller:
        with pytest.raises(InputsNeeded, match=r"^send audio, image$") as refused:
            await caller.predict({"pen": PAYLOADS["pen"]})
    assert refused.value.modalities == ("audio", "image")


@KINDS
async def test_a_server_that_does_not_know_of_it_gets_everything(gateway: tuple[Refusing, str], kind: str) -> None:
    servicer, address = gateway
    async with Caller(kind, address) as caller:
        await caller.predict()
    assert sent(servicer) == [PAYLOADS.keys()]


@KINDS
async def test_what_is_fixed_by_hand_is_sent_and_nobody_is_asked(gateway: tuple[Refusing, str], kind: str) -> None:
    servicer, address = gateway
    servicer.advice = advice("pen")
    async with Caller(kind, address) as caller:
        await caller.predict(modalities=["audio", "pen"])
        assert (sent(servicer), servicer.planned) == ([{"audio", "pen"}], [])
        # With a floor these are those that may be run.
        await caller.predict(modalities=["audio", "pen"], min_accuracy=0.5)
    assert list(servicer.planned[0].modalities) == ["audio", "pen"]
    assert sent(servicer)[1] == frozenset({"pen"})
    assert list(servicer.requests[1].available) == ["audio", "pen"]


@KINDS
async def test_jobs_that_ask_for_something_else_are_planned_apart(gateway: tuple[Refusing, str], kind: str) -> None:
    servicer, address = gateway
    servicer.advice = advice("pen")
    one = {name: array[:1] for name, array in PAYLOADS.items()}
    async with Caller(kind, address) as caller:
        kinds: list[dict[str, Any]] = [
            {"min_accuracy": 0.5},
            {"min_accuracy": 0.6},
            {"max_accuracy_loss": 0.5},
            {"min_accuracy": 0.5, "effort": "best"},
            {"min_accuracy": 0.5, "payloads": one},
            {"min_accuracy": 0.5, "payloads": {"pen": PAYLOADS["pen"], "image": PAYLOADS["image"]}},
            {"min_accuracy": 0.5, "latency_slo_ms": 5000.0},
        ]
        for number, asked in enumerate(kinds, 1):
            await caller.predict(**asked)
            assert len(servicer.planned) == number
        for asked in kinds:
            await caller.predict(**asked)
        # What is left of a deadline is another number each time.
        await caller.predict(min_accuracy=0.5, latency_slo_ms=4900.0)
        await caller.predict(min_accuracy=0.5, priority=1)
    assert len(servicer.planned) == len(kinds)


@KINDS
async def test_the_deadline_counts_from_the_first_call(gateway: tuple[Refusing, str], kind: str) -> None:
    servicer, address = gateway
    servicer.advice, servicer.errors = advice("pen"), [Overloaded("full", 100), InputsNeeded("more", ["image"])]
    async with Caller(kind, address, Retry()) as caller:
        await caller.predict(latency_slo_ms=20_000.0)
    slos = [request.latency_slo_ms for request in servicer.requests]
    assert slos[0] <= 20_000
    assert slos[0] - slos[2] >= 100
    assert sent(servicer) == [{"pen"}, {"pen"}, PAYLOADS.keys()]


@KINDS
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"plan_first": "yes"}, "plan_first is 'yes'"),
        ({"payloads": {}}, "payloads have"),
        ({"payloads": {"pen": PAYLOADS["pen"], "image": PAYLOADS["image"][:1]}}, r"payloads have \[1, 2\] items"),
        ({"modalities": ["scent"]}, "modalities has 'scent'"),
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"latency_slo_ms": -1.0}, "latency_slo_ms is -1"),
        ({"min_acuracy": 0.5}, "did you mean min_accuracy"),
    ],
)
async def test_what_is_wrong_is_refused_before_anything_is_sent(
    gateway: tuple[Refusing, str], kind: str, arguments: dict[str, Any], said: str
) -> None:
    servicer, address = gateway
    async with Caller(kind, address) as caller:
        with pytest.raises(InvalidRequest, match=said):
            await caller.predict(**arguments)
    assert (servicer.planned, servicer.requests) == ([], [])
