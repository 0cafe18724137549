"""`mosel models`: what is served."""

from mosel.cli.options import DEFAULT_ADDRESS, Address, Ca, Certificate, Key, Token, connect


def models(
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
) -> None:
    """Show the models of a running system, with accuracy and latency of every modality set."""
    from rich.console import Console
    from rich.table import Table

    with connect(address, token, ca, certificate, key) as client:
        served = client.models()
    console = Console()
    for model in served:
        inputs = ", ".join(f"{name} {info.dtype} {list(info.shape)}" for name, info in model.modalities.items())
        state = ("ready" if model.ready else "not ready") + (f": {model.reason}" if model.reason else "")
        console.print(f"{model.name} {model.version} ({state}): {model.description}")
        console.print(f"  inputs per item: {inputs}", markup=False)
        table = Table("modality set", "accuracy", "ms for one item", "available")
        for name, info in sorted(model.sets.items(), key=lambda entry: entry[1].accuracy):
            table.add_row(name, f"{info.accuracy:.4f}", f"{info.latency_ms:.2f}", "yes" if info.available else "no")
        console.print(table)
