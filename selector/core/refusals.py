"""What a job is told that cannot be met, and what a plan says."""

from collections.abc import Sequence
from dataclasses import dataclass

from mosel.errors import DeadlineUnreachable, MoselError, Overloaded
from mosel.modality import ModalitySet, format_set
from selector.core.frontier import Strategy
from selector.core.options import best_of
from selector.core.work import Work


@dataclass(frozen=True)
class Plan:
    """What a job would get.

    Attributes:
        frontier: strategies for its size, cheapest first, with their milliseconds on an idle system.
        chosen: the strategy it would get now, None if it would be refused.
        latency_ms: predicted milliseconds until its answer, behind what is queued.
        refusal: why it would be refused; empty if it would not.
    """

    frontier: tuple[tuple[Strategy, float], ...]
    chosen: Strategy | None
    latency_ms: float
    refusal: str


def format_strategy(strategy: Strategy) -> str:
    """Writes a strategy, `pen` or `3 image+pen, 1 pen`."""
    if len(strategy.counts) == 1:
        return format_set(strategy.counts[0][0])
    return ", ".join(f"{count} {format_set(modality_set)}" for modality_set, count in strategy.counts)


def refusal(
    work: Work, now: float, fastest: int, idle_s: float, behind_s: float, fitting: Sequence[ModalitySet]
) -> MoselError:
    """The error for a job whose deadline cannot be met.

    Args:
        work: the job.
        now: seconds on the driver's clock.
        fastest: index of its fastest option.
        idle_s: seconds that it takes on an idle system.
        behind_s: the same behind what is queued.
        fitting: modality sets that would meet the deadline on an idle system, whatever the floor.

    Returns:
        DeadlineUnreachable if not even an idle system meets it, with the best that would; else Overloaded. A job that
        may be late can always be met some time: it is refused only for the sake of others.
    """
    budget_s = work.job.deadline - now
    takes = f"{format_strategy(work.options[fastest].strategy)} takes {idle_s * 1000:.1f} ms on an idle system"
    if idle_s <= budget_s or work.job.late_ok:
        retry_after_ms = max(1, round((behind_s - budget_s) * 1000))
        return Overloaded(
            f"the deadline of {budget_s * 1000:.1f} ms cannot be met behind what is queued; {takes}", retry_after_ms
        )
    return DeadlineUnreachable(
        f"the deadline of {budget_s * 1000:.1f} ms cannot be met for {work.job.size} items: of the strategies that "
        f"are accurate enough, {takes}; {best_of(work.profile, fitting)}"
    )
