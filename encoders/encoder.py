"""The networks of one modality, for every model that has it. Knows no gRPC."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch

from mosel import networks
from mosel.errors import ModelNotFound
from mosel.model_package import ModelPackage
from mosel.transport import Reader
from mosel.transport.torch_exchange import TensorPublisher
from mosel.v1 import tensor_pb2


class ModalityEncoder:
    """Chosen payload rows in, embeddings out. Thread-safe.

    Args:
        modality: which one.
        packages: model packages by name; those without this modality are passed over.
        device: where the networks run.
        reader: gathers payload rows.
        publisher: keeps the embeddings.

    Raises:
        PackageError: a network or its weights are wrong.
    """

    def __init__(
        self,
        modality: str,
        packages: Mapping[str, ModelPackage],
        device: torch.device,
        reader: Reader,
        publisher: TensorPublisher,
    ) -> None:
        self.modality = modality
        self.counters: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._packages = {name: package for name, package in packages.items() if modality in package.modalities}
        self._device, self._reader, self._publisher = device, reader, publisher
        self._networks = {
            name: networks.load_encoder(package, modality, device) for name, package in self._packages.items()
        }

    @property
    def models(self) -> list[str]:
        """The models that have this modality."""
        return list(self._packages)

    def encode(
        self,
        model: str,
        rows: Sequence[tensor_pb2.RowSlice],
        rung: tensor_pb2.Rung.ValueType,
        lease_s: float,
        wait_s: float = 0.0,
    ) -> tuple[tensor_pb2.TensorRef, float]:
        """Encodes rows of one or more payloads as one batch.

        Args:
            model: whose network.
            rows: payload rows; every payload is [B, *shape] of the modality's dtype.
            rung: where fusion reaches the embeddings.
            lease_s: seconds for which they are kept.
            wait_s: seconds to wait for room for them.

        Returns:
            A ref to the embeddings [rows, *embedding], and the seconds that the network took.

        Raises:
            ModelNotFound, InvalidRequest, ReadNotProven, Overloaded.
        """
        network, package = self._network(model), self._packages[model]
        spec = package.modalities[self.modality]
        batch = self._reader.gather(rows, spec.dtype, spec.shape)
        started = time.perf_counter()
        embeddings = network(networks.to_tensor(batch, spec.dtype, self._device)).float()
        networks.synchronize(self._device)
        seconds = time.perf_counter() - started
        networks.check_shape(package, spec.encoder, embeddings, len(batch), spec.embedding)
        with self._lock:
            self.counters.update(calls=1, items=len(batch), payload_bytes_read=batch.nbytes)
        return self._publisher.publish(embeddings, rung, lease_s, wait_s), seconds

    @property
    def resource(self) -> str:
        """What the networks compute on: "cpu", or the GPU's UUID."""
        return networks.resource_of(self._device)

    def ready_call(self, model: str, batch_size: int) -> Callable[[], torch.Tensor]:
        """A call of the network for a batch of this size, to be timed; it has run once.

        Raises:
            ModelNotFound: the model has no such modality here.
            PackageError: the network fails, or returns another shape than model.toml states.
        """
        network, package = self._network(model), self._packages[model]
        spec = package.modalities[self.modality]
        batch = networks.example_payload(package, self.modality, batch_size)
        tensor = networks.to_tensor(batch, spec.dtype, self._device)

        def run() -> torch.Tensor:
            embeddings: torch.Tensor = network(tensor).cpu()
            return embeddings

        networks.check_runs(package, spec.encoder, run, batch_size, spec.embedding)
        return run

    def _network(self, model: str) -> torch.nn.Module:
        if model not in self._networks:
            raise ModelNotFound(f"model '{model}' has no modality '{self.modality}' here")
        return self._networks[model]
