"""A model package that changes while services that loaded it run, and what they are asked about it."""

import contextlib
import json
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mosel.client import Client
from mosel.compute import networks
from mosel.compute.training import save_weights
from mosel.launcher import Child
from mosel.packages.model_package import ModelPackage, load_package

Payloads = dict[str, NDArray[Any]]
# Payloads and the modalities to run, to outputs.
Direct = Callable[[Payloads, Iterable[str]], NDArray[Any]]


class Fruit:
    """The package that the services load, and copies of what it was, to call their networks directly."""

    def __init__(self, folder: Path, kept: Path) -> None:
        self.folder, self._kept = folder, kept
        self._changes = 0

    def change(self, seed: int) -> Direct:
        """Writes other weights, and accuracies that belong to them; returns what the services must then answer."""
        package = load_package(self.folder)
        torch.manual_seed(seed)
        encoders = {name: networks.load_encoder(package, name, torch.device("cpu")) for name in package.modalities}
        fusion = networks.load_fusion(package, torch.device("cpu"))
        for network in (*encoders.values(), fusion):
            for weights in network.parameters():
                weights.copy_(weights + 0.5 * torch.randn_like(weights))
        save_weights(self.folder, encoders, fusion)
        measured(self.folder)
        return self.directly()

    def edit(self, file: str, old: str, new: str) -> None:
        content = (self.folder / file).read_text()
        assert old in content
        (self.folder / file).write_text(content.replace(old, new))

    def directly(self) -> Direct:
        """The networks as the files have them now."""
        self._changes += 1
        copy = shutil.copytree(self.folder, self._kept / str(self._changes) / self.folder.name)
        package, cpu = load_package(copy), torch.device("cpu")
        encoders = {name: networks.load_encoder(package, name, cpu) for name in package.modalities}
        fusion = networks.load_fusion(package, cpu)

        @torch.inference_mode()
        def call(payloads: Payloads, modalities: Iterable[str]) -> NDArray[Any]:
            tensors = {name: torch.from_numpy(payloads[name].copy()) for name in sorted(modalities)}
            output: NDArray[Any] = fusion({name: encoders[name](tensor) for name, tensor in tensors.items()}).numpy()
            return output

        return call

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Has the files afterwards as they are before the block."""
        copy = shutil.copytree(self.folder, self._kept / "before")
        try:
            yield
        finally:
            shutil.rmtree(self.folder)
            copy.rename(self.folder)


def measured(folder: Path) -> ModelPackage:
    """The package as it is now, with its accuracies as if they had been measured with these files."""
    file = folder / "accuracy.json"
    content = json.loads(file.read_text()) | {"content_hash": load_package(folder).content_hash}
    file.write_text(json.dumps(content))
    return load_package(folder)


def slots_held(client: Client) -> int:
    slots = ("slots_published", "slots_filling", "object_slots_published", "object_slots_filling", "slots_held")
    names = (*slots, "jobs_held", "jobs", "queued_items")
    return sum(service.counters.get(name, 0) for service in client.status() for name in names)


def loaded_by(client: Client) -> dict[str, tuple[str, ...]]:
    """The models whose networks each service has that `fruit` needs."""
    services = ("encoder/photo", "encoder/scent", "fusion")
    return {service.name: service.models for service in client.status() if service.name in services}


@contextlib.contextmanager
def frozen(child: Child) -> Iterator[None]:
    """The service neither computes nor answers inside the block."""
    child.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        child.process.send_signal(signal.SIGCONT)


def same(output: NDArray[Any], expected: NDArray[Any]) -> bool:
    return bool(np.allclose(output.astype(np.float32), expected, atol=1e-5))
