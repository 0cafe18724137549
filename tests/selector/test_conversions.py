"""Between messages and the core's words."""

import pytest

from mosel.errors import FloorUnreachable, InvalidRequest, MoselError, Overloaded
from mosel.modality import parse_set
from mosel.profiles.files import CallCost, Point
from mosel.transport.host import clock_id
from mosel.v1 import gateway_pb2, selector_pb2, tensor_pb2
from selector import conversions
from selector.core.frontier import Strategy
from selector.core.jobs import Effort, Job, Plan

JOB_ID = bytes(range(16))


def description(**changes: object) -> selector_pb2.JobDescription:
    fields = {"job_id": JOB_ID, "model": "m", "size": 3, "modalities": ["pen", "audio"], "budget_us": 250_000}
    return selector_pb2.JobDescription(**(fields | changes))  # type: ignore[arg-type]


def test_a_description_becomes_a_job() -> None:
    plain = conversions.job_from(description(), now=10.0)
    assert plain == Job(JOB_ID, "m", 3, frozenset({"pen", "audio"}), None, 10.25)
    assert plain.ends == plain.deadline
    full = description(
        min_accuracy=0.0, exact=True, effort=gateway_pb2.BEST, late_ok=True, expiry_us=2_000_000, budget_us=500_000
    )
    job = conversions.job_from(full, now=10.0)
    assert (job.min_accuracy, job.exact, job.effort, job.late_ok) == (0.0, True, Effort.BEST, True)
    assert (job.deadline, job.ends) == (10.5, 12.0)


def test_only_a_job_that_may_be_late_lives_longer_than_its_deadline() -> None:
    assert conversions.job_from(description(expiry_us=2_000_000), now=0.0).ends == 0.25
    assert conversions.job_from(description(expiry_us=1, late_ok=True), now=0.0).ends == 0.25


def test_on_one_clock_a_deadline_is_a_moment_however_long_its_message_took() -> None:
    sent = description(deadline_ns=12_000_000_000, expiry_us=2_250_000, late_ok=True, clock=clock_id())
    assert [conversions.job_from(sent, now).deadline for now in (10.0, 11.9)] == [12.0, 12.0]
    assert [conversions.job_from(sent, now).ends for now in (10.0, 11.9)] == [14.0, 14.0]
    # Nothing is planned for the past.
    assert conversions.job_from(sent, now=13.0).deadline == 13.0


@pytest.mark.parametrize("clock", ["", "another-boot/0", clock_id() + "0"])
def test_of_another_clock_only_the_budget_counts(clock: str) -> None:
    sent = description(deadline_ns=12_000_000_000, clock=clock)
    assert conversions.job_from(sent, now=10.0).deadline == 10.25


@pytest.mark.parametrize(
    ("effort", "expected"),
    [
        (gateway_pb2.EFFORT_UNSPECIFIED, None),
        (gateway_pb2.CHEAPEST, Effort.CHEAPEST),
        (gateway_pb2.BEST, Effort.BEST),
    ],
)
def test_effort(effort: gateway_pb2.Effort, expected: Effort | None) -> None:
    assert conversions.job_from(description(effort=effort), now=0.0).effort == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"job_id": b"short"}, "job_id has 5 bytes; expected 16"),
        ({"size": 0}, "size is 0; expected at least one item"),
        ({"modalities": []}, "modalities is empty; expected at least one"),
    ],
)
def test_a_field_that_is_wrong_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        conversions.job_from(description(**changes), now=0.0)


def test_what_may_be_run_must_have_been_sent() -> None:
    audio, pen = tensor_pb2.TensorRef(inline=b"a"), tensor_pb2.TensorRef(inline=b"p")
    conversions.check_payloads(description(payloads={"audio": audio, "pen": pen}))
    with pytest.raises(InvalidRequest, match=r"modalities are \['audio', 'pen'\]; the payloads have audio"):
        conversions.check_payloads(description(payloads={"audio": audio}))
    with pytest.raises(InvalidRequest, match="the payloads have nothing"):
        conversions.check_payloads(description())


@pytest.mark.parametrize(
    ("error", "code", "retry_after_ms"),
    [(Overloaded("full", 70), 8, 70), (FloorUnreachable("too high"), 9, 0)],
)
def test_a_failure_says_what_and_when_to_try_again(error: MoselError, code: int, retry_after_ms: int) -> None:
    failure = conversions.failure_from(JOB_ID, error)
    assert (failure.job_id, failure.status_code, failure.message) == (JOB_ID, code, str(error))
    assert failure.retry_after_ms == retry_after_ms


def test_a_plan_is_told_with_its_frontier_and_choice() -> None:
    cheap = Strategy(((parse_set("pen"), 3),), 0.6, 1.5)
    mixed = Strategy(((parse_set("pen+audio"), 1), (parse_set("pen"), 2)), 0.75, 4.0)
    reply = conversions.plan_reply(Plan(((cheap, 1.0), (mixed, 3.0)), mixed, 7.5, ""), gateway_pb2.CALLER)
    assert [(dict(s.items), s.accuracy, s.cost_ms, s.latency_ms) for s in reply.frontier] == [
        ({"pen": 3}, 0.6, 1.5, 1.0),
        ({"audio+pen": 1, "pen": 2}, 0.75, 4.0, 3.0),
    ]
    assert (dict(reply.chosen.items), reply.chosen.latency_ms) == ({"audio+pen": 1, "pen": 2}, 7.5)


def test_a_plan_that_is_refused_has_no_choice() -> None:
    reply = conversions.plan_reply(Plan((), None, 0.0, "too late"), gateway_pb2.CALLER)
    assert reply.refusal == "too late"
    assert not reply.HasField("chosen")


def test_neighbouring_rows_travel_as_one_slice_in_the_order_asked_for() -> None:
    slot = tensor_pb2.ArenaSlot(arena_id=1, slot=4)
    first, second = (tensor_pb2.TensorRef(shape=[8, 2], nbytes=16, slot=slot) for _ in range(2))
    places = [(first, 2), (first, 3), (first, 5), (second, 6), (second, 7), (first, 0)]
    slices = [(s.row_start, s.row_count) for s in conversions.slices(places)]
    assert slices == [(2, 2), (5, 1), (6, 2), (0, 1)]
    assert conversions.slices([]) == []


def test_of_bytes_inside_a_message_only_the_rows_asked_for_travel() -> None:
    ref = tensor_pb2.TensorRef(dtype=tensor_pb2.UINT8, shape=[4, 2], nbytes=8, inline=b"aabbccdd")
    (part,) = conversions.slices([(ref, 1), (ref, 2)])
    assert (part.ref.inline, list(part.ref.shape), part.row_start, part.row_count) == (b"bbcc", [2, 2], 0, 2)


def test_slots_are_found_among_refs() -> None:
    slot = tensor_pb2.ArenaSlot(arena_id=1, slot=4)
    refs = [tensor_pb2.TensorRef(inline=b"x"), tensor_pb2.TensorRef(slot=slot), tensor_pb2.TensorRef()]
    assert conversions.slots_in(refs) == [slot]


def test_items_of_a_group_are_named_with_their_set() -> None:
    output = tensor_pb2.Tensor(dtype=tensor_pb2.UINT8, shape=[2], data=b"ab")
    group = conversions.item_group(parse_set("pen+audio"), (1, 4), output)
    assert (group.modality_set, list(group.items), group.output) == ("audio+pen", [1, 4], output)


def test_a_path_takes_what_its_networks_take_and_one_call() -> None:
    def points(*ms: float, sizes: tuple[int, ...] = (1, 8)) -> tuple[Point, ...]:
        return tuple(Point(batch_size=n, p50_ms=p50, p95_ms=2 * p50) for n, p50 in zip(sizes, ms, strict=True))

    encoders = {"audio": points(4.0, 20.0, 70.0, sizes=(1, 8, 32)), "pen": points(1.0, 2.0)}
    fusion = {"audio+pen": points(0.5, 1.0), "pen": points(0.5, 1.0), "image": points(0.5, 1.0)}
    calls = {lane: CallCost(overhead_ms=0.2, factor=1.1) for lane in ("audio", "pen", "fusion")}
    curves = conversions.path_curves(encoders, fusion, calls)
    assert curves.keys() == {parse_set("audio+pen"), parse_set("pen")}
    sizes, ms = zip(*curves[parse_set("audio+pen")].points, strict=True)
    assert sizes == (1, 8)
    assert ms == pytest.approx((0.2 + 1.1 * 5.5, 0.2 + 1.1 * 23.0))
