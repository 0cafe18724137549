"""Predictions of the services on the device against the same networks on the processor, and how tensors travelled.

python -m bench.gpu.served
"""

import argparse
import contextlib
import os
from collections.abc import Iterator

import numpy as np
import torch

from mosel.client import Client
from mosel.compute import networks
from mosel.config import FREE_PORTS, Settings, load_settings
from mosel.launcher import Launcher
from mosel.modality import subsets
from mosel.packages.model_package import ModelPackage

_MODELS = ("digits", "tvlt")
_ROWS = 4
# How embeddings travel on one GPU in each placement.
_RUNGS = {"services": "cuda_ipc", "single": "in_process"}
# Convolutions and products in TF32, which torch uses on a GPU where it may, differ in the fourth digit.
_MOST = 5e-3


def main() -> None:
    """Prints a list in Markdown; exits with 1 where predictions differ or embeddings do not stay on the GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.served", description=__doc__)
    parser.add_argument("--models", nargs="+", default=_MODELS, help="which are served")
    settings = load_settings(models=tuple(parser.parse_args().models), gateway=FREE_PORTS)
    device = networks.choose_device(settings.device)
    failures = list[str]()
    for placement, rung in _RUNGS.items():
        print(f"* placement {placement}:")
        with _services(settings.model_copy(update={"placement": placement})) as (launcher, client):
            failures += _wrong(launcher, client, rung if device.type == "cuda" else "")
    if failures:
        raise SystemExit("not as it should be: " + "; ".join(failures))


def _wrong(launcher: Launcher, client: Client, rung: str) -> Iterator[str]:
    """Says how predictions and edges are; gives what is wrong with them. Without a rung, any edge is right."""
    for name, package in launcher.packages.items():
        worst, sets = _worst(client, package)
        print(f"  * {name}: largest difference from the processor over {sets} modality sets: {worst:.1e}")
        if worst > _MOST:
            yield f"{name} differs by {worst:.1e}"
    for edge in (edge for service in client.status() for edge in service.edges):
        print(f"  * {edge.producer} to {edge.consumer}: {edge.rung} {edge.reason}".rstrip())
        if rung and edge.consumer == "fusion" and edge.rung != rung:
            yield f"{edge.producer} to fusion travels {edge.rung}"


@contextlib.contextmanager
def _services(settings: Settings) -> Iterator[tuple[Launcher, Client]]:
    # Every embedding by the best rung: none is small enough for a message.
    transport = settings.transport.model_copy(update={"inline_max_kib": 0})
    with Launcher(settings.model_copy(update={"transport": transport})) as launcher:
        launcher.wait_ready(120)
        with Client(launcher.address) as client:
            yield launcher, client


@torch.inference_mode()
def _worst(client: Client, package: ModelPackage) -> tuple[float, int]:
    """The largest difference over all modality sets, and how many of these there are."""
    cpu = torch.device("cpu")
    payloads = {m: networks.example_payload(package, m, _ROWS) for m in package.modalities}
    fusion = networks.load_fusion(package, cpu)
    embeddings = {
        m: networks.load_encoder(package, m, cpu)(torch.from_numpy(payload)).float() for m, payload in payloads.items()
    }
    differences = []
    for chosen in subsets(package.modalities):
        direct = fusion({m: embeddings[m] for m in chosen}).numpy()
        sent = {m: payloads[m] for m in chosen}
        answer = client.predict(package.name, sent, modalities=sorted(chosen), latency_slo_ms=30_000)
        differences.append(float(np.abs(np.asarray(answer.output) - direct).max()))
    return max(differences), len(differences)


if __name__ == "__main__":
    print(f"device: {os.environ.get('MOSEL_DEVICE', 'as set')}")
    main()
