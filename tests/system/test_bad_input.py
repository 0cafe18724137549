"""Bad requests: the right status and one clear line each, and the services go on as if nothing had been."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, TypeAlias

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from mosel.cli import main
from mosel.client import Client
from mosel.launcher import Launcher
from mosel.tensors import to_proto
from mosel.v1 import gateway_pb2, gateway_pb2_grpc, tensor_pb2

Payloads = dict[str, NDArray[Any]]
Draw = Callable[..., Payloads]
Directly = Callable[..., NDArray[Any]]
Change = Callable[[gateway_pb2.PredictRequest], object]

# A call whose request and reply are bytes.
Raw: TypeAlias = "grpc.UnaryUnaryMultiCallable[bytes, bytes]"

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
def stub(services: Launcher) -> Iterator[gateway_pb2_grpc.GatewayStub]:
    """The generated stub, which sends whatever it is given."""
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(services.address, options) as channel:
        yield gateway_pb2_grpc.GatewayStub(channel)


@pytest.fixture(autouse=True)
def a_good_request_still_works(client: Client, draw: Draw, directly: Directly) -> Iterator[None]:
    yield
    payloads = draw(3, seed=9)
    output = client.predict("fruit", payloads).output.astype(np.float32)
    np.testing.assert_allclose(output, directly(payloads, payloads), atol=1e-5)


def request_of(payloads: Mapping[str, NDArray[Any]], model: str = "fruit") -> gateway_pb2.PredictRequest:
    return gateway_pb2.PredictRequest(model=model, payloads={name: to_proto(a) for name, a in payloads.items()})


def scents_with(value: float) -> tensor_pb2.Tensor:
    scents = np.zeros((4, 6), np.float32)
    scents[2, 5] = value
    return to_proto(scents)


def scents_of_four(**fields: Any) -> gateway_pb2.PredictRequest:
    return gateway_pb2.PredictRequest(model="fruit", payloads={"scent": scents_with(0)}, **fields)


BAD_REQUESTS: dict[str, tuple[Change, grpc.StatusCode, str]] = {
    "wrong model": (
        lambda r: setattr(r, "model", "vegetable"),
        grpc.StatusCode.NOT_FOUND,
        "model is 'vegetable'; expected one of fruit",
    ),
    "no model": (
        lambda r: setattr(r, "model", ""),
        grpc.StatusCode.NOT_FOUND,
        "model is ''; expected one of fruit",
    ),
    "unknown modality": (
        lambda r: r.payloads["taste"].CopyFrom(r.payloads["scent"]),
        INVALID,
        "payloads has 'taste'; expected some of photo, scent",
    ),
    "no payload": (
        lambda r: r.payloads.clear(),
        INVALID,
        "payloads is empty; expected some of photo, scent",
    ),
    "wrong dtype": (
        lambda r: r.payloads["scent"].CopyFrom(to_proto(np.zeros((4, 6), np.float64))),
        INVALID,
        "payloads.scent.dtype is FP64; expected FP32",
    ),
    "no dtype": (
        lambda r: setattr(r.payloads["scent"], "dtype", 0),
        INVALID,
        "payloads.scent.dtype is missing; expected FP32",
    ),
    "dtype of another world": (
        lambda r: setattr(r.payloads["scent"], "dtype", 77),
        INVALID,
        "dtype 77 is unknown; expected one of BOOL, UINT8, INT8, INT16, INT32, INT64, FP16, BF16, FP32, FP64",
    ),
    "wrong shape": (
        lambda r: r.payloads["scent"].CopyFrom(to_proto(np.zeros((4, 7), np.float32))),
        INVALID,
        "payloads.scent.shape is [4, 7]; expected [items, 6]",
    ),
    "one item without its batch": (
        lambda r: r.payloads["scent"].CopyFrom(to_proto(np.zeros(6, np.float32))),
        INVALID,
        "payloads.scent.shape is [6]; expected [items, 6]",
    ),
    "no shape": (
        lambda r: r.payloads["scent"].ClearField("shape"),
        INVALID,
        "payloads.scent.shape is []; expected [items, 6]",
    ),
    "negative batch": (
        lambda r: r.payloads["scent"].shape.__setitem__(0, -4),
        INVALID,
        "payloads.scent.shape is [-4, 6], a batch of no items; expected [items, 6] with at least one",
    ),
    "empty batch": (
        lambda r: r.payloads["scent"].CopyFrom(to_proto(np.zeros((0, 6), np.float32))),
        INVALID,
        "payloads.scent.shape is [0, 6], a batch of no items; expected [items, 6] with at least one",
    ),
    "missing bytes": (
        lambda r: setattr(r.payloads["scent"], "data", r.payloads["scent"].data[:-1]),
        INVALID,
        "payloads.scent.data has 95 bytes; FP32 [4, 6] expects 96 bytes",
    ),
    "no bytes": (
        lambda r: r.payloads["scent"].ClearField("data"),
        INVALID,
        "payloads.scent.data has 0 bytes; FP32 [4, 6] expects 96 bytes",
    ),
    "NaN": (
        lambda r: r.payloads["scent"].CopyFrom(scents_with(np.nan)),
        INVALID,
        "payloads.scent has nan in item 2; expected finite numbers",
    ),
    "infinity": (
        lambda r: r.payloads["scent"].CopyFrom(scents_with(-np.inf)),
        INVALID,
        "payloads.scent has -inf in item 2; expected finite numbers",
    ),
    "different numbers of items": (
        lambda r: r.payloads["scent"].CopyFrom(to_proto(np.zeros((3, 6), np.float32))),
        INVALID,
        "payloads have different numbers of items (photo 4, scent 3); expected the same in all",
    ),
    "10,000 items": (
        lambda r: r.CopyFrom(request_of({"scent": np.zeros((10_000, 6), np.float32)})),
        INVALID,
        (
            "payloads.scent.shape is [10000, 6]: 10000 items; expected at most 1024 in one job "
            "(setting gateway.max_items_per_job)"
        ),
    ),
    "floor above one": (
        lambda r: setattr(r, "min_accuracy", 60.0),
        INVALID,
        "min_accuracy is 60.0; expected a number from 0 to 1",
    ),
    "floor below zero": (
        lambda r: setattr(r, "min_accuracy", -0.1),
        INVALID,
        "min_accuracy is -0.1; expected a number from 0 to 1",
    ),
    "floor that is no number": (
        lambda r: setattr(r, "min_accuracy", np.nan),
        INVALID,
        "min_accuracy is nan; expected a number from 0 to 1",
    ),
    "negative deadline": (
        lambda r: setattr(r, "latency_slo_ms", -5.0),
        INVALID,
        "latency_slo_ms is -5.0; expected a positive number of milliseconds",
    ),
    "deadline of nothing": (
        lambda r: setattr(r, "latency_slo_ms", 0.0),
        INVALID,
        "latency_slo_ms is 0.0; expected a positive number of milliseconds",
    ),
    "deadline that is no number": (
        lambda r: setattr(r, "latency_slo_ms", np.nan),
        INVALID,
        "latency_slo_ms is nan; expected a positive number of milliseconds",
    ),
    "modality that was not sent": (
        lambda r: r.CopyFrom(scents_of_four(modalities=["photo"])),
        INVALID,
        "modalities has 'photo'; expected some of the payloads: scent",
    ),
    "floor that cannot be met": (
        lambda r: setattr(r, "min_accuracy", 1.0),
        grpc.StatusCode.FAILED_PRECONDITION,
        "min_accuracy 1 cannot be met with photo+scent; the best that could be had is 0.",
    ),
}


@pytest.mark.parametrize(("change", "status", "message"), BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_bad_requests_are_refused_with_one_line(
    stub: gateway_pb2_grpc.GatewayStub, draw: Draw, change: Change, status: grpc.StatusCode, message: str
) -> None:
    request = request_of(draw(4))
    change(request)
    with pytest.raises(grpc.RpcError) as refused:
        stub.Predict(request, timeout=20)
    assert refused.value.code() is status
    details = refused.value.details() or ""
    assert details.startswith(message), details
    assert details == message or status is grpc.StatusCode.FAILED_PRECONDITION
    assert "\n" not in details


@pytest.mark.parametrize("method", ["Predict", "ListModels", "Status"])
def test_bytes_that_are_no_message(services: Launcher, method: str) -> None:
    with grpc.insecure_channel(services.address) as channel:
        call: Raw = channel.unary_unary(f"/mosel.v1.Gateway/{method}")
        with pytest.raises(grpc.RpcError) as refused:
            call(b"\xff\xff not a message", timeout=20)
    assert refused.value.code() is INVALID
    assert refused.value.details() == f"the request's bytes are no message that {method} knows"


def test_unknown_method(services: Launcher) -> None:
    with grpc.insecure_channel(services.address) as channel:
        call: Raw = channel.unary_unary("/mosel.v1.Gateway/Guess")
        with pytest.raises(grpc.RpcError) as refused:
            call(b"", timeout=20)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_message_beyond_the_limit(stub: gateway_pb2_grpc.GatewayStub) -> None:
    request = gateway_pb2.PredictRequest(model="fruit")
    request.payloads["photo"].data = bytes(65 * 1024 * 1024)
    with pytest.raises(grpc.RpcError) as refused:
        stub.Predict(request, timeout=30)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in (refused.value.details() or "")


@pytest.fixture
def files(tmp_path: Path, draw: Draw) -> Path:
    """A folder with good and bad payload files."""
    for name, array in draw(3).items():
        np.save(tmp_path / f"{name}.npy", array)
    np.save(tmp_path / "empty.npy", np.zeros((0, 6), np.float32))
    np.save(tmp_path / "double.npy", np.zeros((3, 6)))
    np.save(tmp_path / "nan.npy", np.full((3, 6), np.nan, np.float32))
    np.save(tmp_path / "many.npy", np.zeros((10_000, 6), np.float32))
    np.save(tmp_path / "objects.npy", np.array([{}, []], object), allow_pickle=True)
    np.save(tmp_path / "texts.npy", np.array(["a", "b"]))
    np.savez(tmp_path / "archive.npz", a=np.zeros(3))
    (tmp_path / "text.npy").write_text("scent")
    (tmp_path / "nothing.npy").write_bytes(b"")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "scent.npy").read_bytes()[:-10])
    return tmp_path


BAD_COMMANDS = {
    "no such file": (["fruit", "scent=away.npy"], "payload scent: away.npy: no such file; expected a .npy file"),
    "folder": (["fruit", "scent=."], "payload scent: .: "),
    "text": (["fruit", "scent=text.npy"], "payload scent: text.npy: "),
    "empty file": (["fruit", "scent=nothing.npy"], "payload scent: nothing.npy: "),
    "cut file": (["fruit", "scent=cut.npy"], "payload scent: cut.npy: "),
    "pickle": (["fruit", "scent=objects.npy"], "payload scent: objects.npy: "),
    "archive": (["fruit", "scent=archive.npz"], "payload scent: archive.npz is an archive of arrays; expected a .npy"),
    "array of texts": (["fruit", "scent=texts.npy"], "payloads.scent: dtype <U1 cannot be sent; expected one of BOOL"),
    "no equals sign": (["fruit", "scent.npy"], "payload is 'scent.npy'; expected modality=FILE.npy"),
    "no file": (["fruit", "scent="], "payload is 'scent='; expected modality=FILE.npy"),
    "twice": (["fruit", "scent=scent.npy", "scent=nan.npy"], "payload scent is given twice; expected it once"),
    "wrong model": (["tree", "scent=scent.npy"], "model is 'tree'; expected one of fruit"),
    "wrong modality": (["fruit", "taste=scent.npy"], "payloads has 'taste'; expected some of photo, scent"),
    "wrong dtype": (["fruit", "scent=double.npy"], "payloads.scent.dtype is FP64; expected FP32"),
    "wrong shape": (["fruit", "photo=photo.npy", "scent=empty.npy"], "payloads.scent.shape is [0, 6]"),
    "NaN": (["fruit", "scent=nan.npy"], "payloads.scent has nan in item 0; expected finite numbers"),
    "too many": (["fruit", "scent=many.npy"], "payloads.scent.shape is [10000, 6]: 10000 items; expected at most 1024"),
    "floor": (["fruit", "scent=scent.npy", "--min-accuracy", "1.5"], "min_accuracy is 1.5; expected a number"),
    "deadline": (["fruit", "scent=scent.npy", "--latency-slo-ms", "-3"], "latency_slo_ms is -3.0; expected a positive"),
    "modality": (["fruit", "scent=scent.npy", "--modality", "photo"], "modalities has 'photo'; expected some of"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_COMMANDS.values(), ids=BAD_COMMANDS.keys())
def test_mosel_predict_says_in_one_line_what_is_wrong(
    services: Launcher,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(files)
    monkeypatch.setattr("sys.argv", ["mosel", "predict", *arguments, "--address", services.address])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (1, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_mosel_predict_as_a_process(
    services: Launcher, files: Path, run_mosel: Callable[..., CompletedProcess[str]]
) -> None:
    good = run_mosel("predict", "fruit", "scent=scent.npy", "photo=photo.npy", "--address", services.address, cwd=files)
    assert good.returncode == 0, good.stderr
    assert good.stdout.count("photo+scent") == 3
    bad = run_mosel("predict", "fruit", "scent=text.npy", "--address", services.address, cwd=files)
    assert bad.returncode == 1
    assert bad.stdout == ""
    assert bad.stderr.startswith("error: payload scent: text.npy: ")
    assert bad.stderr.count("\n") == 1


def test_mosel_predict_without_services(files: Path, run_mosel: Callable[..., CompletedProcess[str]]) -> None:
    refused = run_mosel("predict", "fruit", "scent=scent.npy", "--address", "127.0.0.1:1", cwd=files)
    assert refused.returncode == 1
    assert refused.stderr == "error: service gateway at 127.0.0.1:1 is not reachable\n"
