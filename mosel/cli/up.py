"""`mosel up`: start everything."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from mosel.cli.options import Device, GrpcPort, Host, HttpPort, MetricsPort, Models, ModelsFolder, Placement


def up(
    models: ModelsFolder = None,
    model: Models = None,
    device: Device = None,
    placement: Placement = None,
    host: Host = None,
    grpc_port: GrpcPort = None,
    http_port: HttpPort = None,
    metrics_port: MetricsPort = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="TLS on the public ports: the gateway's certificate (PEM).")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="Mutual TLS: certificates of the authorities that sign your callers' (PEM).")
    ] = None,
    tokens: Annotated[Path | None, typer.Option(help="File of tenants and the hashes of their tokens.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let other machines call without TLS and tokens.")
    ] = False,
    ready_timeout_s: Annotated[float, typer.Option(help="Seconds to wait for the services.")] = 120,
) -> None:
    """Start gateway, selector, encoders and fusion, and start those again that end; Ctrl-C stops them."""
    from mosel.cli.options import settings_from
    from mosel.cli.starting import started

    settings = settings_from(
        models,
        model,
        device,
        {"certificate": tls_certificate, "key": tls_key, "client_ca": tls_client_ca},
        placement,
        host=host,
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
        tokens_file=tokens,
        insecure=insecure or None,
    )
    known = set(settings.profiles_dir.glob("*.json"))
    with started(settings, ready_timeout_s) as launcher:
        _report_quick_profiles(set(settings.profiles_dir.glob("*.json")) - known)
        names = ", ".join(launcher.packages)
        where = f"gRPC on {launcher.address}, HTTP on {launcher.http_address}, metrics on {launcher.metrics_address}"
        typer.echo(f"ready: {where}, models: {names} (Ctrl-C stops)")
        if settings.tls.certificate or settings.gateway.tokens_file:
            typer.echo(f"for this user alone, without a token: {launcher.local_address}")
        while True:
            for line in launcher.supervise():
                typer.echo(line)
            launcher.trim_logs()
            time.sleep(0.1)


def _report_quick_profiles(files: Iterable[Path]) -> None:
    """Says which models the selector has measured just now."""
    from mosel.profiles.files import read_profile

    for name in sorted(read_profile(file).model for file in files):
        typer.echo(
            f"no profile of {name} for this hardware yet: measured a quick one; `mosel profile {name}` makes a full one"
        )
