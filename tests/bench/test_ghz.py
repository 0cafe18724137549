"""The configurations of ghz and what they send.

ghz itself is not run here: options are checked against its documentation (ghz.sh/docs/options), and the payloads are
sent, message by message, as it would send them.
"""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from google.protobuf.proto import parse_length_prefixed

from bench.ghz import payloads
from bench.ghz.payloads import write_payloads
from bench.items import Items, random_items
from gateway.inference.messages import SERVICE, ModelInferRequest, ModelInferResponse
from mosel.client.demands import Demand
from mosel.launcher import Launcher
from mosel.packages.model_package import ModelPackage
from mosel.v1 import gateway_pb2

ROOT = Path(__file__).parents[2]
CONFIGURATIONS = sorted((ROOT / "bench" / "ghz").glob("*.json"))
# Options of a configuration file by the kind of their value, as ghz documents them; it ignores what it does not know.
TEXTS = {
    *("proto", "protoset", "call", "cacert", "cert", "key", "cname", "authority", "concurrency-schedule"),
    *("load-schedule", "duration-stop", "data-file", "binary-file", "metadata-file", "output", "format"),
    *("name", "debug", "host", "lb-strategy", "max-recv-message-size", "max-send-message-size"),
}
NUMBERS = {
    *("total", "concurrency", "concurrency-start", "concurrency-end", "concurrency-step", "connections", "rps"),
    *("load-start", "load-end", "load-step", "cpus", "skipFirst", "stream-call-count"),
}
DURATIONS = {
    *("duration", "max-duration", "timeout", "connect-timeout", "keepalive", "stream-interval"),
    *("stream-call-duration", "load-step-duration", "load-max-duration"),
    *("concurrency-step-duration", "concurrency-max-duration"),
}
FLAGS = {"insecure", "skipTLS", "async", "enable-compression", "count-errors", "stream-dynamic-messages"}
LISTS, MAPS = {"import-paths"}, {"data", "metadata", "tags", "reflect-metadata"}

PREDICT, SUBMIT = "mosel.v1.Gateway.Predict", "mosel.v1.Gateway.SubmitJob"
INFER = f"{SERVICE.full_name}.ModelInfer"
# What is sent, and what is answered.
MESSAGES: dict[str, tuple[type[Message], type[Message]]] = {
    PREDICT: (gateway_pb2.PredictRequest, gateway_pb2.PredictReply),
    SUBMIT: (gateway_pb2.SubmitJobRequest, gateway_pb2.JobEvent),
    INFER: (ModelInferRequest, ModelInferResponse),
}


def configured(file: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(file.read_text())
    return parsed


def messages(file: Path, kind: type[Message]) -> Iterator[Message]:
    stream = io.BytesIO(file.read_bytes())
    while (message := parse_length_prefixed(kind, stream)) is not None:
        yield message


@pytest.fixture
def written(fruit: ModelPackage, tmp_path: Path) -> dict[str, Path]:
    """Payload files for `fruit`, by name."""
    items = random_items(fruit.modalities, "a test")
    demand = Demand(min_accuracy=0.7, latency_slo_ms=20_000)
    return {file.name: file for file in write_payloads(tmp_path / "payloads", fruit, items, 10, demand)}


def test_there_are_all_kinds_for_both_protocols() -> None:
    kinds = {f"{api}-{kind}.json" for api in ("mosel", "oip") for kind in ("single", "batch", "steps")}
    assert {file.name for file in CONFIGURATIONS} == kinds | {"mosel-job.json"}


@pytest.mark.parametrize("file", CONFIGURATIONS, ids=lambda file: file.stem)
def test_every_option_is_one_of_ghz(file: Path) -> None:
    for option, value in configured(file).items():
        if option in TEXTS:
            assert isinstance(value, str), option
        elif option in NUMBERS:
            assert type(value) is int, option
        elif option in DURATIONS:
            assert re.fullmatch(r"\d+(ms|s|m)", value), option
        elif option in FLAGS:
            assert type(value) is bool, option
        elif option in LISTS:
            assert isinstance(value, list), option
        else:
            assert option in MAPS, f"{option} is no option of ghz"


@pytest.mark.parametrize("file", CONFIGURATIONS, ids=lambda file: file.stem)
def test_files_that_are_named_are_there(file: Path, written: dict[str, Path]) -> None:
    options = configured(file)
    assert (ROOT / options["proto"]).is_file()
    assert all((ROOT / folder).is_dir() for folder in options.get("import-paths", ()))
    binary = ROOT / options["binary-file"]
    assert binary.parent == payloads.PAYLOADS
    assert binary.name in written


def items_and_accuracy(reply: Message) -> tuple[int, float]:
    if isinstance(reply, gateway_pb2.PredictReply):
        return len(reply.labels), reply.expected_accuracy
    response: Any = reply
    return response.outputs[0].shape[0], response.parameters["expected_accuracy"].double_param


@pytest.mark.parametrize("name", [f"{api}-{kind}" for api in ("mosel", "oip") for kind in ("single", "batch", "steps")])
def test_each_message_is_answered(name: str, written: dict[str, Path], services: Launcher) -> None:
    options = configured(ROOT / "bench" / "ghz" / f"{name}.json")
    request, reply = MESSAGES[options["call"]]
    service, _, method = options["call"].rpartition(".")
    with grpc.insecure_channel(services.address) as channel:
        call = channel.unary_unary(f"/{service}/{method}", request.SerializeToString, reply.FromString)
        sent = [*messages(written[Path(options["binary-file"]).name], request)]
        answers = [items_and_accuracy(call(message, timeout=30)) for message in sent]
    assert len(answers) > 1
    assert {items for items, _ in answers} == {10 if name.endswith("batch") else 1}
    assert all(accuracy >= 0.7 for _, accuracy in answers)
    # Requests that are all the same would be a strange load.
    assert len({message.SerializeToString(deterministic=True) for message in sent}) == len(sent)


def test_a_streamed_job_is_answered(written: dict[str, Path], services: Launcher) -> None:
    options = configured(ROOT / "bench" / "ghz" / "mosel-job.json")
    with grpc.insecure_channel(services.address) as channel:
        call = channel.stream_stream(
            "/mosel.v1.Gateway/SubmitJob",
            gateway_pb2.SubmitJobRequest.SerializeToString,
            gateway_pb2.JobEvent.FromString,
        )
        events = [*call(messages(written["mosel-job.bin"], MESSAGES[options["call"]][0]), timeout=30)]
    assert events[0].HasField("accepted")
    assert events[-1].HasField("summary")
    assert sorted(item for event in events[1:-1] for item in event.results.items) == list(range(10))


def test_perf_analyzer_gets_the_same_items(written: dict[str, Path], fruit: ModelPackage) -> None:
    data = json.loads(written["perf-analyzer.json"].read_text())["data"]
    requests = [*messages(written["mosel-single.bin"], gateway_pb2.PredictRequest)]
    assert len(data) == len(requests)
    for step, request in zip(data, requests, strict=True):
        assert isinstance(request, gateway_pb2.PredictRequest)
        assert {name: tuple(tensor["shape"]) for name, tensor in step.items()} == {
            name: spec.shape for name, spec in fruit.modalities.items()
        }
        sent = np.frombuffer(request.payloads["scent"].data, np.float32)
        assert step["scent"]["content"] == pytest.approx(sent.tolist())


def test_the_script_says_what_it_sends(
    fruit: ModelPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "fruit", "--models", str(fruit.folder.parent), "--items", "3", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["payloads", *arguments])
    payloads.main()
    out = capsys.readouterr().out
    assert out.startswith("fruit: random payloads (the model has no labelled samples)\n")
    (job,) = [*messages(tmp_path / "mosel-job.bin", gateway_pb2.SubmitJobRequest)][:1]
    assert isinstance(job, gateway_pb2.SubmitJobRequest)
    assert job.job.size == 3


def test_real_samples_are_sent_where_there_are_some(fruit: ModelPackage, tmp_path: Path) -> None:
    scents = np.arange(12, dtype=np.float32).reshape(2, 6)
    items = Items({"scent": scents}, np.zeros(2, np.int64), np.zeros((2, 0), np.int64), "two labelled test items")
    files = {file.name: file for file in write_payloads(tmp_path, fruit, items, 2, Demand())}
    (batch, *_) = messages(files["mosel-batch.bin"], gateway_pb2.PredictRequest)
    assert isinstance(batch, gateway_pb2.PredictRequest)
    assert batch.payloads["scent"].data == scents.tobytes()
