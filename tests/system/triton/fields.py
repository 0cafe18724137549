"""Compares names, numbers and types of a descriptor set with tritonclient's: fields.py FILE. Prints what differs."""

import sys
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet
from tritonclient.grpc import model_config_pb2, service_pb2

Facts = Iterator[tuple[str, object]]


def facts_of(file: FileDescriptorProto) -> Facts:
    """Everything in a file by its full name."""
    for message in file.message_type:
        yield from _message(f"{file.package}.{message.name}", message)
    for enum in file.enum_type:
        yield from _enum(f"{file.package}.{enum.name}", enum)
    for service in file.service:
        for method in service.method:
            streams = (method.client_streaming, method.server_streaming)
            yield f"{file.package}.{service.name}.{method.name}", (method.input_type, method.output_type, streams)


def _message(name: str, message: DescriptorProto) -> Facts:
    for field in message.field:
        yield f"{name}.{field.name}", (field.number, field.type, field.label, field.type_name)
    for nested in message.nested_type:
        yield from _message(f"{name}.{nested.name}", nested)
    for enum in message.enum_type:
        yield from _enum(f"{name}.{enum.name}", enum)


def _enum(name: str, enum: EnumDescriptorProto) -> Facts:
    for value in enum.value:
        yield f"{name}.{value.name}", value.number


def main(file: Path) -> None:
    """Fails where something of ours is not theirs."""
    theirs: dict[str, object] = {}
    for module in (model_config_pb2, service_pb2):
        copy = FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(copy)
        theirs.update(facts_of(copy))
    (own,) = FileDescriptorSet.FromString(file.read_bytes()).file
    ours = dict(facts_of(own))
    assert len(ours) > 100, ours
    for name, fact in ours.items():
        assert theirs.get(name) == fact, f"{name} is {fact}; theirs is {theirs.get(name)}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
