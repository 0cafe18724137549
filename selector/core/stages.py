"""The steps of every model, what each is expected to take now, and what is left to do for a job."""

from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from mosel.modality import FUSION, ModalitySet
from selector.core.correction import Correction
from selector.core.frontier import Strategy
from selector.core.profile import LatencyCurve, ModelProfile


def service_name(lane: str) -> str:
    """How people know the service behind a lane: `fusion`, `encoder/image`, `encoder/image/2`."""
    return lane if lane == FUSION else f"encoder/{lane}"


@dataclass(eq=False)
class Stage:
    """A step of a model on a lane: the encoder of a modality, or the fusion of a modality set.

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


Steps = tuple[tuple[Stage, int], ...]


@dataclass(frozen=True)
class Remaining:
    """What is left to do for a job.

    Attributes:
        encode: rows that wait for each encoder.
        fuse: items that wait for fusion or for embeddings, by modality set.
        not_before: seconds at which the last call under way for it is over.
    """

    encode: Steps
    fuse: Steps
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
        self._stages: dict[tuple[str, str | ModalitySet], Stage] = {}
        self._corrections: dict[tuple[str, str], Correction] = {}

    def of(self, model: str, what: str | ModalitySet) -> Stage:
        """The stage that encodes a modality or, if `what` is a modality set, fuses it."""
        key = (model, what)
        if key not in self._stages:
            profile = self._profiles[model]
            if isinstance(what, str):
                lane, curve, siblings = what, profile.encoders[what], [profile.encoders[what]]
            else:
                lane, curve, siblings = FUSION, profile.fusion[what], list(profile.fusion.values())
            if (model, lane) not in self._corrections:
                smallest, largest = min(c.points[0][1] for c in siblings), max(c.points[-1][1] for c in siblings)
                self._corrections[model, lane] = Correction(smallest, largest)
            self._stages[key] = Stage(lane, curve, self._corrections[model, lane], profile.lacking)
        return self._stages[key]

    def remaining(self, model: str, strategy: Strategy) -> Remaining:
        """What is left to do for a job that has not started, with a strategy."""
        rows: Counter[str] = Counter()
        for modality_set, count in strategy.counts:
            rows.update(dict.fromkeys(modality_set, count))
        encode = tuple((self.of(model, modality), count) for modality, count in sorted(rows.items()))
        return Remaining(encode, tuple((self.of(model, s), count) for s, count in strategy.counts))

    def forget(self, model: str) -> None:
        """Nothing more will be asked of a model."""
        self._stages = {key: stage for key, stage in self._stages.items() if key[0] != model}
        self._corrections = {key: learned for key, learned in self._corrections.items() if key[0] != model}

    def corrections(self, now: float) -> dict[tuple[str, str], tuple[float, float]]:
        """What was learned of each (model, lane): a call takes (overhead in ms) + (factor) * its profile."""
        known = dict(self._corrections)
        for (model, _), stage in self._stages.items():
            known |= {(model, lane): replica.correction for lane, replica in stage.replicas.items()}
        return {key: correction.fit(now) for key, correction in known.items()}
