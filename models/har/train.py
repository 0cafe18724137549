"""Trains `har` for all its modality sets at once, and cross-fits its calibration rows; about ten minutes on one core.

Few people wore the phone, and people differ more than windows do. So everybody who is not a test person is both trained
on and calibrated on: the people are dealt into folds, and each fold is answered by networks that were trained, in the
same way, on the others. The weights that are written have seen all of them, and should be no worse than those.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from mosel.compute.training import Scores, save_weights, score, write_accuracy, write_report
from mosel.data.samples import Samples
from mosel.modality import subsets

from . import samples
from .networks import MODALITIES, AccelerationEncoder, Fusion, MotionEncoder, RotationEncoder

FOLDS = 3


@dataclass(frozen=True)
class Settings:
    """What can be tuned. `turn_rad`: how far, in radians, a phone is turned at random (see `turn`)."""

    epochs: int
    batch: int = 64
    peak_rate: float = 3e-3
    weight_decay: float = 2e-2
    label_smoothing: float = 0.05
    turn_rad: float = 0.2


def main(data: Path, out: Path, seed: int, epochs: int = 20) -> None:
    """Train, measure, and write the weights, their accuracy and a report to `out`.

    Args:
        data: the folder that holds `hapt.npz`.
        out: a folder; made if it is not there.
        seed: of every random choice. The same seed on the same machine and torch gives the same weights.
        epochs: how often every window is seen.

    Raises:
        DatasetError: the recordings are not there or damaged.
    """
    settings, started = Settings(epochs), time.monotonic()
    train = samples.load(data, "train")
    encoders, fusion = trained(train, settings, seed, "all people")
    save_weights(out, encoders, fusion)
    accuracy = write_accuracy(
        out,
        calibration=cross_fitted(train, settings, seed),
        test=score(encoders, fusion, samples.load(data, "test")),
        source="everybody who is not a test person, answered by networks that were trained on others",
        package=Path(__file__).parent,
    )
    write_report(out, accuracy, seed=seed, seconds=time.monotonic() - started)


def cross_fitted(train: Samples, settings: Settings, seed: int) -> Scores:
    """What networks answer about people whom they have not seen, fold by fold."""
    sets, person = subsets(MODALITIES), train.groups["person"]
    answers = np.empty((len(train), len(sets)), np.int32)
    confidence = np.empty((len(train), len(sets)), np.float32)
    dealt = np.random.default_rng(seed).permutation(np.unique(person))
    for number, fold in enumerate(np.array_split(dealt, FOLDS), 1):
        held_out = np.isin(person, fold)
        others = train.take(np.flatnonzero(~held_out))
        part = score(
            *trained(others, settings, seed, f"fold {number} of {FOLDS}"), train.take(np.flatnonzero(held_out))
        )
        answers[held_out], confidence[held_out] = part.answers, part.confidence
    return Scores(train, sets, answers, confidence)


def trained(train: Samples, settings: Settings, seed: int, what: str) -> tuple[dict[str, nn.Module], Fusion]:
    """Encoders and fusion, fitted to samples; `what` says for the progress shown which."""
    torch.manual_seed(seed)
    encoders = nn.ModuleDict({"acc": AccelerationEncoder(), "gyro": RotationEncoder(), "motion": MotionEncoder()})
    fusion = Fusion()
    fit(encoders, fusion, train, settings, what)
    return dict(encoders.items()), fusion


def fit(encoders: nn.ModuleDict, fusion: Fusion, train: Samples, settings: Settings, what: str) -> None:
    """Fit the networks to every modality set at once."""
    payloads = {modality: torch.tensor(payload) for modality, payload in train.payloads.items()}
    labels = torch.tensor(train.labels)
    parameters = [*encoders.parameters(), *fusion.parameters()]
    optimizer = torch.optim.AdamW(parameters, settings.peak_rate, weight_decay=settings.weight_decay)
    steps = settings.epochs * -(-len(labels) // settings.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.peak_rate, total_steps=steps)
    encoders.train()
    fusion.train()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(f"{what}: epoch 1", total=steps)
        for epoch in range(settings.epochs):
            total = 0.0
            for rows in torch.randperm(len(labels)).split(settings.batch):  # type: ignore[no-untyped-call]
                inputs = turn({modality: payload[rows] for modality, payload in payloads.items()}, settings.turn_rad)
                loss = loss_over_sets(encoders, fusion, inputs, labels[rows], settings.label_smoothing)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                total += loss.item() * len(rows)
                progress.advance(task)
            progress.update(task, description=f"{what}: epoch {epoch + 1}, loss {total / len(labels):.3f}")


def loss_over_sets(
    encoders: nn.ModuleDict, fusion: Fusion, inputs: dict[str, Tensor], labels: Tensor, smoothing: float
) -> Tensor:
    """The mean over all modality sets of the cross entropy of a batch.

    Modality dropout without the dice: the encoders run once per item, and fusion, which costs next to nothing, sees
    every set that it will be asked for.
    """
    embeddings = {modality: encoder(inputs[modality]) for modality, encoder in encoders.items()}
    losses = [
        F.cross_entropy(fusion.logits({name: embeddings[name] for name in subset}), labels, label_smoothing=smoothing)
        for subset in subsets(embeddings)
    ]
    return torch.stack(losses).mean()


def turn(inputs: dict[str, Tensor], turn_rad: float) -> dict[str, Tensor]:
    """Turn each window's phone by a small random rotation, and start the window elsewhere in its cycle.

    People wear the phone a little differently; without this the networks learn how the training people wore it.
    `motion` is left alone, for the magnitude does not change.
    """
    count = len(inputs["acc"])
    x, y, z = (torch.randn(3, count) * turn_rad).unbind()
    zero = torch.zeros(count)
    generator = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=1).reshape(count, 3, 3)
    rotation = torch.linalg.matrix_exp(generator)
    shift = int(torch.randint(inputs["acc"].shape[1], (1,)))
    turned = {modality: (inputs[modality] @ rotation).roll(shift, dims=1) for modality in ("acc", "gyro")}
    return {**inputs, **turned}
