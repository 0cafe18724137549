"""Spans by OpenTelemetry, sent to a collector by OTLP over gRPC. Imported only where tracing is on."""

import logging
import os
import threading
import time
from collections.abc import Sequence

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span as OpenTelemetrySpan
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from mosel.config import TracingSettings
from mosel.errors import MoselError
from mosel.observability.tracing import NO_SPAN, NONE, Attributes, Kind, Span, Tracing

_SEND_EVERY_MS = 1000
# Of one attempt to deliver, with its repetitions.
_DELIVER_WITHIN_S = 5.0
_KINDS = {"internal": SpanKind.INTERNAL, "server": SpanKind.SERVER, "client": SpanKind.CLIENT}

log = logging.getLogger(__name__)


class OtlpTracing(Tracing):
    """Records spans and sends them, batch by batch, from a thread of its own; when too many wait, the oldest are lost.

    Args:
        settings: where to, and how many.
        service: the service's name.
    """

    on = True

    def __init__(self, settings: TracingSettings, service: str) -> None:
        # What the libraries say of a collector that is away, for each batch; `_Reporting` says it once.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self._exporter = OTLPSpanExporter(endpoint=settings.otlp_endpoint, timeout=_DELIVER_WITHIN_S)
        self._processor = BatchSpanProcessor(_Reporting(self._exporter), schedule_delay_millis=_SEND_EVERY_MS)
        self._ids = _GivenIds()
        provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(settings.sample_ratio)),
            resource=Resource.create({"service.name": f"mosel/{service}", "service.instance.id": str(os.getpid())}),
            shutdown_on_exit=False,
            id_generator=self._ids,
        )
        provider.add_span_processor(self._processor)
        self._tracer = provider.get_tracer("mosel")
        self._propagator = TraceContextTextMapPropagator()

    def begin(
        self,
        step: str,
        parent: str = "",
        kind: Kind = "internal",
        trace_id: bytes = b"",
        started: float | None = None,
    ) -> Span:
        """As `Tracing.begin`."""
        self._ids.given = trace_id
        context = self._propagator.extract({"traceparent": parent}, Context())
        start_time = None if started is None else _epoch_ns(started)
        span = self._tracer.start_span(step, context, _KINDS[kind], start_time=start_time)
        return _Recorded(span) if span.is_recording() else NO_SPAN

    def close(self, seconds: float) -> None:
        """Sends what waits, for so long at most."""
        sending = threading.Thread(target=self._processor.shutdown, name="last spans", daemon=True)
        sending.start()
        sending.join(seconds)
        # Ends an attempt that is under way.
        self._exporter.shutdown()


class _Recorded(Span):
    def __init__(self, span: OpenTelemetrySpan) -> None:
        context = span.get_span_context()
        super().__init__(f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}")
        self._span = span

    def end(
        self, attributes: Attributes = NONE, error: BaseException | None = None, ended: float | None = None
    ) -> None:
        self._span.set_attributes({f"mosel.{name}": value for name, value in attributes.items()})
        if error is not None:
            text = str(error) if isinstance(error, MoselError) else type(error).__name__
            self._span.set_status(Status(StatusCode.ERROR, text))
        self._span.end(None if ended is None else _epoch_ns(ended))


class _GivenIds(RandomIdGenerator):
    """The id of a trace that begins is the one that is given, if there is one."""

    given = b""

    def generate_trace_id(self) -> int:
        return int.from_bytes(self.given) or super().generate_trace_id()


class _Reporting(SpanExporter):
    """Logs when delivery fails, once until it is well again."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter, self._well = exporter, True

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        well = result is SpanExportResult.SUCCESS
        if well != self._well:
            self._well = well
            if well:
                log.info("traces are delivered again")
            else:
                log.warning("traces cannot be delivered to tracing.otlp_endpoint; they are lost until they can")
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


def _epoch_ns(monotonic: float) -> int:
    return time.time_ns() - round((time.monotonic() - monotonic) * 1e9)
