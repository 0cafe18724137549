"""Samples of a model: labelled ones, as its `samples` module hands them out, and made-up ones."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mosel.errors import DatasetError
from mosel.tensors import DTYPES


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


def example_rows(dtype: str, shape: tuple[int, ...]) -> NDArray[np.generic]:
    """Ordinary-looking numbers, the same ones each time: 0..1, bytes 0..255, other integers 0 and 1."""
    random, numpy_dtype = np.random.default_rng(0), DTYPES[dtype]
    if dtype == "BF16":  # the upper half of a float32's bits
        return (random.random(shape, np.float32).view(np.uint32) >> 16).astype(numpy_dtype)
    if np.issubdtype(numpy_dtype, np.floating):
        return random.uniform(0, 1, shape).astype(numpy_dtype)
    # Wider integers may be looked up in a table, of which only the first rows are sure to be there.
    return random.integers(0, 256 if dtype == "UINT8" else 2, shape).astype(numpy_dtype)
