"""When a call is made again: where the server cannot have begun with it, or where another gateway has the job."""

import math
import random
import time
from collections import Counter
from dataclasses import dataclass

import grpc

from mosel.client.checks import number, seconds, whole
from mosel.status import asked_gateway, retry_hint_ms
from mosel.v1 import gateway_pb2

# What gRPC says when a call found no connection: it was never sent. If it said something else it would not be repeated.
_NOT_SENT = ("failed to connect to all addresses", "DNS resolution failed")
# Callers that are told the same do not all come back at the same moment.
_SPREAD = 0.25
# How often each gateway behind one name is asked for a job that another has, and seconds until it is asked again. Calls
# go round them all; but other calls do, too, and one may have to be connected first.
_ROUNDS, _ROUND_S = 4, 0.05
# What a job asks for that may be late, and is.
_LEAST_SLO_MS = 0.001


@dataclass(frozen=True)
class Retry:
    """How often a call is made again that the server refused as overloaded, or that could not be sent to it.

    The server says when to try again. A call that may have begun is never repeated, and none is when its time is over.

    Args:
        max_attempts: calls in all; 1: none is repeated.
        wait_ms: milliseconds before the second attempt where the server did not say; doubled before each further one.

    Raises:
        InvalidRequest: one of them is not a positive number.
    """

    max_attempts: int = 3
    wait_ms: float = 100.0

    def __post_init__(self) -> None:
        whole("max_attempts", self.max_attempts, "at least 1", lambda attempts: attempts >= 1)
        number("wait_ms", self.wait_ms, "a positive number of milliseconds", lambda wait_ms: 0 < wait_ms < math.inf)


DEFAULT_RETRY = Retry()


class Attempts:
    """The attempts of one call, on a clock that starts now.

    Args:
        retry: how many there may be; None: one.
        request: what is asked for; each attempt asks for it within what is left of its deadline.
        timeout_s: seconds for all attempts together.

    Raises:
        InvalidRequest: that is not a positive number.
    """

    def __init__(self, retry: Retry | None, request: object, timeout_s: float) -> None:
        self._most, self._wait_ms = (retry.max_attempts, retry.wait_ms) if retry else (1, 0.0)
        self._timeout_s, self._started, self._made = seconds("timeout_s", timeout_s), time.monotonic(), 0
        self._limit_s, self._slo_ms = self._timeout_s, 0.0
        self._asked: Counter[str] = Counter()
        self._predict: gateway_pb2.PredictRequest | None = None
        if isinstance(request, gateway_pb2.PredictRequest) and request.HasField("latency_slo_ms"):
            self._predict, self._slo_ms = request, request.latency_slo_ms
            if not request.late_ok:
                self._limit_s = min(self._timeout_s, self._slo_ms / 1000)

    def begin(self) -> float:
        """The next attempt begins; returns the seconds that it has."""
        passed_s = self._passed_s() if self._made else 0.0
        if self._made and self._predict is not None:
            # The caller counts from the first attempt.
            self._predict.latency_slo_ms = max(self._slo_ms - passed_s * 1000, _LEAST_SLO_MS)
        self._made += 1
        return self._timeout_s - passed_s

    def wait_s(self, error: grpc.RpcError) -> float | None:
        """Seconds to wait before the next attempt; None if there must not be one."""
        if asked := asked_gateway(error):
            return self._ask_another(asked)
        refused = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        hint_ms = retry_hint_ms(error) if refused else 0
        if self._made >= self._most or not (hint_ms or _was_not_sent(error)):
            return None
        wait_ms = hint_ms or self._wait_ms * 2 ** (self._made - 1)
        wait_s = wait_ms / 1000 * random.uniform(1, 1 + _SPREAD)  # noqa: S311 (fair, not secret)
        return wait_s if self._passed_s() + wait_s < self._limit_s else None

    def _ask_another(self, asked: str) -> float | None:
        """Seconds until the next gateway of the name is asked for a job that the one just asked does not have."""
        # That was none of the attempts at one gateway.
        self._most += 1
        self._asked[asked] += 1
        wait_s = _ROUND_S * (self._asked[asked] - 1)
        return wait_s if self._asked[asked] <= _ROUNDS and self._passed_s() + wait_s < self._limit_s else None

    def _passed_s(self) -> float:
        return time.monotonic() - self._started


def _was_not_sent(error: grpc.RpcError) -> bool:
    details = error.details() or ""
    return error.code() is grpc.StatusCode.UNAVAILABLE and details.startswith(_NOT_SENT)
