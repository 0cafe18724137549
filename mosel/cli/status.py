"""`mosel status`: what every service does."""

from mosel.cli.options import DEFAULT_ADDRESS, Address, Ca, Certificate, Key, Token, connect


def status(
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
) -> None:
    """Show every service of a running system: state, transport, what it has done."""
    from rich.console import Console
    from rich.table import Table

    with connect(address, token, ca, certificate, key) as client:
        services = client.status()
    table = Table("service", "state", "pid", "address", "networks", "counters")
    for service in services:
        state = "ready" if service.ready else f"not ready: {service.detail or 'starting'}"
        counters = ", ".join(f"{name} {value}" for name, value in sorted(service.counters.items()))
        forms = ", ".join(f"{model.partition('@')[0]} {form}" for model, form in sorted(service.forms.items()))
        table.add_row(service.name, state, str(service.pid or "-"), service.address, forms, counters)
    edges = Table("from", "to", "tensors travel by", "why not better")
    for edge in (edge for service in services for edge in service.edges):
        edges.add_row(edge.producer, edge.consumer, edge.rung, edge.reason)
    console = Console()
    console.print(table)
    console.print(edges)
