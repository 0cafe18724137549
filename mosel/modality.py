"""Modality sets: non-empty subsets of a model's modalities, written sorted and joined with `+`.

A *lane* is one service that computes: an encoder of a modality, `photo`, its replicas `photo/2`, `photo/3`, or fusion.
"""

import itertools
from collections.abc import Iterable

ModalitySet = frozenset[str]

# The lane of fusion; those of encoders are named after their modalities.
FUSION = "fusion"
# What is learned of calls that encode and fuse goes by this; no modality is called so, for `+` separates them.
PATH = "encoders+fusion"


def format_set(modalities: Iterable[str]) -> str:
    """Writes a modality set, `audio+image`."""
    return "+".join(sorted(modalities))


def parse_set(text: str) -> ModalitySet:
    """Reads what `format_set` wrote."""
    return frozenset(text.split("+"))


def lane_of(modality: str, replica: int) -> str:
    """The lane of a modality's encoder; they are counted from 1."""
    return modality if replica == 1 else f"{modality}/{replica}"


def modality_of(lane: str) -> str:
    """The modality that a lane encodes; `fusion` of fusion."""
    return lane.partition("/")[0]


def subsets(modalities: Iterable[str]) -> list[ModalitySet]:
    """All non-empty subsets, small ones first."""
    names = sorted(modalities)
    return [frozenset(c) for size in range(1, len(names) + 1) for c in itertools.combinations(names, size)]
