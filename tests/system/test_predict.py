"""Requests through all services: the answers are those of the networks, and only chosen modalities are read."""

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mosel.client import AsyncClient, Client, Prediction
from mosel.errors import DeadlineExceeded, PayloadTooLarge, RequestError, Unreachable
from mosel.launcher import Launcher
from mosel.modality import format_set, subsets
from mosel.packages.model_package import ModelPackage

PLACEMENTS = ("single", "services")
Payloads = dict[str, NDArray[Any]]
Draw = Callable[..., Payloads]
Directly = Callable[[Payloads, Iterable[str]], NDArray[Any]]
Counters = Callable[[Client], dict[str, dict[str, int]]]

SETS = [frozenset({"photo"}), frozenset({"scent"}), frozenset({"photo", "scent"})]


def check(prediction: Prediction, expected: NDArray[Any], modality_set: Iterable[str]) -> None:
    assert prediction.output.dtype == np.float32
    np.testing.assert_allclose(prediction.output.astype(np.float32), expected, atol=1e-5)
    labels = ("apple", "lemon", "plum")
    assert prediction.labels == tuple(labels[i] for i in expected.argmax(-1))
    assert prediction.modality_sets == (format_set(modality_set),) * len(expected)


@pytest.mark.parametrize("modality_set", SETS, ids=format_set)
@pytest.mark.parametrize("items", [1, 5, 32, 100, 1024])
def test_every_set_answers_as_the_networks_do(
    client: Client, fruit: ModelPackage, draw: Draw, directly: Directly, modality_set: frozenset[str], items: int
) -> None:
    payloads = draw(items, seed=items)
    prediction = client.predict("fruit", {name: payloads[name] for name in modality_set})
    check(prediction, directly(payloads, modality_set), modality_set)
    assert prediction.expected_accuracy == fruit.accuracy.sets[modality_set]
    assert len(bytes.fromhex(prediction.job_id)) == 16
    assert prediction.queue_ms >= 0
    assert prediction.compute_ms > 0
    assert 0 < prediction.deadline_slack_ms <= 30_000


@pytest.mark.parametrize("modality_set", SETS, ids=format_set)
def test_a_floor_gets_the_cheapest_set_that_meets_it(
    client: Client, fruit: ModelPackage, draw: Draw, directly: Directly, modality_set: frozenset[str]
) -> None:
    # In this model what costs more is better, so that each accuracy is the floor at which its set is chosen.
    sets = next(model for model in client.models() if model.name == "fruit").sets
    assert sets["scent"].latency_ms < sets["photo"].latency_ms
    assert sets["scent"].accuracy < sets["photo"].accuracy < sets["photo+scent"].accuracy
    floor, payloads = fruit.accuracy.sets[modality_set], draw(7, seed=1)
    prediction = client.predict("fruit", payloads, min_accuracy=floor)
    check(prediction, directly(payloads, modality_set), modality_set)


def test_no_floor_uses_all_that_was_sent_and_floor_zero_the_cheapest(client: Client, draw: Draw) -> None:
    assert set(client.predict("fruit", draw(3)).modality_sets) == {"photo+scent"}
    assert set(client.predict("fruit", draw(3), min_accuracy=0.0).modality_sets) == {"scent"}


def test_a_floor_beyond_the_model_is_refused_with_the_best_that_could_be_had(
    client: Client, fruit: ModelPackage, draw: Draw
) -> None:
    best = fruit.accuracy.sets[frozenset(fruit.modalities)]
    with pytest.raises(Unreachable, match=f"min_accuracy 0.999 .* {best:.4g} with photo\\+scent"):
        client.predict("fruit", draw(3), min_accuracy=0.999)
    only_scent = {"scent": draw(3)["scent"]}
    with pytest.raises(Unreachable, match=r"with scent; the best that could be had is 0\.\d+ with scent"):
        client.predict("fruit", only_scent, min_accuracy=best)


@pytest.mark.parametrize("modality_set", SETS, ids=format_set)
def test_modalities_override_the_choice(
    client: Client, draw: Draw, directly: Directly, modality_set: frozenset[str]
) -> None:
    payloads = draw(4, seed=2)
    prediction = client.predict("fruit", payloads, modalities=modality_set)
    check(prediction, directly(payloads, modality_set), modality_set)


@pytest.mark.parametrize("latency_slo_ms", [0.001, 4.0])
def test_an_impossible_deadline_is_refused_before_anything_is_run(
    client: Client, draw: Draw, counters: Counters, latency_slo_ms: float
) -> None:
    before = counters(client)
    # So little time may be over before the selector can say that it is too little.
    with pytest.raises((RequestError, DeadlineExceeded), match=r"the deadline .*(cannot be met for|passed)"):
        client.predict("fruit", draw(1024), latency_slo_ms=latency_slo_ms)
    after = counters(client)
    for name in ("encoder/photo", "encoder/scent", "fusion"):
        assert after[name].get("calls", 0) == before[name].get("calls", 0)


def test_a_deadline_counts_as_slack(client: Client, draw: Draw) -> None:
    assert client.predict("fruit", draw(2), latency_slo_ms=60_000).deadline_slack_ms < 60_000
    assert client.predict("fruit", draw(2), latency_slo_ms=5_000).deadline_slack_ms < 5_000
    # What grpc says of the caller's own timeout is a few milliseconds off.
    assert client.predict("fruit", draw(2), timeout_s=7).deadline_slack_ms < 7_100


def test_payloads_of_modalities_that_are_not_chosen_are_read_by_nobody(
    client: Client, draw: Draw, counters: Counters
) -> None:
    before = counters(client)
    payloads = draw(100, seed=3)
    for _ in range(5):
        assert set(client.predict("fruit", payloads, min_accuracy=0.5).modality_sets) == {"scent"}
    after = counters(client)
    for name in ("payload_bytes_read", "calls", "items"):
        assert after["encoder/photo"].get(name, 0) == before["encoder/photo"].get(name, 0)
    read = after["encoder/scent"]["payload_bytes_read"] - before["encoder/scent"].get("payload_bytes_read", 0)
    assert read == 5 * payloads["scent"].nbytes


def test_large_payloads_travel_in_an_arena_and_every_slot_comes_back(
    services: Launcher, client: Client, draw: Draw, counters: Counters, until: Callable[..., None]
) -> None:
    arena = "object_slots" if services.settings.placement == "single" else "slots"
    before = counters(client)["gateway"]
    client.predict("fruit", draw(200))
    until(lambda: counters(client)["gateway"][f"{arena}_published"] == 0, "every slot is free")
    after = counters(client)["gateway"]
    # The photos of 200 items have 338 KiB, their scents 5 KiB.
    assert after[f"{arena}_acquired_total"] == before[f"{arena}_acquired_total"] + 1
    assert after[f"{arena}_released_total"] == before[f"{arena}_released_total"] + 1
    assert after[f"{arena}_expired_total"] == 0


def test_threads_get_their_own_answers(client: Client, draw: Draw, directly: Directly) -> None:
    def one(seed: int) -> None:
        payloads, modality_set = draw(1 + seed % 40, seed=seed), SETS[seed % 3]
        check(
            client.predict("fruit", payloads, modalities=modality_set), directly(payloads, modality_set), modality_set
        )

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(one, seed) for seed in range(96)]:
            done.result(timeout=60)


async def test_concurrent_tasks_get_their_own_answers(services: Launcher, draw: Draw, directly: Directly) -> None:
    async with AsyncClient(services.address) as client:

        async def one(seed: int) -> None:
            payloads, modality_set = draw(1 + seed % 40, seed=seed), SETS[seed % 3]
            prediction = await client.predict("fruit", payloads, modalities=modality_set)
            check(prediction, directly(payloads, modality_set), modality_set)

        await asyncio.gather(*(one(seed) for seed in range(200, 280)))


def test_the_client_refuses_what_no_gateway_would_take(services: Launcher, draw: Draw) -> None:
    with (
        Client(services.address, max_message_mib=1) as client,
        pytest.raises(PayloadTooLarge, match=r"the payloads have 1\.7 MiB; expected less than 1 MiB"),
    ):
        client.predict("fruit", draw(1024))


def test_models_describes_what_is_served(client: Client, fruit: ModelPackage) -> None:
    (model,) = client.models()
    assert (model.name, model.version, model.ready) == ("fruit", "1", True)
    assert model.labels == ("apple", "lemon", "plum")
    assert {name: (m.dtype, m.shape) for name, m in model.modalities.items()} == {
        "photo": ("UINT8", (24, 24, 3)),
        "scent": ("FP32", (6,)),
    }
    assert {name: info.accuracy for name, info in model.sets.items()} == {
        format_set(s): fruit.accuracy.sets[s] for s in subsets(fruit.modalities)
    }
    assert all(info.available and info.latency_ms > 0 for info in model.sets.values())
