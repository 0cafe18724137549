"""Items exchangeable with those that certified: one random half of the groups certifies, the other is measured."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from bench.items import Items, mixed_items
from mosel.data.datasets import find
from mosel.data.samples import Samples
from mosel.errors import DatasetError
from mosel.packages.calibration import save_calibration
from mosel.packages.model_package import ModelPackage, load_package

# More groupings would leave too few rows whose groups are all of one half: of C, a share of 2 ** -C.
_CROSSED = 2


def halves(groups: NDArray[np.int32], random: np.random.Generator) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Two sets of rows of which no group of the first groupings is in both; rows of mixed groups are in neither."""
    one = np.ones(len(groups), np.bool_)
    other = one.copy()
    for column in groups.T[:_CROSSED]:
        every = random.permutation(np.unique(column))
        first = np.isin(column, every[: len(every) // 2])
        one, other = one & first, other & ~first
    return one, other


@contextmanager
def half_calibrated(package: ModelPackage, data: Path | None, seed: int) -> Iterator[tuple[ModelPackage, Items]]:
    """A copy of a package of whose certifying rows one half is left, and the items of the other half.

    Raises:
        DatasetError: the package has no calibration rows, or its items cannot be had.
    """
    calibration = package.calibration
    if calibration is None or package.samples is None:
        raise DatasetError(f"model '{package.name}' has no calibration rows, or no module that loads their items")
    samples: Samples = package.load_module(package.samples).load(find(package, data).folder, "calibration")
    if not np.array_equal(samples.labels, calibration.labels):
        raise DatasetError(f"model '{package.name}': calibration.npz is not of its calibration split; calibrate again")
    one, other = halves(calibration.groups, np.random.default_rng(seed))
    measured = np.flatnonzero(other & calibration.certify)
    kept = np.flatnonzero(~calibration.certify | one)
    rows = ("answers", "confidence", "labels", "groups", "certify")
    with TemporaryDirectory(prefix="mosel-halves-") as scratch:
        folder = copytree(package.folder, Path(scratch) / package.name)
        save_calibration(
            folder / "calibration.npz",
            replace(calibration, **{name: getattr(calibration, name)[kept] for name in rows}),
        )
        items = mixed_items(samples.take(measured), f"{len(measured)} items exchangeable with those that certified")
        yield load_package(folder), items
