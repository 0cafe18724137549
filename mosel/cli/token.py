"""`mosel token`: a token for somebody who may call."""

from pathlib import Path
from typing import Annotated

import typer


def token(
    name: Annotated[str, typer.Argument(help="The tenant: letters, digits, - and _.")],
    admin: Annotated[bool, typer.Option("--admin", help="May also load and unload models.")] = False,
    requests_per_s: Annotated[float | None, typer.Option(help="Requests a second, on average.")] = None,
    burst: Annotated[int | None, typer.Option(help="Requests at once. [default: those of a second]")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Requests under way at the same time.")] = None,
    payload_bytes_per_s: Annotated[float | None, typer.Option(help="Bytes of requests a second, on average.")] = None,
    max_accuracy_loss: Annotated[
        float | None, typer.Option(help="The floor of requests that state none: at most so much worse than everything.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Tokens file to add the tenant to; made if it is not there.")
    ] = None,
) -> None:
    """Make a token: print it, once. The tokens file gets its hash and the limits, never the token itself."""
    from gateway.access.tenants import add_tenant, hash_of, new_token, tenant_entry

    secret = new_token()
    tenant = {
        "token_sha256": [hash_of(secret)],
        "admin": admin or None,
        "requests_per_s": requests_per_s,
        "burst": burst,
        "max_concurrent": max_concurrent,
        "payload_bytes_per_s": payload_bytes_per_s,
        "max_accuracy_loss": max_accuracy_loss,
    }
    entry = tenant_entry(name, tenant)
    # Standard output has the token and nothing else, so that a script can keep it.
    if file is None:
        typer.echo(f"To be added to the tokens file:\n\n{entry}", err=True)
    else:
        add_tenant(file, name, entry)
        typer.echo(f"Added {name} to {file}; a running gateway knows it within a second or two.", err=True)
    typer.echo("The token, which nothing can show again:", err=True)
    typer.echo(secret)
