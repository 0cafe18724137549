"""The limit of every server: the same networks in the same form, called directly in a process of their own."""

import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from bench.one_process import networks_of
from mosel.compute import networks
from mosel.config import Settings
from mosel.packages.model_package import load_package


class Direct:
    """The networks of a model in a child process; a context manager.

    Args:
        package: the model package's folder.
        settings: of the services that it is compared with: where the networks run, payloads and predictions being in
            host memory, and which form of them was chosen.
    """

    def __init__(self, package: Path, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(package, settings, theirs), daemon=True)

    def run(self, job_size: int, torch_threads: int, seconds: float) -> list[float]:
        """Calls all encoders and the fusion on jobs of this size, one after another, for so long.

        Returns:
            Seconds that each job took.
        """
        self._connection.send((job_size, torch_threads, seconds))
        times: list[float] = self._connection.recv()
        return times

    def __enter__(self) -> "Direct":
        self._process.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        self._process.join()


@torch.inference_mode()
def _serve(folder: Path, settings: Settings, connection: Connection) -> None:
    # The services are ready by the first question, and have chosen.
    connection.poll(None)
    package, device = load_package(folder), networks.choose_device(settings.device)
    encoders, fusion = networks_of(package, settings)
    while True:
        job_size, torch_threads, seconds = connection.recv()
        torch.set_num_threads(torch_threads)
        payloads = {m: torch.from_numpy(networks.example_payload(package, m, job_size)) for m in encoders}
        times: list[float] = []
        until = time.perf_counter() + seconds
        while not times or time.perf_counter() < until:
            started = time.perf_counter()
            fusion({modality: encoder(payloads[modality].to(device)) for modality, encoder in encoders.items()}).cpu()
            times.append(time.perf_counter() - started)
        connection.send(times)
