"""The metrics page of real services: what was sent is what is counted, for every service, whatever happens to it."""

import contextlib
import json
import os
import re
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from mosel.client import Client
from mosel.config import FREE_PORTS, Settings
from mosel.errors import DeadlineExceeded, InternalError, InvalidRequest, MoselError, Unreachable
from mosel.launcher import Launcher
from tests.fruit_on_disk import measured
from tests.mosel.observability.test_metrics import Samples, key, samples

Draw = Callable[..., dict[str, NDArray[Any]]]
Until = Callable[..., None]
SERVICES = ["gateway", "selector", "encoder/photo", "encoder/scent", "fusion"]


@pytest.fixture(scope="module")
def launcher(settings_with: Callable[..., Settings]) -> Iterator[Launcher]:
    """Services of this module alone, so that nobody else is counted; every tensor travels by shared memory."""
    with Launcher(settings_with(transport={"inline_max_kib": 0})) as launcher:
        launcher.wait_ready(120)
        yield launcher


def scrape(launcher: Launcher) -> Samples:
    reply = httpx.get(launcher.metrics_address, timeout=30)
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return samples(reply.content)


def grown(before: Samples, after: Samples, name: str, *by: str) -> dict[tuple[str, ...], float]:
    """By how much a metric has grown, by some of its labels, where it has."""
    growth: dict[tuple[str, ...], float] = {}
    for (metric, labels), value in after.items():
        if metric == name:
            values = dict(labels)
            at = tuple(values[label] for label in by)
            growth[at] = growth.get(at, 0.0) + value - before.get((metric, labels), 0.0)
    return {labels: value for labels, value in growth.items() if value}


def test_every_service_is_on_the_page(launcher: Launcher) -> None:
    found = scrape(launcher)
    up = {dict(labels)["service"]: value for (name, labels), value in found.items() if name == "mosel_up"}
    assert up == dict.fromkeys(SERVICES, 1)
    for service in SERVICES:
        assert found[key("mosel_process_resident_memory_bytes", service=service)] > 0
    assert found[key("mosel_model_ready", service="gateway", model="fruit")] == 1
    # From the gateway to both encoders, and from these to fusion.
    assert found[key("mosel_transport_edges", service="selector", rung="posix_shm")] == 4
    for name, arena in (("gateway", "shared_memory"), ("encoder/photo", "shared_memory")):
        assert found[key("mosel_arena_slots", service=name, arena=arena, state="free")] > 0
    page = httpx.get(launcher.metrics_address).text
    types = re.findall(r"(?m)^# TYPE (\S+)", page)
    assert len(types) == len(set(types))
    assert httpx.get(launcher.metrics_address.removesuffix("metrics")).status_code == 404
    assert httpx.post(launcher.metrics_address).status_code == 405


def test_the_documentation_has_every_metric_and_no_other(launcher: Launcher) -> None:
    text = (Path(__file__).parents[2] / "docs" / "observability.md").read_text()
    ours = {re.sub(r"(_bucket|_sum|_count)$", "", name) for name in re.findall(r"\bmosel_\w+", text)}
    documented = ours | set(re.findall(r"\bnv_inference_\w+", text))
    shown = set(re.findall(r"(?m)^# TYPE (\S+)", httpx.get(launcher.metrics_address).text))
    assert documented <= shown
    assert {name for name in shown - documented if not name.startswith("mosel_process_")} == set()


# What is sent: modalities, size, how often.
SENT = [(("photo", "scent"), 4, 5), (("scent",), 3, 7), (("photo",), 1, 2)]


@pytest.fixture(scope="module")
def served(launcher: Launcher, draw: Draw) -> tuple[Samples, Samples]:
    """The page before and after `SENT`."""
    before = scrape(launcher)
    with Client(launcher.address) as client:
        for modalities, size, times in SENT:
            for seed in range(times):
                payloads = {name: array for name, array in draw(size, seed).items() if name in modalities}
                client.predict("fruit", payloads, modalities=modalities)
    return before, scrape(launcher)


def by_set(count: Callable[[int, int], int]) -> dict[tuple[str, ...], int]:
    return {("+".join(modalities),): count(size, times) for modalities, size, times in SENT}


def test_requests_are_timed_by_their_modality_set(served: tuple[Samples, Samples]) -> None:
    jobs = by_set(lambda size, times: times)
    for name in ("request", "queue", "processing"):
        assert grown(*served, f"mosel_{name}_duration_seconds_count", "modality_set") == jobs
    sums = {
        name: grown(*served, f"mosel_{name}_duration_seconds_sum", "modality_set")
        for name in ("request", "queue", "processing")
    }
    for modality_set in jobs:
        inside = sums["queue"].get(modality_set, 0.0) + sums["processing"][modality_set]
        assert 0 < inside < sums["request"][modality_set]


def test_calls_are_timed_where_they_are_computed_and_where_they_are_made(served: tuple[Samples, Samples]) -> None:
    rows = Counter[tuple[str, ...]]()
    for modalities, size, times in SENT:
        rows.update(dict.fromkeys([(modality,) for modality in modalities], size * times))
    assert grown(*served, "mosel_encode_batch_items_sum", "modality") == rows
    assert grown(*served, "mosel_fuse_batch_items_sum", "modality_set") == by_set(lambda size, times: size * times)
    for verb, label in (("encode", "modality"), ("fuse", "modality_set")):
        calls = grown(*served, f"mosel_{verb}_duration_seconds_count", label)
        assert calls == grown(*served, f"mosel_{verb}_batch_items_count", label)
        assert calls == grown(*served, f"mosel_{verb}_transfer_duration_seconds_count", label)
        assert all(value > 0 for value in grown(*served, f"mosel_{verb}_duration_seconds_sum", label).values())
        assert all(v > 0 for v in grown(*served, f"mosel_{verb}_transfer_duration_seconds_sum", label).values())
    # One job at a time: an encoder call for each modality of each job, none shared.
    assert grown(*served, "mosel_encode_duration_seconds_count", "service", "model", "modality") == {
        ("encoder/photo", "fruit", "photo"): 7,
        ("encoder/scent", "fruit", "scent"): 12,
    }


def test_jobs_and_items_are_counted(served: tuple[Samples, Samples]) -> None:
    jobs = sum(times for _, _, times in SENT)
    for name in ("admitted", "answered"):
        assert grown(*served, f"mosel_{name}_total", "service", "model") == {("selector", "fruit"): jobs}
    assert grown(*served, "mosel_requests_total", "model", "status") == {("fruit", "OK"): jobs}
    assert grown(*served, "mosel_items_total", "modality_set") == by_set(lambda size, times: size * times)
    assert grown(*served, "mosel_prediction_ratio_count", "model") == {("fruit",): jobs}
    for name in ("refused", "missed", "unanswered", "degraded", "upgraded", "failed_calls"):
        assert grown(*served, f"mosel_{name}_total") == {}


def test_tensors_and_bytes_are_counted(served: tuple[Samples, Samples], draw: Draw) -> None:
    row = {name: array.nbytes for name, array in draw(1).items()}
    rows = {"photo": 4 * 5 + 2, "scent": 4 * 5 + 3 * 7}
    read = {(f"encoder/{name}",): float(rows[name] * row[name]) for name in rows}
    assert grown(*served, "mosel_payload_read_bytes_total", "service") == read
    sent = sum(nbytes for nbytes in read.values())
    tensors = grown(*served, "mosel_tensors_total", "service", "rung")
    assert tensors["gateway", "posix_shm"] == 2 * 5 + 7 + 2
    assert (tensors["encoder/photo", "posix_shm"], tensors["encoder/scent", "posix_shm"]) == (7, 12)
    assert grown(*served, "mosel_tensor_bytes_total", "service", "rung")["gateway", "posix_shm"] == sent
    assert grown(*served, "mosel_embedding_read_bytes_total", "service")["fusion",] > 0


def test_triton_s_names_say_the_same(served: tuple[Samples, Samples]) -> None:
    jobs, items = sum(times for _, _, times in SENT), sum(size * times for _, size, times in SENT)
    fruit = ("fruit", "1")

    def growth(name: str) -> float:
        return grown(*served, f"nv_inference_{name}", "model", "version").get(fruit, 0.0)

    assert (growth("request_success"), growth("request_failure"), growth("count")) == (jobs, 0, items)
    assert growth("exec_count") == sum(grown(*served, "mosel_fuse_duration_seconds_count").values())
    for name, ours in (
        ("request_duration_us", "mosel_request_duration_seconds_sum"),
        ("queue_duration_us", "mosel_queue_duration_seconds_sum"),
        ("compute_infer_duration_us", "mosel_processing_duration_seconds_sum"),
    ):
        seconds = sum(grown(*served, ours).values())
        assert growth(name) == pytest.approx(seconds * 1e6, abs=jobs)
    _, after = served
    assert after[key("nv_inference_pending_request_count", model="fruit", version="1")] == 0


def tries_until_unreachable(client: Client, payloads: dict[str, NDArray[Any]], slo_ms: float) -> int:
    """Asks for what cannot be had in time; returns how often the time was over before the selector could say so."""
    for expired in range(50):
        with contextlib.suppress(DeadlineExceeded):
            with pytest.raises(Unreachable):
                client.predict("fruit", payloads, modalities=["photo", "scent"], latency_slo_ms=slo_ms)
            return expired
    raise AssertionError(f"never refused: {slo_ms} ms")


def test_the_refused_are_counted_by_their_reason(launcher: Launcher, draw: Draw) -> None:
    before = scrape(launcher)
    with Client(launcher.address) as client:
        for _ in range(2):
            with pytest.raises(Unreachable):
                client.predict("fruit", draw(1), min_accuracy=0.999)
        too_soon = client.plan("fruit", 512).frontier[-1].latency_ms / 3
        expired = tries_until_unreachable(client, draw(512), too_soon)
        with pytest.raises(InvalidRequest):
            client.predict("fruit", {"scent": np.zeros((1, 7), np.float32)})
        with pytest.raises(MoselError):
            client.predict("pear", draw(1))
    after = scrape(launcher)
    refused = grown(before, after, "mosel_refused_total", "service", "model", "reason")
    # The selector may have refused those as well.
    assert 1 <= refused.pop(("selector", "fruit", "deadline_unreachable")) <= 1 + expired
    assert refused == {
        ("selector", "fruit", "floor_unreachable"): 2,
        ("gateway", "fruit", "invalid_request"): 1,
        ("gateway", "", "model_not_found"): 1,
    }
    statuses = grown(before, after, "mosel_requests_total", "status")
    assert statuses.pop(("DEADLINE_EXCEEDED",), 0) == expired
    assert statuses == {
        ("FAILED_PRECONDITION",): 3,
        ("INVALID_ARGUMENT",): 1,
        ("NOT_FOUND",): 1,
    }
    assert grown(before, after, "nv_inference_request_failure") == {(): 4 + expired}
    assert grown(before, after, "mosel_admitted_total") == {}


def test_a_late_answer_is_a_miss(launcher: Launcher, draw: Draw) -> None:
    before = scrape(launcher)
    with Client(launcher.address) as client:
        assert not client.predict("fruit", draw(1), latency_slo_ms=0.01, late_ok=True).deadline_met
    after = scrape(launcher)
    assert grown(before, after, "mosel_missed_total", "model", "how") == {("fruit", "late"): 1}


def test_jobs_that_share_calls_are_counted_each(launcher: Launcher, draw: Draw) -> None:
    before = scrape(launcher)
    with Client(launcher.address) as client, ThreadPoolExecutor(24) as pool:
        list(pool.map(lambda seed: client.predict("fruit", draw(1, seed)), range(120)))
    after = scrape(launcher)
    assert sum(grown(before, after, "mosel_request_duration_seconds_count").values()) == 120
    assert sum(grown(before, after, "mosel_items_total").values()) == 120
    assert grown(before, after, "mosel_encode_batch_items_sum", "modality") == {("photo",): 120, ("scent",): 120}
    assert sum(grown(before, after, "mosel_encode_duration_seconds_count").values()) < 240


def log_lines(launcher: Launcher, service: str) -> list[dict[str, Any]]:
    lines = launcher.children[service].log.read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def request_lines(launcher: Launcher) -> list[dict[str, Any]]:
    return [line for line in log_lines(launcher, "gateway") if line["logger"] == "gateway.requests"]


def test_the_log_has_a_line_for_each_request(launcher: Launcher, draw: Draw, until: Until) -> None:
    before = len(request_lines(launcher))
    with Client(launcher.address) as client:
        job_id = client.predict("fruit", draw(2)).job_id
        with pytest.raises(Unreachable):
            client.predict("fruit", draw(1), min_accuracy=0.999)
    until(lambda: len(request_lines(launcher)) >= before + 2, "both are logged")
    answered, refused = request_lines(launcher)[before:]
    names = ("service", "level", "method", "model", "size", "status", "modality_sets", "job_id")
    expected = ["gateway", "INFO", "Predict", "fruit", 2, "OK", {"photo+scent": 2}, job_id]
    assert [answered[name] for name in names] == expected
    assert answered["ms"] > answered["compute_ms"] > 0
    assert (refused["status"], refused["size"]) == ("FAILED_PRECONDITION", 1)
    assert refused["reason"].startswith("min_accuracy 0.999 cannot be met")
    assert len(refused["job_id"]) == 32


def test_a_line_about_a_failed_call_names_its_job(launcher: Launcher, draw: Draw, until: Until) -> None:
    before, logged = scrape(launcher), len(request_lines(launcher))
    fusion = launcher.children["fusion"].process.pid
    os.kill(fusion, signal.SIGSTOP)
    try:
        # Long enough for the encoders to be done on a busy machine: it is in fusion that the job must expire.
        with Client(launcher.address) as client, pytest.raises(DeadlineExceeded):
            client.predict("fruit", draw(1), latency_slo_ms=4000.0)
    finally:
        os.kill(fusion, signal.SIGCONT)
    until(lambda: len(request_lines(launcher)) > logged, "the request is logged")
    refused = request_lines(launcher)[-1]
    assert refused["status"] == "DEADLINE_EXCEEDED"

    def failed() -> list[dict[str, Any]]:
        lines = [line for line in log_lines(launcher, "selector") if line["message"] == "call failed"]
        return [line for line in lines if line.get("job_id") == refused["job_id"]]

    until(lambda: bool(failed()), "a line about the failed call names the job")
    after = scrape(launcher)
    assert grown(before, after, "mosel_missed_total", "how") == {("expired",): 1}
    assert grown(before, after, "mosel_failed_calls_total", "callee", "reason") == {("fusion", "deadline_exceeded"): 1}


def test_a_service_that_hangs_or_is_gone_leaves_the_page_working(launcher: Launcher, draw: Draw, until: Until) -> None:
    def up() -> Mapping[str, float]:
        return {dict(labels)["service"]: value for (n, labels), value in scrape(launcher).items() if n == "mosel_up"}

    os.kill(launcher.children["fusion"].process.pid, signal.SIGSTOP)
    try:
        # On a busy machine another may be late, once.
        until(lambda: up() == dict.fromkeys(SERVICES, 1) | {"fusion": 0}, "fusion alone does not answer")
    finally:
        os.kill(launcher.children["fusion"].process.pid, signal.SIGCONT)
    until(lambda: up() == dict.fromkeys(SERVICES, 1), "fusion answers again")

    launcher.children["encoder/photo"].process.kill()
    launcher.children["encoder/photo"].process.wait()
    found = scrape(launcher)
    assert found[key("mosel_up", service="encoder/photo")] == 0
    assert not any(("service", "encoder/photo") in labels for name, labels in found if name != "mosel_up")
    assert found[key("mosel_up", service="encoder/scent")] == 1
    launcher.start_again("encoder/photo")
    until(lambda: up() == dict.fromkeys(SERVICES, 1), "the encoder answers again")

    launcher.children["selector"].process.kill()
    launcher.children["selector"].process.wait()
    assert up() == {"gateway": 1, "selector": 0}
    launcher.start_again("selector")
    until(lambda: up() == dict.fromkeys(SERVICES, 1), "the selector answers again")


def test_many_scrapes_at_once_while_jobs_run(launcher: Launcher, draw: Draw, until: Until) -> None:
    with Client(launcher.address) as client:
        until(lambda: all(model.ready for model in client.models()), "the model is ready")
        over = threading.Event()

        def scrapes() -> int:
            count = 0
            while not over.is_set():
                scrape(launcher)
                count += 1
            return count

        with ThreadPoolExecutor(6) as pool:
            scraped = [pool.submit(scrapes) for _ in range(6)]
            for seed in range(40):
                client.predict("fruit", draw(1, seed))
            over.set()
        assert all(future.result() for future in scraped)


def test_a_log_that_has_grown_large_is_forgotten_and_goes_on(
    launcher: Launcher, draw: Draw, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    def last() -> str:
        return (request_lines(launcher) or [{"job_id": ""}])[-1]["job_id"]  # type: ignore[no-any-return]

    with Client(launcher.address) as client:
        first = client.predict("fruit", draw(1)).job_id
        until(lambda: last() == first, "the line is written")
        monkeypatch.setattr("mosel.launcher.launcher._MOST_LOG_BYTES", 50)
        launcher.trim_logs()
        assert launcher.children["gateway"].log.read_text() == ""
        job_id = client.predict("fruit", draw(1)).job_id
    until(lambda: last() == job_id, "the next line is written")
    assert len(log_lines(launcher, "gateway")) == 1


FRAGILE = """
    def forward(self, scent: Tensor) -> Tensor:
        if bool((scent > 1e30).any()):
            raise RuntimeError("broken")
        return super().forward(scent)
"""


@pytest.fixture
def fragile_models(models_dir: Path, tmp_path: Path) -> Path:
    """`fruit` with an encoder that fails for some payloads."""
    shutil.copytree(models_dir / "fruit", tmp_path / "fruit")
    networks = tmp_path / "fruit" / "networks.py"
    made = "        super().__init__(6, 8)\n"
    assert made in networks.read_text()
    networks.write_text(networks.read_text().replace(made, made + FRAGILE))
    measured(tmp_path / "fruit")
    return tmp_path


def test_without_the_access_log_only_trouble_leaves_lines_and_they_name_the_job(
    settings_with: Callable[..., Settings], fragile_models: Path, draw: Draw
) -> None:
    gateway = FREE_PORTS | {"access_log": False}
    with Launcher(settings_with(models_dir=fragile_models, gateway=gateway)) as launcher:
        launcher.wait_ready(120)
        with Client(launcher.address) as client:
            client.predict("fruit", draw(1))
            with pytest.raises(InternalError):
                client.predict("fruit", {"scent": np.full((1, 6), 2e30, np.float32)})
        assert not [line for line in log_lines(launcher, "gateway") if line["logger"] == "gateway.requests"]
        statuses = grown({}, scrape(launcher), "mosel_requests_total", "status")
        assert statuses == {("OK",): 1, ("INTERNAL",): 1}
        called = [line for line in log_lines(launcher, "selector") if line["message"] == "call failed"]
        broken = [line for line in log_lines(launcher, "encoder/scent") if line["level"] == "ERROR"]
        assert len(called) == len(broken) == 2, "it is tried once more"
        assert all("RuntimeError: broken" in line["exc_info"] for line in broken)
        (job_id,) = {line["job_id"] for line in (*called, *broken)}
        assert len(job_id) == 32
