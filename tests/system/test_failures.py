"""Services that are killed, stopped or frozen: callers get a typed error in time, the others go on, nothing leaks."""

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mosel.client import AsyncClient, Client, Prediction
from mosel.config import Settings
from mosel.errors import DeadlineExceeded, InternalError, MoselError, ServiceUnavailable
from mosel.launcher import Child, Launcher

Payloads = dict[str, NDArray[Any]]
Draw = Callable[..., Payloads]
Directly = Callable[[Payloads, Iterable[str]], NDArray[Any]]
Counters = Callable[[Client], dict[str, dict[str, int]]]
Until = Callable[..., None]
Outcome = Prediction | MoselError

SERVICES = ["encoder/photo", "encoder/scent", "fusion", "selector", "gateway"]
# How long a call may take beyond its deadline before it counts as hanging.
MARGIN_S = 15


@pytest.fixture(scope="module")
def shared_memory() -> Iterator[Path]:
    """A folder in shared memory for these services alone; empty at the end."""
    folder = Path(tempfile.mkdtemp(prefix="mosel-test-", dir="/dev/shm"))
    yield folder
    left = list(folder.iterdir())
    shutil.rmtree(folder)
    assert left == []


@pytest.fixture(scope="module")
def launcher(settings_with: Callable[..., Settings], shared_memory: Path) -> Iterator[Launcher]:
    """Services of this module alone; every tensor travels by shared memory."""
    transport = {
        "shm_dir": shared_memory,
        "inline_max_kib": 0,
        "lease_grace_ms": 200,
        "gateway_arena_mib": 32,
        "encoder_arena_mib": 16,
    }
    with Launcher(settings_with(transport=transport)) as launcher:
        launcher.wait_ready(120)
        yield launcher


@pytest.fixture
def own(launcher: Launcher, until: Until, counters: Counters) -> Iterator[Launcher]:
    """The module's services, all running and ready; at the end of the test, no slot may be held any more."""
    for child in launcher.ended():
        launcher.start_again(child.name)
    until(launcher.is_ready, "all services are ready")
    yield launcher
    with Client(launcher.address) as client:
        if not launcher.ended():
            until(lambda: slots_held(counters(client)) == 0, "every slot is free")


def slots_held(counters: dict[str, dict[str, int]]) -> int:
    slots = ("slots_published", "slots_filling", "object_slots_published", "object_slots_filling", "slots_held")
    names = (*slots, "jobs_held", "jobs", "queued_items")
    return sum(service.get(name, 0) for service in counters.values() for name in names)


def answers(client: Client) -> bool:
    with contextlib.suppress(MoselError):
        return bool(client.status())
    return False


def at_selector(client: Client, counters: Counters) -> int:
    """How many jobs it has."""
    return counters(client)["selector"]["jobs"]


def outcome_of(address: str, payloads: Payloads, timeout_s: float, **demand: float) -> Outcome:
    """An answer or a typed error; anything else fails the test."""
    with Client(address) as client:
        started = time.monotonic()
        try:
            return client.predict("fruit", payloads, timeout_s=timeout_s, **demand)  # type: ignore[arg-type]
        except MoselError as error:
            return error
        finally:
            assert time.monotonic() - started < timeout_s + MARGIN_S


@contextlib.contextmanager
def frozen(child: Child) -> Iterator[None]:
    """The service neither computes nor answers inside the block."""
    child.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        child.process.send_signal(signal.SIGCONT)


def test_with_nothing_inline_the_answers_are_the_same(own: Launcher, draw: Draw, directly: Directly) -> None:
    with Client(own.address) as client:
        for items in (1, 5, 32, 100):
            payloads = draw(items, seed=items)
            for chosen in (["photo"], ["scent"], ["photo", "scent"]):
                output = client.predict("fruit", payloads, modalities=chosen).output.astype(np.float32)
                np.testing.assert_allclose(output, directly(payloads, chosen), atol=1e-5)


@pytest.mark.parametrize("name", SERVICES)
def test_calls_in_flight_fail_when_a_service_is_killed(
    own: Launcher, draw: Draw, counters: Counters, until: Until, name: str
) -> None:
    child = own.children[name]
    with Client(own.address) as client, ThreadPoolExecutor(6) as pool:
        with frozen(child):
            calls: list[Future[Outcome]] = [
                pool.submit(outcome_of, own.address, draw(64, seed=seed), timeout_s=30) for seed in range(6)
            ]
            if name == "gateway":
                # Nobody can say what reaches it.
                time.sleep(0.5)
            else:
                until(lambda: counters(client)["gateway"]["jobs_in_flight"] == len(calls), "the calls are under way")
            assert not any(call.done() for call in calls)
            child.process.kill()
        outcomes = [call.result() for call in calls]
    child.process.wait()
    shown = "gateway at" if name == "gateway" else name
    for outcome in outcomes:
        assert isinstance(outcome, ServiceUnavailable)
        assert str(outcome).startswith(f"service {shown} ")
    while_away = outcome_of(own.address, draw(3), timeout_s=10)
    assert isinstance(while_away, ServiceUnavailable)
    assert str(while_away).startswith(f"service {shown} ")


@pytest.mark.parametrize("name", SERVICES)
def test_calls_end_at_their_deadline_while_a_service_hangs(
    own: Launcher, draw: Draw, directly: Directly, name: str
) -> None:
    timeout_s = 1.5 if name == "gateway" else 10.0
    with frozen(own.children[name]), ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(outcome_of, own.address, draw(64, seed=seed), timeout_s, latency_slo_ms=1200)
            for seed in range(4)
        ]
        for call in calls:
            assert isinstance(call.result(), DeadlineExceeded)
    payloads = draw(5)
    answer = outcome_of(own.address, payloads, timeout_s=20)
    assert isinstance(answer, Prediction)
    np.testing.assert_allclose(answer.output.astype(np.float32), directly(payloads, payloads), atol=1e-5)


def test_jobs_in_the_hands_of_a_dead_encoder_get_another_modality_set_that_meets_their_floor(
    own: Launcher, draw: Draw, directly: Directly, counters: Counters, until: Until
) -> None:
    payloads = {seed: draw(16, seed=seed) for seed in range(4)}
    photo = own.children["encoder/photo"]
    with Client(own.address) as client, ThreadPoolExecutor(4) as pool:
        before = client.predict("fruit", payloads[0], min_accuracy=0.6, effort="best")
        assert (set(before.modality_sets), before.unavailable_modalities) == ({"photo+scent"}, ())
        with frozen(photo):
            calls = {
                seed: pool.submit(client.predict, "fruit", rows, min_accuracy=0.6, effort="best", latency_slo_ms=20_000)
                for seed, rows in payloads.items()
            }
            until(lambda: at_selector(client, counters) == len(calls), "the jobs are under way")
            until(lambda: counters(client)["selector"]["calls_in_flight.photo"], "the encoder has some")
            assert not any(call.done() for call in calls.values())
            photo.process.kill()
        for seed, call in calls.items():
            prediction = call.result()
            assert (set(prediction.modality_sets), prediction.unavailable_modalities) == ({"scent"}, ("photo",))
            output = prediction.output.astype(np.float32)
            np.testing.assert_allclose(output, directly(payloads[seed], ["scent"]), atol=1e-5)
        assert counters(client)["selector"]["items_tried_again"] > 0


def test_a_job_whose_numbers_are_not_finite_fails_alone(
    own: Launcher, draw: Draw, directly: Directly, counters: Counters, until: Until
) -> None:
    """Its rows share a batch with others, which are answered all the same."""
    jobs = [draw(4, seed=seed) for seed in range(6)]
    bad = {"scent": np.full((4, 6), 3.4e38, np.float32)}
    with Client(own.address, retries=None) as client, ThreadPoolExecutor(8) as pool:
        with frozen(own.children["encoder/scent"]):
            # What comes first is a call by itself; the others wait for it, and then are a batch.
            first = pool.submit(client.predict, "fruit", {"scent": jobs[0]["scent"]})
            until(lambda: counters(client)["selector"]["calls_in_flight.scent"], "the encoder has a call")
            good = [pool.submit(client.predict, "fruit", {"scent": job["scent"]}) for job in jobs[1:]]
            failing = pool.submit(client.predict, "fruit", bad)
            until(lambda: at_selector(client, counters) == 7, "the jobs are under way")
        with pytest.raises(InternalError, match=r"encoder/scent of model 'fruit': .* not finite") as failed:
            failing.result()
        assert "Traceback" not in str(failed.value)
        for job, call in zip(jobs, [first, *good], strict=True):
            output = call.result().output.astype(np.float32)
            np.testing.assert_allclose(output, directly(job, ["scent"]), atol=1e-5)
        assert counters(client)["selector"]["items_tried_again"] > 0


def test_under_load_an_encoder_is_killed_and_started_by_hand(
    own: Launcher, draw: Draw, directly: Directly, until: Until
) -> None:
    jobs = {seed: draw(48, seed=seed) for seed in range(8)}
    expected = {seed: directly(payloads, payloads) for seed, payloads in jobs.items()}
    answers: dict[int, list[Outcome]] = {seed: [] for seed in jobs}
    stop = False

    def load(seed: int) -> None:
        while not stop:
            answers[seed].append(outcome_of(own.address, jobs[seed], timeout_s=30))

    with ThreadPoolExecutor(len(jobs)) as pool:
        running = [pool.submit(load, seed) for seed in jobs]
        try:
            until(lambda: all(answers.values()), "everybody has been answered")
            own.children["encoder/photo"].process.kill()
            own.children["encoder/photo"].process.wait()
            own.start_again("encoder/photo")
            until(own.is_ready, "the encoder is used again")
            before = {seed: len(outcomes) for seed, outcomes in answers.items()}
            # The first of them may have been under way before.
            until(lambda: all(len(answers[seed]) > before[seed] + 1 for seed in jobs), "everybody has been answered")
        finally:
            stop = True
        for call in running:
            call.result()
        for seed, outcomes in answers.items():
            assert isinstance(outcomes[0], Prediction)
            assert isinstance(outcomes[-1], Prediction)
            for outcome in outcomes:
                if isinstance(outcome, Prediction):
                    np.testing.assert_allclose(outcome.output.astype(np.float32), expected[seed], atol=1e-5)
                else:
                    assert isinstance(outcome, ServiceUnavailable)


def test_without_an_encoder_the_other_sets_are_served_until_it_is_back(
    own: Launcher,
    draw: Draw,
    directly: Directly,
    counters: Counters,
    until: Until,
) -> None:
    payloads = draw(40)
    photo = own.children["encoder/photo"].process
    photo.send_signal(signal.SIGTERM)
    assert photo.wait(20) == 0
    with Client(own.address) as client:
        until(lambda: not client.models()[0].sets["photo"].available, "the encoder's end is known")
        prediction = client.predict("fruit", payloads, min_accuracy=0.6)
        assert set(prediction.modality_sets) == {"scent"}
        # It would have been scent anyway; with the best effort it would have been both.
        assert prediction.unavailable_modalities == ()
        best = client.predict("fruit", payloads, min_accuracy=0.6, effort="best")
        assert (set(best.modality_sets), best.unavailable_modalities) == ({"scent"}, ("photo",))
        output = prediction.output.astype(np.float32)
        np.testing.assert_allclose(output, directly(payloads, ["scent"]), atol=1e-5)
        with pytest.raises(ServiceUnavailable, match=r"^service encoder/photo is away, .* 0\.\d+ with scent$"):
            client.predict("fruit", payloads)
        with pytest.raises(ServiceUnavailable, match=r"^service encoder/photo is away, .* 0\.\d+ with scent$"):
            client.predict("fruit", payloads, min_accuracy=0.85)
        (away,) = [service for service in client.status() if not service.ready]
        assert (away.name, away.detail) == ("encoder/photo", "does not answer: UNAVAILABLE")
        own.start_again("encoder/photo")
        until(lambda: client.models()[0].sets["photo+scent"].available, "the encoder is used again")
        output = client.predict("fruit", payloads).output.astype(np.float32)
        np.testing.assert_allclose(output, directly(payloads, payloads), atol=1e-5)
        assert counters(client)["encoder/photo"]["payload_bytes_read"] == payloads["photo"].nbytes


async def test_a_caller_that_goes_away_frees_the_slots(
    own: Launcher, draw: Draw, counters: Counters, until: Until
) -> None:
    with Client(own.address) as watcher:
        before = counters(watcher)["selector"].get("jobs_cancelled", 0)
        async with AsyncClient(own.address) as client:
            with frozen(own.children["encoder/photo"]):
                jobs = [asyncio.create_task(client.predict("fruit", draw(64), timeout_s=300)) for _ in range(5)]
                await asyncio.to_thread(until, lambda: at_selector(watcher, counters) == 5, "the jobs are under way")
                for job in jobs:
                    job.cancel()
                results = await asyncio.gather(*jobs, return_exceptions=True)
                assert all(isinstance(result, asyncio.CancelledError) for result in results)
                # Until then the encoder must not answer any of them.
                await asyncio.to_thread(
                    until,
                    lambda: counters(watcher)["selector"].get("jobs_cancelled", 0) == before + 5,
                    "the selector knows",
                )
        # Long before the deadline, and by release: the leases last for minutes.
        await asyncio.to_thread(until, lambda: slots_held(counters(watcher)) == 0, "every slot is free")


def test_a_second_signal_ends_a_service_at_once(own: Launcher, draw: Draw, counters: Counters, until: Until) -> None:
    gateway, watcher = own.children["gateway"].process, Client(own.local_address, retries=None)
    with frozen(own.children["selector"]), ThreadPoolExecutor(1) as pool, watcher:
        call = pool.submit(outcome_of, own.address, draw(3), timeout_s=60)
        until(lambda: counters(watcher)["gateway"]["jobs_in_flight"] == 1, "the call is under way")
        gateway.send_signal(signal.SIGTERM)
        # Two signals that come before it looks would be one.
        until(lambda: not answers(watcher), "it takes no more calls")
        # It waits for the one that is under way.
        assert gateway.poll() is None
        gateway.send_signal(signal.SIGTERM)
        assert gateway.wait(20) == 1
        assert isinstance(call.result(), ServiceUnavailable)


def test_every_service_stops_on_a_signal_and_leaves_nothing(own: Launcher, shared_memory: Path) -> None:
    sockets = own.settings.run_dir
    assert len(list(sockets.glob("*.sock"))) == 5
    assert list(shared_memory.iterdir()) != []
    for name, number in zip(SERVICES, [signal.SIGTERM, signal.SIGINT] * 3, strict=False):
        process = own.children[name].process
        os.kill(process.pid, number)
        assert process.wait(20) == 0, name
    assert list(sockets.glob("*.sock")) == []
    # A service that was killed leaves its arena to the next start; others remove their own.
    assert list(shared_memory.iterdir()) == []


def test_hang_ups_come_in_numbers_and_stop_a_service_cleanly(own: Launcher) -> None:
    process = own.children["encoder/scent"].process
    for _ in range(3):
        process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 0
