"""A model package's networks, with their weights. Imports torch, so only encoders, fusion and training import this."""

import ctypes
import threading
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray

from mosel.data.samples import example_rows
from mosel.errors import ConfigError, InternalError, PackageError
from mosel.modality import ModalitySet, format_set
from mosel.packages.model_modules import forget_modules
from mosel.packages.model_package import ModelPackage
from mosel.runtime.heap import settle_soon
from mosel.transport.torch_exchange import tensor_over

# How much a row may differ between a batch and alone: a share of the largest number, and some units of precision.
_ROWS_DIFFER, ROUNDINGS = 1e-3, 4


# What a network is called with: payload rows, or embedding rows by modality.
Inputs = torch.Tensor | dict[str, torch.Tensor]


def load_encoder(package: ModelPackage, modality: str, device: torch.device) -> torch.nn.Module:
    """The encoder network of a modality, ready for inference.

    Raises:
        PackageError: the class or its weights are missing or do not fit.
    """
    return _load(package, package.modalities[modality].encoder, f"encoders.{modality}.", device)


def load_fusion(package: ModelPackage, device: torch.device) -> torch.nn.Module:
    """The fusion network, ready for inference.

    Raises:
        PackageError: the class or its weights are missing or do not fit.
    """
    return _load(package, package.fusion, "fusion.", device)


@dataclass(frozen=True)
class Loaded:
    """A network that is ready to be called.

    Attributes:
        package: what it is of.
        network: payloads [N, *shape], or embeddings by modality, in; embeddings or outputs out.
        precision: the coarsest with which it computes, as `torch.finfo` states it.
        form: the one that it is in, see `mosel.compute.forms`.
    """

    package: ModelPackage
    network: torch.nn.Module
    precision: float
    form: str = "eager"

    @classmethod
    def plain(cls, package: ModelPackage, network: torch.nn.Module) -> "Loaded":
        """A network as the package makes it."""
        return cls(package, network, coarsest({p.dtype for p in network.parameters()}))


# Loading changes what all threads of a process share: the modules of a package, torch's random numbers, and the
# warnings by which tracing tells what it could not follow.
_loading = threading.Lock()


class Hosted:
    """The networks of a service, by the ids of their models. Thread-safe; services of one process load in turn.

    Args:
        make: makes the network of a package.
        warm: calls it once and checks what it returns.
        device: where it is.
        fastest: finds the form that it is served in; None: as it is made.
    """

    def __init__(
        self,
        make: Callable[[ModelPackage], torch.nn.Module],
        warm: Callable[[Loaded], object],
        device: torch.device,
        fastest: Callable[[Loaded], Loaded] | None = None,
    ) -> None:
        self._make, self._warm, self._device, self._fastest = make, warm, device, fastest
        self._loaded: dict[str, Loaded] = {}

    def load(self, package: ModelPackage) -> None:
        """Loads and warms a network beside those that are there; one that is there already stays as it is.

        Raises:
            PackageError: the network or its weights are wrong, or the files changed meanwhile.
        """
        with _loading:
            if package.id in self._loaded:
                return
            forget_modules(package.name)
            loaded = Loaded.plain(package, self._make(package))
            self._warm(loaded)
            if self._fastest:
                loaded = self._fastest(loaded)
                _give_memory_back(self._device)
            package.check_unchanged()
            self._loaded[package.id] = loaded
        settle_soon()

    def unload(self, model: str) -> None:
        """Frees a network once no call uses it any more; one that is not there is passed over."""
        if self._loaded.pop(model, None):
            _give_memory_back(self._device)
            settle_soon()

    def get(self, model: str) -> Loaded | None:
        """The network of a model, None if it is not here."""
        return self._loaded.get(model)

    @property
    def forms(self) -> dict[str, str]:
        """The ids of the models that are here, and the forms that their networks are in."""
        return {model: loaded.form for model, loaded in self._loaded.copy().items()}

    @property
    def models(self) -> list[str]:
        """The ids of the models that are here."""
        return list(self._loaded)


def choose_device(setting: str) -> torch.device:
    """The device that the setting `device` names; `auto` takes a GPU if there is one.

    Raises:
        ConfigError: `cuda` is asked for and there is none.
    """
    if setting == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: 'cuda' is asked for, but torch finds no CUDA device; use 'auto' or 'cpu'")
    return torch.device("cuda" if setting != "cpu" and torch.cuda.is_available() else "cpu")


def resource_of(device: torch.device) -> str:
    """What services on this device compete for: "cpu", or the GPU's UUID."""
    return "cpu" if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)


def to_tensor(array: NDArray[np.generic], dtype: str, device: torch.device) -> torch.Tensor:
    """A gathered array as a torch tensor; the bits of BF16 arrive as uint16."""
    tensor = tensor_over(array, dtype)
    # Torch gives Python's lock away even where there is nothing to do.
    return tensor if device.type == "cpu" else tensor.to(device)


def synchronize(device: torch.device) -> None:
    """Waits until what this thread started on a GPU is complete, so that its time can be read."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def some_rows(inputs: Inputs, rows: slice) -> Inputs:
    """Some rows of what a network is called with."""
    return {m: tensor[rows] for m, tensor in inputs.items()} if isinstance(inputs, dict) else inputs[rows]


def encoder_inputs(package: ModelPackage, modality: str, rows: int, device: torch.device) -> torch.Tensor:
    """So many ordinary-looking rows for an encoder, the first ones the same each time."""
    return to_tensor(example_payload(package, modality, rows), package.modalities[modality].dtype, device)


def fusion_inputs(
    package: ModelPackage, modalities: ModalitySet, rows: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """So many made-up rows for fusion with a modality set, the same each time."""
    specs, seeded = package.modalities, torch.Generator().manual_seed(0)
    return {m: torch.rand(rows, *specs[m].embedding, generator=seeded).to(device) for m in sorted(modalities)}


def example_payload(package: ModelPackage, modality: str, rows: int) -> NDArray[np.generic]:
    """Ordinary-looking rows [rows, *shape] for warming up and timing."""
    spec = package.modalities[modality]
    return example_rows(spec.dtype, (rows, *spec.shape))


@dataclass(frozen=True)
class Part:
    """Says what is expected of a network, and checks what it returns.

    Attributes:
        package: what it is of.
        service: where it runs, as people know it.
        name: the network, in words.
        shape: of one row of what it returns.
    """

    package: ModelPackage
    service: str
    name: str
    shape: tuple[int, ...]

    def check_shape(self, output: torch.Tensor, rows: int) -> None:
        """Checks what the network returned.

        Raises:
            PackageError: its shape is not [rows, *shape].
        """
        if tuple(output.shape) != (rows, *self.shape):
            raise self._wrong(f"{self.name} returned {list(output.shape)}; expected {[rows, *self.shape]}")

    def check_finite(self, finite: bool) -> None:
        """Ends a call in service whose numbers are not finite, so that nobody is answered with them.

        Raises:
            InternalError: they are not.
        """
        if not finite:
            raise InternalError(f"{self._of_model}: {self.name} returned numbers that are not finite")

    def run(self, call: Callable[[], torch.Tensor], rows: int) -> torch.Tensor:
        """Runs the network once on example rows, and checks what it returns.

        Raises:
            PackageError: it fails, its shape is not [rows, *shape], or its numbers are not finite.
        """
        try:
            output = call()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise self._wrong(f"{self.name} fails on an input of the shape stated there: {reason}") from error
        self.check_shape(output, rows)
        if not are_finite(output):
            raise self._wrong(f"{self._of_model}: {self.name} returned numbers that are not finite on example rows")
        return output

    def check_rows_apart(self, call: Callable[[slice], torch.Tensor], precision: float) -> None:
        """Runs the network on two example rows, each alone and both at once, and checks that it is the same to them.

        Rows of different callers share batches, so an answer must not depend on who else asks. Libraries add up in
        another order for another batch size, which moves a number by about the precision of its type; what is mixed
        over a batch, such as its mean, moves it by about its own size.

        Args:
            call: the network on some of the rows.
            precision: the coarsest with which it computes.

        Raises:
            PackageError: they influence each other, or as `run` says.
        """
        alone = torch.cat([self.run(partial(call, slice(row, row + 1)), 1) for row in range(2)])
        together = self.run(partial(call, slice(2)), 2)
        precision = max(precision, coarsest({alone.dtype}))
        largest = float(alone.double().abs().max())
        difference = float((together.double() - alone.double()).abs().max())
        if difference > (_ROWS_DIFFER + ROUNDINGS * precision) * largest:
            raise self._wrong(
                f"{self._of_model}: {self.name} returns other numbers for a row alone than in a batch: the largest "
                f"difference is {difference:.3g}, the largest number {largest:.3g}; expected rows that do not "
                "influence each other, and the same answer each time"
            )

    @property
    def _of_model(self) -> str:
        return f"{self.service} of model '{self.package.name}'"

    def _wrong(self, message: str) -> PackageError:
        return PackageError(f"{self.package.folder / 'model.toml'}: {message}")


def encoder_part(package: ModelPackage, modality: str) -> Part:
    """What is expected of the encoder of a modality."""
    spec = package.modalities[modality]
    return Part(package, f"encoder/{modality}", spec.encoder, spec.embedding)


def fusion_part(package: ModelPackage, modalities: ModalitySet) -> Part:
    """What is expected of fusion for a modality set."""
    return Part(package, "fusion", f"{package.fusion} with {format_set(modalities)}", package.output.shape)


def coarsest(dtypes: Iterable[torch.dtype]) -> float:
    """The coarsest precision of some types, 0 if none has one."""
    return max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=0.0)


def as_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in FP32: the tensor itself if it is."""
    return tensor if tensor.dtype is torch.float32 else tensor.float()


def are_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are; integers always are."""
    if not tensor.is_floating_point():
        return True
    if tensor.dtype is torch.float32 and not tensor.is_cuda and not tensor.requires_grad:
        # Torch gives Python's lock away at each call, however short, and gets it back when the event loop rests.
        return bool(np.isfinite(tensor.numpy()).all())
    return bool(tensor.isfinite().all())


def finite_soon(tensor: torch.Tensor) -> torch.Tensor | bool:
    """As `are_finite`; of numbers on a GPU a scalar there, which waits for nothing."""
    return tensor.isfinite().all() if tensor.is_cuda else are_finite(tensor)


def _give_memory_back(device: torch.device) -> None:
    """What was freed goes back to the GPU, or to the system, which Python alone would keep for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _load(package: ModelPackage, path: str, prefix: str, device: torch.device) -> torch.nn.Module:
    network_class = package.load_attribute(path)
    if not (isinstance(network_class, type) and issubclass(network_class, torch.nn.Module)):
        raise PackageError(f"{package.folder / 'model.toml'}: '{path}' is no torch.nn.Module class")
    try:
        network = _seeded(network_class, prefix) if package.random_weights else network_class()
    except Exception as error:
        raise PackageError(
            f"{package.folder / 'model.toml'}: '{path}' cannot be made without arguments: {error}"
        ) from error
    if not package.random_weights:
        _fill(network, package.weights, prefix, path)
    return network.to(device).eval().requires_grad_(False)


def _seeded(network_class: type[torch.nn.Module], name: str) -> torch.nn.Module:
    """Makes a network whose random weights are the same in every process; the state of torch's generator stays."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(zlib.crc32(name.encode()))
        return network_class()


def _fill(network: torch.nn.Module, file: Path, prefix: str, path: str) -> None:
    try:
        network.load_state_dict(_weights(file, prefix))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise PackageError(f"{file}: keys '{prefix}*' do not fit {path}: {reason}") from None


def _weights(file: Path, prefix: str) -> dict[str, torch.Tensor]:
    try:
        with safetensors.safe_open(file, framework="pt") as content:
            keys = [key for key in content.keys() if key.startswith(prefix)]  # noqa: SIM118 (not a mapping)
            return {key.removeprefix(prefix): content.get_tensor(key) for key in keys}
    except (OSError, safetensors.SafetensorError) as error:
        raise PackageError(f"{file}: cannot be read as safetensors: {error}") from None
