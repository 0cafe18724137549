"""Read a pickle without trusting it: the one place in this project that touches one.

The recordings of `har` are published as a pickle of pandas tables. A pickle is a programme, so nothing that it names is
ever looked up: each name on a short list becomes `Inert`, a bag that keeps what it is given and does nothing; every
other name is refused. `pandas` is not needed and no object of the file's choosing is made; arrays are read from their
raw bytes, as numbers only.
"""

import io
import pickle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mosel.errors import DatasetError

_INERT = {
    "__builtin__.object",
    "__builtin__.slice",
    "copy_reg._reconstructor",
    "numpy.core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
    "pandas.core.frame.DataFrame",
    "pandas.core.indexes.base.Index",
    "pandas.core.indexes.base._new_Index",
    "pandas.core.indexes.range.RangeIndex",
    "pandas.core.internals.managers.BlockManager",
}
_NUMBERS = {"f8": np.dtype("<f8"), "i8": np.dtype("<i8")}


class Inert:
    """Stands for whatever the pickle wanted to make; keeps the arguments and the state, and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in _INERT:
            return Inert
        if (module, name) == ("_codecs", "encode"):
            return _bytes  # how protocol 2 writes bytes
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not on the list")


def load(content: bytes) -> Any:
    """The pickle's plain values, with `Inert` in the place of every object.

    Raises:
        DatasetError: it is damaged, or names anything that is not on the list.
    """
    try:
        return _InertUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises nearly anything
        raise DatasetError(f"the pickle is refused: {error}") from None


def to_array(value: Any) -> NDArray[Any]:
    """The numbers of an inert numpy array.

    Raises:
        DatasetError: it is no array of 64-bit floats or integers.
    """
    try:
        _, shape, dtype, fortran, content = value.state
        numbers = np.frombuffer(content, _NUMBERS[dtype.arguments[0]])
        return numbers.reshape(shape, order="F" if fortran else "C")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"the pickle holds something else than an array of numbers: {error}") from None


def _bytes(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes written as {encoding!r}; expected latin1")
    return text.encode("latin1")
