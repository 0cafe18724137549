"""What is known of a model: measured accuracy per modality set, measured latency per encoder and fusion."""

import bisect
import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mosel.modality import ModalitySet
from selector.core.certificate import Certificates, Ladder

# A batch is good enough if an item in it costs so little more than in the best one: smaller calls yield sooner.
_GOOD_ENOUGH = 1.05
# Of the normal distribution, for an interval of 95 %.
_Z = 1.96


@dataclass(frozen=True)
class LatencyCurve:
    """Measured time of one call by batch size, as the selector sees it: network, transport and message.

    Attributes:
        points: (batch size, milliseconds), by rising batch size; at least one.
    """

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.points]
        sound = all(size >= 1 and 0 <= ms < math.inf for size, ms in self.points)
        if not sizes or sizes != sorted(set(sizes)) or not sound:
            raise ValueError(f"a latency curve needs points by rising batch size, got {self.points}")

    @property
    def max_batch(self) -> int:
        """The largest batch that was measured."""
        return self.points[-1][0]

    @cached_property
    def best_batch(self) -> int:
        """The smallest measured batch whose items cost hardly more than in any other; more is cut into such calls."""
        least = min(ms / size for size, ms in self.points)
        return next(size for size, ms in self.points if ms / size <= least * _GOOD_ENOUGH)

    def call_ms(self, items: int) -> float:
        """Milliseconds of one call with 1 to `max_batch` items, interpolated between the measured batch sizes."""
        at = bisect.bisect_left(self.points, (items, 0.0))
        size, ms = self.points[at]
        if at == 0 or size == items:
            return ms
        size_before, ms_before = self.points[at - 1]
        return ms_before + (ms - ms_before) * (items - size_before) / (size - size_before)

    def ms(self, items: int) -> float:
        """Milliseconds of all calls that so many items take: whole ones of the best batch, and one with the rest."""
        calls, rest = divmod(items, self.best_batch)
        return calls * self.call_ms(self.best_batch) + (self.call_ms(rest) if rest else 0.0)

    def table(self, items: int) -> NDArray[np.float64]:
        """The same for 0, 1 and so on to so many items."""
        calls, rest = np.divmod(np.arange(items + 1), self.best_batch)
        sizes, times = zip(*self.points, strict=True)
        return calls * self.call_ms(self.best_batch) + np.where(rest, np.interp(rest, sizes, times), 0.0)


@dataclass
class ModelProfile:
    """One model's profile. Latencies arrive as services are measured.

    Attributes:
        accuracy: expected accuracy per modality set, 0..1.
        samples: validation items behind the accuracies.
        default_min_accuracy: the floor when a caller gives none; None: the accuracy of what was sent.
        encoders: latency curve per modality.
        fusion: latency curve per modality set.
        paths: latency curve per modality set of encoders and fusion back to back, in one call.
        joined: the modalities that fusion encodes itself.
        unavailable: sets that cannot be run because services do not have their networks.
        lacking: lanes that do not have them; kept up to date in place.
        certificates: what is guaranteed; None without calibration rows.
        observed: whether jobs run everything that was sent, as far as they can, to see what cheaper sets would answer.
    """

    accuracy: Mapping[ModalitySet, float]
    samples: int
    default_min_accuracy: float | None = None
    encoders: dict[str, LatencyCurve] = field(default_factory=dict)
    fusion: dict[ModalitySet, LatencyCurve] = field(default_factory=dict)
    paths: dict[ModalitySet, LatencyCurve] = field(default_factory=dict)
    joined: frozenset[str] = frozenset()
    unavailable: frozenset[ModalitySet] = frozenset()
    lacking: set[str] = field(default_factory=set)
    certificates: Certificates | None = None
    observed: bool = False

    @property
    def modalities(self) -> frozenset[str]:
        """All that the model has."""
        return frozenset(m for modality_set in self.accuracy for m in modality_set)

    @property
    def state(self) -> Hashable:
        """Which strategies jobs may use does not change while this stays equal, and no latency is measured again."""
        known = len(self.encoders), len(self.fusion), len(self.paths), self.joined
        return known, self.unavailable, frozenset(self.lacking), self.certificates, self.observed

    @property
    def least_difference(self) -> float:
        """The least difference between the accuracies of two sets that the samples can show, with 95 % confidence.

        Both were measured on the same items. At least so many of those came out differently as the difference says; if
        no others did, its normal interval is narrowest, and holds 0 for differences up to z² / (samples + z²). With
        unknown samples (0), every difference counts.
        """
        return _Z**2 / (self.samples + _Z**2) if self.samples else 0.0

    def accuracy_ladder(self, sent: ModalitySet) -> Ladder | None:
        """Of guaranteed floors over what was sent; None without labelled calibration rows."""
        return None if self.certificates is None else self.certificates.of_accuracy(sent)

    def loss_ladder(self, sent: ModalitySet) -> Ladder | None:
        """Of guaranteed losses over what was sent; None without calibration rows."""
        return None if self.certificates is None else self.certificates.of_loss(sent)

    def take_latencies(self, of: "ModelProfile") -> None:
        """Takes over what is not known here from a model with the same networks."""
        self.encoders, self.fusion = of.encoders | self.encoders, of.fusion | self.fusion
        self.paths = of.paths | self.paths

    def is_measured(self, modality_set: ModalitySet) -> bool:
        """Whether every latency of the set is known."""
        return modality_set in self.fusion and all(m in self.encoders for m in modality_set)

    def can_run(self, modality_set: ModalitySet) -> bool:
        """Whether some service for each step has the networks of the set, and their latencies are known."""
        return modality_set not in self.unavailable and self.is_measured(modality_set)

    def is_path(self, modality_set: ModalitySet) -> bool:
        """Whether items of a set take one call each, encoders and fusion back to back.

        Not while the model is observed: their embeddings are wanted for other sets as well.
        """
        return modality_set <= self.joined and modality_set in self.paths and not self.observed

    def cost_ms(self, modality_set: ModalitySet, items: int) -> float:
        """Compute time that so many items of one set cost in all services together, in milliseconds."""
        if self.is_path(modality_set):
            return self.paths[modality_set].ms(items)
        return sum(self.encoders[m].ms(items) for m in modality_set) + self.fusion[modality_set].ms(items)

    def idle_latency_ms(self, modality_set: ModalitySet, items: int) -> float:
        """Time until the answer on an idle system, encoders running in parallel, in milliseconds."""
        if self.is_path(modality_set):
            return self.paths[modality_set].ms(items)
        return max(self.encoders[m].ms(items) for m in modality_set) + self.fusion[modality_set].ms(items)

    def mixed_cost_ms(self, counts: Mapping[ModalitySet, int]) -> float:
        """The same for items of several sets: those that have a modality in common share its calls, but for paths.

        Args:
            counts: items per modality set, each at least one.
        """
        rows: dict[str, int] = {}
        cost = 0.0
        for modality_set, items in counts.items():
            if self.is_path(modality_set):
                cost += self.paths[modality_set].ms(items)
                continue
            cost += self.fusion[modality_set].ms(items)
            for modality in modality_set:
                rows[modality] = rows.get(modality, 0) + items
        return cost + sum(self.encoders[modality].ms(items) for modality, items in rows.items())

    def saved(self, counts: Mapping[ModalitySet, int], sent: ModalitySet) -> float:
        """The share of the compute of everything that was sent that a mix saves, 0..1; 0 while that is not measured."""
        if not self.is_measured(sent):
            return 0.0
        everything = self.cost_ms(sent, sum(counts.values()))
        return max(1 - self.mixed_cost_ms(counts) / everything, 0.0) if everything else 0.0

    def best(self, candidates: Iterable[ModalitySet]) -> ModalitySet | None:
        """The most accurate of the candidates."""
        return max(candidates, key=lambda s: self.accuracy[s], default=None)
