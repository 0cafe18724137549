"""Which recordings make the rows of each split: training, validation, calibration and test.

`pairs.npz` has three tables, `train`, `val` and `test`. Training and validation are the first two. `test` keeps the
rows of its table whose take, noise clip and pen path are all in its share of each speaker and digit, and of each kind
of noise. The others become calibration rows: each keeps its image, loudness and moment of noise, and gets a take, a
clip and a pen path anew, from those that the test split does not have; the takes and clips of validation, which no
weight was fitted to either, are among them. Rows that choose rules and rows that certify them have no recording in
common. The noise clip makes rows alike more than anything else, so as many as can be had certify.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mosel.data.samples import load_arrays
from mosel.errors import NoSuchSplit

SPLITS = ("train", "validation", "calibration", "test")
AUDIO_SAMPLES = 8_000  # one second at 8 kHz

_TABLES = {"train": "train", "validation": "val", "test": "test"}
_COLUMNS = ("image", "speech", "pen", "noise", "noise_start", "speech_start", "snr_db", "label")
# With these, 30 noise recordings stand behind the rows that certify; with fewer groups, bounds are approximate.
_TEST_SHARE, _DESIGN_SHARE = 0.6, 1 / 6
_CALIBRATION_ROWS = 6_000
_SEED = 20_261_128

Column = NDArray[Any]
Table = Mapping[str, Column]
Roles = NDArray[np.bool_] | None


def noise_sources() -> NDArray[np.int64]:
    """The Freesound recording behind each noise clip: `5-198411-C` and `5-198411-D` were cut from the same."""
    clips = load_arrays(Path(__file__).with_name("rows.npz"))["noise_clip"].tolist()
    return np.unique([clip.rpartition("-")[0] for clip in clips], return_inverse=True)[1].astype(np.int64)


def rows_of(split: str, pairs: Table, *, speech: Table, pen: Table, noise: Table) -> tuple[Table, Roles]:
    """The rows of a split by column, and, of calibration, which of them certify.

    Args:
        split: one of `SPLITS`.
        pairs: the arrays of pairs.npz.
        speech: those of speech.npz.
        pen: those of pen.npz.
        noise: those of noise.npz.

    Raises:
        NoSuchSplit: there is no such split.
    """
    if split not in SPLITS:
        raise NoSuchSplit(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    if split in ("train", "validation"):
        return _table(pairs, split), None
    random = np.random.default_rng(_SEED)
    test, validation = _table(pairs, "test"), _table(pairs, "validation")
    kinds = {"speech": 10 * speech["speaker"] + speech["digit"], "pen": pen["label"], "noise": noise["cls"]}
    pools = {part: _pools(part, test, validation, kind, random) for part, kind in kinds.items()}
    kept = np.all([np.isin(test[part], of_test) for part, (of_test, _, _) in pools.items()], axis=0)
    if split == "test":
        return {name: column[kept] for name, column in test.items()}, None
    left = random.permutation(np.flatnonzero(~kept))[:_CALIBRATION_ROWS]
    rows = {name: column[left] for name, column in test.items()}
    certify = np.arange(len(left)) >= _DESIGN_SHARE * len(left)
    digits = {"speech": speech["digit"], "pen": pen["label"], "noise": None}
    for part, (_, design, certifying) in pools.items():
        for pool, chosen in ((design, ~certify), (certifying, certify)):
            rows[part][chosen] = _partners(pool, digits[part], rows["label"][chosen], random)
    take_samples = np.minimum(np.diff(speech["offset"])[rows["speech"]], AUDIO_SAMPLES)
    rows["speech_start"] = random.integers(AUDIO_SAMPLES - take_samples + 1)
    return rows, certify


def _table(pairs: Table, split: str) -> dict[str, Column]:
    return {name: pairs[f"{_TABLES[split]}_{name}"] for name in _COLUMNS}


def _pools(
    part: str, test: Table, validation: Table, kind: Column, random: np.random.Generator
) -> tuple[Column, Column, Column]:
    """The recordings of the test rows, of the design rows, and of the rows that certify."""
    recordings = np.unique(test[part])
    # The same share of every kind, so that chance makes the test rows no easier or harder than the others.
    of_kinds = [recordings[kind[recordings] == one] for one in np.unique(kind[recordings])]
    of_test = np.concatenate([_drawn(part, of_kind, _TEST_SHARE, random) for of_kind in of_kinds])
    left = np.setdiff1d(recordings, of_test)
    if part != "pen":  # training has seen other pen paths of validation's writers, but nobody of the test's
        left = np.concatenate([left, np.unique(validation[part])])
    design = _drawn(part, left, _DESIGN_SHARE, random)
    return of_test, design, np.setdiff1d(left, design)


def _drawn(part: str, recordings: Column, share: float, random: np.random.Generator) -> Column:
    """A share of recordings; noise clips of the same source stay together."""
    sources = noise_sources()[recordings] if part == "noise" else recordings
    every = random.permutation(np.unique(sources))
    return recordings[np.isin(sources, every[: round(share * len(every))])]


def _partners(pool: Column, digit: Column | None, labels: Column, random: np.random.Generator) -> Column:
    """A recording for each row, of the row's digit where recordings have one."""
    if digit is None:
        return random.choice(pool, len(labels))
    partners = np.empty(len(labels), pool.dtype)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        partners[rows] = random.choice(pool[digit[pool] == label], len(rows))
    return partners
