"""What each modality set of a model does worst on, by the model's calibration rows. Knows no gRPC."""

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mosel.errors import PackageError
from mosel.modality import format_set
from mosel.packages.calibration import UNLABELLED, Calibration
from mosel.packages.model_package import ModelPackage
from mosel.v1 import gateway_pb2

# Of fewer rows nothing can be said.
_LEAST_ROWS = 20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weakest:
    """The label, and the group of rows, on which a set is right least often; None where each has too few rows."""

    label: gateway_pb2.Weakness | None
    group: gateway_pb2.Weakness | None


class Weaknesses:
    """Finds the weaknesses of packages, once of each."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[ModelPackage, Mapping[str, Weakest]]] = {}

    async def of(self, package: ModelPackage) -> Mapping[str, Weakest]:
        """Those of a package by modality set; none without labelled calibration rows."""
        known = self._found.get(package.name)
        if known is None or known[0] is not package:
            # To read the rows blocks, and takes a moment.
            known = self._found[package.name] = package, await asyncio.to_thread(_of_package, package)
        return known[1]


def find_weaknesses(calibration: Calibration, labels: Sequence[str]) -> dict[str, Weakest]:
    """What each set does worst on.

    Args:
        calibration: the rows; those without a label say nothing.
        labels: names of the model's labels; empty if it has none.

    Returns:
        By modality set, as it is written.
    """
    rows = calibration.labels != UNLABELLED
    truth = calibration.labels[rows]
    right = calibration.answers[rows] == truth[:, np.newaxis]
    by_label = [(f"label {labels[n] if labels else n}", truth == n) for n in np.unique(truth)]
    by_group = list(_groups(calibration.group_names, calibration.groups[rows]))
    return {
        format_set(known): Weakest(_worst(by_label, right[:, index]), _worst(by_group, right[:, index]))
        for index, known in enumerate(calibration.sets)
    }


def _groups(names: Sequence[str], groups: NDArray[np.int32]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Each group of each grouping: its name, and which rows it has."""
    for name, column in zip(names, groups.T, strict=True):
        for number in np.unique(column):
            yield f"{name} {number}", column == number


def _worst(parts: Sequence[tuple[str, NDArray[np.bool_]]], right: NDArray[np.bool_]) -> gateway_pb2.Weakness | None:
    """The part with the lowest accuracy among those that have enough rows."""
    found = [
        gateway_pb2.Weakness(name=name, accuracy=right[rows].mean(), samples=int(rows.sum()))
        for name, rows in parts
        if rows.sum() >= _LEAST_ROWS
    ]
    return min(found, key=lambda part: part.accuracy, default=None)


def _of_package(package: ModelPackage) -> Mapping[str, Weakest]:
    try:
        calibration = package.calibration
    except PackageError as error:
        # The files have changed since; what is served was read before.
        log.warning("no calibration rows", extra={"model": package.id, "reason": str(error)})
        return {}
    return {} if calibration is None else find_weaknesses(calibration, package.output.labels)
