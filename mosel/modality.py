"""Modality sets: non-empty subsets of a model's modalities, written sorted and joined with `+`."""

import itertools
from collections.abc import Iterable

ModalitySet = frozenset[str]


def format_set(modalities: Iterable[str]) -> str:
    """Writes a modality set, `audio+image`."""
    return "+".join(sorted(modalities))


def parse_set(text: str) -> ModalitySet:
    """Reads what `format_set` wrote."""
    return frozenset(text.split("+"))


def subsets(modalities: Iterable[str]) -> list[ModalitySet]:
    """All non-empty subsets, small ones first."""
    names = sorted(modalities)
    return [frozenset(c) for size in range(1, len(names) + 1) for c in itertools.combinations(names, size)]
