"""Whom methods are for."""

from typing import Any

import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from gateway.access.methods import METHODS, Access, access_to
from gateway.inference.messages import POOL, SERVICE
from mosel.v1 import gateway_pb2


@pytest.mark.parametrize(
    ("method", "access"),
    [
        ("/inference.GRPCInferenceService/RepositoryModelLoad", Access.ADMINS),
        ("/inference.GRPCInferenceService/RepositoryModelUnload", Access.ADMINS),
        ("/inference.GRPCInferenceService/RepositoryIndex", Access.TENANTS),
        ("/inference.GRPCInferenceService/ModelInfer", Access.TENANTS),
        ("/mosel.v1.Gateway/LoadModel", Access.ADMINS),
        ("/mosel.v1.Gateway/UnloadModel", Access.ADMINS),
        ("/mosel.v1.Gateway/Observe", Access.ADMINS),
        ("/mosel.v1.Gateway/Status", Access.ADMINS),
        ("/mosel.v1.Gateway/Predict", Access.TENANTS),
        ("/mosel.v1.Gateway/SubmitJob", Access.TENANTS),
        ("/mosel.v1.Gateway/CancelJob", Access.TENANTS),
        ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Access.TENANTS),
        ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", Access.TENANTS),
        ("/mosel.v1.Gateway/Preload", Access.ADMINS),
        ("/mosel.v1.Gateway/DrainModel", Access.ADMINS),
        ("/mosel.v1.gateway/Predict", Access.ADMINS),
        ("/other.Service/Predict", Access.ADMINS),
        ("", Access.ADMINS),
        ("/grpc.health.v1.Health/Check", Access.ALL),
        ("/grpc.health.v1.Health/Reset", Access.ADMINS),
    ],
)
def test_whom_methods_are_for(method: str, access: Access) -> None:
    assert access_to(method) is access


def test_every_method_that_the_gateway_serves_is_listed_and_no_other() -> None:
    services: list[Any] = [
        SERVICE,
        gateway_pb2.DESCRIPTOR.services_by_name["Gateway"],
        health_pb2.DESCRIPTOR.services_by_name["Health"],
        reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
        POOL.FindServiceByName("grpc.reflection.v1.ServerReflection"),
    ]
    served = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    # Newer ones than what is installed have it.
    assert served | {"/grpc.health.v1.Health/List"} == METHODS.keys()
