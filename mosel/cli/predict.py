"""`mosel predict`: one job from files."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mosel.cli.options import (
    DEFAULT_ADDRESS,
    Address,
    Ca,
    Certificate,
    Key,
    MaxAccuracyLoss,
    MinAccuracy,
    Token,
    connect,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.table import Table

    from mosel.client import Assurance, Prediction


def sentence(assurance: "Assurance", *happened: str) -> str:
    """What an answer stands on, what happened, and whose floor counted unless it was the caller's."""
    floor = "" if assurance.floor_source in (None, "caller") else f"floor of the {assurance.floor_source}"
    return "; ".join(filter(None, (str(assurance), *happened, floor, assurance.note)))


def predict(
    model: Annotated[str, typer.Argument(help="The model's name.")],
    payload: Annotated[list[str], typer.Argument(help="modality=FILE.npy, an array with the items first; repeatable.")],
    min_accuracy: MinAccuracy = None,
    max_accuracy_loss: MaxAccuracyLoss = None,
    latency_slo_ms: Annotated[float | None, typer.Option(help="Deadline in milliseconds.")] = None,
    modality: Annotated[list[str] | None, typer.Option(help="Run only this modality (repeatable).")] = None,
    effort: Annotated[
        Literal["cheapest", "best"] | None, typer.Option(help="What to do with time that the floor leaves unused.")
    ] = None,
    late_ok: Annotated[bool, typer.Option("--late-ok", help="Take an answer after the deadline, too.")] = False,
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
) -> None:
    """Predict the items of one job and print labels, modality sets, and what is guaranteed or expected of them."""
    from rich.console import Console

    from mosel.errors import InvalidRequest

    payloads: dict[str, NDArray[np.generic]] = {}
    for name, file in map(_split, payload):
        if name in payloads:
            raise InvalidRequest(f"payload {name} is given twice; expected it once")
        payloads[name] = _load(name, Path(file))
    with connect(address, token, ca, certificate, key) as client:
        prediction = client.predict(
            model,
            payloads,
            min_accuracy=min_accuracy,
            max_accuracy_loss=max_accuracy_loss,
            latency_slo_ms=latency_slo_ms,
            modalities=modality,
            effort=effort,
            late_ok=late_ok,
        )
    console = Console()
    console.print(_items(prediction))
    console.print(_sentence(prediction), markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"expected accuracy {prediction.expected_accuracy:.4f}, queue {prediction.queue_ms:.2f} ms, "
        f"compute {prediction.compute_ms:.2f} ms, slack {prediction.deadline_slack_ms:.0f} ms, job {prediction.job_id}"
    )
    if prediction.unavailable_modalities:
        console.print(f"without {', '.join(prediction.unavailable_modalities)}, whose encoders are away")


def _items(prediction: "Prediction") -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table("item", "label", "modality set")
    labels = prediction.labels or tuple(str(row.tolist()) for row in prediction.output)
    for index, (label, modality_set) in enumerate(zip(labels, prediction.modality_sets, strict=True)):
        table.add_row(str(index), escape(label), modality_set)
    return table


def _sentence(prediction: "Prediction") -> str:
    """What the answer stands on: `guaranteed at least 0.951 (95 %); ran pen and image; saved 68 %`."""
    assurance = prediction.assurance
    ran = f"ran {_ran(Counter(prediction.modality_sets))}"
    return sentence(assurance, ran, f"saved {100 * assurance.saved:.0f} %")


def _ran(sets: Mapping[str, int]) -> str:
    names = {name: " and ".join(", ".join(name.split("+")).rsplit(", ", 1)) for name in sets}
    if len(sets) == 1:
        return next(iter(names.values()))
    return ", ".join(f"{names[name]} for {count}" for name, count in sets.items())


def _split(argument: str) -> tuple[str, str]:
    from mosel.errors import InvalidRequest

    name, equals, file = argument.partition("=")
    if not (name and equals and file):
        raise InvalidRequest(f"payload is '{argument}'; expected modality=FILE.npy")
    return name, file


def _load(name: str, file: Path) -> "NDArray[np.generic]":
    import numpy as np

    from mosel.errors import InvalidRequest

    try:
        array = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise InvalidRequest(f"payload {name}: {file}: no such file; expected a .npy file") from None
    except (ValueError, OSError, EOFError) as error:
        raise InvalidRequest(f"payload {name}: {file}: {error}; expected a .npy file") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise InvalidRequest(f"payload {name}: {file} is an archive of arrays; expected a .npy file with one array")
    return array
