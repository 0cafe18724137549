"""The scheduler core under a virtual clock."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mosel.errors import DeadlineUnreachable, ModelNotFound, MoselError, Overloaded, ServiceUnavailable
from mosel.modality import subsets
from selector.profile import LatencyCurve, ModelProfile
from selector.scheduler import FUSION, Call, EncodeCall, Expired, FuseCall, Job, Rows, Scheduler, Wait

MODALITIES = ("audio", "image", "pen")
MAX_BATCH = {"audio": 4, "image": 8, "pen": 8}
ENCODER_MS = {"audio": 8.0, "image": 3.0, "pen": 1.0}
MAX_QUEUED, CALLS_PER_LANE = 40, 2


def profile_of(modalities: tuple[str, ...]) -> ModelProfile:
    sets = subsets(modalities)
    return ModelProfile(
        accuracy={s: 0.2 + 0.15 * sum(1 + MODALITIES.index(m) / 3 for m in s) for s in sets},
        samples=100,
        default_min_accuracy=0.4,
        encoders={m: LatencyCurve(((1, ENCODER_MS[m]), (MAX_BATCH[m], 2 * ENCODER_MS[m]))) for m in modalities},
        fusion={s: LatencyCurve(((1, 0.5), (8, 1.0))) for s in sets},
    )


PROFILES = {"three": profile_of(MODALITIES), "two": profile_of(("audio", "pen"))}


def scheduler_with(*up: str) -> Scheduler:
    scheduler = Scheduler(PROFILES, MAX_QUEUED, CALLS_PER_LANE)
    for name in up:
        assert scheduler.lane(name, up=True) == []
    return scheduler


def job(name: str, deadline: float = 10.0, size: int = 1, sent: str = "pen", model: str = "three") -> Job:
    return Job(name.encode(), model, size, frozenset(sent.split("+")), None, deadline)


@pytest.fixture
def scheduler() -> Scheduler:
    return scheduler_with(*MODALITIES, FUSION)


def encode_call(scheduler: Scheduler, now: float = 0.0) -> EncodeCall:
    call = scheduler.next(now)
    assert isinstance(call, EncodeCall)
    return call


def fuse_call(scheduler: Scheduler, now: float = 0.0) -> FuseCall:
    call = scheduler.next(now)
    assert isinstance(call, FuseCall)
    return call


def test_a_job_goes_through_its_encoders_and_fusion_and_leaves_nothing(scheduler: Scheduler) -> None:
    scheduler.submit(job("a", sent="audio+pen"), 0.0)
    calls = [encode_call(scheduler), encode_call(scheduler)]
    assert {call.modality for call in calls} == {"audio", "pen"}
    for call in calls:
        assert scheduler.next(0.0) == Wait(10.0)
        scheduler.completed(call, 0.01)
    fuse = fuse_call(scheduler)
    assert fuse.jobs == ((b"a", frozenset({"audio", "pen"})),)
    scheduler.completed(fuse, 0.02)
    assert scheduler.next(0.02) == Wait(None)
    assert not any(scheduler.statistics().values())


def test_jobs_of_one_model_share_a_call_in_deadline_order_and_large_jobs_are_cut(scheduler: Scheduler) -> None:
    scheduler.submit(job("late", deadline=9, size=7), 0.0)
    scheduler.submit(job("soon", deadline=5, size=3), 0.0)
    scheduler.submit(job("next", deadline=6, size=4), 0.0)
    scheduler.submit(job("other", deadline=7, size=1, model="two"), 0.0)
    assert encode_call(scheduler).rows == (Rows(b"soon", 0, 3), Rows(b"next", 0, 4), Rows(b"late", 0, 1))
    second = encode_call(scheduler)
    assert (second.model, second.rows) == ("two", (Rows(b"other", 0, 1),))
    assert isinstance(scheduler.next(0.0), Wait), "two calls are under way"
    scheduler.completed(second, 0.001)
    assert encode_call(scheduler).rows == (Rows(b"late", 1, 6),)
    assert fuse_call(scheduler).model == "two"


def test_a_job_that_expires_in_the_queue_never_reaches_an_encoder(scheduler: Scheduler) -> None:
    scheduler.submit(job("a", deadline=1.0), 0.0)
    assert scheduler.next(1.0) == Expired(b"a")
    assert scheduler.next(1.0) == Wait(None)


def test_a_cancelled_job_does_not_hurt_the_others_in_its_call(scheduler: Scheduler) -> None:
    scheduler.submit(job("a"), 0.0)
    scheduler.submit(job("b"), 0.0)
    call = encode_call(scheduler)
    assert scheduler.cancelled(b"a")
    assert not scheduler.cancelled(b"a")
    scheduler.completed(call, 0.001)
    assert [job_id for job_id, _ in fuse_call(scheduler).jobs] == [b"b"]


def test_a_job_that_is_cancelled_while_it_waits_for_fusion_is_not_fused(scheduler: Scheduler) -> None:
    calls = []
    for name in "abc":
        scheduler.submit(job(name), 0.0)
        scheduler.completed(encode_call(scheduler), 0.001)
        calls.append(scheduler.next(0.001))
    assert [type(call) for call in calls] == [FuseCall, FuseCall, Wait]
    assert scheduler.cancelled(b"c")
    assert isinstance(calls[0], FuseCall)
    scheduler.completed(calls[0], 0.002)
    assert isinstance(scheduler.next(0.002), Wait)


def test_a_failed_call_loses_its_jobs_once(scheduler: Scheduler) -> None:
    scheduler.submit(job("a", sent="audio+pen"), 0.0)
    first, second = encode_call(scheduler), encode_call(scheduler)
    assert scheduler.failed(first, 0.01) == [b"a"]
    assert scheduler.failed(second, 0.01) == []
    assert not any(scheduler.statistics().values())


def test_a_failed_call_says_nothing_about_the_time_of_good_ones(scheduler: Scheduler) -> None:
    before = scheduler.predicted_ms(job("next"), frozenset({"pen"}), 0.0)
    scheduler.submit(job("a", deadline=60.0), 0.0)
    scheduler.failed(encode_call(scheduler), 30.0)
    assert scheduler.predicted_ms(job("next", deadline=60.0), frozenset({"pen"}), 30.0) == pytest.approx(before)


def test_calls_slower_than_their_profile_raise_the_prediction(scheduler: Scheduler) -> None:
    before = scheduler.predicted_ms(job("next"), frozenset({"pen"}), 0.0)
    scheduler.submit(job("a"), 0.0)
    scheduler.completed(encode_call(scheduler), 0.051)
    after = scheduler.predicted_ms(job("next"), frozenset({"pen"}), 0.051)
    assert after == pytest.approx(before + 5.0), "a tenth of 50 ms"


def test_what_slow_calls_taught_is_forgotten_when_none_confirm_it(scheduler: Scheduler) -> None:
    pen = frozenset({"pen"})
    before = scheduler.predicted_ms(job("next"), pen, 0.0)
    scheduler.submit(job("a", deadline=100.0), 0.0)
    scheduler.completed(encode_call(scheduler), 50.0)
    later = [scheduler.predicted_ms(job("next", deadline=1000.0), pen, now) for now in (50.0, 52.0, 60.0, 1e6)]
    assert later == sorted(later, reverse=True)
    assert later[0] > before + 1000
    assert later[-1] == pytest.approx(before)


def test_a_service_that_goes_loses_the_jobs_that_still_need_it(scheduler: Scheduler) -> None:
    scheduler.submit(job("needs", sent="audio"), 0.0)
    scheduler.submit(job("not", sent="pen"), 0.0)
    assert scheduler.lane("audio", up=False) == [b"needs"]
    with pytest.raises(ServiceUnavailable):
        scheduler.submit(job("again", sent="audio"), 0.0)
    assert scheduler.lane(FUSION, up=False) == [b"not"]
    assert not any(scheduler.statistics().values())


def test_a_job_in_a_call_of_a_service_that_goes_is_left_to_that_call(scheduler: Scheduler) -> None:
    scheduler.submit(job("a", sent="audio", size=6), 0.0)
    call = encode_call(scheduler)
    assert scheduler.lane("audio", up=False) == []
    assert scheduler.failed(call, 0.1) == [b"a"]


def test_refusals_name_their_reason(scheduler: Scheduler) -> None:
    with pytest.raises(ModelNotFound, match="known: three, two"):
        scheduler.submit(job("a", model="four"), 0.0)
    with pytest.raises(DeadlineUnreachable):
        scheduler.submit(job("a", deadline=0.0001), 0.0)
    scheduler.submit(job("a", size=MAX_QUEUED), 0.0)
    with pytest.raises(Overloaded, match=f"at most {MAX_QUEUED}"):
        scheduler.submit(job("b"), 0.0)
    assert scheduler.statistics()["jobs"] == 1


def test_work_in_front_is_part_of_the_prediction(scheduler: Scheduler) -> None:
    audio = frozenset({"audio"})
    next_job = job("a0", deadline=0.05, size=4, sent="audio")
    before = 0.0
    while (predicted := scheduler.predicted_ms(next_job, audio, 0.0)) <= 50:
        assert predicted > before, "each job makes the next one wait longer"
        before = predicted
        scheduler.submit(next_job, 0.0)
        next_job = job(f"a{predicted}", deadline=0.05, size=4, sent="audio")
    with pytest.raises(Overloaded, match="behind what is queued") as refused:
        scheduler.submit(next_job, 0.0)
    assert refused.value.retry_after_ms == max(1, round(predicted - 50))
    # Work that is due later does not stand in front.
    assert scheduler.submit(job("c", deadline=0.02, sent="audio"), 0.0).modality_set == audio


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of events; the driver's view is kept beside the scheduler's and compared with it."""

    @initialize(away=st.sets(st.sampled_from([*MODALITIES, FUSION]), max_size=1))
    def start(self, away: set[str]) -> None:
        self.now = 0.0
        self.up = {*MODALITIES, FUSION} - away
        self.scheduler = scheduler_with(*self.up)
        self.jobs: dict[bytes, Job] = {}
        self.chosen: dict[bytes, frozenset[str]] = {}
        self.ends: dict[bytes, str] = {}
        self.sent: Counter[tuple[bytes, str, int]] = Counter()
        self.under_way: list[Call] = []

    def end(self, job_id: bytes, how: str) -> None:
        assert job_id not in self.ends, f"ended as {self.ends[job_id]}, then as {how}"
        self.ends[job_id] = how

    def alive(self) -> list[bytes]:
        return [job_id for job_id in self.jobs if job_id not in self.ends]

    @rule(
        model=st.sampled_from(sorted(PROFILES)),
        size=st.integers(1, 15),
        pick=st.sets(st.sampled_from(MODALITIES), min_size=1),
        floor=st.none() | st.floats(0, 1),
        exact=st.booleans(),
        budget_ms=st.sampled_from([5.0, 30.0, 100.0, 1000.0]),
    )
    def submit(self, model: str, size: int, pick: set[str], floor: float | None, exact: bool, budget_ms: float) -> None:
        profile = PROFILES[model]
        sent = frozenset(pick if model == "three" else (pick - {"image"}) or {"pen"})
        new = Job(len(self.jobs).to_bytes(16, "big"), model, size, sent, floor, self.now + budget_ms / 1000, exact)
        queued = sum(self.jobs[job_id].size for job_id in self.alive())
        try:
            progress = self.scheduler.submit(new, self.now)
        except MoselError:
            return
        self.jobs[new.id], self.chosen[new.id] = new, progress.modality_set
        assert queued + size <= MAX_QUEUED
        assert progress.modality_set <= sent
        assert progress.modality_set == sent or not exact
        assert progress.modality_set | {FUSION} <= self.up
        lowest = floor if floor is not None else min(profile.accuracy[sent], 0.4)
        assert progress.expected_accuracy == profile.accuracy[progress.modality_set] >= lowest

    @rule()
    def advance(self) -> None:
        """Does what the service does: asks for the next thing until there is none."""
        while not isinstance(action := self.scheduler.next(self.now), Wait):
            if isinstance(action, Expired):
                assert self.jobs[action.job_id].deadline <= self.now
                self.end(action.job_id, "expired")
            else:
                self.check_call(action)
                self.under_way.append(action)
        deadlines = [self.jobs[job_id].deadline for job_id in self.alive()]
        assert action.until == min(deadlines, default=None)

    def check_call(self, call: Call) -> None:
        lane = call.modality if isinstance(call, EncodeCall) else FUSION
        same = [c for c in self.under_way if (c.modality if isinstance(c, EncodeCall) else FUSION) == lane]
        assert lane in self.up
        assert len(same) < CALLS_PER_LANE
        ids = [r.job_id for r in call.rows] if isinstance(call, EncodeCall) else [job_id for job_id, _ in call.jobs]
        assert not self.ends.keys() & set(ids), "work for a job that has ended"
        assert {self.jobs[job_id].model for job_id in ids} == {call.model}
        deadlines = [self.jobs[job_id].deadline for job_id in ids]
        assert deadlines == sorted(deadlines)
        assert self.now < deadlines[0]
        if isinstance(call, EncodeCall):
            self.check_rows(call, deadlines)
            return
        for job_id, modality_set in call.jobs:
            assert modality_set == self.chosen[job_id]
            size = self.jobs[job_id].size
            wanted = {(job_id, m, row): 1 for m in modality_set for row in range(size)}
            assert {key: n for key, n in self.sent.items() if key[0] == job_id} == wanted

    def check_rows(self, call: EncodeCall, deadlines: list[float]) -> None:
        assert sum(r.count for r in call.rows) <= MAX_BATCH[call.modality]
        for rows in call.rows:
            assert call.modality in self.chosen[rows.job_id]
            assert rows.count > 0
            assert 0 <= rows.start < rows.start + rows.count <= self.jobs[rows.job_id].size
            self.sent.update((rows.job_id, call.modality, rows.start + i) for i in range(rows.count))
        assert max(self.sent.values()) == 1, "a row was sent twice"
        for job_id in self.alive():
            waiting = self.jobs[job_id]
            if waiting.model == call.model and call.modality in self.chosen[job_id]:
                complete = sum(self.sent[job_id, call.modality, row] for row in range(waiting.size)) == waiting.size
                assert complete or waiting.deadline >= deadlines[-1], "a later job was served first"

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), well=st.booleans())
    def call_returns(self, data: st.DataObject, well: bool) -> None:
        call = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        if not well:
            for job_id in self.scheduler.failed(call, self.now):
                self.end(job_id, "failed")
            return
        if isinstance(call, FuseCall):
            for job_id, _ in call.jobs:
                if self.scheduler.progress_of(job_id) is not None:
                    self.end(job_id, "answered")
        self.scheduler.completed(call, self.now)

    @rule(name=st.sampled_from([*MODALITIES, FUSION]))
    def lane_changes(self, name: str) -> None:
        self.up ^= {name}
        for job_id in self.scheduler.lane(name, name in self.up):
            assert name not in self.up
            self.end(job_id, "failed")

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(self.alive()))
        assert self.scheduler.cancelled(job_id)
        self.end(job_id, "cancelled")

    @rule(ms=st.sampled_from([0.5, 5.0, 50.0]))
    def time_passes(self, ms: float) -> None:
        self.now += ms / 1000

    @invariant()
    def both_sides_know_the_same_jobs(self) -> None:
        statistics = self.scheduler.statistics()
        alive = self.alive()
        assert statistics["jobs"] == len(alive)
        assert statistics["queued_items"] == sum(self.jobs[job_id].size for job_id in alive) <= MAX_QUEUED
        assert all(self.scheduler.progress_of(job_id) is not None for job_id in alive)
        calls = sum(count for name, count in statistics.items() if name.startswith("calls_in_flight."))
        assert calls == len(self.under_way)

    def teardown(self) -> None:
        """With all services up and calls going well, every job that is left is answered before it expires."""
        if not hasattr(self, "scheduler"):
            return
        for name in {*MODALITIES, FUSION} - self.up:
            self.lane_changes(name)
        self.advance()
        while self.under_way:
            call = self.under_way.pop(0)
            for job_id, _ in call.jobs if isinstance(call, FuseCall) else ():
                if self.scheduler.progress_of(job_id) is not None:
                    self.end(job_id, "answered")
            self.scheduler.completed(call, self.now)
            self.advance()
        assert self.alive() == []
        assert not any(self.scheduler.statistics().values())


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
