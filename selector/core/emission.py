"""Results of a job that are sent as they finish: the floor holds over what was sent, at any moment."""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

Group = TypeVar("Group")

# Sums of floats: a floor equal to a strategy's accuracy is met by it.
_TOLERANCE = 1e-9


@dataclass
class Emission(Generic[Group]):
    """Holds back results of modality sets below the floor until the mean over everything sent meets it.

    Args:
        floor: what items must count for on average, 0..1.
    """

    floor: float
    # What was sent has this much accuracy above the floor, summed over its items.
    _credit: float = 0.0
    _held: list[tuple[float, int, Group]] = field(default_factory=list)

    def add(self, accuracy: float, items: int, group: Group) -> list[Group]:
        """These items are done; returns the groups that may be sent now, the most accurate first."""
        self._held.append((accuracy, items, group))
        self._held.sort(key=lambda held: -held[0])
        sent = []
        while self._held and self._credit + (self._held[0][0] - self.floor) * self._held[0][1] >= -_TOLERANCE:
            accuracy, items, group = self._held.pop(0)
            self._credit += (accuracy - self.floor) * items
            sent.append(group)
        return sent

    def rest(self) -> list[Group]:
        """What is left when the whole job is done: its strategy meets the floor."""
        held, self._held = self._held, []
        return [group for _, _, group in held]
