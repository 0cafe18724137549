"""`mosel reload` and `mosel unload`: which models a running system has loaded."""

from typing import Annotated

import typer

from mosel.cli.options import DEFAULT_ADDRESS, Address, Ca, Certificate, Key, Token, connect

Model = Annotated[str, typer.Argument(help="Name of the model, that of its folder.")]
Timeout = Annotated[float, typer.Option(help="Seconds to wait at most; the services go on after that.")]


def reload(
    model: Model,
    timeout_s: Timeout = 600,
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
) -> None:
    """Load a model from the services' models folder, or load it anew; jobs under way are not touched."""
    with connect(address, token, ca, certificate, key) as client:
        before = {known.name: known.revision for known in client.models() if known.ready}
        loaded = client.load_model(model, timeout_s)
    done = "nothing changed:" if before.get(loaded.name) == loaded.revision else "loaded"
    typer.echo(f"{done} {loaded.name} {loaded.version}, revision {loaded.revision}")


def unload(
    model: Model,
    timeout_s: Timeout = 600,
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
) -> None:
    """Take no more jobs for a model, and free its memory once those under way are over."""
    with connect(address, token, ca, certificate, key) as client:
        client.unload_model(model, timeout_s)
    typer.echo(f"unloaded {model}")
