"""What is demanded on the command line is checked as in the Python client, before anything is read or started."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mosel.cli import app
from mosel.errors import InvalidRequest

COMMANDS = pytest.mark.parametrize(
    "command",
    [
        ["plan", "nobody"],
        ["predict", "nobody", "pen={pen}", "--address", "127.0.0.1:1"],
        ["bench", "load", "--address", "127.0.0.1:1"],
    ],
    ids=["plan", "predict", "bench load"],
)


@COMMANDS
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--min-accuracy", "nan", "min_accuracy is nan; expected a number from 0 to 1"),
        ("--max-accuracy-loss", "nan", "max_accuracy_loss is nan; expected a number from 0 to 1"),
        ("--min-accuracy", "1.5", r"min_accuracy is 1\.5; expected a number from 0 to 1"),
        ("--latency-slo-ms", "0", r"latency_slo_ms is 0\.0; expected a positive number of milliseconds"),
        ("--latency-slo-ms", "inf", "latency_slo_ms is inf; expected a positive number of milliseconds"),
    ],
)
def test_a_wrong_demand_is_named(command: list[str], option: str, value: str, message: str, tmp_path: Path) -> None:
    pen = tmp_path / "pen.npy"
    np.save(pen, np.zeros((1, 3), np.float32))
    arguments = [part.format(pen=pen) for part in command]
    with pytest.raises(InvalidRequest, match=f"^{message}$"):
        CliRunner().invoke(app, [*arguments, option, value], catch_exceptions=False)


def test_an_effort_that_is_none_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"^effort is 'most'; expected cheapest or best$"):
        CliRunner().invoke(app, ["plan", "nobody", "--effort", "most"], catch_exceptions=False)


@COMMANDS
def test_two_floors_are_one_too_many(command: list[str], tmp_path: Path) -> None:
    pen = tmp_path / "pen.npy"
    np.save(pen, np.zeros((1, 3), np.float32))
    arguments = [part.format(pen=pen) for part in command]
    both = ["--min-accuracy", "0.5", "--max-accuracy-loss", "0.5"]
    with pytest.raises(InvalidRequest, match="min_accuracy and max_accuracy_loss; expected one of them"):
        CliRunner().invoke(app, [*arguments, *both], catch_exceptions=False)
