"""Save what was trained: weights as safetensors, and accuracy.json with the accuracy of every modality set."""

import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from mosel.data.samples import Samples
from mosel.errors import PackageError
from mosel.modality import format_set, subsets
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


@torch.inference_mode()
def measure_accuracy(encoders: Mapping[str, nn.Module], fusion: nn.Module, samples: Samples) -> dict[str, float]:
    """The share of items whose most probable class is the label, 0..1, for every modality set.

    The networks are left in evaluation mode.

    Args:
        encoders: one network per modality, payload [N, *shape] -> embedding [N, *embedding].
        fusion: dict of embeddings -> probabilities [N, classes].
        samples: at least one item, with a payload for each encoder.

    Returns:
        Accuracy by modality set, written sorted and joined: `audio+image`.
    """
    correct = dict.fromkeys(map(format_set, subsets(encoders)), 0)
    for network in (*encoders.values(), fusion):
        network.eval()
    for start in range(0, len(samples), CHUNK_ITEMS):
        chunk = samples.take(slice(start, start + CHUNK_ITEMS))
        labels = torch.tensor(chunk.labels)
        embeddings: dict[str, Tensor] = {
            modality: encoder(torch.tensor(chunk.payloads[modality])) for modality, encoder in encoders.items()
        }
        for subset in subsets(encoders):
            output: Tensor = fusion({modality: embeddings[modality] for modality in sorted(subset)})
            correct[format_set(subset)] += int((output.argmax(-1) == labels).sum())
    return {name: count / len(samples) for name, count in correct.items()}


def write_accuracy(
    folder: Path,
    encoders: Mapping[str, nn.Module],
    fusion: nn.Module,
    *,
    validation: Samples,
    test: Samples,
    package: Path | None = None,
) -> dict[str, Any]:
    """Measure every modality set and write `accuracy.json`, bound to the `weights.safetensors` beside it and the code.

    Args:
        folder: the model package, with the weights saved by `save_weights`.
        encoders: the networks whose weights were saved.
        fusion: the fusion network whose weights were saved.
        validation: samples that no weight was fitted to; the selector relies on these accuracies.
        test: samples that no choice was made with; reported.
        package: the model package, where `folder` is another one, whose files will be put into it.

    Returns:
        What was written.

    Raises:
        PackageError: the weights have not been saved, or the package is wrong.
    """
    weights = folder / "weights.safetensors"
    if not weights.is_file():
        raise PackageError(f"{weights}: no such file; save_weights writes it")
    measured = load_package(package or folder, weights)
    document: dict[str, Any] = {"content_hash": measured.content_hash, "metric": "accuracy"}
    for split, samples in {"validation": validation, "test": test}.items():
        document[split] = {"samples": len(samples), "sets": measure_accuracy(encoders, fusion, samples)}
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
        f"| modality set | validation ({validation['samples']} samples) | test ({test['samples']} samples) |",
        "| --- | --- | --- |",
        *(f"| {name} | {value:.3f} | {test['sets'][name]:.3f} |" for name, value in validation["sets"].items()),
    ]
    _replace(folder / "report.json", (json.dumps({**facts, **accuracy}, indent=2) + "\n").encode())
    _replace(folder / "report.md", ("\n".join(lines) + "\n").encode())


def _replace(path: Path, content: bytes) -> Path:
    """Write a file so that a reader sees the old content or the new, never a half."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    return partial.replace(path)
