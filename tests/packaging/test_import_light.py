"""`import mosel` is enough for a client, and brings in nothing heavy."""

import subprocess
import sys
import typing

import pytest

import mosel

HEAVY = [
    "torch",
    "pydantic",
    "typer",
    "rich",
    "matplotlib",
    "psutil",
    "cupy",
    "gateway",
    "selector",
    "encoders",
    "fusion",
]


@pytest.mark.parametrize("module", ["mosel", "mosel.client", "mosel.errors", "mosel.v1.gateway_pb2_grpc"])
def test_import_brings_in_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == ""


def test_the_command_line_brings_in_no_client() -> None:
    heavy = ["numpy", "grpc", "mosel.client", "rich", "torch"]
    code = f"import sys, mosel.cli; print(*[name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == ""


def test_what_the_package_offers_is_there_when_it_is_asked_for() -> None:
    for name in set(mosel.__all__) - {"JobEvent", "Payloads"}:
        assert getattr(mosel, name).__name__.rpartition(".")[2] == name
    assert mosel.ItemResults in typing.get_args(mosel.JobEvent)
    assert typing.get_args(mosel.Payloads)[0] is str
    with pytest.raises(AttributeError, match="module 'mosel' has no attribute 'Clients'"):
        mosel.Clients  # type: ignore[attr-defined] # noqa: B018


def test_the_selector_and_gateway_never_load_torch() -> None:
    code = "import sys, selector, gateway; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
