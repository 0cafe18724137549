"""Who may call which method of gRPC. Knows no gRPC: methods are names."""

import enum
from collections.abc import Iterator, Mapping


class Access(enum.Enum):
    """Whom a method is for."""

    ALL = "everybody, without a token"
    TENANTS = "every tenant"
    ADMINS = "admins alone"


_SERVICES: Mapping[str, Mapping[Access, str]] = {
    # Supervisors and load balancers must be able to ask how a gateway is.
    "grpc.health.v1.Health": {Access.ALL: "Check List Watch"},
    "grpc.reflection.v1.ServerReflection": {Access.TENANTS: "ServerReflectionInfo"},
    "grpc.reflection.v1alpha.ServerReflection": {Access.TENANTS: "ServerReflectionInfo"},
    "inference.GRPCInferenceService": {
        Access.TENANTS: "ServerLive ServerReady ModelReady ServerMetadata ModelMetadata ModelConfig ModelStatistics "
        "ModelInfer ModelStreamInfer RepositoryIndex",
        Access.ADMINS: "RepositoryModelLoad RepositoryModelUnload",
    },
    "mosel.v1.Gateway": {
        Access.TENANTS: "Predict SubmitJob Plan GetJob CancelJob ListModels",
        # What is served, and how the services and all tenants are.
        Access.ADMINS: "LoadModel UnloadModel Observe Status",
    },
}


def _listed() -> Iterator[tuple[str, Access]]:
    for service, methods in _SERVICES.items():
        for access, names in methods.items():
            for name in names.split():
                yield f"/{service}/{name}", access


METHODS: Mapping[str, Access] = dict(_listed())


def access_to(method: str, methods: Mapping[str, Access] = METHODS) -> Access:
    """Whom a method is for; one that is not listed is for admins alone.

    Args:
        method: its full name, `/package.Service/Method`.
        methods: those that are listed.
    """
    return methods.get(method, Access.ADMINS)
