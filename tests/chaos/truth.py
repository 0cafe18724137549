"""What the networks answer when they are called directly: the measure of every answer."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mosel.compute import networks
from mosel.modality import format_set
from mosel.packages.model_package import ModelPackage

# Two outputs this close may change places when an item is computed together with others.
_TIE = 1e-4


class Truth:
    """The outputs for items, by modality set.

    Args:
        package: the model.
        payloads: of the items, [N, ...] by modality.

    Attributes:
        accuracy: of each modality set, 0..1, as the package states it.
    """

    def __init__(self, package: ModelPackage, payloads: Mapping[str, NDArray[Any]]) -> None:
        self.package, self.payloads = package, payloads
        self.accuracy = {format_set(chosen): value for chosen, value in package.accuracy.sets.items()}
        self._outputs = _outputs(package, payloads)

    @property
    def count(self) -> int:
        """Of the items."""
        return len(next(iter(self.payloads.values())))

    @property
    def floor(self) -> float:
        """That of jobs without one."""
        return self.package.default_min_accuracy or 0.0

    def rows(self, start: int, size: int) -> dict[str, NDArray[Any]]:
        """The payloads of some items, one after another."""
        return {name: payload[start : start + size] for name, payload in self.payloads.items()}

    def is_label(self, item: int, modality_set: str, label: str) -> bool:
        """Whether an item has this label under this modality set; either of two does that are tied."""
        output = self._outputs[modality_set][item]
        return bool(output[self.package.output.labels.index(label)] >= output.max() - _TIE)

    def mean_accuracy(self, modality_sets: Iterable[str]) -> float:
        """Over items that used these sets."""
        return float(np.mean([self.accuracy[name] for name in modality_sets]))


@torch.inference_mode()
def _outputs(package: ModelPackage, payloads: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    cpu = torch.device("cpu")
    encoders = {name: networks.load_encoder(package, name, cpu) for name in sorted(payloads)}
    embeddings = {name: encoder(torch.from_numpy(payloads[name].copy())) for name, encoder in encoders.items()}
    fusion = networks.load_fusion(package, cpu)
    return {
        format_set(chosen): fusion({name: embeddings[name] for name in sorted(chosen)}).numpy()
        for chosen in package.accuracy.sets
    }
