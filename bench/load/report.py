"""Reports in the shape of ghz's JSON: tools that read one read the other.

Times are nanoseconds and marks of the histogram seconds, as ghz has them; latencies count from the scheduled time of a
request, and fastest, slowest, average and both distributions are over the requests that were answered (ghz's default).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.load.steps import Plan, Step, percentile
from bench.outcomes import Ending, Outcome
from bench.serving import Gateway
from mosel.status import status_of

_PERCENTAGES = (10, 25, 50, 75, 90, 95, 99)
_BUCKETS = 10
_CALL = "mosel.v1.Gateway.Predict"


@dataclass(frozen=True)
class About:
    """What a report says of its run.

    Attributes:
        gateway: which one.
        model: its name.
        items: where they come from, in words.
        plan: what was sent, and when.
    """

    gateway: Gateway
    model: str
    items: str
    plan: Plan


def report(about: About, steps: Sequence[Step]) -> dict[str, Any]:
    """Everything over all steps, as ghz reports a run whose load rises; each step is under `mosel.steps`.

    Args:
        about: the run.
        steps: what became of it; at least one.
    """
    outcomes = [outcome for step in steps for outcome in step.outcomes]
    seconds = sum(step.seconds for step in steps)
    return {
        "name": f"mosel bench load {about.model}",
        "endReason": "normal",
        "options": _options(about, seconds, len(outcomes)),
        "date": steps[0].began.isoformat(timespec="seconds"),
        **_figures(outcomes, seconds),
        "details": [_detail(step, outcome) for step in steps for outcome in step.outcomes],
        "tags": _tags(about),
        "mosel": {"steps": [_step(step) for step in steps]},
    }


def _figures(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    answered_s = np.sort([outcome.ms / 1000 for outcome in outcomes if outcome.ending is Ending.ANSWERED])
    failed = [outcome for outcome in outcomes if outcome.ending is not Ending.ANSWERED]
    return {
        "count": len(outcomes),
        "total": _ns(seconds),
        "average": _ns(answered_s.mean()) if len(answered_s) else 0,
        "fastest": _ns(answered_s[0]) if len(answered_s) else 0,
        "slowest": _ns(answered_s[-1]) if len(answered_s) else 0,
        "rps": len(outcomes) / seconds,
        "errorDistribution": dict(Counter(map(_error, failed)).most_common()),
        "statusCodeDistribution": dict(Counter(map(_status, outcomes)).most_common()),
        "latencyDistribution": _latencies(answered_s),
        "histogram": _histogram(answered_s),
    }


def _latencies(answered_s: NDArray[np.float64]) -> list[dict[str, int]] | None:
    if not len(answered_s):
        return None
    return [{"percentage": p, "latency": _ns(percentile(answered_s, p))} for p in _PERCENTAGES]


def _histogram(answered_s: NDArray[np.float64]) -> list[dict[str, float]] | None:
    """Ten equal steps from the fastest to the slowest; each mark counts what lies between the one before and it."""
    if not len(answered_s):
        return None
    marks = np.linspace(answered_s[0], answered_s[-1], _BUCKETS + 1)
    counts = np.diff(np.searchsorted(answered_s, marks, side="right"), prepend=0)
    return [
        {"mark": float(mark), "count": int(count), "frequency": float(count / len(answered_s))}
        for mark, count in zip(marks, counts, strict=True)
    ]


def _detail(step: Step, outcome: Outcome) -> dict[str, Any]:
    return {
        "timestamp": (step.began + timedelta(seconds=outcome.arrival.at_s)).isoformat(),
        "latency": _ns(outcome.ms / 1000),
        "error": "" if outcome.error is None else _error(outcome),
        "status": _status(outcome),
    }


def _options(about: About, seconds: float, requests: int) -> dict[str, Any]:
    rates = about.plan.rates
    rising = len(rates) > 1
    return {
        "call": _CALL,
        "host": about.gateway.address,
        "insecure": about.gateway.tls is None,
        "async": True,
        "binary": True,
        "rps": 0 if rising else round(rates[0]),
        "load-schedule": "step" if rising else "const",
        "load-start": round(rates[0]),
        "load-end": round(rates[-1]),
        "load-step": round((rates[-1] - rates[0]) / max(len(rates) - 1, 1)),
        "load-step-duration": _ns(about.plan.seconds),
        "connections": 1,
        "duration": _ns(seconds),
        "total": requests,
    }


def _tags(about: About) -> dict[str, str]:
    plan = about.plan
    return {
        "latency": "from the scheduled time",
        "arrivals": "Poisson" if plan.trace is None else plan.trace.name,
        "items": f"{plan.items} per job: {about.items}",
        "min_accuracy": "none" if plan.min_accuracy is None else f"{plan.min_accuracy:g}",
        "max_accuracy_loss": "none" if plan.max_accuracy_loss is None else f"{plan.max_accuracy_loss:g}",
        "latency_slo_ms": "none" if math.isinf(plan.latency_slo_ms) else f"{plan.latency_slo_ms:g}",
        "seed": str(plan.seed),
    }


def _step(step: Step) -> dict[str, Any]:
    summary = step.summary
    figures = {
        "rate": step.rate,
        "goodputJobsPerSecond": step.goodput,
        "goodputItemsPerSecond": summary.items_per_s,
        "missRatio": summary.job_miss_ratio,
        "endings": summary.endings,
        "belowFloor": summary.below_floor,
        "expectedAccuracy": summary.expected_accuracy,
        "measuredAccuracy": summary.measured_accuracy,
        "modalitySets": summary.shares,
        "refusedLatency50": step.ms(50, Ending.REFUSED) * 1e6,
        "sendLag99": step.lag_ms(99) * 1e6,
    }
    # JSON knows no NaN.
    plain = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in figures.items()}
    return {**plain, **_figures(step.outcomes, step.seconds)}


def _status(outcome: Outcome) -> str:
    """The status as Go writes it, `ResourceExhausted`."""
    if outcome.error is None:
        return "OK"
    name = status_of(outcome.error).name
    return "Canceled" if name == "CANCELLED" else name.title().replace("_", "")


def _error(outcome: Outcome) -> str:
    """The error as grpc-go words it."""
    return f"rpc error: code = {_status(outcome)} desc = {outcome.error}"


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
