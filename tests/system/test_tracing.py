"""Traces of real services, sent to a real collector in this process."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from numpy.typing import NDArray
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from mosel.client import Client, JobSummary
from mosel.client.demands import predict_request
from mosel.config import Settings
from mosel.errors import Unreachable
from mosel.launcher import Launcher
from mosel.v1 import gateway_pb2_grpc

Draw = Callable[..., dict[str, NDArray[Any]]]
Until = Callable[..., None]
SERVER, CLIENT = trace_pb2.Span.SPAN_KIND_SERVER, trace_pb2.Span.SPAN_KIND_CLIENT
CALLER_S_TRACE, CALLER_S_SPAN = "ab" * 16, "cd" * 8


@dataclass(frozen=True)
class Step:
    """A span as the collector got it."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    kind: int
    begin: int
    end: int
    failed: bool
    attributes: dict[str, Any] = field(hash=False)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self._steps: list[Step] = []
        self._lock = threading.Lock()

    def Export(  # noqa: N802 (named by the proto)
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            names = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
            spans = [span for scope in resource.scope_spans for span in scope.spans]
            with self._lock:
                self._steps.extend(step(names["service.name"], span) for span in spans)
        return trace_service_pb2.ExportTraceServiceResponse()

    def trace(self, trace: str) -> list[Step]:
        with self._lock:
            return [step for step in self._steps if step.trace == trace]

    def all(self) -> list[Step]:
        with self._lock:
            return list(self._steps)


def step(service: str, span: trace_pb2.Span) -> Step:
    attributes = {}
    for pair in span.attributes:
        kind = pair.value.WhichOneof("value")
        assert kind is not None
        attributes[pair.key] = getattr(pair.value, kind)
    return Step(
        service,
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.kind,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
        attributes,
    )


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[Collector, str]]:
    """A collector, and its address."""
    servicer, server = Collector(), grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"http://127.0.0.1:{port}"
    server.stop(None)


@dataclass(frozen=True)
class Sent:
    """Requests that were sent, and what the collector had got when the services had stopped right after the last."""

    collector: Collector
    alone: str
    together: list[str]


@pytest.fixture(scope="module")
def sent(collector: tuple[Collector, str], settings_with: Callable[..., Settings], draw: Draw) -> Sent:
    servicer, endpoint = collector
    with Launcher(settings_with(tracing={"otlp_endpoint": endpoint})) as launcher:
        launcher.wait_ready(120)
        with Client(launcher.address) as client, ThreadPoolExecutor(24) as pool:
            jobs = list(pool.map(lambda seed: client.predict("fruit", draw(1, seed)).job_id, range(96)))
            with_traceparent(launcher, draw, "01")
            with pytest.raises(Unreachable):
                client.predict("fruit", draw(1), min_accuracy=0.999)
            *_, summary = client.submit_job("fruit", draw(3), modalities=["scent"])
            assert isinstance(summary, JobSummary)
            alone = client.predict("fruit", draw(5)).job_id
    return Sent(servicer, alone, jobs)


def with_traceparent(launcher: Launcher, draw: Draw, flags: str, trace: str = CALLER_S_TRACE) -> None:
    """A request of a caller that traces."""
    with grpc.insecure_channel(launcher.address) as channel:
        request = predict_request("fruit", draw(2), {}, 64)
        metadata = (("traceparent", f"00-{trace}-{CALLER_S_SPAN}-{flags}"),)
        gateway_pb2_grpc.GatewayStub(channel).Predict(request, metadata=metadata)


def only(steps: list[Step], service: str, name: str) -> Step:
    (found,) = [step for step in steps if (step.service, step.name) == (service, name)]
    return found


def test_a_request_is_one_trace_through_all_services(sent: Sent) -> None:
    # The trace's id is the job's; the services stopped right after the answer, and nothing was lost.
    steps = sent.collector.trace(sent.alone)
    assert sorted((step.service, step.name) for step in steps) == [
        ("mosel/encoder/photo", "encode photo"),
        ("mosel/encoder/scent", "encode scent"),
        ("mosel/fusion", "fuse"),
        ("mosel/gateway", "request"),
        ("mosel/selector", "encode photo"),
        ("mosel/selector", "encode scent"),
        ("mosel/selector", "fuse"),
        ("mosel/selector", "plan"),
        ("mosel/selector", "queue"),
    ]
    root = only(steps, "mosel/gateway", "request")
    assert (root.parent, root.kind) == ("", SERVER)
    for step in steps:
        if step.service == "mosel/selector":
            assert step.parent == root.id
    for service, name in (("encoder/photo", "encode photo"), ("encoder/scent", "encode scent"), ("fusion", "fuse")):
        call, inside = only(steps, "mosel/selector", name), only(steps, f"mosel/{service}", name)
        assert (inside.parent, inside.kind, call.kind) == (call.id, SERVER, CLIENT)
    assert len({step.id for step in steps}) == len(steps)
    assert not any(step.failed for step in steps)


def test_steps_say_what_they_did_and_follow_each_other(sent: Sent) -> None:
    steps = sent.collector.trace(sent.alone)
    root = only(steps, "mosel/gateway", "request")
    assert root.attributes == {
        "mosel.job_id": sent.alone,
        "mosel.model": "fruit",
        "mosel.batch_size": 5,
        "mosel.modality_set": "photo+scent",
        "mosel.status": "OK",
    }
    photo = only(steps, "mosel/encoder/photo", "encode photo")
    fuse = only(steps, "mosel/fusion", "fuse")
    shared = {"mosel.model": "fruit", "mosel.batch_size": 5}
    assert photo.attributes.pop("mosel.compute_ms") > 0
    assert photo.attributes == shared | {"mosel.modality": "photo"}
    assert fuse.attributes.pop("mosel.compute_ms") > 0
    assert fuse.attributes == shared | {"mosel.modality_set": "photo+scent"}
    call = only(steps, "mosel/selector", "fuse")
    assert call.attributes.pop("mosel.transfer_ms") > 0
    assert call.attributes == shared | {"mosel.modality_set": "photo+scent"}
    plan, queue = only(steps, "mosel/selector", "plan"), only(steps, "mosel/selector", "queue")
    encode = only(steps, "mosel/selector", "encode photo")
    # Clocks of processes on one machine agree to well within this.
    slack = 5_000_000
    assert plan.begin == pytest.approx(queue.begin, abs=slack)
    for earlier, later in ((root.begin, plan.begin), (queue.end, encode.begin), (encode.end, call.begin)):
        assert earlier <= later + slack
    assert call.end <= root.end + slack
    assert all(step.begin <= step.end for step in steps)


def test_a_call_that_jobs_share_is_in_the_trace_of_each(sent: Sent) -> None:
    for job_id in sent.together:
        steps = sent.collector.trace(job_id)
        assert {step.name for step in steps} == {"request", "plan", "queue", "encode photo", "encode scent", "fuse"}
        assert only(steps, "mosel/gateway", "request").attributes["mosel.batch_size"] == 1
    calls = [step for step in sent.collector.all() if step.name == "encode photo" and step.service == "mosel/selector"]
    shared = [step for step in calls if step.trace in sent.together and step.attributes["mosel.batch_size"] > 1]
    assert len({step.trace for step in shared}) > 1


def test_a_caller_s_trace_is_continued(sent: Sent) -> None:
    steps = sent.collector.trace(CALLER_S_TRACE)
    root = only(steps, "mosel/gateway", "request")
    assert root.parent == CALLER_S_SPAN
    assert root.attributes["mosel.batch_size"] == 2
    assert root.attributes["mosel.job_id"] != CALLER_S_TRACE
    assert len(steps) == 9


def test_a_refused_request_is_a_trace_too(sent: Sent) -> None:
    (root,) = [step for step in sent.collector.all() if step.attributes.get("mosel.status") == "FAILED_PRECONDITION"]
    assert root.failed
    assert sorted(step.name for step in sent.collector.trace(root.trace)) == ["plan", "request"]
    assert only(sent.collector.trace(root.trace), "mosel/selector", "plan").failed


def test_a_streamed_job_is_a_trace_too(sent: Sent) -> None:
    roots = [step for step in sent.collector.all() if step.name == "request"]
    (root,) = [step for step in roots if step.attributes["mosel.batch_size"] == 3]
    assert root.attributes["mosel.modality_set"] == "scent"
    names = {step.name for step in sent.collector.trace(root.trace)}
    assert names == {"request", "plan", "queue", "encode scent", "fuse"}


def test_what_is_not_to_be_recorded_is_not(
    collector: tuple[Collector, str], settings_with: Callable[..., Settings], draw: Draw
) -> None:
    servicer, endpoint = collector
    before = len(servicer.all())
    with Launcher(settings_with(tracing={"otlp_endpoint": endpoint, "sample_ratio": 0.0})) as launcher:
        launcher.wait_ready(120)
        with Client(launcher.address) as client:
            client.predict("fruit", draw(1))
        with_traceparent(launcher, draw, "00", "12" * 16)
        with_traceparent(launcher, draw, "01", "34" * 16)
    recorded = servicer.all()[before:]
    assert {step.trace for step in recorded} == {"34" * 16}
    assert len(recorded) == 9


def test_off_nothing_is_sent(services: Launcher, collector: tuple[Collector, str], client: Client, draw: Draw) -> None:
    with_traceparent(services, draw, "01", "56" * 16)
    assert collector[0].trace("56" * 16) == []
    assert collector[0].trace(client.predict("fruit", draw(1)).job_id) == []


@pytest.mark.slow
def test_a_collector_that_is_away_harms_nobody(
    settings_with: Callable[..., Settings], draw: Draw, until: Until
) -> None:
    # Nobody listens on port 1.
    with Launcher(settings_with(tracing={"otlp_endpoint": "http://127.0.0.1:1"})) as launcher:
        launcher.wait_ready(120)

        def warnings() -> list[str]:
            lines = [json.loads(line) for line in launcher.children["gateway"].log.read_text().splitlines()]
            return [line["message"] for line in lines if line["level"] != "INFO"]

        with Client(launcher.address) as client:

            def predict_until_warned() -> bool:
                for seed in range(20):
                    client.predict("fruit", draw(1, seed))
                return bool(warnings())

            until(predict_until_warned, "the gateway says that traces cannot be delivered")
            for seed in range(100):
                client.predict("fruit", draw(1, seed))
            assert len(warnings()) == 1
            assert warnings()[0].startswith("traces cannot be delivered to tracing.otlp_endpoint")


class Hanging(trace_service_pb2_grpc.TraceServiceServicer):
    """A collector that takes what it is sent, and never answers."""

    def __init__(self) -> None:
        self.asked, self.over = threading.Event(), threading.Event()

    def Export(  # noqa: N802 (named by the proto)
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self.asked.set()
        self.over.wait()
        return trace_service_pb2.ExportTraceServiceResponse()


def test_a_collector_that_hangs_holds_up_no_end(settings_with: Callable[..., Settings], draw: Draw) -> None:
    collector, server = Hanging(), grpc.server(ThreadPoolExecutor(16))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Launcher(settings_with(tracing={"otlp_endpoint": f"http://127.0.0.1:{port}"})) as launcher:
            launcher.wait_ready(120)
            with Client(launcher.address) as client:
                client.predict("fruit", draw(1))
                assert collector.asked.wait(60)
                client.predict("fruit", draw(1))
        # The launcher kills what does not end in time.
        assert {name: child.process.returncode for name, child in launcher.children.items()} == dict.fromkeys(
            launcher.children, 0
        )
    finally:
        # Else its threads hold up the end of the tests.
        collector.over.set()
        server.stop(None)
