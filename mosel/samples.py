"""Labelled samples of a model: what its `samples` module hands to the demo, to training and to profiling."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mosel.errors import DatasetError


@dataclass(frozen=True)
class Samples:
    """N labelled items.

    Args:
        payloads: one array per modality, [N, *shape], in the dtype that model.toml states.
        labels: int64 [N], the index of the right class.

    Raises:
        DatasetError: there is no modality, or the arrays differ in N.
    """

    payloads: dict[str, NDArray[Any]]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        if not self.payloads:
            raise DatasetError("samples: payloads is empty, expected one array per modality")
        if self.labels.ndim != 1 or self.labels.dtype != np.int64:
            raise DatasetError(f"samples: labels is {self.labels.dtype} {self.labels.shape}, expected int64 [N]")
        for modality, payload in self.payloads.items():
            if payload.ndim == 0 or len(payload) != len(self):
                raise DatasetError(f"samples: {modality} has shape {payload.shape}, expected {len(self)} rows")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: slice | NDArray[np.int64]) -> "Samples":
        """The samples of some rows, in that order."""
        return Samples({modality: payload[rows] for modality, payload in self.payloads.items()}, self.labels[rows])


def load_arrays(file: Path) -> dict[str, NDArray[Any]]:
    """All arrays of an `.npz` file; never objects.

    Raises:
        DatasetError: the file is missing or damaged.
    """
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, AttributeError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DatasetError(f"{file}: not a readable .npz file: {error}") from None
