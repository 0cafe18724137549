"""List schedules worked out by hand, and what holds for all of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosel.modality import FUSION
from selector.core.forecast import Forecast
from selector.core.profile import LatencyCurve
from selector.core.stages import Correction, Remaining, Stage


def stage(lane: str, *points: tuple[int, float]) -> Stage:
    return Stage(lane, LatencyCurve(points), Correction(points[0][1], points[-1][1]))


IMAGE = stage("image", (1, 10.0), (4, 16.0))  # calls of 4
PEN = stage("pen", (1, 2.0))  # calls of 1
FUSE = stage(FUSION, (1, 3.0), (4, 3.0))  # calls of 4
ONE_HOST = dict.fromkeys(["image", "pen", FUSION], "cpu")
FUSION_APART = ONE_HOST | {FUSION: "gpu"}


def job(image: int = 0, pen: int = 0, fuse: int = 0, not_before: float = 0.0) -> Remaining:
    encode = tuple((s, rows) for s, rows in ((IMAGE, image), (PEN, pen)) if rows)
    return Remaining(encode, ((FUSE, fuse),) if fuse else (), not_before)


def cpu(*free_at_ms: float, resources: dict[str, str] = ONE_HOST, reply_ms: float = 0.0) -> Forecast:
    free_at = {name: [ms / 1000 for ms in free_at_ms] for name in set(resources.values())}
    return Forecast(0.0, free_at, resources, reply_ms / 1000)


def ends_ms(forecast: Forecast, *queue: Remaining) -> list[float]:
    return [round(seconds * 1000, 6) for seconds in forecast.finish(queue)]


def test_a_job_alone_takes_its_calls_one_after_another() -> None:
    assert ends_ms(cpu(0), job(image=1, fuse=1)) == [10 + 3]
    assert ends_ms(cpu(0), job(image=4, fuse=4)) == [16 + 3]
    assert ends_ms(cpu(0), job(image=1, pen=1, fuse=1)) == [10 + 2 + 3]
    assert ends_ms(cpu(0), job(image=1, fuse=1), job()) == [13, 0]


def test_two_tokens_work_side_by_side() -> None:
    assert ends_ms(cpu(0, 0), job(image=1, pen=1, fuse=1)) == [10 + 3]
    assert ends_ms(cpu(0, 0), job(image=8, fuse=1)) == [16 + 3]
    assert ends_ms(cpu(0, 0), job(image=12, fuse=1)) == [16 + 16 + 3]


def test_work_under_way_comes_first() -> None:
    assert ends_ms(cpu(7), job(image=1, fuse=1)) == [7 + 13]
    assert ends_ms(cpu(7, 20), job(image=1, pen=1, fuse=1)) == [7 + 10 + 2 + 3], "the second token comes too late"
    assert ends_ms(cpu(0), job(fuse=1, not_before=0.05)) == [50 + 3], "its embeddings are still being made"
    assert ends_ms(cpu(0), job(not_before=0.05)) == [50]


def test_another_resource_does_not_wait() -> None:
    # The second job's pen calls run while the first is fused elsewhere.
    assert ends_ms(cpu(0), job(pen=1, fuse=4), job(pen=2, fuse=4)) == [2 + 3, 5 + 4 + 3]
    assert ends_ms(cpu(0, resources=FUSION_APART), job(pen=1, fuse=4), job(pen=2, fuse=4)) == [5, 6 + 3]


def test_a_job_that_joins_a_call_takes_what_it_adds_to_it() -> None:
    # 10 ms for one row, 12 for two, 16 for four; the fifth is the first of a new call.
    assert ends_ms(cpu(0), *[job(image=1)] * 5) == [10, 12, 14, 16, 26]
    assert ends_ms(cpu(0), job(image=3), job(image=2)) == [14, 26]
    assert ends_ms(cpu(0), job(image=1), job(pen=1), job(image=1)) == [10, 12, 14]


def test_who_joins_a_call_waits_for_all_of_it() -> None:
    # The second token is free at once, but the call that both are in takes 12 ms.
    assert ends_ms(cpu(0, 0), job(image=1), job(image=1)) == [10, 12]


def test_what_is_ready_only_after_a_call_has_begun_does_not_join_it() -> None:
    # Fused one by one, as they are encoded; 3 ms each, though one call could take all.
    assert ends_ms(cpu(0), *[job(pen=1, fuse=1)] * 3) == [2 + 3, 5 + 2 + 3, 10 + 2 + 3]
    # Those whose embeddings are there when the token is free share a call.
    assert ends_ms(cpu(7), job(fuse=1), job(fuse=1, not_before=0.005), job(fuse=1, not_before=0.008)) == [10, 10, 13]


def test_jobs_behind_use_what_a_job_leaves_while_it_waits() -> None:
    # The first job's fusion waits for 50 ms; the second does not.
    assert ends_ms(cpu(0), job(fuse=4, not_before=0.05), job(pen=1)) == [53, 3 + 2]


def test_the_way_back_counts_once() -> None:
    assert ends_ms(cpu(0, reply_ms=1.5), job(image=1, fuse=1), job(pen=1)) == [13 + 1.5, 13 + 2 + 1.5]


def test_calls_that_take_longer_than_their_profile_are_expected_to() -> None:
    slow = stage("pen", (1, 2.0))
    for i in range(100):
        slow.correction.learn(2.0, 6.0, i / 1000)
    forecast = Forecast(0.1, {"cpu": [0.1]}, ONE_HOST)
    assert forecast.finish([Remaining(((slow, 3),), ())])[0] == pytest.approx(0.1 + 3 * 0.006, rel=0.1)


def test_the_load_of_a_job_is_its_share_of_each_resource() -> None:
    forecast = cpu(0, 0, resources=FUSION_APART)
    alone, among = (
        forecast.demands([[job(image=2, fuse=2)]], queue)[0][0] for queue in ([], [job(image=4, fuse=4)] * 2)
    )
    assert alone.seconds == pytest.approx({"cpu": 0.012 / 2, "gpu": 0.003 / 2})
    assert alone.alone_s == pytest.approx(0.012 + 0.003)
    assert among.seconds == pytest.approx({"cpu": 0.016 / 2 / 2, "gpu": 0.003 / 2 / 2}), "half of a call of 4"
    assert forecast.demands([[job()]], [])[0][0].alone_s == 0


def test_busy_is_the_mean_over_the_tokens() -> None:
    assert cpu(4, 10).busy_s("cpu") == pytest.approx(0.007)
    assert cpu(-5, 10).busy_s("cpu") == pytest.approx(0.005)


def test_a_cautious_forecast_leaves_the_reserve_to_others() -> None:
    forecast = Forecast(0.0, {"cpu": [0.0]}, ONE_HOST, reserve={"cpu": 0.6})
    assert ends_ms(forecast, job(pen=1)) == [2]
    assert ends_ms(forecast.cautious(), job(pen=1)) == [5]


counts = st.integers(0, 9)
jobs = st.builds(job, image=counts, pen=counts, fuse=counts, not_before=st.floats(0, 0.1))
tokens = st.lists(st.floats(0, 100), min_size=1, max_size=3)
layouts = st.sampled_from([ONE_HOST, FUSION_APART])


@given(queue=st.lists(jobs, max_size=6), free_at_ms=tokens, resources=layouts)
def test_no_job_ends_before_its_own_work_could(
    queue: list[Remaining], free_at_ms: list[float], resources: dict[str, str]
) -> None:
    forecast = cpu(*free_at_ms, resources=resources)
    for left, end in zip(queue, forecast.finish(queue), strict=True):
        assert end >= left.not_before
        if left.fuse:
            assert end >= left.not_before + 0.003 - 1e-9
        if left.encode:
            assert end >= (min(free_at_ms) + min(s.curve.call_ms(1) for s, _ in left.encode)) / 1000 - 1e-9


@given(queue=st.lists(jobs, max_size=6), more=jobs, free_at_ms=tokens, data=st.data())
def test_nobody_waits_for_jobs_behind(
    queue: list[Remaining], more: Remaining, free_at_ms: list[float], data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(queue)))
    before, after = (cpu(*free_at_ms).finish(jobs) for jobs in (queue, [*queue[:at], more, *queue[at:]]))
    assert after[:at] == before[:at]


pen_jobs = st.builds(job, pen=counts, not_before=st.floats(0, 0.1))


@given(queue=st.lists(pen_jobs, max_size=6), more=pen_jobs, free_at_ms=tokens, data=st.data())
def test_more_work_makes_nobody_earlier(
    queue: list[Remaining], more: Remaining, free_at_ms: list[float], data: st.DataObject
) -> None:
    # In calls of one row: others may be cheaper in a call that somebody in front pays for.
    at = data.draw(st.integers(0, len(queue)))
    before, after = (cpu(*free_at_ms).finish(jobs) for jobs in (queue, [*queue[:at], more, *queue[at:]]))
    del after[at]
    assert all(late >= early - 1e-12 for early, late in zip(before, after, strict=True))


@given(rows=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_one_token_ends_with_all_calls_that_the_rows_fill(rows: list[int]) -> None:
    ends = ends_ms(cpu(0), *[job(image=count) for count in rows])
    assert ends == [round(IMAGE.curve.ms(sum(rows[: i + 1])), 6) for i in range(len(rows))]


@given(queue=st.lists(jobs, max_size=6), free_at_ms=tokens)
def test_later_tokens_make_nobody_earlier(queue: list[Remaining], free_at_ms: list[float]) -> None:
    early, late = cpu(*free_at_ms).finish(queue), cpu(*(ms + 5 for ms in free_at_ms)).finish(queue)
    assert all(b >= a - 1e-12 for a, b in zip(early, late, strict=True))


# Two encoders of images, on two resources

APART = ONE_HOST | {"image/2": "gpu"}
SPREAD = {"image": ("image", "image/2")}


def image_stage(factor: float = 1.0) -> Stage:
    """10 ms a call of one row; on the second lane so many times as much."""
    fresh = stage("image", (1, 10.0))
    for i in range(200):
        fresh.on("image/2").correction.learn(10.0, 10.0 * factor, i / 1e6)
    return fresh


def both(*free_at_ms: float) -> Forecast:
    free_at = {name: [ms / 1000] for name, ms in zip(("cpu", "gpu"), free_at_ms, strict=True)}
    return Forecast(0.0, free_at, APART, spread=SPREAD)


def test_calls_go_where_they_are_over_first() -> None:
    images = [Remaining(((image_stage(), 1),), ())] * 4
    assert ends_ms(both(0, 0), *images) == [10, 10, 20, 20]
    assert ends_ms(both(25, 0), *images) == [10, 20, 30, 35]
    assert ends_ms(both(0, 0), Remaining(((image_stage(), 4),), ())) == [20]
    slower = ends_ms(both(0, 0), *[Remaining(((image_stage(2.5), 1),), ())] * 4)
    assert slower == pytest.approx([10, 20, 25, 30], rel=0.1)


def test_rows_join_a_call_where_it_was_begun() -> None:
    by_fours = stage("image", (1, 10.0), (4, 16.0))
    assert ends_ms(both(0, 5), *[Remaining(((by_fours, 1),), ())] * 6) == [10, 12, 14, 16, 15, 17]


def test_the_load_is_spread_as_the_lanes_share_it() -> None:
    load = both(0, 0).demands([[Remaining(((image_stage(), 8),), ())]], [])[0][0]
    assert load.seconds == pytest.approx({"cpu": 0.04, "gpu": 0.04})
    assert load.alone_s == pytest.approx(0.04)
    slower = both(0, 0).demands([[Remaining(((image_stage(3.0), 8),), ())]], [])[0][0]
    assert slower.seconds == pytest.approx({"cpu": 0.06, "gpu": 0.06}, rel=0.02)


def test_a_lane_that_lacks_the_model_is_not_counted_on() -> None:
    lacking = {"image"}
    images = Stage("image", LatencyCurve(((1, 10.0),)), Correction(10.0, 10.0), lacking)
    assert ends_ms(both(0, 50), Remaining(((images, 2),), ())) == [70]
    lacking.clear()
    assert ends_ms(both(0, 50), Remaining(((images, 2),), ())) == [20]
