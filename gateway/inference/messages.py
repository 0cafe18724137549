"""The messages of the Open Inference Protocol, in a pool of their own.

tritonclient and others register messages of the same names in the pool that a process has by default; so both can be
there. The pool also holds what else the gateway serves, so that reflection finds everything in one place.
"""

from importlib import resources
from typing import Any

from google.protobuf import json_format, text_format
from google.protobuf.descriptor import Descriptor, FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from mosel.v1 import gateway_pb2

_PACKAGE = "inference"
_FILE = "open_inference.binpb"


def _pool() -> DescriptorPool:
    pool = DescriptorPool()
    own = FileDescriptorSet.FromString(resources.files(__package__).joinpath(_FILE).read_bytes())
    for file in own.file:
        pool.AddSerializedFile(file.SerializeToString())
    for module in (gateway_pb2, health_pb2, reflection_pb2):
        _add(pool, module.DESCRIPTOR)
    pool.Add(_newer(FileDescriptorProto.FromString(reflection_pb2.DESCRIPTOR.serialized_pb)))
    return pool


def _newer(file: FileDescriptorProto) -> FileDescriptorProto:
    """The file of `v1alpha` as `v1` has it: other names, the same messages."""
    return text_format.Parse(text_format.MessageToString(file).replace("v1alpha", "v1"), FileDescriptorProto())


def _add(pool: DescriptorPool, file: FileDescriptor) -> None:
    """Adds a file of the default pool, behind those that it needs."""
    for needed in file.dependencies:
        _add(pool, needed)
    pool.AddSerializedFile(file.serialized_pb)


POOL = _pool()
SERVICE = POOL.FindServiceByName(f"{_PACKAGE}.GRPCInferenceService")


def class_of(descriptor: Descriptor) -> type[Message]:
    """The class of a message in the pool."""
    return GetMessageClass(descriptor)


def _class(name: str) -> Any:
    return class_of(POOL.FindMessageTypeByName(f"{_PACKAGE}.{name}"))


def message(name: str, content: dict[str, Any]) -> Message:
    """A message of the protocol with the content that its JSON has."""
    made: Message = _class(name)()
    return json_format.ParseDict(content, made)


ModelInferRequest = _class("ModelInferRequest")
ModelInferResponse = _class("ModelInferResponse")
ModelStreamInferResponse = _class("ModelStreamInferResponse")
