"""What jobs bring along: labelled items where a model has them, else random ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.accuracy import Scored
from mosel.client.answers import ModalityInfo
from mosel.data.datasets import find
from mosel.data.samples import Samples, example_rows
from mosel.errors import ConfigError, DatasetError
from mosel.packages.manifest import ModalitySpec
from mosel.packages.model_package import ModelPackage

_RANDOM_ITEMS = 64


@dataclass(frozen=True)
class Items:
    """Items that jobs are cut from, without copying.

    Attributes:
        payloads: arrays [N, ...] by modality.
        labels: int64 [N], or None if nobody knows the right answers.
        groups: int64 [N, C], the group of each item in every grouping; items of the same group are alike.
        source: where they come from, in words.
    """

    payloads: Mapping[str, NDArray[Any]]
    labels: NDArray[np.int64] | None
    groups: NDArray[np.int64]
    source: str

    def rows(self, size: int, seed: int) -> slice:
        """The items of a job."""
        start = int(np.random.default_rng(seed).integers(max(len(self.groups) - size, 0) + 1))
        return slice(start, start + size)

    def check_size(self, size: int) -> None:
        """Raises ConfigError if a job would have more items than there are."""
        if size > len(self.groups):
            raise ConfigError(f"a job of {size} items is asked for; there are {len(self.groups)} ({self.source})")

    def spread(self, size: int, jobs: int) -> list[slice]:
        """The items of at most so many jobs, each of other items if there are enough; errors as of `check_size`."""
        self.check_size(size)
        last = len(self.groups) - size
        return [slice(start, start + size) for start in np.unique(np.linspace(0, last, jobs).astype(int)).tolist()]

    def payloads_of(self, rows: slice) -> dict[str, NDArray[Any]]:
        """The arrays of a job's items."""
        return {modality: payload[rows] for modality, payload in self.payloads.items()}

    def scored(self, rows: slice, labels: Sequence[str], names: Sequence[str]) -> Scored:
        """Which of a job's items were predicted right; nothing if nobody knows."""
        if self.labels is None:
            return ()
        right = [names[label] == predicted for label, predicted in zip(self.labels[rows], labels, strict=True)]
        return tuple(zip(map(tuple, self.groups[rows].tolist()), right, strict=True))


def items_of(package: ModelPackage, data: Path | None = None, at_least: int = _RANDOM_ITEMS) -> Items:
    """The test split in random order if it is on this machine, else random items.

    Args:
        package: the model.
        data: folder that has the recordings; None: wherever they are found.
        at_least: so many random items.
    """
    try:
        if package.samples is None:
            raise DatasetError("the model has no labelled samples")
        found, module = find(package, data), package.load_module(package.samples)
        samples: Samples = module.load(found.folder, "test")
    except DatasetError as error:
        return random_items(package.modalities, str(error), at_least)
    return mixed_items(samples, f"{len(samples)} labelled test items")


def mixed_items(samples: Samples, source: str) -> Items:
    """Samples in random order, the same each time."""
    mixed = samples.take(np.random.default_rng(0).permutation(len(samples)))
    return Items(mixed.payloads, mixed.labels, grouped(mixed), f"{source}{_of_groups(mixed)}")


def grouped(samples: Samples) -> NDArray[np.int64]:
    """The groups of samples as columns, [N, C]."""
    columns = list(samples.groups.values())
    return np.stack(columns, 1) if columns else np.zeros((len(samples), 0), np.int64)


def _of_groups(samples: Samples) -> str:
    counts = [f"{len(np.unique(group))} by {name}" for name, group in samples.groups.items()]
    return f" of groups: {', '.join(counts)}" if counts else ""


def random_items(modalities: Mapping[str, ModalitySpec | ModalityInfo], why: str, count: int = _RANDOM_ITEMS) -> Items:
    """So many random items of a model's modalities; `why` says why no real ones."""
    count = max(count, _RANDOM_ITEMS)
    payloads = {name: example_rows(spec.dtype, (count, *spec.shape)) for name, spec in modalities.items()}
    return Items(payloads, None, np.zeros((count, 0), np.int64), f"random payloads ({why})")
