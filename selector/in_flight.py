"""Jobs and calls under way: the one record of each, and the requests that name the tensors of a call."""

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from mosel.observability.tracing import Span
from mosel.v1 import encoder_pb2, fusion_pb2, gateway_pb2, selector_pb2, tensor_pb2
from selector.conversions import Place, slices
from selector.core.emission import Emission
from selector.core.jobs import EncodeCall, FuseCall
from selector.core.ledger import Holder
from selector.core.observation import Sample
from selector.core.work import Work
from selector.gateway_session import GatewaySession

CallT = TypeVar("CallT", EncodeCall, FuseCall)
# The producer of a slot, a gateway or the lane of an encoder, and the slot's numbers.
SlotKey = tuple[GatewaySession | str, int, int, int, int]


@dataclass(eq=False, kw_only=True)
class JobInFlight(Holder[SlotKey]):
    """A job from its admission until its last call is back, and the slots that it holds.

    Attributes:
        session: the gateway that waits for it.
        work: what the scheduler knows of it.
        payloads: by modality.
        emission: of its results; if it is not streamed, all wait for the last.
        traceparent: that of its request, empty if it is not traced.
        floor_source: whose floor it has.
        embeddings: where those of each item are, by modality.
        over: set when it is answered, failed or cancelled.
    """

    session: GatewaySession
    work: Work
    payloads: Mapping[str, tensor_pb2.TensorRef]
    emission: Emission[selector_pb2.ItemGroup]
    traceparent: str
    floor_source: gateway_pb2.FloorSource.ValueType
    embeddings: dict[str, dict[int, Place]] = field(default_factory=lambda: defaultdict(dict))
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def id(self) -> bytes:
        """Unique among the jobs under way."""
        return self.work.job.id


@dataclass(eq=False)
class SampleInFlight(Holder[SlotKey]):
    """Items of an answered job that are observed, and the slots with their embeddings.

    Attributes:
        model: `name@revision`.
        sample: what the core knows of them.
        embeddings: where those of each item of the job are, by modality.
    """

    model: str
    sample: Sample
    embeddings: Mapping[str, Mapping[int, Place]]


@dataclass(frozen=True, eq=False)
class CallInFlight(Generic[CallT]):
    """A call to a service.

    Attributes:
        call: what is called with which rows.
        jobs: that of each `call.rows`; they may be over before it is back.
        started: seconds of `time.monotonic()`.
        spans: one for each job that is traced.
    """

    call: CallT
    jobs: Sequence[JobInFlight]
    started: float
    spans: Sequence[Span]


def encode_request(
    call: EncodeCall, jobs: Sequence[JobInFlight], rung: tensor_pb2.Rung.ValueType
) -> encoder_pb2.EncodeRequest:
    """The payload rows of a call.

    Args:
        call: for an encoder.
        jobs: that of each `call.rows`.
        rung: how fusion reaches the embeddings.
    """
    request = encoder_pb2.EncodeRequest(model=call.model, rung=rung)
    for job, rows in zip(jobs, call.rows, strict=True):
        payload = job.payloads[call.modality]
        request.rows.extend(slices((payload, item) for item in rows.items))
    return request


def note_embeddings(call: EncodeCall, jobs: Sequence[JobInFlight], embeddings: tensor_pb2.TensorRef) -> None:
    """Notes where the embeddings are that a call brought, one row for each of its items."""
    row = 0
    for job, rows in zip(jobs, call.rows, strict=True):
        places = job.embeddings[call.modality]
        places.update((item, (embeddings, row + i)) for i, item in enumerate(rows.items))
        row += len(rows.items)


def fuse_request(call: FuseCall, jobs: Sequence[JobInFlight | SampleInFlight]) -> fusion_pb2.FuseRequest:
    """The embedding rows of a call, or those of payloads; `jobs` are those of each `call.rows`."""
    request = fusion_pb2.FuseRequest(model=call.model, from_payloads=call.from_payloads)
    for job, rows in zip(jobs, call.rows, strict=True):
        group = request.groups.add()
        for modality in call.modality_set:
            if call.from_payloads:
                assert isinstance(job, JobInFlight), "samples have embeddings"
                places: Iterable[Place] = ((job.payloads[modality], item) for item in rows.items)
            else:
                places = (job.embeddings[modality][item] for item in rows.items)
            group.rows[modality].rows.extend(slices(places))
    return request
