"""Labelled items of `digits`: row numbers in pairs.npz become pen starts, degraded images and noisy speech.

The image and audio parts follow the AV-MNIST recipe (Vielzeuf et al., "CentralNet", 2018, arXiv 1808.07275).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mosel.data.samples import Samples, load_arrays

from .splits import AUDIO_SAMPLES, Roles, Table, noise_sources, rows_of

AUDIO_RMS = 0.1

Floats = NDArray[np.float32]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Recordings:
    """The recordings that rows are made of, in memory; each argument holds the arrays of one npz file."""

    images: Arrays
    speech: Arrays
    pen: Arrays
    noise: Arrays
    pairs: Arrays

    def rows(self, split: str) -> tuple[Table, Roles]:
        """Which recordings go into each row of a split, and, of calibration, which rows certify."""
        return rows_of(split, self.pairs, speech=self.speech, pen=self.pen, noise=self.noise)

    def payloads(self, rows: Table) -> dict[str, Floats]:
        """Pen starts, degraded images and noisy speech of rows."""
        return {
            "pen": self.pen_starts(rows["pen"]),
            "image": self.degraded_images(rows["image"]),
            "audio": self._noisy_speech(rows),
        }

    def degraded_images(self, rows: NDArray[Any]) -> Floats:
        """Images as float32 [N, 28, 28], of which 4 principal components (28 % of the variance) are kept."""
        mean, components = self.images["pca_mean"], self.images["pca_components"]
        pixels = _over(self.images["image"][rows].reshape(-1, 784), 255)
        kept: Floats = ((pixels - mean) @ components.T) @ components + mean
        return kept.reshape(-1, 28, 28)

    def pen_starts(self, rows: NDArray[Any]) -> Floats:
        """The first 2 of 8 (x, y) points of pen paths, float32 [N, 2, 2] in -1..1."""
        return _over(self.pen["points"][rows, :2], 50) - np.float32(1)

    def take(self, row: int) -> Floats:
        """The first second, at most, of one spoken digit, float32 in -1..1."""
        start, end = self.speech["offset"][row : row + 2]
        return _over(self.speech["pcm"][start : min(end, start + AUDIO_SAMPLES)], 32768)

    def noise_second(self, row: int, start: int) -> Floats:
        """One second of a noise clip, float32 [8000] in -1..1, from the sample `start` on."""
        return _over(self.noise["pcm"][row, start : start + AUDIO_SAMPLES], 32768)

    def _noisy_speech(self, rows: Table) -> Floats:
        columns = [rows[part].tolist() for part in ("speech", "noise", "noise_start", "speech_start", "snr_db")]
        audio = np.empty((len(columns[0]), AUDIO_SAMPLES), np.float32)
        for out, speech, noise, noise_start, start, snr_db in zip(audio, *columns, strict=True):
            out[:] = mix(self.take(speech), self.noise_second(noise, noise_start), start, snr_db)
        return audio


def read_recordings(data: Path) -> Recordings:
    """Read images.npz, speech.npz, pen.npz, noise.npz and pairs.npz from a folder.

    Raises:
        DatasetError: a file is missing or is not a readable npz archive.
    """
    return Recordings(*(load_arrays(data / f"{name}.npz") for name in ("images", "speech", "pen", "noise", "pairs")))


def mix(take: Floats, noise: Floats, start: int, snr_db: float) -> Floats:
    """Put a take into one second of noise.

    Args:
        take: float32, at most `8000 - start` samples.
        noise: float32 [8000].
        start: the sample at which the take begins.
        snr_db: root mean square of the take against that of the noise, in dB.

    Returns:
        float32 [8000] with a root mean square of 0.1.
    """
    mixed = noise * np.float32(_rms(take) / _rms(noise) * 10 ** (-snr_db / 20))
    mixed[start : start + len(take)] += take
    mixed *= np.float32(AUDIO_RMS / _rms(mixed))
    return mixed


def load(data: Path, split: str) -> Samples:
    """The rows of one split.

    Args:
        data: the folder with images.npz, speech.npz, pen.npz, noise.npz and pairs.npz.
        split: one of `splits.SPLITS`.

    Returns:
        Payloads pen float32 [N, 2, 2], image float32 [N, 28, 28] and audio float32 [N, 8000]; labels 0..9; groups by
        the recordings that several rows share.

    Raises:
        DatasetError: a file is missing or unreadable, or the split is unknown.
    """
    recordings = read_recordings(data)
    rows, certify = recordings.rows(split)
    groups = {"noise clip": noise_sources()[rows["noise"]], "spoken take": rows["speech"], "pen path": rows["pen"]}
    return Samples(
        payloads=recordings.payloads(rows),
        labels=rows["label"].astype(np.int64),
        groups={name: group.astype(np.int64) for name, group in groups.items()},
        certify=certify,
    )


def _over(integers: NDArray[Any], unit: float) -> Floats:
    scaled: Floats = np.divide(integers, unit, dtype=np.float32)
    return scaled


def _rms(signal: Floats) -> float:
    return max(float(np.sqrt(np.mean(np.square(signal)))), 1e-9)  # some noise clips have a silent second
