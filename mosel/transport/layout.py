"""Where the slots of an arena are.

An arena is a header, a control page with a generation and a size per slot, and the slots, sorted by size class.
Producer and consumer compute the same offsets from the number of slots per class.
"""

from dataclasses import dataclass
from functools import cached_property

KIB, MIB = 1024, 1024 * 1024
SLOT_SIZES = (64 * KIB, 256 * KIB, 1 * MIB, 4 * MIB, 16 * MIB, 64 * MIB)
HEADER_BYTES = 256
ENTRY_BYTES = 16  # of the control page, per slot: generation and size
PAGE_BYTES = 4096
MAX_SLOTS = 1 << 20


@dataclass(frozen=True)
class Layout:
    """The shape of an arena.

    Attributes:
        counts: slots per size class, in the order of `SLOT_SIZES`.
    """

    counts: tuple[int, ...]

    @classmethod
    def for_budget(cls, nbytes: int) -> "Layout":
        """Splits a budget over the size classes.

        Every class up to a quarter of the budget gets one slot; what is left is shared equally, by bytes.
        """
        sizes = [size for size in SLOT_SIZES if size * 4 <= nbytes] or [SLOT_SIZES[0]]
        share = (nbytes - sum(sizes)) // len(sizes)
        counts = [1 + max(share, 0) // size if size in sizes else 0 for size in SLOT_SIZES]
        return cls(tuple(counts))

    @cached_property
    def slot_count(self) -> int:
        """Slots of all classes."""
        return sum(self.counts)

    @cached_property
    def data_start(self) -> int:
        """Offset of the first slot in bytes; the control page lies before it."""
        control = HEADER_BYTES + ENTRY_BYTES * self.slot_count
        return -(-control // PAGE_BYTES) * PAGE_BYTES

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of the whole arena."""
        return self.data_start + sum(count * size for count, size in zip(self.counts, SLOT_SIZES, strict=True))

    def slot_size(self, index: int) -> int:
        """Bytes that fit into a slot."""
        return SLOT_SIZES[self._class_of(index)[0]]

    def slot_offset(self, index: int) -> int:
        """Offset of a slot from the start of the arena, in bytes."""
        size_class, position = self._class_of(index)
        before = sum(self.counts[c] * SLOT_SIZES[c] for c in range(size_class))
        return self.data_start + before + position * SLOT_SIZES[size_class]

    def _class_of(self, index: int) -> tuple[int, int]:
        position = index
        for size_class, count in enumerate(self.counts):
            if 0 <= position < count:
                return size_class, position
            position -= count
        raise IndexError(f"slot {index} of {self.slot_count}")
