"""Train `digits`: one set of weights that serves all 7 modality sets. About 10 minutes on two cores."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mosel.compute.training import save_weights, score, write_accuracy, write_report
from mosel.data.samples import Samples
from mosel.modality import subsets

from .networks import CLASSES, AudioEncoder, Fusion, ImageEncoder, PenEncoder
from .samples import Floats, Recordings, load, mix, read_recordings
from .splits import AUDIO_SAMPLES

EPOCHS = 11
BATCH_ITEMS = 128
LEARNING_RATE = 3e-3
SPEED = (0.88, 1.12)  # a take is played faster or slower, which also moves its pitch
SNR_DB = (-10.0, 2.0)  # the samples have -10..0; a few easier ones help at the start

Batch = tuple[dict[str, Tensor], Tensor]


class Digits(nn.Module):
    """The encoders and the fusion together."""

    def __init__(self) -> None:
        super().__init__()
        self.audio, self.image, self.pen = AudioEncoder(), ImageEncoder(), PenEncoder()
        self.fusion = Fusion()
        self.encoders: dict[str, nn.Module] = {"audio": self.audio, "image": self.image, "pen": self.pen}

    def loss(self, payloads: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Mean cross-entropy over all modality sets; each payload is encoded once."""
        embeddings = {
            "audio": self.audio.embed(mask_spectrogram(self.audio.logmel(payloads["audio"]))),
            "image": self.image(payloads["image"]),
            "pen": self.pen(payloads["pen"]),
        }
        losses = [
            cross_entropy(self.fusion.logits({name: embeddings[name] for name in sorted(subset)}), labels)
            for subset in subsets(embeddings)
        ]
        return torch.stack(losses).mean()


def mask_spectrogram(logmel: Tensor) -> Tensor:
    """Hide up to 12 moments and up to 6 mel bands of each item (SpecAugment, Park et al. 2019, arXiv 1904.08779)."""
    items, times, mels = logmel.shape
    hidden = _stripe(items, times, 12).unsqueeze(2) | _stripe(items, mels, 6).unsqueeze(1)
    return logmel.masked_fill(hidden, 0.0)


def _stripe(items: int, length: int, longest: int) -> Tensor:
    """Bool [items, length]: one run of up to `longest` places per item."""
    width = torch.randint(0, longest + 1, (items, 1))
    start = (torch.rand(items, 1) * (length - width)).long()
    places = torch.arange(length)
    return (places >= start) & (places < start + width)


class Mixer:
    """Draws new rows from the recordings of the train split: another partner, noise, loudness and speed every time.

    Args:
        recordings: all recordings; only those that the train split uses are drawn.
        seed: of the random draws.
    """

    def __init__(self, recordings: Recordings, seed: int) -> None:
        self.recordings = recordings
        self.random = np.random.default_rng(seed)
        rows, _ = recordings.rows("train")
        self.labels = rows["label"].astype(np.int64)
        self.noises = np.unique(rows["noise"])
        self.by_label = {
            part: [np.unique(rows[part][self.labels == label]) for label in range(CLASSES)]
            for part in ("image", "pen", "speech")
        }

    def epoch(self) -> Iterator[Batch]:
        """As many rows as the train split has, in batches; an incomplete last batch is left out."""
        order = self.random.permutation(self.labels)
        for start in range(0, len(order) - BATCH_ITEMS + 1, BATCH_ITEMS):
            yield self._batch(order[start : start + BATCH_ITEMS])

    def _batch(self, labels: NDArray[np.int64]) -> Batch:
        payloads = {
            "image": self.recordings.degraded_images(self._draw("image", labels)),
            "pen": self.recordings.pen_starts(self._draw("pen", labels)),
            "audio": np.stack([self._audio(row) for row in self._draw("speech", labels)]),
        }
        return {name: torch.from_numpy(payload) for name, payload in payloads.items()}, torch.from_numpy(labels)

    def _draw(self, part: str, labels: NDArray[np.int64]) -> NDArray[Any]:
        return np.array([self.random.choice(self.by_label[part][label]) for label in labels])

    def _audio(self, row: int) -> Floats:
        random = self.random
        take = self.recordings.take(row)
        positions = np.arange(0, len(take) - 1, random.uniform(*SPEED))[:AUDIO_SAMPLES]
        take = np.interp(positions, np.arange(len(take)), take).astype(np.float32)
        noise = self.recordings.noise_second(int(random.choice(self.noises)), int(random.integers(AUDIO_SAMPLES + 1)))
        start = int(random.integers(AUDIO_SAMPLES - len(take) + 1))
        return mix(take, noise, start, random.uniform(*SNR_DB))


def fit(model: Digits, mixer: Mixer, validation: Samples, epochs: int) -> None:
    """Train a model in place; shows progress, and the accuracies on validation after each epoch."""
    steps = epochs * (len(mixer.labels) // BATCH_ITEMS)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.15)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=steps)
        for epoch in range(1, epochs + 1):
            model.train()
            for payloads, labels in mixer.epoch():
                loss = model.loss(payloads, labels)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                progress.update(task, advance=1, description=f"epoch {epoch}/{epochs}, loss {loss.item():.3f}")
            accuracy = score(model.encoders, model.fusion, validation).accuracy
            sets = ", ".join(f"{name} {value:.3f}" for name, value in accuracy.items())
            progress.console.print(f"epoch {epoch}: {sets}")


def main(data: Path, out: Path, seed: int, epochs: int = EPOCHS) -> None:
    """Train, measure, and write weights, accuracy.json, calibration.npz, report.json and report.md.

    Args:
        data: the folder with the npz files that `samples.load` reads.
        out: the folder to write to; made if it is not there.
        seed: of the weights and of everything that is drawn.
        epochs: passes over as many rows as the train split has.

    Raises:
        DatasetError: a data file is missing or unreadable.
    """
    began = time.monotonic()
    torch.manual_seed(seed)
    # A third faster on a CPU; torch's own types do not know this argument.
    model: Digits = Digits().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fit(model, Mixer(read_recordings(data), seed), load(data, "validation"), epochs)
    save_weights(out, model.encoders, model.fusion)
    calibration, test = (score(model.encoders, model.fusion, load(data, split)) for split in ("calibration", "test"))
    accuracy = write_accuracy(out, calibration=calibration, test=test, package=Path(__file__).parent)
    write_report(out, accuracy, seed=seed, seconds=time.monotonic() - began)
