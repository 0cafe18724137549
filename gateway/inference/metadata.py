"""What servers and models are, as the Open Inference Protocol's JSON has it; gRPC says the same in messages."""

from typing import Any

import mosel
from gateway.data_plane import DataPlane
from gateway.inference.requests import served
from gateway.inference.responses import output_tensors
from gateway.inferences import Total
from mosel.errors import ServiceUnavailable
from mosel.packages.model_package import ModelPackage

Json = dict[str, Any]

PLATFORM = "mosel"
# The names that Triton gave to what both do.
EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "parameters",
    "schedule_policy",
    "statistics",
)


def server_ready(data_plane: DataPlane) -> bool:
    """Whether jobs for every model that is loaded would be run."""
    try:
        data_plane.link.check_connected()
    except ServiceUnavailable:
        return False
    return all(map(data_plane.is_ready, data_plane.link.models))


def model_ready(data_plane: DataPlane, model: str, model_version: str = "") -> bool:
    """Whether jobs for a model would be run; of one that is not served here they would not."""
    package = data_plane.packages.get(model)
    return package is not None and model_version in ("", package.version) and data_plane.is_ready(model)


def server_metadata() -> Json:
    """Who answers, and which extensions of the protocol it knows."""
    return {"name": PLATFORM, "version": mosel.__version__, "extensions": list(EXTENSIONS)}


def model_metadata(package: ModelPackage) -> Json:
    """Inputs and outputs of a model, -1 for the items of a job; any subset of the inputs may be sent."""
    inputs = {name: (spec.dtype, spec.shape) for name, spec in package.modalities.items()}
    return {
        "name": package.name,
        "versions": [package.version],
        "platform": PLATFORM,
        "inputs": _tensors(inputs),
        "outputs": _tensors(output_tensors(package)),
    }


def model_config(data_plane: DataPlane, package: ModelPackage) -> Json:
    """A model as Triton describes one; its measured accuracies are among the parameters once the selector is there."""
    sets = {
        f"accuracy.{known.modality_set}": f"{known.accuracy:.4f}" for known in data_plane.state_of(package.name).sets
    }
    parameters = {"metric": package.metric} | sets
    inputs = {name: (spec.dtype, spec.shape) for name, spec in package.modalities.items()}
    return {
        "name": package.name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "max_batch_size": data_plane.settings.gateway.max_items_per_job,
        "input": [tensor | {"optional": True} for tensor in _configured(inputs)],
        "output": _configured(output_tensors(package)),
        "dynamic_batching": {},
        "model_transaction_policy": {"decoupled": False},
        "parameters": {name: {"string_value": value} for name, value in parameters.items()},
    }


def model_statistics(data_plane: DataPlane, model: str = "", model_version: str = "") -> Json:
    """What became of the requests to a model, or to each; durations in nanoseconds.

    Each answered job counts as one execution: the selector merges jobs, and does not say which.

    Raises:
        ModelNotFound: there is no such model.
    """
    packages = [served(model, model_version, data_plane.packages)] if model else data_plane.packages.values()
    return {"model_stats": [_statistics(data_plane, package) for package in packages]}


def repository_index(data_plane: DataPlane, ready_only: bool = False) -> list[Json]:
    """The models, and whether jobs for them would be run."""
    ready = {name: data_plane.is_ready(name) for name in data_plane.packages}
    return [
        {
            "name": name,
            "version": package.version,
            "state": "READY" if ready[name] else "UNAVAILABLE",
            "reason": "" if ready[name] else _why_not(data_plane, name),
        }
        for name, package in data_plane.packages.items()
        if ready[name] or not ready_only
    ]


def _why_not(data_plane: DataPlane, model: str) -> str:
    return data_plane.link.refused or data_plane.state_of(model).reason or "a service that it needs is not ready"


def _tensors(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> list[Json]:
    return [{"name": name, "datatype": dtype, "shape": [-1, *shape]} for name, (dtype, shape) in tensors.items()]


def _configured(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> list[Json]:
    """As `_tensors`, in the words of a configuration: without the batch dimension, and BYTES is a string."""
    return [
        {"name": name, "data_type": f"TYPE_{'STRING' if dtype == 'BYTES' else dtype}", "dims": list(shape)}
        for name, (dtype, shape) in tensors.items()
    ]


def _statistics(data_plane: DataPlane, package: ModelPackage) -> Json:
    done = data_plane.inferences_of(package.name)
    stages = {
        "success": done.success,
        "fail": done.fail,
        "queue": done.queue,
        "compute_input": done.intake,
        "compute_infer": done.compute,
        "compute_output": done.delivery,
        "cache_hit": Total(),
        "cache_miss": Total(),
    }
    return {
        "name": package.name,
        "version": package.version,
        "last_inference": done.last_ms,
        "inference_count": done.items,
        "execution_count": done.success.count,
        "inference_stats": {name: {"count": total.count, "ns": total.ns} for name, total in stages.items()},
        "batch_stats": [],
    }
