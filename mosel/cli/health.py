"""`mosel health`: ask a service's `grpc.health.v1`."""

from typing import Annotated

import typer

from mosel.cli.options import DEFAULT_ADDRESS, Ca, Certificate, Key, tls_from


def health(
    address: Annotated[str, typer.Argument(help="Any service: host:port or unix:/path.")] = DEFAULT_ADDRESS,
    service: Annotated[str, typer.Option(help="Service name; a model's name asks whether it is ready.")] = "",
    timeout_s: Annotated[float, typer.Option(help="Seconds to wait at most.")] = 2.0,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
) -> None:
    """Exit with 0 if a service is healthy; for container health checks."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from mosel.errors import ServiceUnavailable
    from mosel.status import error_from_rpc

    tls, options = tls_from(ca, certificate, key), [("grpc.enable_http_proxy", 0)]
    with (
        grpc.insecure_channel(address, options)
        if tls is None
        else grpc.secure_channel(address, tls.channel_credentials(), options)
    ) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            reply = stub.Check(  # type: ignore[attr-defined]
                health_pb2.HealthCheckRequest(service=service), timeout=timeout_s
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error, f"{service} at {address}".lstrip()) from None
    state = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    if reply.status != health_pb2.HealthCheckResponse.SERVING:
        raise ServiceUnavailable(f"{address} is {state}")
    typer.echo(state)
