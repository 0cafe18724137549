"""What the dispatcher is told: each change of a job, and of what jobs can use, is one of these."""

import asyncio
from dataclasses import dataclass, field

from mosel.v1 import encoder_pb2, fusion_pb2, selector_pb2
from selector.core.jobs import EncodeCall, FuseCall
from selector.core.observation import Piece
from selector.gateway_session import GatewaySession
from selector.in_flight import CallInFlight, SampleInFlight


@dataclass(frozen=True)
class JobSubmitted:
    """A gateway sent a job; its answer or failure goes to the session."""

    session: GatewaySession
    description: selector_pb2.JobDescription


@dataclass(frozen=True)
class JobUnwanted:
    """Nobody waits for a job any more."""

    job_id: bytes


@dataclass(frozen=True)
class GatewayGone:
    """A gateway is gone, and with it the callers of its jobs."""

    session: GatewaySession


@dataclass(frozen=True)
class EncodeReturned:
    """An encoder answered a call."""

    call: CallInFlight[EncodeCall]
    reply: encoder_pb2.EncodeReply


@dataclass(frozen=True)
class FuseReturned:
    """Fusion answered a call, with one output for each of its rows."""

    call: CallInFlight[FuseCall]
    reply: fusion_pb2.FuseReply


@dataclass(frozen=True)
class CallFailed:
    """A call ended with an error, or its answer is not one to it."""

    call: CallInFlight[EncodeCall] | CallInFlight[FuseCall]
    error: Exception


@dataclass(frozen=True)
class SampleFused:
    """A call for observed items is over; the reply is None if it failed."""

    call: FuseCall
    piece: Piece
    sample: SampleInFlight
    reply: fusion_pb2.FuseReply | None


@dataclass(frozen=True)
class LaneUp:
    """Jobs may use a service; `resource` is what it computes on, `joined` what fusion encodes itself."""

    lane: str
    resource: str
    joined: frozenset[str] = frozenset()


@dataclass(frozen=True)
class LaneDown:
    """A service is away."""

    lane: str


@dataclass(frozen=True)
class LaneLeaving:
    """A service is about to end: new jobs do without it. `drained` is set when those that may need it are over."""

    lane: str
    drained: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class LaneRemoved:
    """No model needs a service any more, and none uses it."""

    lane: str


@dataclass(frozen=True)
class TimePassed:
    """The moment is there until which there was nothing to do."""


Event = (
    JobSubmitted
    | JobUnwanted
    | GatewayGone
    | EncodeReturned
    | FuseReturned
    | CallFailed
    | SampleFused
    | LaneUp
    | LaneDown
    | LaneLeaving
    | LaneRemoved
    | TimePassed
)
