"""Plan first: of what a caller has, only what will be used is sent. Sends nothing itself."""

import math
import time
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from threading import Lock

from mosel.client.answers import Prediction, prediction_from
from mosel.client.calls import UnaryCall
from mosel.client.checks import seconds
from mosel.client.demands import (
    Demand,
    Payloads,
    arrays_of,
    checked_demand,
    checked_model,
    request_of,
    size_of,
    spec_of,
)
from mosel.errors import MoselError
from mosel.v1 import gateway_pb2

# Kinds of jobs that are remembered.
_KEPT = 256
# What is asked for, and sent, when no time is left: the server says so.
_LEAST_MS, _LEAST_S = 0.001, 0.001


@dataclass
class _Plan:
    modalities: frozenset[str]
    until: float
    jobs_left: int


class UploadPlans:
    """What the server said that jobs use, by what they ask for, as long as it holds. For use from several threads.

    Knows no clock: `now` is in seconds of any that only goes forward.
    """

    def __init__(self) -> None:
        self._plans: OrderedDict[Hashable, _Plan] = OrderedDict()
        self._lock = Lock()

    def take(self, kind: Hashable, now: float) -> frozenset[str] | None:
        """What the next job of a kind brings; None where nobody knows any more."""
        with self._lock:
            plan = self._plans.get(kind)
            if plan is None or now >= plan.until or plan.jobs_left < 1:
                return None
            plan.jobs_left -= 1
            self._plans.move_to_end(kind)
            return plan.modalities

    def renew(self, kind: Hashable, advice: gateway_pb2.UploadAdvice | None, now: float) -> None:
        """The server said what jobs of a kind should bring; None: it does not say, so nobody knows."""
        with self._lock:
            self._plans.pop(kind, None)
            if advice is not None and advice.modalities:
                until = now + advice.valid_s
                self._plans[kind] = _Plan(frozenset(advice.modalities), until, advice.valid_jobs)
                if len(self._plans) > _KEPT:
                    self._plans.popitem(last=False)


class PlannedUpload:
    """The calls for one job, one after the other.

    What it should bring, if nobody knows; the job with just that; and, if that does not do, with everything.

    Args:
        plans: what is known of jobs like it.
        model: its name.
        payloads: all that the caller has.
        demand: what is asked for; a deadline counts from now.
        max_message_mib: the largest message.
        timeout_s: seconds for all calls together.

    Attributes:
        answer: the job's, once it is there.

    Raises:
        InvalidRequest: something cannot be sent, or is of the wrong kind.
    """

    def __init__(
        self,
        plans: UploadPlans,
        model: str,
        payloads: Payloads,
        demand: Mapping[str, object],
        max_message_mib: int,
        timeout_s: float,
    ) -> None:
        self.answer: Prediction | None = None
        self._timeout_s, self._started = seconds("timeout_s", timeout_s), time.monotonic()
        self._plans, self._model, self._limit_mib = plans, checked_model(model), max_message_mib
        self._demand = asked = checked_demand(demand)
        only, floors = asked.get("modalities"), (asked.get("min_accuracy"), asked.get("max_accuracy_loss"))
        self._has = arrays_of(payloads, "payloads", only)
        self._size = size_of(self._has)
        # Deadlines that are about the same mean the same to a plan, and callers may reckon theirs anew for each job.
        slo_ms = asked.get("latency_slo_ms")
        within = None if slo_ms is None else round(math.log2(slo_ms))
        self._kind = model, self._size, frozenset(self._has), *floors, asked.get("effort"), within
        # What is fixed by hand is run, all of it.
        is_fixed = bool(only) and floors == (None, None)
        self._brings = frozenset(self._has) if is_fixed else plans.take(self._kind, self._started)

    @property
    def left_s(self) -> float:
        """Seconds that are left for further calls."""
        return max(self._timeout_s - (time.monotonic() - self._started), _LEAST_S)

    def next_call(self) -> UnaryCall[None]:
        """The next call; more are to be made until the answer is there."""
        if self._brings is None:
            spec = spec_of(self._model, self._size, {**self._demand_now(), "modalities": sorted(self._has)})
            return UnaryCall("Plan", gateway_pb2.PlanRequest(job=spec), self._planned)
        brings = {name: array for name, array in self._has.items() if name in self._brings}
        request = request_of(self._model, brings, self._demand_now(), self._limit_mib, self._has)
        return UnaryCall("Predict", request, self._answered)

    def refused(self, error: MoselError) -> None:
        """The call was refused for what it asked: more inputs may help; raises the error where there are none."""
        if self._brings is None or self._brings >= self._has.keys():
            raise error
        self._brings = frozenset(self._has)

    def _planned(self, reply: gateway_pb2.PlanReply) -> None:
        advice = reply.upload if reply.HasField("upload") else None
        self._plans.renew(self._kind, advice, time.monotonic())
        self._brings = self._plans.take(self._kind, time.monotonic()) or frozenset(self._has)

    def _answered(self, reply: gateway_pb2.PredictReply) -> None:
        self._plans.renew(self._kind, reply.upload if reply.HasField("upload") else None, time.monotonic())
        self.answer = prediction_from(reply)

    def _demand_now(self) -> Demand:
        """What is asked for now: the deadline counts from the start."""
        if (slo_ms := self._demand.get("latency_slo_ms")) is None:
            return self._demand
        return {**self._demand, "latency_slo_ms": max(slo_ms - (time.monotonic() - self._started) * 1000, _LEAST_MS)}
