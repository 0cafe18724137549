"""Jobs under way as the services see them: where their tensors are, and the requests that name those."""

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from mosel.v1 import encoder_pb2, fusion_pb2, selector_pb2, tensor_pb2
from selector.conversions import Place, slices
from selector.core.emission import Emission
from selector.core.jobs import EncodeCall, FuseCall
from selector.core.work import Work
from selector.gateway_session import GatewaySession


@dataclass(eq=False)
class JobInFlight:
    """A job, and where its tensors are.

    Attributes:
        session: the gateway that waits for it.
        work: what the scheduler knows of it.
        payloads: by modality.
        emission: of its results, if they are sent as they finish.
        traceparent: that of its request, empty if it is not traced.
        embeddings: where those of each item are, by modality.
        done: results that wait for the end, unless they are sent as they finish.
        over: set when it is, well or not.
    """

    session: GatewaySession
    work: Work
    payloads: Mapping[str, tensor_pb2.TensorRef]
    emission: Emission[selector_pb2.ItemGroup] | None
    traceparent: str
    embeddings: dict[str, dict[int, Place]] = field(default_factory=lambda: defaultdict(dict))
    done: list[selector_pb2.ItemGroup] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)


Jobs = Mapping[bytes, JobInFlight]


def encode_request(call: EncodeCall, jobs: Jobs, rung: tensor_pb2.Rung.ValueType) -> encoder_pb2.EncodeRequest:
    """The payload rows of a call.

    Args:
        call: of jobs that are under way.
        jobs: all that are under way.
        rung: how fusion reaches the embeddings.
    """
    request = encoder_pb2.EncodeRequest(model=call.model, rung=rung)
    for rows in call.rows:
        payload = jobs[rows.job_id].payloads[call.modality]
        request.rows.extend(slices((payload, item) for item in rows.items))
    return request


def note_embeddings(call: EncodeCall, embeddings: tensor_pb2.TensorRef, jobs: Jobs) -> None:
    """Notes where the embeddings are that a call brought, one row for each of its items."""
    row = 0
    for rows in call.rows:
        if rows.job_id in jobs:
            places = jobs[rows.job_id].embeddings[call.modality]
            places.update((item, (embeddings, row + i)) for i, item in enumerate(rows.items))
        row += len(rows.items)


def fuse_request(call: FuseCall, jobs: Jobs) -> fusion_pb2.FuseRequest:
    """The embedding rows of a call."""
    request = fusion_pb2.FuseRequest(model=call.model)
    for rows in call.rows:
        group = request.groups.add()
        for modality in call.modality_set:
            places = jobs[rows.job_id].embeddings[modality]
            group.embeddings[modality].rows.extend(slices(places[item] for item in rows.items))
    return request
