"""Between the core's words and those of messages and profile files."""

from collections.abc import Iterable, Sequence
from statistics import NormalDist

from mosel.errors import InvalidRequest, MoselError
from mosel.modality import FUSION, format_set, parse_set
from mosel.profiles.files import CallCost, Point, Profile, wilson_interval
from mosel.status import retry_after_ms, status_number
from mosel.transport import slice_rows
from mosel.transport.host import clock_id
from mosel.v1 import gateway_pb2, selector_pb2, tensor_pb2
from selector.core.frontier import Strategy
from selector.core.jobs import NORMAL_PRIORITY, Effort, Job, Plan
from selector.core.profile import LatencyCurve, ModelProfile

_EFFORTS = {gateway_pb2.CHEAPEST: Effort.CHEAPEST, gateway_pb2.BEST: Effort.BEST}
# One row of a tensor.
Place = tuple[tensor_pb2.TensorRef, int]


def job_from(description: selector_pb2.JobDescription, now: float) -> Job:
    """The job behind a description.

    Args:
        description: from a gateway.
        now: seconds on the clock that deadlines are kept on.

    Raises:
        InvalidRequest: names the field that is wrong.
    """
    if len(description.job_id) != 16:
        raise InvalidRequest(f"job_id has {len(description.job_id)} bytes; expected 16")
    if description.size < 1:
        raise InvalidRequest("size is 0; expected at least one item")
    if not description.modalities:
        raise InvalidRequest("modalities is empty; expected at least one")
    deadline = _deadline_of(description, now)
    late_s = max(description.expiry_us - description.budget_us, 0) / 1e6
    return Job(
        id=description.job_id,
        model=description.model,
        size=description.size,
        modalities=frozenset(description.modalities),
        min_accuracy=description.min_accuracy if description.HasField("min_accuracy") else None,
        deadline=deadline,
        exact=description.exact,
        effort=_EFFORTS.get(description.effort),
        late_ok=description.late_ok,
        priority=description.priority or NORMAL_PRIORITY,
        expires=deadline + late_s if description.late_ok else None,
    )


def check_payloads(description: selector_pb2.JobDescription) -> None:
    """Checks that every modality that may be run was sent.

    Raises:
        InvalidRequest: one was not.
    """
    if not description.payloads.keys() >= set(description.modalities):
        sent = ", ".join(sorted(description.payloads)) or "nothing"
        raise InvalidRequest(f"modalities are {sorted(description.modalities)}; the payloads have {sent}")


def failure_from(job_id: bytes, error: MoselError) -> selector_pb2.JobFailure:
    """What a gateway is told of a job that failed."""
    return selector_pb2.JobFailure(
        job_id=job_id,
        status_code=status_number(error),
        message=str(error),
        retry_after_ms=retry_after_ms(error),
    )


def plan_reply(plan: Plan) -> gateway_pb2.PlanReply:
    """The answer to a caller that asked for a plan."""
    reply = gateway_pb2.PlanReply(refusal=plan.refusal)
    reply.frontier.extend(_strategy(strategy, idle_ms) for strategy, idle_ms in plan.frontier)
    if plan.chosen is not None:
        reply.chosen.CopyFrom(_strategy(plan.chosen, plan.latency_ms))
    return reply


def set_profile(profile: ModelProfile, modality_set: frozenset[str], available: bool) -> gateway_pb2.SetProfile:
    """What gateways are told of a modality set.

    Args:
        profile: of the model.
        modality_set: which one.
        available: whether it can be run now.
    """
    measured = profile.is_measured(modality_set)
    return gateway_pb2.SetProfile(
        modality_set=format_set(modality_set),
        accuracy=profile.accuracy[modality_set],
        samples=profile.samples,
        latency_ms=profile.idle_latency_ms(modality_set, 1) if measured else 0.0,
        available=available,
    )


def model_profile(profile: Profile, default_min_accuracy: float | None, floor_confidence: float = 0.5) -> ModelProfile:
    """A model's profile with every latency known.

    Args:
        profile: what was measured.
        default_min_accuracy: the model package's, see `ModelProfile`.
        floor_confidence: see `believed_accuracy`.
    """
    return ModelProfile(
        accuracy={
            parse_set(name): believed_accuracy(accuracy.value, accuracy.samples, floor_confidence)
            for name, accuracy in profile.accuracy.items()
        },
        samples=min(accuracy.samples for accuracy in profile.accuracy.values()),
        default_min_accuracy=default_min_accuracy,
        encoders={m: latency_curve(points, profile.calls[m]) for m, points in profile.encoders.items()},
        fusion={parse_set(s): latency_curve(points, profile.calls[FUSION]) for s, points in profile.fusion.items()},
    )


def believed_accuracy(value: float, samples: int, confidence: float) -> float:
    """What an accuracy is at least, with a confidence, given the samples that it was measured on.

    Args:
        value: as measured, 0..1.
        samples: 0 if unknown; then nothing can be said, and the value is taken as it is.
        confidence: 0.5 to below 1; 0.5 gives the value itself.
    """
    if not samples:
        return value
    return wilson_interval(value, samples, NormalDist().inv_cdf(confidence))[0]


def latency_curve(points: Iterable[Point], call: CallCost) -> LatencyCurve:
    """The time of calls as the selector sees them: network, transport and message."""
    return LatencyCurve(tuple((p.batch_size, call.overhead_ms + call.factor * p.p50_ms) for p in points))


def slices(places: Iterable[Place]) -> list[tensor_pb2.RowSlice]:
    """Rows in this order, for the wire; neighbours in the same tensor become one slice."""
    runs: list[tuple[tensor_pb2.TensorRef, int, int]] = []
    for ref, row in places:
        if runs and runs[-1][0] is ref and row == runs[-1][1] + runs[-1][2]:
            runs[-1] = (ref, runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((ref, row, 1))
    return [slice_rows(ref, start, count) for ref, start, count in runs]


def slots_in(refs: Iterable[tensor_pb2.TensorRef]) -> list[tensor_pb2.ArenaSlot]:
    """The slots that hold these tensors; those that travel inside messages have none."""
    return [ref.slot for ref in refs if ref.WhichOneof("place") == "slot"]


def item_group(modality_set: frozenset[str], items: Sequence[int], output: tensor_pb2.Tensor) -> selector_pb2.ItemGroup:
    """Items of a job that are done."""
    return selector_pb2.ItemGroup(modality_set=format_set(modality_set), items=items, output=output)


def _deadline_of(description: selector_pb2.JobDescription, now: float) -> float:
    """When an answer is no longer wanted: on one clock as the gateway says, otherwise so long from now as it says."""
    if description.clock == clock_id():
        # What is over is over now: nothing is planned for the past.
        return max(description.deadline_ns / 1e9, now)
    return now + description.budget_us / 1e6


def _strategy(strategy: Strategy, latency_ms: float) -> gateway_pb2.Strategy:
    return gateway_pb2.Strategy(
        items={format_set(modality_set): count for modality_set, count in strategy.counts},
        accuracy=strategy.accuracy,
        cost_ms=strategy.cost_ms,
        latency_ms=latency_ms,
    )
