"""Between the core's words and those of messages and profile files."""

from collections.abc import Iterable, Mapping, Sequence

from mosel.errors import InputsNeeded, InvalidRequest, MoselError
from mosel.modality import FUSION, format_set, parse_set
from mosel.packages.calibration import Calibration
from mosel.profiles.files import CallCost, Point, Profile
from mosel.status import retry_after_ms, status_number
from mosel.transport import slice_rows
from mosel.transport.host import clock_id
from mosel.v1 import gateway_pb2, selector_pb2, tensor_pb2
from selector.core.certificate import CalibrationRows, Certificates
from selector.core.floors import bound_of
from selector.core.frontier import Strategy
from selector.core.jobs import NORMAL_PRIORITY, Assurance, Effort, Guarantee, Job, Plan
from selector.core.profile import LatencyCurve, ModelProfile

_GUARANTEES = {
    Guarantee.CALIBRATED: gateway_pb2.CALIBRATED,
    Guarantee.NONE: gateway_pb2.NONE,
    Guarantee.ESTIMATE: gateway_pb2.ESTIMATE,
}
_EFFORTS = {gateway_pb2.CHEAPEST: Effort.CHEAPEST, gateway_pb2.BEST: Effort.BEST}
# How long callers may go by what they were told to send. Each answer says it anew, so it ends only where none comes.
_ADVICE_VALID_S, _ADVICE_VALID_JOBS = 10.0, 64
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
    available = frozenset(description.available)
    if available and not available.issuperset(description.modalities):
        raise InvalidRequest(f"available is {sorted(available)}; expected {sorted(description.modalities)} among them")
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
        max_accuracy_loss=description.max_accuracy_loss if description.HasField("max_accuracy_loss") else None,
        expires=deadline + late_s if description.late_ok else None,
        available=available,
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
        send=error.modalities if isinstance(error, InputsNeeded) else (),
    )


def upload_advice(wanted: frozenset[str]) -> gateway_pb2.UploadAdvice | None:
    """What callers are told of what their next jobs should bring; None if there is nothing to say."""
    if not wanted:
        return None
    return gateway_pb2.UploadAdvice(modalities=sorted(wanted), valid_s=_ADVICE_VALID_S, valid_jobs=_ADVICE_VALID_JOBS)


def assurance_message(
    assurance: Assurance, saved: float, source: gateway_pb2.FloorSource.ValueType
) -> gateway_pb2.Assurance:
    """What a caller is told of the accuracy of its answer.

    Args:
        assurance: what it stands on.
        saved: the share of the compute of everything that was sent which was not spent, 0..1.
        source: whose floor it was.
    """
    return gateway_pb2.Assurance(
        guarantee=_GUARANTEES[assurance.guarantee],
        guaranteed_accuracy=assurance.accuracy,
        guaranteed_loss=assurance.loss,
        confidence=assurance.confidence,
        saved=saved,
        floor_source=source,
        note=assurance.note,
    )


def plan_reply(plan: Plan, source: gateway_pb2.FloorSource.ValueType) -> gateway_pb2.PlanReply:
    """The answer to a caller that asked for a plan; `source` as of `assurance_message`."""
    reply = gateway_pb2.PlanReply(refusal=plan.refusal, upload=upload_advice(plan.wanted))
    reply.frontier.extend(_strategy(strategy, idle_ms) for strategy, idle_ms in plan.frontier)
    if plan.chosen is not None:
        reply.chosen.CopyFrom(_strategy(plan.chosen, plan.latency_ms))
    if plan.assurance is not None:
        reply.assurance.CopyFrom(assurance_message(plan.assurance, plan.saved, source))
    return reply


def set_profile(profile: ModelProfile, modality_set: frozenset[str], available: bool) -> gateway_pb2.SetProfile:
    """What gateways are told of a modality set.

    Args:
        profile: of the model.
        modality_set: which one.
        available: whether it can be run now.
    """
    measured = profile.is_measured(modality_set)
    everything = frozenset(profile.modalities)
    of_accuracy, of_loss = profile.accuracy_ladder(everything), profile.loss_ladder(everything)
    return gateway_pb2.SetProfile(
        modality_set=format_set(modality_set),
        accuracy=profile.accuracy[modality_set],
        samples=profile.samples,
        latency_ms=profile.idle_latency_ms(modality_set, 1) if measured else 0.0,
        available=available,
        guaranteed_accuracy=bound_of(of_accuracy, {modality_set: 1}),
        guaranteed_loss=None if (agreement := bound_of(of_loss, {modality_set: 1})) is None else 1 - agreement,
    )


def certificates(calibration: Calibration | None, confidence: float) -> Certificates | None:
    """What a model's calibration rows guarantee; None if it has none, or if floors are to hold in expectation only.

    Args:
        calibration: the model's.
        confidence: the setting `selector.floor_confidence`.
    """
    if calibration is None or confidence <= 0.5:
        return None
    rows = CalibrationRows(
        sets=calibration.sets,
        answers=calibration.answers,
        labels=calibration.labels if calibration.is_labelled else None,
        groups=calibration.groups,
        certify=calibration.certify,
    )
    return Certificates(rows, confidence)


def origin_of(profile: Profile) -> str:
    """Where latencies are from, in words."""
    if not profile.quick:
        return f"profile of {profile.measured_on}"
    used = f"made while others used {profile.others_share:.0%} of the processors".replace("%", " %")
    again = "; is measured again when it is quiet" if profile.busy else ""
    return f"quick profile of {profile.measured_on}, {used}, spread {profile.spread:.1f}{again}"


def model_profile(profile: Profile, default_min_accuracy: float | None) -> ModelProfile:
    """A model's profile with every latency known; what shares a process there runs as paths.

    Args:
        profile: what was measured.
        default_min_accuracy: the model package's, see `ModelProfile`.
    """
    return ModelProfile(
        accuracy={parse_set(name): accuracy.value for name, accuracy in profile.accuracy.items()},
        samples=min(accuracy.samples for accuracy in profile.accuracy.values()),
        default_min_accuracy=default_min_accuracy,
        encoders={m: latency_curve(points, profile.calls[m]) for m, points in profile.encoders.items()},
        fusion={parse_set(s): latency_curve(points, profile.calls[FUSION]) for s, points in profile.fusion.items()},
        paths=path_curves(profile.encoders, profile.fusion, profile.calls),
        joined=frozenset(profile.encoders) if profile.hardware.placement == "single" else frozenset(),
    )


def latency_curve(points: Iterable[Point], call: CallCost) -> LatencyCurve:
    """The time of calls as the selector sees them: network, transport and message."""
    return LatencyCurve(tuple((p.batch_size, call.overhead_ms + call.factor * p.p50_ms) for p in points))


def path_curves(
    encoders: Mapping[str, Sequence[Point]], fusion: Mapping[str, Sequence[Point]], calls: Mapping[str, CallCost]
) -> dict[frozenset[str], LatencyCurve]:
    """The time of encoders and fusion back to back in one call to fusion, by modality set, as far as it is known.

    Args:
        encoders: by modality.
        fusion: by modality set.
        calls: what calls cost, by lane.
    """
    curves = {}
    for name, points in fusion.items():
        modality_set = parse_set(name)
        if not modality_set <= encoders.keys():
            continue
        networks = [(points, calls[FUSION].factor), *((encoders[m], calls[m].factor) for m in modality_set)]
        ms = [{p.batch_size: factor * p.p50_ms for p in of_one} for of_one, factor in networks]
        sizes = sorted(set(ms[0]).intersection(*ms[1:]))
        if sizes:
            times = tuple((size, calls[FUSION].overhead_ms + sum(one[size] for one in ms)) for size in sizes)
            curves[modality_set] = LatencyCurve(times)
    return curves


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
