"""A job on its way: which items are committed to which modality set, and where each of them is."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mosel.modality import ModalitySet
from selector.core.floors import Floor, Outcome, Outcomes, mean_score, outcome_of
from selector.core.frontier import Strategy
from selector.core.jobs import Job, Option, Path, Rows, Step
from selector.core.options import strategy_of
from selector.core.policies import Queued
from selector.core.profile import ModelProfile

# Sums of floats.
_TOLERANCE = 1e-9
_KEPT_OUTCOMES = 256


@dataclass(eq=False)
class Work:
    """Items are committed to a modality set when their rows are first handed out; until then their plan may change.

    The most accurate part of a plan is committed first: what is left can then become cheaper without breaking the
    floor. Which item it is, a permutation seeded by the job's id says, never the item's position.

    Attributes:
        profile: of the job's model.
        floor: what its answered items have on average at least.
        options: strategies for the items that are not committed, the preferred one first.
        queued: the same as a policy sees them, with what is left to do for committed items.
        chosen: index of the option that is planned, or of the nearest to it.
        planned: items that are not committed, by the modality set that they will run.
        preferred: the mean score of the option that it would have on an idle system.
        least: that of the cheapest plan that it had before it started.
        predicted: when it was expected to be answered when it was admitted.
        started_at: when the first call was handed out, None before.
        unsent: committed items whose rows wait for an encoder, by modality.
        unfused: items whose embeddings are all there, by modality set.
        left: items without an output.
        is_settled: all items are committed, and no call began or returned since `queued` said what is left to do.
        calls: the calls under way, by id, and which of their items they are still wanted for.
        alone: a call for it failed; it shares no more.
        without: modalities that it would have run, had their encoders been there when it was planned.
        outcomes: those that are known, of jobs that are alike.
    """

    job: Job
    profile: ModelProfile
    floor: Floor
    submitted_at: float
    options: Sequence[Option]
    queued: Queued
    chosen: int = 0
    planned: dict[ModalitySet, int] = field(default_factory=dict)
    preferred: float = 0.0
    least: float = 0.0
    predicted: float = 0.0
    started_at: float | None = None
    unsent: dict[str, list[int]] = field(default_factory=dict)
    unfused: dict[ModalitySet, list[int]] = field(default_factory=dict)
    left: int = 0
    is_settled: bool = False
    calls: dict[int, set[int]] = field(default_factory=dict)
    alone: bool = False
    without: ModalitySet = frozenset()
    outcomes: Outcomes = field(default_factory=dict)
    _order: list[int] = field(default_factory=list)
    _set_of: dict[int, ModalitySet] = field(default_factory=dict)
    _committed: dict[ModalitySet, int] = field(default_factory=dict)
    _missing: dict[int, int] = field(default_factory=dict)
    _failed: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.left = self.job.size
        self._order = self._permuted(range(self.job.size))
        self.preferred = self.least = self.options[0].strategy.accuracy if self.options else 0.0
        self.choose(0)

    @property
    def uncommitted(self) -> int:
        """Items whose modality set may still change."""
        return len(self._order)

    @property
    def floor_of_rest(self) -> float:
        """The score that the items which are not committed need on average, so that all together meet the floor."""
        spent = sum(self.floor.scores[s] * count for s, count in self._committed.items())
        return (self.floor.least * self.job.size - spent) / max(self.uncommitted, 1)

    @property
    def strategy(self) -> Strategy:
        """What is committed and planned together."""
        return strategy_of(self.profile, self.counts, self.floor.scores)

    @property
    def counts(self) -> Mapping[ModalitySet, int]:
        """Items by the modality set that they run, committed or planned."""
        counts = dict(self._committed)
        for modality_set, planned in self.planned.items():
            counts[modality_set] = counts.get(modality_set, 0) + planned
        return counts

    @property
    def outcome(self) -> Outcome:
        """What becomes of it."""
        counts = self.counts
        key = self.floor, frozenset(counts.items())
        if (known := self.outcomes.get(key)) is None:
            if len(self.outcomes) >= _KEPT_OUTCOMES:
                self.outcomes.clear()
            known = self.outcomes[key] = outcome_of(self.floor, self.profile, self.job.everything, counts)
        return known

    @property
    def degraded(self) -> bool:
        """Whether it gave up accuracy that it would have had on an idle system."""
        return self.outcome.score < self.preferred - _TOLERANCE

    @property
    def upgraded(self) -> bool:
        """Whether it has more accuracy than a plan gave it while it waited."""
        return self.outcome.score > self.least + _TOLERANCE

    @property
    def staged(self) -> list[ModalitySet]:
        """The sets that are planned and not run as paths."""
        return [s for s in self.planned if not self.profile.is_path(s)]

    @property
    def next_paths(self) -> list[Path]:
        """The path that the next items to be committed may take, if there is one: that of the most accurate set."""
        sets = [s for s in self.planned if self.profile.is_path(s)]
        return [Path(max(sets, key=lambda s: self.floor.scores[s]))] if sets else []

    def choose(self, option: int) -> None:
        """Plans an option for the items that are not committed."""
        self.chosen = option
        self.planned = dict(self.options[option].strategy.counts) if self.options else {}
        if self.started_at is None and self.options:
            self.least = min(self.least, self.options[option].strategy.accuracy)

    def replace_options(self, options: Sequence[Option]) -> None:
        """Other options, now that fewer items can be planned; the plan stays."""
        planned = mean_score(self.floor.scores, self.planned)
        self.options = options
        self.chosen = min(range(len(options)), key=lambda i: abs(options[i].strategy.accuracy - planned))

    def waiting(self, step: Step) -> int:
        """Items that wait, or will wait, for an encoder; for fusion or a path, those that it can have now."""
        if isinstance(step, Path):
            return self.planned.get(step.modality_set, 0)
        if not isinstance(step, str):
            return len(self.unfused.get(step, ()))
        count = len(self.unsent.get(step, ()))
        for modality_set, planned in self.planned.items():
            count += planned if step in modality_set and not self.profile.is_path(modality_set) else 0
        return count

    def take(self, step: Step, most: int) -> Rows:
        """Takes the next items that wait there; commits as many as that needs."""
        self.is_settled = False
        if isinstance(step, Path):
            return Rows(self.job.id, tuple(sorted(self._commit_to(step.modality_set, most))))
        if isinstance(step, str):
            self._commit(step, most - len(self.unsent.get(step, ())))
        items = sorted(self.unsent.pop(step) if isinstance(step, str) else self.unfused.pop(step))
        self.put_back(step, items[most:])
        return Rows(self.job.id, tuple(items[:most]))

    def put_back(self, step: str | ModalitySet, items: Sequence[int]) -> None:
        """These items wait there again."""
        if items and isinstance(step, str):
            self.unsent.setdefault(step, []).extend(items)
        elif items and not isinstance(step, str):
            self.unfused.setdefault(step, []).extend(items)

    def begin_again(self, items: Iterable[int]) -> None:
        """Nothing that was done for these items counts any more; they wait for a plan like new ones."""
        again, self.is_settled = set(items), False
        for item in again:
            self._committed[self._set_of[item]] -= 1
            if not self._committed[self._set_of[item]]:
                del self._committed[self._set_of[item]]
            del self._set_of[item]
            self._missing.pop(item, None)
        self.unsent = {m: rest for m, waiting in self.unsent.items() if (rest := _without(waiting, again))}
        self.unfused = {s: rest for s, waiting in self.unfused.items() if (rest := _without(waiting, again))}
        for wanted in self.calls.values():
            wanted -= again
        self._order = self._permuted({*self._order, *again})

    def may_try_again(self, items: Iterable[int]) -> bool:
        """Notes that a call with these items failed; whether it was the first time for each of them."""
        first = self._failed.isdisjoint(items)
        self._failed.update(items)
        return first

    def returned(self, call_id: int) -> set[int]:
        """A call for it came back; the items that it is still wanted for."""
        self.is_settled = False
        return self.calls.pop(call_id)

    def encoded(self, items: Iterable[int]) -> None:
        """One more modality of these items is encoded."""
        for item in items:
            self._missing[item] -= 1
            if not self._missing[item]:
                del self._missing[item]
                self.unfused.setdefault(self._set_of[item], []).append(item)

    def unfinished(self) -> Mapping[ModalitySet, int]:
        """Committed items that wait for fusion or for embeddings, by modality set; without those in fusion."""
        counts = {modality_set: len(items) for modality_set, items in self.unfused.items()}
        for item in self._missing:
            counts[self._set_of[item]] = counts.get(self._set_of[item], 0) + 1
        return counts

    def _permuted(self, items: Iterable[int]) -> list[int]:
        order = sorted(items)
        if len(order) > 1:
            random.Random(self.job.id).shuffle(order)  # noqa: S311 (fair, not secret)
        return order

    def _commit(self, modality: str, count: int) -> None:
        """Commits the next items that run a modality, the most accurate sets first."""
        for modality_set in sorted(self.planned, key=lambda s: -self.floor.scores[s]):
            if modality not in modality_set or self.profile.is_path(modality_set):
                continue
            committed = self._commit_to(modality_set, max(count, 0))
            count -= len(committed)
            for item in committed:
                self._missing[item] = len(modality_set)
                for needed in modality_set:
                    self.unsent.setdefault(needed, []).append(item)

    def _commit_to(self, modality_set: ModalitySet, most: int) -> list[int]:
        """Commits the next items that are planned for a set, so many at most."""
        taken = min(most, self.planned[modality_set])
        self.planned[modality_set] -= taken
        if not self.planned[modality_set]:
            del self.planned[modality_set]
        items = [self._order.pop() for _ in range(taken)]
        self._set_of.update(dict.fromkeys(items, modality_set))
        if items:
            self._committed[modality_set] = self._committed.get(modality_set, 0) + taken
        return items


def _without(items: Iterable[int], others: set[int]) -> list[int]:
    return [item for item in items if item not in others]
