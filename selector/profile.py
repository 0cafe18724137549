"""What is known of a model: measured accuracy per modality set, measured latency per encoder and fusion."""

import bisect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mosel.modality import ModalitySet


@dataclass(frozen=True)
class LatencyCurve:
    """Measured time of one call by batch size.

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
        """The largest batch that was measured; larger work is cut into calls of this size."""
        return self.points[-1][0]

    def ms(self, items: int) -> float:
        """Milliseconds for so many items: whole calls of the largest batch, and the rest interpolated."""
        calls, rest = divmod(items, self.max_batch)
        return calls * self.points[-1][1] + (self._interpolated(rest) if rest else 0.0)

    def _interpolated(self, items: int) -> float:
        at = bisect.bisect_left(self.points, (items, 0.0))
        size, ms = self.points[at]
        if at == 0 or size == items:
            return ms
        size_before, ms_before = self.points[at - 1]
        return ms_before + (ms - ms_before) * (items - size_before) / (size - size_before)


@dataclass
class ModelProfile:
    """One model's profile. Latencies arrive as services are measured.

    Attributes:
        accuracy: expected accuracy per modality set, 0..1.
        samples: validation items behind the accuracies.
        default_min_accuracy: the floor when a caller gives none; None: the accuracy of what was sent.
        encoders: latency curve per modality.
        fusion: latency curve per modality set.
    """

    accuracy: Mapping[ModalitySet, float]
    samples: int
    default_min_accuracy: float | None = None
    encoders: dict[str, LatencyCurve] = field(default_factory=dict)
    fusion: dict[ModalitySet, LatencyCurve] = field(default_factory=dict)

    def is_measured(self, modality_set: ModalitySet) -> bool:
        """Whether every latency of the set is known."""
        return modality_set in self.fusion and all(m in self.encoders for m in modality_set)

    def cost_ms(self, modality_set: ModalitySet, items: int) -> float:
        """Compute time that a job of this many items costs in all services together, in milliseconds."""
        return sum(self.encoders[m].ms(items) for m in modality_set) + self.fusion[modality_set].ms(items)

    def idle_latency_ms(self, modality_set: ModalitySet, items: int) -> float:
        """Time until the answer on an idle system, encoders running in parallel, in milliseconds."""
        return max(self.encoders[m].ms(items) for m in modality_set) + self.fusion[modality_set].ms(items)

    def best(self, candidates: Iterable[ModalitySet]) -> ModalitySet | None:
        """The most accurate of the candidates."""
        return max(candidates, key=lambda s: self.accuracy[s], default=None)
