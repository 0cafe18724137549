"""`mosel models`: what is served."""

from typing import TYPE_CHECKING

from mosel.cli.options import DEFAULT_ADDRESS, Address, Ca, Certificate, Key, Token, connect

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from mosel.client import ModelInfo, Weakness


def models(
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
) -> None:
    """Show the models of a running system: what each modality set is expected and guaranteed to reach, and how fast."""
    from rich.console import Console

    with connect(address, token, ca, certificate, key) as client:
        served = client.models()
    console = Console()
    for model in served:
        inputs = ", ".join(f"{name} {info.dtype} {list(info.shape)}" for name, info in model.modalities.items())
        state = ("ready" if model.ready else "not ready") + (f": {model.reason}" if model.reason else "")
        console.print(f"{model.name} {model.version} ({state}): {model.description}", markup=False)
        console.print(f"  inputs per item: {inputs}", markup=False)
        if model.latencies:
            console.print(f"  latencies: {model.latencies}", markup=False)
        console.print(_table(model))


def _table(model: "ModelInfo") -> "Table":
    """The modality sets; what only calibration rows tell is left out where there are none."""
    from rich.table import Table

    from mosel.client.assurance import rounded_down, rounded_up

    sets = dict(sorted(model.sets.items(), key=lambda entry: entry[1].accuracy))
    known = sets.values()
    columns = {
        "modality set": list(sets),
        "expected": [f"{info.accuracy:.4f}" for info in known],
        "at least": [bound_text(info.guaranteed_accuracy, rounded_down) for info in known],
        "worse by at most": [bound_text(info.guaranteed_loss, rounded_up) for info in known],
        "worst label": [weakness_text(info.worst_label) for info in known],
        "worst group": [weakness_text(info.worst_group) for info in known],
        "ms for one item": [f"{info.latency_ms:.2f}" for info in known],
        "available": ["yes" if info.available else "no" for info in known],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    table = Table(*shown)
    for row in zip(*shown.values(), strict=True):
        table.add_row(*row)
    return table


def bound_text(value: float | None, rounded: "Callable[[float], str]") -> str:
    """A bound, rounded; empty where nobody knows."""
    return "" if value is None else rounded(value)


def weakness_text(weakness: "Weakness | None") -> str:
    """A weakness in a few words, for a table; empty where nobody knows."""
    from rich.markup import escape

    return "" if weakness is None else escape(f"{weakness.name}: {weakness.accuracy:.2f}")
