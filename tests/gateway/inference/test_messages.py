"""The protocol's messages live in a pool of their own, beside those of others with the same names."""

import subprocess
import sys
from pathlib import Path

from google.protobuf import descriptor_pool
from google.protobuf.message_factory import GetMessageClass

from gateway.inference.messages import POOL, SERVICE, ModelInferRequest, message
from mosel.v1 import gateway_pb2

ROOT = Path(__file__).parents[3]
# Another package's idea of the same names, in the pool that every generated module uses.
OTHERS = """
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
file = descriptor_pb2.FileDescriptorProto(name="grpc_service.proto", package="inference", syntax="proto3")
for name in ("ModelInferRequest", "ModelConfig", "DataType"):
    field = file.message_type.add(name=name).field.add(name="theirs", number=1, type=9, label=1)
pool = descriptor_pool.Default()
pool.AddSerializedFile(file.SerializeToString())
theirs = message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelInferRequest"))
"""
OURS = "from gateway.inference.messages import ModelInferRequest as ours\n"
CHECK = """
assert theirs(theirs="x").SerializeToString() == b"\\n\\1x"
assert ours(model_name="x").SerializeToString() == b"\\n\\1x"
assert theirs.DESCRIPTOR.full_name == ours.DESCRIPTOR.full_name == "inference.ModelInferRequest"
"""


def test_others_may_have_messages_of_the_same_names_loaded_before_or_after() -> None:
    for order in (OTHERS + OURS, OURS + OTHERS):
        command = [sys.executable, "-W", "error", "-c", order + CHECK]
        result = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


def test_the_pool_knows_everything_that_the_gateway_serves() -> None:
    for name in (SERVICE.full_name, "mosel.v1.Gateway", "grpc.health.v1.Health"):
        assert POOL.FindServiceByName(name).full_name == name
    ours = POOL.FindServiceByName("mosel.v1.Gateway").methods_by_name["Predict"].input_type
    data = gateway_pb2.PredictRequest(model="x").SerializeToString()
    assert GetMessageClass(ours).FromString(data).SerializeToString() == data


def test_nothing_of_the_protocol_is_in_the_pool_of_the_process() -> None:
    assert ModelInferRequest.DESCRIPTOR.file.pool is POOL
    names = {*SERVICE.file.message_types_by_name, *SERVICE.file.enum_types_by_name, *SERVICE.file.services_by_name}
    code = (
        "import gateway.__main__\n"
        "from google.protobuf import descriptor_pool\n"
        f"for name in {sorted(names)!r}:\n"
        "    try: descriptor_pool.Default().FindFileContainingSymbol(f'inference.{name}')\n"
        "    except KeyError: continue\n"
        "    raise SystemExit(name)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    assert descriptor_pool.Default() is not POOL


def test_messages_take_the_content_of_their_json() -> None:
    made: object = message("ModelMetadataResponse", {"name": "x", "inputs": [{"name": "y", "shape": [-1, 3]}]})
    assert made.inputs[0].shape == [-1, 3]  # type: ignore[attr-defined]
