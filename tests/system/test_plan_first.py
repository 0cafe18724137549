"""Callers who send only what will be used: fewer bytes, the same answers, and whatever happens meanwhile."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mosel.client import AsyncClient, Client, Prediction
from mosel.config import Settings
from mosel.launcher import Launcher
from mosel.modality import parse_set
from mosel.packages.model_package import ModelPackage
from tests.system.test_failures import frozen

PLACEMENTS = ("single", "services")
Payloads = dict[str, NDArray[Any]]
Draw = Callable[..., Payloads]
Counters = Callable[[Client], dict[str, dict[str, int]]]
Until = Callable[..., None]
SCENT, PHOTO = frozenset({"scent"}), frozenset({"photo"})


def bytes_of(payloads: Payloads, *names: str) -> int:
    return sum(payloads[name].nbytes for name in names or payloads)


def bytes_during(client: Client, counters: Counters, call: Callable[[], Prediction]) -> tuple[Prediction, int]:
    """An answer, and the payload bytes that reached the gateway for it."""
    before = counters(client)["gateway"]["payload_bytes"]
    return call(), counters(client)["gateway"]["payload_bytes"] - before


def check_same(found: Prediction, expected: Prediction) -> None:
    assert found.modality_sets == expected.modality_sets
    assert found.labels == expected.labels
    np.testing.assert_allclose(found.output.astype(float), expected.output.astype(float), atol=1e-5)
    assert found.expected_accuracy == expected.expected_accuracy
    assert found.assurance == expected.assurance


@pytest.mark.parametrize("items", [1, 7])
def test_what_is_not_used_is_not_sent_and_the_answers_are_the_same(
    client: Client, fruit: ModelPackage, draw: Draw, counters: Counters, items: int
) -> None:
    payloads, accuracy = draw(items, seed=items), fruit.accuracy.sets
    for demand in (*({"min_accuracy": accuracy[s]} for s in (SCENT, PHOTO, SCENT | PHOTO)), {"max_accuracy_loss": 0.0}):
        expected = client.predict("fruit", payloads, **demand)  # type: ignore[arg-type]
        used = frozenset().union(*map(parse_set, expected.modality_sets))
        for _ in range(3):
            found, nbytes = bytes_during(
                client,
                counters,
                lambda: client.predict("fruit", payloads, plan_first=True, **demand),  # type: ignore[arg-type] # noqa: B023
            )
            check_same(found, expected)
            assert nbytes == bytes_of(payloads, *used)
    cheapest, nbytes = bytes_during(
        client, counters, lambda: client.predict("fruit", payloads, plan_first=True, min_accuracy=accuracy[SCENT])
    )
    assert cheapest.modality_sets == ("scent",) * items
    assert nbytes < 0.02 * bytes_of(payloads)


async def test_so_does_the_asynchronous_client(
    services: Launcher, fruit: ModelPackage, draw: Draw, counters: Counters
) -> None:
    payloads, floor = draw(5), fruit.accuracy.sets[SCENT]
    async with AsyncClient(services.address) as client:
        prediction = await client.predict("fruit", payloads, min_accuracy=floor, plan_first=True)
        assert prediction.modality_sets == ("scent",) * 5


@pytest.fixture
def own(settings_with: Callable[..., Settings]) -> Iterator[Launcher]:
    with Launcher(settings_with()) as launcher:
        launcher.wait_ready(120)
        yield launcher


def test_where_an_encoder_is_killed_the_client_sends_what_is_needed_then(
    own: Launcher, fruit: ModelPackage, draw: Draw, counters: Counters, until: Until
) -> None:
    payloads, floor, encoder = draw(6), fruit.accuracy.sets[SCENT], own.children["encoder/scent"]
    with Client(own.address) as client, Client(own.address) as other, ThreadPoolExecutor(1) as pool:

        def predict() -> Prediction:
            return client.predict("fruit", payloads, min_accuracy=floor, plan_first=True)

        assert predict().modality_sets == ("scent",) * 6
        with frozen(encoder):
            call = pool.submit(predict)
            until(lambda: counters(other)["selector"]["jobs"] == 1, "the job is under way")
            encoder.process.kill()
        assert call.result().modality_sets == ("photo",) * 6
        assert call.result().unavailable_modalities == ("scent",)
        # Its answer said what to send from now on.
        assert bytes_during(other, counters, predict)[1] == bytes_of(payloads, "photo")
        encoder.process.wait()
        own.start_again("encoder/scent")
        until(lambda: predict().modality_sets == ("scent",) * 6, "the encoder is used again")
        assert bytes_during(other, counters, predict)[1] == bytes_of(payloads, "scent")
