"""What a model would save, were its callers to accept a loss: by rows that were observed, and its profile."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mosel.cli.losses import LOSSES, least_score, loss_ladder, tiled

if TYPE_CHECKING:
    from mosel.client import ObservedItems
    from mosel.modality import ModalitySet
    from mosel.packages.calibration import Calibration
    from mosel.packages.model_package import ModelPackage
    from mosel.profiles.files import Profile
    from selector.core.frontier import Frontier, Strategy

# Of the jobs that were observed, chosen for design rows: with these, rules are made; with the rest they are tested.
_DESIGN_SHARE = 0.25
# Items like those that were observed, so many times as many, are tried; the last stand for items without end.
_TIMES = (1, 2, 4, 8, 16, 32, 64)
# A saving is most of what is possible.
_MOST = 0.9
# Sizes of jobs that stand for all.
_SIZES = 16
# Sums of floats.
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Figures:
    """Predicted from the profile, for jobs of the sizes that were observed: nothing else is under way.

    Attributes:
        cost_ms: compute time of all jobs in all services.
        p50_ms: milliseconds of the median job.
        items_per_s: of as many jobs as the machine can do.
    """

    cost_ms: float
    p50_ms: float
    items_per_s: float


@dataclass(frozen=True)
class Prospect:
    """What a loss would bring.

    Attributes:
        loss: the most accuracy that is lost against running everything, 0..1; guaranteed by the rows.
        before: with everything.
        after: with the cheapest sets that the rows guarantee not to lose more.
        most_saved: the share of compute that more rows like these could save, 0..1.
        items_for_most: about how many items it takes for most of that.
    """

    loss: float
    before: Figures
    after: Figures
    most_saved: float
    items_for_most: int

    @property
    def saved(self) -> float:
        """The share of the compute of everything that is not spent, 0..1."""
        return 1 - self.after.cost_ms / self.before.cost_ms


def rows_of(
    package: "ModelPackage", sets: Sequence[str], observed: "Sequence[ObservedItems]", source: str
) -> "Calibration":
    """What was observed as calibration rows, in groups by job; a quarter of the jobs are for design."""
    import numpy as np

    from mosel.modality import parse_set
    from mosel.packages.calibration import UNLABELLED, Calibration

    jobs = np.repeat(np.arange(len(observed), dtype=np.int32), [len(items.answers) for items in observed])
    certify = np.random.default_rng(0).permutation(len(observed)) >= _DESIGN_SHARE * len(observed)
    return Calibration(
        content_hash=package.content_hash,
        sets=list(map(parse_set, sets)),
        answers=np.concatenate([items.answers for items in observed]),
        confidence=np.concatenate([items.confidences for items in observed]),
        labels=np.full(len(jobs), UNLABELLED, np.int32),
        groups=jobs[:, None],
        group_names=["job"],
        certify=certify[jobs],
        source=source,
    )


def prospects(rows: "Calibration", measured: "Profile", sizes: Sequence[int]) -> list[Prospect]:
    """What each of `LOSSES` would bring; empty while there are too few rows to guarantee anything.

    Args:
        rows: that were observed.
        measured: the model's profile.
        sizes: of the jobs.
    """
    import numpy as np

    ladder = loss_ladder(rows)
    if ladder is None:
        return []
    among = np.quantile(sizes, np.linspace(0, 1, _SIZES), method="nearest").tolist()
    forecast = _Forecasts(measured, Counter(map(int, among)), ladder.scores)
    before, found = forecast.of(1.0), []
    ladders = [ladder, *(loss_ladder(tiled(rows, times)) or ladder for times in _TIMES[1:])]
    for loss in LOSSES:
        costs = [forecast.of(least_score(one, loss)).cost_ms for one in ladders]
        most = before.cost_ms - costs[-1]
        enough = next(
            n for n, ms in zip(_TIMES, costs, strict=True) if before.cost_ms - ms >= _MOST * most - _TOLERANCE
        )
        after = forecast.of(least_score(ladder, loss))
        found.append(Prospect(loss, before, after, most / before.cost_ms, len(rows.labels) * enough))
    return found


class _Forecasts:
    """Jobs of some sizes on an idle system.

    Args:
        measured: the model's profile.
        sizes: how many jobs have which size.
        scores: of each modality set.
    """

    def __init__(self, measured: "Profile", sizes: Mapping[int, int], scores: "Mapping[ModalitySet, float]") -> None:
        from mosel.modality import FUSION
        from selector.conversions import model_profile
        from selector.core.frontier import frontier
        from selector.core.resources import Resources
        from selector.core.stages import Stages

        self._measured, self._sizes = measured, sizes
        known = model_profile(measured, None)
        self._stages = Stages({measured.model: known})
        lanes = (*sorted(known.modalities), FUSION)
        self._idle = Resources(lanes, measured.concurrency, 0.0)
        for lane in lanes:
            self._idle.set_lane(lane, True, measured.hardware.device)
        self._everything = known.modalities
        self._profile = known
        self._frontiers: dict[int, Frontier] = {size: frontier(known, scores, size, scores) for size in sizes}

    def of(self, least: float) -> Figures:
        """Those of jobs that need a mean score; those that need 1 run everything."""
        costs, times, items, seconds = 0.0, list[tuple[float, float]](), 0, 0.0
        for size, jobs in self._sizes.items():
            for strategy, share in self._strategies(size, least):
                left, forecast = self._stages.remaining(self._measured.model, strategy), self._idle.idle_forecast(0.0)
                edge_ms = self._measured.edge_ms + self._measured.edge_item_ms * (size - 1)
                costs += jobs * share * strategy.cost_ms
                times.append((forecast.finish([left])[0] * 1000 + edge_ms, jobs * share))
                seconds += jobs * share * max(forecast.demands([[left]], ())[0][0].seconds.values())
            items += jobs * size
        return Figures(costs, _median(times), items / seconds)

    def _strategies(self, size: int, least: float) -> "list[tuple[Strategy, float]]":
        """What jobs of a size run, a little too much or too little, and how many of them, so that the mean is right."""
        import numpy as np

        from selector.core.options import strategy_of

        found = self._frontiers[size]
        at = int(np.searchsorted(found.accuracy, least - _TOLERANCE))
        if least >= 1 or at == len(found):
            return [(strategy_of(self._profile, {self._everything: size}), 1.0)]
        if not at:
            return [(found[0], 1.0)]
        less, more = found[at - 1], found[at]
        share = (more.accuracy - least) / (more.accuracy - less.accuracy)
        return [(less, share), (more, 1 - share)]


def _median(weighted: Sequence[tuple[float, float]]) -> float:
    """Of numbers with weights."""
    half, below = sum(weight for _, weight in weighted) / 2, 0.0
    for number, weight in sorted(weighted):
        below += weight
        if below >= half - _TOLERANCE:
            return number
    return 0.0
