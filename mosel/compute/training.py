"""Save what was trained: weights, and what they make of samples, as accuracies and calibration rows."""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from mosel.compute.networks import to_tensor
from mosel.data.samples import Samples
from mosel.errors import PackageError
from mosel.modality import ModalitySet, format_set, subsets
from mosel.packages.calibration import Calibration, drawn_roles, save_calibration
from mosel.packages.model_package import load_package

CHUNK_ITEMS = 250


def save_weights(folder: Path, encoders: Mapping[str, nn.Module], fusion: nn.Module) -> Path:
    """Write `weights.safetensors` with the keys `encoders.<modality>.<param>` and `fusion.<param>`.

    Args:
        folder: the model package; made if it is not there.
        encoders: one network per modality.
        fusion: the fusion network.

    Returns:
        The file that was written.
    """
    parts = {**{f"encoders.{modality}": encoder for modality, encoder in encoders.items()}, "fusion": fusion}
    weights = {
        f"{part}.{name}": value.detach().cpu().contiguous()
        for part, module in parts.items()
        for name, value in module.state_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    return _replace(folder / "weights.safetensors", save(weights))


@dataclass(frozen=True, eq=False)
class Scores:
    """What networks made of N samples.

    Attributes:
        samples: those that were scored.
        sets: the S modality sets, every non-empty one.
        answers: int32 [N, S], the index of the largest output.
        confidence: float32 [N, S], that output.
    """

    samples: Samples
    sets: Sequence[ModalitySet]
    answers: NDArray[np.int32]
    confidence: NDArray[np.float32]

    @property
    def accuracy(self) -> dict[str, float]:
        """The share of items whose largest output is that of their label, 0..1, by modality set: `audio+image`."""
        right = (self.answers == self.samples.labels[:, None]).mean(0)
        return dict(zip(map(format_set, self.sets), right.tolist(), strict=True))

    def calibration(self, content_hash: str, source: str) -> Calibration:
        """These samples as calibration rows of the package with that hash; `source` says in words where they are from.

        Where the samples do not say which of them certify, that is drawn.
        """
        names = list(self.samples.groups)
        groups = np.zeros((len(self.samples), len(names)), np.int32)
        for column, name in enumerate(names):
            groups[:, column] = self.samples.groups[name]
        certify = self.samples.certify
        return Calibration(
            content_hash=content_hash,
            sets=self.sets,
            answers=self.answers,
            confidence=self.confidence,
            labels=self.samples.labels.astype(np.int32),
            groups=groups,
            group_names=names,
            certify=drawn_roles(groups) if certify is None else certify,
            source=source,
        )


@torch.inference_mode()
def score(
    encoders: Mapping[str, nn.Module],
    fusion: nn.Module,
    samples: Samples,
    advance: Callable[[int], object] = lambda items: None,
) -> Scores:
    """Ask networks about samples, with every modality set. They are left in evaluation mode.

    Args:
        encoders: one network per modality, payload [N, *shape] -> embedding [N, *embedding].
        fusion: dict of embeddings -> output [N, *shape], such as probabilities [N, classes].
        samples: with a payload for each encoder; copied to where the encoders are, some at a time.
        advance: told after each chunk how many items it had.
    """
    sets = subsets(encoders)
    answers = np.empty((len(samples), len(sets)), np.int32)
    confidence = np.empty((len(samples), len(sets)), np.float32)
    for network in (*encoders.values(), fusion):
        network.eval()
    device = next((weight.device for weight in fusion.parameters()), torch.device("cpu"))
    for start in range(0, len(samples), CHUNK_ITEMS):
        rows = slice(start, start + CHUNK_ITEMS)
        chunk = samples.take(rows)
        embeddings: dict[str, Tensor] = {
            modality: encoder(_tensor(chunk.payloads[modality], device)) for modality, encoder in encoders.items()
        }
        for column, subset in enumerate(sets):
            output: Tensor = fusion({modality: embeddings[modality] for modality in sorted(subset)})
            largest = output.float().flatten(1).max(-1)
            answers[rows, column] = largest.indices.cpu()
            confidence[rows, column] = largest.values.cpu()
        advance(len(chunk))
    return Scores(samples, sets, answers, confidence)


def write_accuracy(
    folder: Path,
    *,
    calibration: Scores,
    test: Scores,
    source: str = "samples that no weight was fitted to",
    package: Path | None = None,
) -> dict[str, Any]:
    """Write `accuracy.json` and `calibration.npz`, bound to the `weights.safetensors` beside them and the code.

    Args:
        folder: the model package, with the weights saved by `save_weights`.
        calibration: of samples that no weight was fitted to; the selector relies on them.
        test: of samples that no choice was made with; reported.
        source: where the calibration samples are from, in words.
        package: the model package, where `folder` is another one, whose files will be put into it.

    Returns:
        What `accuracy.json` holds.

    Raises:
        PackageError: the weights have not been saved, or the package is wrong.
    """
    weights = folder / "weights.safetensors"
    if not weights.is_file():
        raise PackageError(f"{weights}: no such file; save_weights writes it")
    content_hash = load_package(package or folder, weights).content_hash
    document: dict[str, Any] = {"content_hash": content_hash, "metric": "accuracy"}
    for split, scores in {"validation": calibration, "test": test}.items():
        document[split] = {"samples": len(scores.samples), "sets": scores.accuracy}
    save_calibration(folder / "calibration.npz", calibration.calibration(content_hash, source))
    _replace(folder / "accuracy.json", (json.dumps(document, indent=2) + "\n").encode())
    return document


def write_report(folder: Path, accuracy: Mapping[str, Any], *, seed: int, seconds: float) -> None:
    """Write `report.json` and `report.md`: how the weights beside them came about.

    Args:
        folder: the model package.
        accuracy: what `write_accuracy` returned.
        seed: the seed that was given to the training.
        seconds: how long training and measuring took.
    """
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "seed": seed,
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    validation, test = accuracy["validation"], accuracy["test"]
    lines = [
        "# Training report",
        "",
        ", ".join(f"{name} {value}" for name, value in facts.items()),
        "",
        f"| modality set | calibration ({validation['samples']} samples) | test ({test['samples']} samples) |",
        "| --- | --- | --- |",
        *(f"| {name} | {value:.3f} | {test['sets'][name]:.3f} |" for name, value in validation["sets"].items()),
    ]
    _replace(folder / "report.json", (json.dumps({**facts, **accuracy}, indent=2) + "\n").encode())
    _replace(folder / "report.md", ("\n".join(lines) + "\n").encode())


def _tensor(payload: NDArray[Any], device: torch.device) -> Tensor:
    """Of the types that a payload may have, only BF16 arrives as uint16."""
    return to_tensor(np.array(payload), "BF16" if payload.dtype == np.uint16 else "", device)


def _replace(path: Path, content: bytes) -> Path:
    """Write a file so that a reader sees the old content or the new, never a half."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    return partial.replace(path)
