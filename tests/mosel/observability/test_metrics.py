"""Metrics of one process, and pages of several."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import mosel.errors
from mosel.config import TransportSettings
from mosel.errors import FloorUnreachable, MoselError, Overloaded
from mosel.observability.metrics import Metrics, merged, parts, reason_of, refusals, show_arenas, single, up
from mosel.transport import Publisher, SharedMemoryArena
from mosel.transport.object_arena import ObjectArena
from mosel.v1 import tensor_pb2

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(page: bytes) -> Samples:
    """What a page says."""
    found: Samples = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            # The parser gives counters a suffix that those of Triton do not have.
            name = sample.name.removesuffix("_total") if sample.name.startswith("nv_") else sample.name
            labelled = (name, frozenset(sample.labels.items()))
            assert labelled not in found
            found[labelled] = sample.value
    return found


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


async def test_everything_bears_the_name_of_its_service() -> None:
    metrics = Metrics("encoder/image")
    duration = metrics.histogram("mosel_call_seconds", "A call.", ("model",))
    refused = metrics.counts("mosel_refused_total", "Refused.", "model", "reason")
    metrics.gauge("mosel_jobs", "Jobs.", ("state",), lambda: {("waiting",): 3, ("under_way",): 4})
    duration.observe(0.0004, "a")
    duration.observe(0.04, "a")
    duration.observe(100.0, "b")
    refused["a", "overloaded"] += 2
    found = samples(await metrics.page())
    assert all(("service", "encoder/image") in labels for _, labels in found)
    here = {"service": "encoder/image"}
    assert found[key("mosel_call_seconds_count", model="a", **here)] == 2
    assert found[key("mosel_call_seconds_sum", model="a", **here)] == pytest.approx(0.0404)
    assert found[key("mosel_call_seconds_bucket", model="a", le="0.0005", **here)] == 1
    assert found[key("mosel_call_seconds_bucket", model="a", le="0.05", **here)] == 2
    assert found[key("mosel_call_seconds_bucket", model="b", le="30.0", **here)] == 0
    assert found[key("mosel_refused_total", model="a", reason="overloaded", **here)] == 2
    assert found[key("mosel_jobs", state="under_way", **here)] == 4
    assert found[key("mosel_process_resident_memory_bytes", **here)] > 0
    assert not any(name.endswith("_created") for name, _ in found)


async def test_two_in_one_process_share_nothing() -> None:
    first, second = Metrics("first"), Metrics("second")
    for metrics in (first, second):
        metrics.histogram("mosel_call_seconds", "A call.", ()).observe(1.0)
    assert samples(await first.page())[key("mosel_call_seconds_count", service="first")] == 1
    assert samples(await second.page())[key("mosel_call_seconds_count", service="second")] == 1


async def test_triton_s_names_are_bare() -> None:
    metrics = Metrics("gateway")
    metrics.triton("nv_inference_count", "Items.", "counter", lambda: {("digits", "1"): 7})
    metrics.triton("nv_inference_pending_request_count", "Waiting.", "gauge", lambda: {("digits", "1"): 2})
    page = await metrics.page()
    assert b"# TYPE nv_inference_count counter\n" in page
    assert b'\nnv_inference_count{model="digits",version="1"} 7.0\n' in page
    assert b"# TYPE nv_inference_pending_request_count gauge\n" in page
    assert b'\nnv_inference_pending_request_count{model="digits",version="1"} 2.0\n' in page


async def test_a_metric_of_several_services_appears_once_in_their_page() -> None:
    gateway, selector = Metrics("gateway"), Metrics("selector")
    refusals(gateway)["", "invalid_request"] += 1
    refusals(selector)["digits", "overloaded"] += 2
    selector.histogram("mosel_queue_seconds", "Queue.", ()).observe(0.1)
    said = up({"gateway": True, "selector": True, "fusion": False})
    page = merged([said, await gateway.page(), await selector.page(), b""])
    lines = page.decode().splitlines()
    types = [line for line in lines if line.startswith("# TYPE ")]
    assert len(types) == len(set(types))
    at = lines.index("# TYPE mosel_refused_total counter")
    assert lines[at - 1].startswith("# HELP mosel_refused_total ")
    assert lines[at + 1 : at + 3] == [
        'mosel_refused_total{model="",reason="invalid_request",service="gateway"} 1.0',
        'mosel_refused_total{model="digits",reason="overloaded",service="selector"} 2.0',
    ]
    found = samples(page)
    parted = [samples(part) for part in (said, await gateway.page(), await selector.page())]
    assert set(found) == set().union(*parted)
    assert found[key("mosel_up", service="fusion")] == 0
    assert found[key("mosel_up", service="selector")] == 1


async def test_a_label_may_hold_anything() -> None:
    metrics = Metrics("gateway")
    metrics.counts("mosel_odd_total", "Odd.", "model")['a"\n# HELP mosel_odd_total x\\',] += 1
    found = samples(merged([await metrics.page(), up({})]))
    assert found[key("mosel_odd_total", service="gateway", model='a"\n# HELP mosel_odd_total x\\')] == 1


async def test_a_page_while_another_thread_counts() -> None:
    metrics = Metrics("encoder/image")
    counts = metrics.counts("mosel_things_total", "Things.", "number")
    duration = metrics.histogram("mosel_call_seconds", "A call.", ("number",))
    over = threading.Event()

    def count() -> None:
        for number in range(2000):
            counts[str(number),] += 1
            duration.observe(0.1, str(number % 50))
        over.set()

    thread = threading.Thread(target=count)
    thread.start()
    while not over.is_set():
        samples(await metrics.page())
        await asyncio.sleep(0)
    thread.join()
    found = samples(await metrics.page())
    assert sum(value for (name, _), value in found.items() if name == "mosel_things_total") == 2000
    assert sum(value for (name, _), value in found.items() if name == "mosel_call_seconds_count") == 2000


def test_reasons_are_the_names_of_errors() -> None:
    assert reason_of(FloorUnreachable("no")) == "floor_unreachable"
    assert reason_of(Overloaded("full")) == "overloaded"
    assert reason_of(ValueError("a bug")) == "internal_error"
    kinds = [kind for kind in vars(mosel.errors).values() if isinstance(kind, type) and issubclass(kind, MoselError)]
    assert len({reason_of(kind("why")) for kind in kinds}) == len(kinds)


def test_statistics_become_values() -> None:
    statistics = {"jobs": 3, "edges.inline": 1, "edges.posix_shm": 2, "edges": 9}
    assert single(statistics, "jobs") == {(): 3}
    assert parts(statistics, "edges") == {("inline",): 1, ("posix_shm",): 2}


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[SharedMemoryArena]:
    with SharedMemoryArena(tmp_path, 2 * 1024 * 1024, "transport.gateway_arena_mib") as arena:
        yield arena


def test_objects_of_the_process_are_counted_too() -> None:
    with ObjectArena(2 * 1024 * 1024, "transport.gateway_arena_mib") as objects:
        publisher = Publisher(None, TransportSettings(inline_max_kib=1), objects)
        publisher.rung = tensor_pb2.IN_PROCESS
        metrics = Metrics("gateway")
        show_arenas(metrics, publisher.statistics)
        publisher.publish("UINT8", (5000,), memoryview(bytes(5000)), 60)
        found = samples(asyncio.run(metrics.page()))
    assert found[key("mosel_tensor_bytes_total", rung="in_process", service="gateway")] == 5000
    assert found[key("mosel_arena_slots", arena="object", state="published", service="gateway")] == 1


def test_tensors_are_counted_by_their_rung(arena: SharedMemoryArena) -> None:
    publisher = Publisher(arena, TransportSettings(inline_max_kib=1))
    publisher.rung = tensor_pb2.POSIX_SHM
    metrics = Metrics("gateway")
    show_arenas(metrics, publisher.statistics)
    free = arena.statistics().free
    publisher.publish("UINT8", (1000,), memoryview(bytes(1000)), 60)
    refs = [publisher.publish("UINT8", (5000,), memoryview(bytes(5000)), 60) for _ in range(2)]
    publisher.release([refs[0].slot])
    found = samples(asyncio.run(metrics.page()))
    here = {"service": "gateway"}
    assert found[key("mosel_tensors_total", rung="inline", **here)] == 1
    assert found[key("mosel_tensors_total", rung="posix_shm", **here)] == 2
    assert found[key("mosel_tensor_bytes_total", rung="inline", **here)] == 1000
    assert found[key("mosel_tensor_bytes_total", rung="posix_shm", **here)] == 10000
    slots = {"arena": "shared_memory", **here}
    assert found[key("mosel_arena_slots", state="published", **slots)] == 1
    assert found[key("mosel_arena_slots", state="free", **slots)] == free - 1
    assert found[key("mosel_arena_slot_events_total", event="acquired", **slots)] == 2
    assert found[key("mosel_arena_slot_events_total", event="released", **slots)] == 1
