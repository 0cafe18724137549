"""The steps of every model, what each is expected to take now, and what is left to do for a job.

Calls take what their profile says, corrected by what was measured while running.
"""

import itertools
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from mosel.modality import FUSION, PATH
from selector.core.frontier import Strategy
from selector.core.jobs import Path, Step
from selector.core.profile import LatencyCurve, ModelProfile

# Weight of what was learned before, per newer measurement, and per time without one.
_MEMORY = 0.95
_HALF_LIFE_S = 2.0
# Within which nothing fades.
_AT_ONCE_S = 0.001
# Weight of the profile, in measurements.
_PRIOR = 1.0
_FACTORS = (0.2, 5.0)


def service_name(lane: str) -> str:
    """How people know the service behind a lane: `fusion`, `encoder/image`, `encoder/image/2`."""
    return lane if lane == FUSION else f"encoder/{lane}"


@dataclass
class Correction:
    """Fits `measured = overhead + factor * profiled` by least squares with a fading memory.

    The profile itself counts as two measurements, so what was learned under load fades while nothing confirms it:
    otherwise one busy hour would bar the next.

    Args:
        small_ms: profiled time of the smallest call.
        large_ms: of the largest.
    """

    small_ms: float
    large_ms: float
    _count: float = 0.0
    _x: float = 0.0
    _y: float = 0.0
    _xx: float = 0.0
    _xy: float = 0.0
    _at: float = 0.0
    # What `fit` last said, while that holds.
    _fit: tuple[float, float] | None = None

    def learn(self, profiled_ms: float, measured_ms: float, now: float) -> None:
        """A call took so long; a stalled machine counts as three times the profile at most."""
        self._fade(now)
        measured_ms = min(measured_ms, 3 * self.expected_ms(profiled_ms, now) + 5)
        self._count = _MEMORY * self._count + 1
        self._x = _MEMORY * self._x + profiled_ms
        self._y = _MEMORY * self._y + measured_ms
        self._xx = _MEMORY * self._xx + profiled_ms**2
        self._xy = _MEMORY * self._xy + profiled_ms * measured_ms
        self._fit = None

    def expected_ms(self, profiled_ms: float, now: float) -> float:
        """What a call is expected to take, in milliseconds; never less than a fifth of its profile."""
        overhead_ms, factor = self.fit(now)
        return max(overhead_ms + factor * profiled_ms, _FACTORS[0] * profiled_ms)

    def fit(self, now: float) -> tuple[float, float]:
        """Overhead in milliseconds, and factor."""
        self._fade(now)
        if self._fit is None:
            self._fit = self._fitted()
        return self._fit

    def _fitted(self) -> tuple[float, float]:
        count, both = self._count + 2 * _PRIOR, _PRIOR * (self.small_ms + self.large_ms)
        x, y = self._x + both, self._y + both
        squares = _PRIOR * (self.small_ms**2 + self.large_ms**2)
        spread = self._xx + squares - x * x / count
        together = self._xy + squares - x * y / count
        factor = together / spread if spread > 1e-9 else 1.0
        factor = min(max(factor, _FACTORS[0]), _FACTORS[1])
        return (y - factor * x) / count, factor

    def _fade(self, now: float) -> None:
        if now > self._at + _AT_ONCE_S:
            fading: float = 0.5 ** ((now - self._at) / _HALF_LIFE_S)
            self._count, self._x, self._y = self._count * fading, self._x * fading, self._y * fading
            self._xx, self._xy = self._xx * fading, self._xy * fading
            self._at, self._fit = now, None


@dataclass(eq=False)
class Stage:
    """A step of a model on a lane: the encoder of a modality, the fusion of a modality set, or both in one call.

    Plans name the stage of the modality's first lane, whichever does it in the end.

    Attributes:
        lane: the service that does it.
        curve: measured milliseconds by batch size.
        correction: what calls to this service and model really take.
        lacking: lanes that do not have the model; changes as they come and go.
        replicas: the same step on other lanes, by lane, as far as it was asked for.
    """

    lane: str
    curve: LatencyCurve
    correction: Correction
    lacking: Set[str] = frozenset()
    replicas: "dict[str, Stage]" = field(default_factory=dict)
    _profiled: dict[int, float] = field(default_factory=dict)
    _risen: dict[int, float] = field(default_factory=dict)

    def on(self, lane: str) -> "Stage":
        """The same step on another lane of the modality, where calls may take more or less time."""
        if lane == self.lane:
            return self
        if lane not in self.replicas:
            self.replicas[lane] = Stage(
                lane, self.curve, Correction(self.correction.small_ms, self.correction.large_ms)
            )
        return self.replicas[lane]

    def profiled_ms(self, items: int) -> float:
        """Profiled milliseconds of one call."""
        if items not in self._profiled:
            self._profiled[items] = self.curve.call_ms(items)
        return self._profiled[items]

    def expected_ms(self, items: int, now: float) -> float:
        """The same, corrected by what was measured lately."""
        return self.correction.expected_ms(self.profiled_ms(items), now)

    def most_ms(self, items: int, now: float) -> float:
        """What a call takes at most to which so many items come one after another: where more take less, no less."""
        if items not in self._risen:
            sizes = [1, *(size for size, _ in self.curve.points if 1 < size < items), items]
            times = [self.profiled_ms(size) for size in sizes]
            rises = (max(more - less, 0.0) for less, more in itertools.pairwise(times))
            self._risen[items] = times[0] + sum(rises)
        return self.correction.expected_ms(self._risen[items], now)


RowsByStage = tuple[tuple[Stage, int], ...]


@dataclass(frozen=True, eq=False)
class Remaining:
    """What is left to do for a job.

    Attributes:
        encode: rows that wait for each encoder.
        fuse: items that wait for fusion or for embeddings, or for the one call that they take, by modality set.
        not_before: seconds at which the last call under way for it is over.
    """

    encode: RowsByStage
    fuse: RowsByStage
    not_before: float = 0.0

    def __add__(self, more: "Remaining") -> "Remaining":
        """What is left for the same job besides."""
        return Remaining(self.encode + more.encode, self.fuse + more.fuse, max(self.not_before, more.not_before))


class Stages:
    """The stages of all models; made when they are first asked for, once their curves are measured.

    Args:
        profiles: by model.
    """

    def __init__(self, profiles: Mapping[str, ModelProfile]) -> None:
        self._profiles = profiles
        self._stages: dict[tuple[str, Step], Stage] = {}
        self._corrections: dict[tuple[str, str], Correction] = {}

    def of(self, model: str, what: Step) -> Stage:
        """The stage of a step of a model."""
        key = (model, what)
        if key not in self._stages:
            profile = self._profiles[model]
            kind, lane = FUSION, FUSION
            if isinstance(what, str):
                kind, lane, curve, siblings = what, what, profile.encoders[what], [profile.encoders[what]]
            elif isinstance(what, Path):
                kind, curve, siblings = PATH, profile.paths[what.modality_set], [*profile.paths.values()]
            else:
                curve, siblings = profile.fusion[what], [*profile.fusion.values()]
            if (model, kind) not in self._corrections:
                smallest, largest = min(c.points[0][1] for c in siblings), max(c.points[-1][1] for c in siblings)
                self._corrections[model, kind] = Correction(smallest, largest)
            self._stages[key] = Stage(lane, curve, self._corrections[model, kind], profile.lacking)
        return self._stages[key]

    def remaining(self, model: str, strategy: Strategy) -> Remaining:
        """What is left to do for a job that has not started, with a strategy."""
        rows: dict[str, int] = {}
        fuse: list[tuple[Stage, int]] = []
        for modality_set, count in strategy.counts:
            if self._profiles[model].is_path(modality_set):
                fuse.append((self.of(model, Path(modality_set)), count))
                continue
            fuse.append((self.of(model, modality_set), count))
            for modality in modality_set:
                rows[modality] = rows.get(modality, 0) + count
        encode = tuple((self.of(model, modality), count) for modality, count in sorted(rows.items()))
        return Remaining(encode, tuple(fuse))

    def forget(self, model: str) -> None:
        """Nothing more will be asked of a model."""
        self._stages = {key: stage for key, stage in self._stages.items() if key[0] != model}
        self._corrections = {key: learned for key, learned in self._corrections.items() if key[0] != model}

    def corrections(self, now: float) -> dict[tuple[str, str], tuple[float, float]]:
        """What was learned of each (model, lane or `PATH`): a call takes (overhead in ms) + (factor) * its profile."""
        known = dict(self._corrections)
        for (model, _), stage in self._stages.items():
            known |= {(model, lane): replica.correction for lane, replica in stage.replicas.items()}
        return {key: correction.fit(now) for key, correction in known.items()}
