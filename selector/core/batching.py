"""Which rows the next call has: those of the first job that waits for a service that is open, and of jobs behind it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from mosel.modality import FUSION, ModalitySet
from selector.core.jobs import Rows, Step
from selector.core.resources import LaneBalancer, Resources
from selector.core.stages import Stage, Stages
from selector.core.work import Work

# How many jobs are asked for rows that could join a batch.
_LOOK_BEHIND = 64


@dataclass(frozen=True)
class Batch:
    """What a call does, and for whom.

    Attributes:
        model: whose networks.
        step: what is done.
        stage: the same, on the lane that does it.
        rows: of each job.
        items: how many in all.
    """

    model: str
    step: Step
    stage: Stage
    rows: tuple[Rows, ...]
    items: int


def next_batch(queue: Sequence[Work], resources: Resources, stages: Stages, now: float) -> Batch | None:
    """Rows for a service whose resource has a free token, taken from their jobs; None if there are none.

    Args:
        queue: the jobs in the order in which they are served.
        resources: where work runs.
        stages: the steps of every model.
        now: seconds on the driver's clock.
    """
    lanes = LaneBalancer(resources, now)
    for at, work in enumerate(queue if lanes.open else ()):
        if not (work.unfused or work.unsent or work.planned):
            continue
        fusable = [*work.unfused] if FUSION in lanes.open else []
        # Fusion of a few items that others will follow may wait: together they take fewer calls.
        whole = [modality_set for modality_set in fusable if _fills_a_call(work, modality_set, stages)]
        paths = work.next_paths if FUSION in lanes.open and not whole else []
        modalities = () if whole else sorted(frozenset(work.unsent).union(*work.staged))
        queued, model = partial(_queued_rows, queue, at), work.job.model
        found = [(m, lanes.of(stages.of(model, m), work.waiting(m), partial(queued, m))) for m in modalities]
        encodable = {modality: lane for modality, lane in found if lane}
        ready: list[Step] = [*whole] or [*paths, *encodable] or [*fusable]
        if ready:
            step = max(ready, key=partial(_expected_ms, work, stages))
            return _filled(queue, at, step, encodable[step] if isinstance(step, str) else FUSION, stages, now)
    return None


def _filled(queue: Sequence[Work], at: int, step: Step, lane: str, stages: Stages, now: float) -> Batch:
    """A batch with rows of the job at a place in the queue and of those behind it."""
    head = queue[at]
    model, stage = head.job.model, stages.of(head.job.model, step).on(lane)
    rest_s = _fusing_s(head, stages, now) if isinstance(step, str) and at + 1 < len(queue) else 0.0
    rows: list[Rows] = []
    items = 0
    for work in islice(queue, at, at + _LOOK_BEHIND):
        count = min(stage.curve.best_batch - items, work.waiting(step) if work.job.model == model else 0)
        if work is not head and (head.alone or work.alone or _too_late(head, stage, items, count, rest_s, now)):
            continue
        if count:
            rows.append(work.take(step, count))
            work.started_at = now if work.started_at is None else work.started_at
            items += count
        if head.alone or items == stage.curve.best_batch:
            break
    return Batch(model, step, stage, tuple(rows), items)


def _queued_rows(queue: Sequence[Work], at: int, modality: str) -> int:
    """Rows of the job at a place in the queue, and of those behind it, that could share a call."""
    behind = islice(queue, at, at + _LOOK_BEHIND)
    return sum(work.waiting(modality) for work in behind if work.job.model == queue[at].job.model)


def _fills_a_call(work: Work, modality_set: ModalitySet, stages: Stages) -> bool:
    """Whether all items of a set that a job has, or enough for the best batch, wait for fusion."""
    waiting = work.waiting(modality_set)
    all_items = work.unfinished()[modality_set] + work.planned.get(modality_set, 0)
    return waiting == all_items or waiting >= stages.of(work.job.model, modality_set).curve.best_batch


def _expected_ms(work: Work, stages: Stages, step: Step) -> float:
    """About how long the rows of a job that wait there take; the longest first leaves least idle."""
    return stages.of(work.job.model, step).profiled_ms(1) * work.waiting(step)


def _too_late(head: Work, stage: Stage, items: int, more: int, rest_s: float, now: float) -> bool:
    """Whether more rows in its call would make the first job late that would be in time without them."""
    left_ms = (head.job.deadline - now - rest_s) * 1000
    return more > 0 and stage.expected_ms(items, now) <= left_ms < stage.expected_ms(items + more, now)


def _fusing_s(work: Work, stages: Stages, now: float) -> float:
    fusions = [stages.of(work.job.model, s) for s in {*work.staged, *work.unfinished()}]
    return sum(stage.expected_ms(1, now) for stage in fusions) / 1000
