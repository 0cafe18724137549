"""Options that several commands share, and the settings they make."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mosel.client import Client
    from mosel.config import Settings
    from mosel.tls import Tls

DEFAULT_ADDRESS = "127.0.0.1:8001"

ModelsFolder = Annotated[Path | None, typer.Option("--models", help="Folder of model packages.")]
Models = Annotated[list[str] | None, typer.Option("--model", help="Serve only this model (repeatable).")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]
Placement = Annotated[
    str | None,
    typer.Option(help="single: all services in one process (faster, less memory). services: each in its own."),
]
Host = Annotated[str | None, typer.Option(help="Address to listen on.")]
GrpcPort = Annotated[int | None, typer.Option(help="gRPC port; 0 takes a free one.")]
HttpPort = Annotated[int | None, typer.Option(help="HTTP port; 0 takes a free one.")]
MetricsPort = Annotated[int | None, typer.Option(help="Port of Prometheus metrics; 0 takes a free one.")]
Address = Annotated[str, typer.Option(help="The gateway: host:port or unix:/path.")]
Token = Annotated[
    str | None, typer.Option(envvar="MOSEL_TOKEN", help="Says who you are; others on this machine can see the option.")
]
Ca = Annotated[
    Path | None, typer.Option(help="TLS: certificates of the authorities that may have signed the service's (PEM).")
]
Certificate = Annotated[Path | None, typer.Option(help="Mutual TLS: your certificate (PEM).")]
Key = Annotated[Path | None, typer.Option(help="Mutual TLS: its private key (PEM).")]
MinAccuracy = Annotated[float | None, typer.Option(help="Accuracy floor: at least so much, 0..1.")]
MaxAccuracyLoss = Annotated[
    float | None, typer.Option(help="Instead of it: at most so much worse than everything, 0..1.")
]
DataFolder = Annotated[Path | None, typer.Option("--data", help="Folder with samples; default: MOSEL_DATA.")]


def settings_from(
    models: Path | None = None,
    model: list[str] | None = None,
    device: str | None = None,
    tls: Mapping[str, Path | None] | None = None,
    placement: str | None = None,
    /,
    **gateway: str | int | Path | None,
) -> "Settings":
    """The effective settings, with what was given on the command line; `tls` and `gateway` are flags of their sections.

    Raises:
        ConfigError: a setting or a flag is wrong.
    """
    from mosel.config import load_settings

    flags = {
        "models_dir": models,
        "models": tuple(model) if model else None,
        "device": device,
        "placement": placement,
        "tls": _given(tls or {}) or None,
        "gateway": _given(gateway) or None,
    }
    return load_settings(**_given(flags))


def connect(address: str, token: str | None, ca: Path | None, certificate: Path | None, key: Path | None) -> "Client":
    """A client of a gateway.

    Raises:
        ConfigError: a file for TLS is wrong.
    """
    from mosel.client import Client

    return Client(address, token=token, tls=tls_from(ca, certificate, key))


def tls_from(ca: Path | None, certificate: Path | None, key: Path | None) -> "Tls | None":
    """TLS as the command line asks for it; None: plain text.

    Raises:
        ConfigError: only one of certificate and key is given.
    """
    from mosel.tls import Tls

    return None if ca is None and certificate is None and key is None else Tls(ca, certificate, key)


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}
