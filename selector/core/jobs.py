"""The words of the core: jobs, and the calls that serve them."""

from dataclasses import dataclass, replace
from enum import StrEnum

from mosel.errors import MoselError
from mosel.modality import FUSION, ModalitySet
from selector.core.frontier import Strategy

NORMAL_PRIORITY = 5
# What a level of priority is worth, in seconds of the deadline.
_LEVEL_S = 5.0


class Effort(StrEnum):
    """What happens to time that an accuracy floor leaves unused: nothing, or more accuracy."""

    CHEAPEST = "cheapest"
    BEST = "best"


@dataclass(frozen=True)
class Job:
    """Items that arrived together.

    Attributes:
        id: unique among the jobs on their way.
        model: which model; every call for the job names the same.
        size: items.
        modalities: those that were sent and may be run.
        min_accuracy: the accuracy floor, 0..1, or None.
        max_accuracy_loss: the most accuracy that may be lost against the reference set, 0..1, or None; instead of it.
        deadline: seconds on the driver's clock; orders jobs, and plans are made to meet it.
        exact: run all of `modalities` or refuse.
        effort: None: cheapest with a floor, best without.
        late_ok: a late answer is wanted too, so the job is neither refused nor dropped for its deadline.
        expires: seconds on the driver's clock after which nobody waits; None: the deadline.
        priority: 1 goes first, 9 last.
        available: those that the caller has and that may be run, if it did not send all of them; else empty.
    """

    id: bytes
    model: str
    size: int
    modalities: ModalitySet
    min_accuracy: float | None
    deadline: float
    exact: bool = False
    effort: Effort | None = None
    late_ok: bool = False
    expires: float | None = None
    priority: int = NORMAL_PRIORITY
    max_accuracy_loss: float | None = None
    available: ModalitySet = frozenset()

    @property
    def everything(self) -> ModalitySet:
        """What its caller has: what floors, losses and savings are counted against."""
        return self.available or self.modalities

    @property
    def is_part(self) -> bool:
        """Whether its caller has more than it sent."""
        return self.modalities != self.everything

    @property
    def sent_whole(self) -> "Job":
        """The same job, had its caller sent all that it has."""
        return replace(self, modalities=self.everything, available=frozenset())

    @property
    def has_floor(self) -> bool:
        """Whether anything was asked of its accuracy."""
        return self.min_accuracy is not None or self.max_accuracy_loss is not None

    @property
    def order(self) -> float:
        """Jobs are served by rising order: by deadline, as if that were sooner or later for each level of priority.

        So a job that has waited long enough goes before a newer one of any priority.
        """
        return self.deadline + (self.priority - NORMAL_PRIORITY) * _LEVEL_S

    @property
    def ends(self) -> float:
        """When nobody waits any more."""
        return self.deadline if self.expires is None else self.expires


class Guarantee(StrEnum):
    """What the accuracy of an answer stands on: a test on calibration rows, nothing, or measured means alone."""

    CALIBRATED = "calibrated"
    NONE = "none"
    ESTIMATE = "estimate"


@dataclass(frozen=True)
class Assurance:
    """What can be said of the accuracy of an answer.

    Attributes:
        guarantee: what it stands on.
        accuracy: what it is at least, 0..1.
        loss: what is lost at most against the reference set, 0..1; at most one of both is there.
        confidence: of that; 0 where nothing is guaranteed.
        note: what else there is to say; mostly empty.
    """

    guarantee: Guarantee
    accuracy: float | None = None
    loss: float | None = None
    confidence: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Rows:
    """Some items of a job, by rising index."""

    job_id: bytes
    items: tuple[int, ...]


@dataclass(frozen=True)
class Path:
    """Encoders and fusion back to back, in one call, for items of one modality set."""

    modality_set: ModalitySet


# What decides how long a call takes, besides model and size: the encoder of a modality, fusion, or both.
Step = str | ModalitySet | Path


@dataclass(frozen=True)
class EncodeCall:
    """One batch for an encoder of a modality; `lane` is the service that it is for."""

    id: int
    model: str
    modality: str
    lane: str
    rows: tuple[Rows, ...]

    @property
    def step(self) -> Step:
        """What it does."""
        return self.modality


@dataclass(frozen=True)
class FuseCall:
    """One batch for fusion, of items of one modality set: their embeddings are all there, or payloads are sent."""

    id: int
    model: str
    modality_set: ModalitySet
    rows: tuple[Rows, ...]
    from_payloads: bool = False

    @property
    def lane(self) -> str:
        """The service that it is for."""
        return FUSION

    @property
    def step(self) -> Step:
        """What it does."""
        return Path(self.modality_set) if self.from_payloads else self.modality_set


Call = EncodeCall | FuseCall


@dataclass(frozen=True)
class Ended:
    """A job that ends without an answer: it expired, or was dropped because it could no longer be met."""

    job_id: bytes
    error: MoselError


@dataclass(frozen=True)
class Wait:
    """Nothing to do before an event, or before `until` seconds on the driver's clock."""

    until: float | None


@dataclass(frozen=True)
class Plan:
    """What a job would get.

    Attributes:
        frontier: strategies for its size, cheapest first, with their milliseconds on an idle system.
        chosen: the strategy it would get now, None if it would be refused.
        latency_ms: predicted milliseconds until its answer, behind what is queued.
        refusal: why it would be refused; empty if it would not.
        assurance: what an answer would stand on.
        saved: the share of the compute of everything that was sent which would not be spent, 0..1.
        wanted: the modalities that jobs like it use; empty if none can be answered now.
    """

    frontier: tuple[tuple[Strategy, float], ...]
    chosen: Strategy | None
    latency_ms: float
    refusal: str
    assurance: Assurance | None = None
    saved: float = 0.0
    wanted: ModalitySet = frozenset()


@dataclass(frozen=True)
class Option:
    """A strategy that a job may use, and what it is worth to a policy: accuracy, or thrift."""

    strategy: Strategy
    value: float
