"""A model is observed through a gateway, whose selector says what there is to tell."""

import asyncio
from contextlib import aclosing

import numpy as np
import pytest

from mosel.client import ObserveEvent
from mosel.errors import InvalidRequest, ModelNotFound, ServiceUnavailable
from tests.gateway.scripted import Gateway


async def at_selector(gateway: Gateway, count: int) -> None:
    async with asyncio.timeout(30):
        # Nobody tells when it changes.
        while gateway.selector.observing != count:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_events_are_passed_on_until_the_caller_has_enough(gateway: Gateway) -> None:
    async with aclosing(gateway.client.observe("fruit")) as events:
        told: list[ObserveEvent] = [await anext(events) for _ in range(2)]
        assert gateway.selector.observing == 1
    assert {event.revision for event in told} == {f"fruit@{gateway.selector.fruit.revision}"}
    assert [items.job for event in told for items in event.observed] == [0, 1]
    (items,) = told[0].observed
    assert [items.answers.dtype.name, items.confidences.dtype.name] == ["int32", "float32"]
    np.testing.assert_array_equal(items.answers, [[1, 2]])
    np.testing.assert_array_equal(items.confidences, [[0.5, 0.75]])
    await at_selector(gateway, 0)


async def test_a_gateway_that_stops_ends_it(gateway: Gateway) -> None:
    events = gateway.client.observe("fruit")
    await anext(events)
    gateway.data_plane.stopping.set()
    with pytest.raises(ServiceUnavailable, match="service gateway is stopping"):
        async for _ in events:
            pass
    await at_selector(gateway, 0)


async def test_a_selector_that_goes_away_ends_it(gateway: Gateway) -> None:
    events = gateway.client.observe("fruit")
    await anext(events)
    gateway.selector.gone.set()
    with pytest.raises(ServiceUnavailable, match="selector"):
        async for _ in events:
            pass


async def test_wrong_requests_are_refused(gateway: Gateway) -> None:
    with pytest.raises(ModelNotFound, match="model 'tree' is not served; known: fruit"):
        await anext(gateway.client.observe("tree"))
    for share in (0.0, 1.01, float("nan")):
        with pytest.raises(InvalidRequest, match=r"share is .*; expected more than 0 and at most 1"):
            gateway.client.observe("fruit", share=share)
    with pytest.raises(InvalidRequest, match="name is 3"):
        gateway.client.observe(3)  # type: ignore[arg-type]
    assert gateway.selector.observing == 0
