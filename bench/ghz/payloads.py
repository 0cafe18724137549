"""Writes the requests that ghz, perf_analyzer and k6 send: real samples where there are any.

ghz reads messages with their lengths in front (as varints), one after another, and sends them in turn; a call that
streams gets all of them. A single message without its length would do for calls that do not stream, but ghz tries to
read it as several first, and what a message begins with may look like a length.
"""

import argparse
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.proto import serialize_length_prefixed
from numpy.typing import NDArray

from bench.items import Items, items_of
from gateway.inference.messages import ModelInferRequest
from mosel.client.demands import Demand, Upload, predict_request
from mosel.config import load_settings
from mosel.packages.model_package import ModelPackage, find_packages

PAYLOADS = Path(__file__).parent / "payloads"
# Messages of a file, and items of one batch of a job.
_SINGLES, _BATCHES, _JOB_BATCH = 64, 8, 4


def main() -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--items", type=int, default=16, help="items of a batch job")
    parser.add_argument("--min-accuracy", type=float, help="accuracy floor of each request")
    parser.add_argument("--max-accuracy-loss", type=float, help="instead of it: the most that may be lost")
    parser.add_argument("--latency-slo-ms", type=float, help="deadline of each request")
    parser.add_argument("--data", type=Path, help="folder with the recordings")
    parser.add_argument("--models", type=Path, help="folder of model packages")
    parser.add_argument("--out", type=Path, default=PAYLOADS, help="folder for the files")
    given = parser.parse_args()
    models = given.models or load_settings().models_dir
    package = find_packages(models, (given.model,))[given.model]
    demand = Demand(
        min_accuracy=given.min_accuracy,
        max_accuracy_loss=given.max_accuracy_loss,
        latency_slo_ms=given.latency_slo_ms,
    )
    items = items_of(package, given.data, given.items)
    print(f"{package.name}: {items.source}")
    for file in write_payloads(given.out, package, items, given.items, demand):
        print(f"{file}: {file.stat().st_size} bytes")


def write_payloads(folder: Path, package: ModelPackage, items: Items, size: int, demand: Demand) -> Iterator[Path]:
    """Writes the files, and says which.

    Args:
        folder: for them.
        package: the model.
        items: what requests bring along.
        size: items of a batch job.
        demand: what each request asks for.

    Raises:
        ConfigError: there are fewer items than that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    limit = load_settings().transport.max_message_mib
    rows = {"single": items.spread(1, _SINGLES), "batch": items.spread(size, _BATCHES)}
    for kind, slices in rows.items():
        payloads = [items.payloads_of(rows) for rows in slices]
        requests = [predict_request(package.name, payload, demand, limit) for payload in payloads]
        yield _write(folder / f"mosel-{kind}.bin", requests)
        yield _write_json(folder / f"mosel-{kind}.json", [MessageToDict(request) for request in requests])
        yield _write(folder / f"oip-{kind}.bin", [_infer_request(package, payload, demand) for payload in payloads])
    yield _write(folder / "mosel-job.bin", _job(package.name, items, size, demand, limit))
    yield _write_json(
        folder / "perf-analyzer.json", {"data": [_step(items.payloads_of(one)) for one in rows["single"]]}
    )


def _infer_request(package: ModelPackage, payloads: Mapping[str, NDArray[Any]], demand: Demand) -> Message:
    """The same as the Open Inference Protocol says it."""
    request = ModelInferRequest(model_name=package.name)
    for name, array in payloads.items():
        request.inputs.add(name=name, datatype=package.modalities[name].dtype, shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    for name in ("min_accuracy", "max_accuracy_loss", "latency_slo_ms"):
        if (value := demand.get(name)) is not None:
            request.parameters[name].double_param = value
    return request  # type: ignore[no-any-return] # made from a descriptor


def _job(model: str, items: Items, size: int, demand: Demand, limit: int) -> Iterable[Message]:
    """The messages of one job that brings its items in batches."""
    ends = [min(start + _JOB_BATCH, size) for start in range(0, size, _JOB_BATCH)]
    batches = [items.payloads_of(slice(start, end)) for start, end in zip([0, *ends], ends, strict=False)]
    return Upload(model, batches, size, demand, limit).requests()


def _write(file: Path, messages: Iterable[Message]) -> Path:
    written = io.BytesIO()
    for message in messages:
        serialize_length_prefixed(message, written)
    file.write_bytes(written.getvalue())
    return file


def _step(payloads: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """One item as `perf_analyzer --input-data` reads it: its numbers flat and row-major."""
    return {
        name: {"content": array[0].ravel().tolist(), "shape": [*array.shape[1:]]} for name, array in payloads.items()
    }


def _write_json(file: Path, content: Any) -> Path:
    file.write_text(json.dumps(content) + "\n")
    return file


if __name__ == "__main__":
    main()
