"""What a client takes and gives has a name in `mosel`, and nothing else does."""

import dataclasses
import inspect
import typing
from collections.abc import Iterator

import pytest

import mosel
from mosel import AsyncClient, Client

CLASSES = [
    "Assurance",
    "AsyncClient",
    "Client",
    "Demand",
    "EdgeInfo",
    "ItemResults",
    "JobAccepted",
    "JobInfo",
    "JobSummary",
    "ModalityInfo",
    "ModelInfo",
    "ObserveEvent",
    "ObservedItems",
    "PlanInfo",
    "Prediction",
    "Retry",
    "ServiceInfo",
    "SetInfo",
    "StrategyInfo",
    "SupportsDlpack",
    "Tls",
    "Weakness",
]
ALIASES = ["JobEvent", "Payloads"]


def classes_in(hint: object) -> Iterator[type]:
    """Classes of `mosel` that a type is made of: members of unions, arguments of generics, fields of dataclasses."""
    for part in typing.get_args(hint):
        yield from classes_in(part)
    if isinstance(hint, list):
        for part in hint:
            yield from classes_in(part)
    if isinstance(hint, type) and hint.__module__.partition(".")[0] == "mosel":
        yield hint
        if dataclasses.is_dataclass(hint) or typing.is_typeddict(hint):
            for field in typing.get_type_hints(hint).values():
                yield from classes_in(field)


def methods_of(client: type) -> dict[str, object]:
    """The public ones, and how a client is made."""
    found = inspect.getmembers(client, inspect.isfunction)
    return {name: method for name, method in found if name == "__init__" or not name.startswith("_")}


def test_the_names_are_these() -> None:
    assert mosel.__all__ == [*sorted(CLASSES + ALIASES), "errors"]
    assert [name for name in CLASSES if not isinstance(getattr(mosel, name), type)] == []


def test_the_walk_finds_what_is_nested() -> None:
    found = {kind.__name__ for kind in classes_in(typing.get_type_hints(Client.models)["return"])}
    assert found == {"ModelInfo", "ModalityInfo", "SetInfo", "Weakness"}
    found = {kind.__name__ for hint in typing.get_type_hints(Client.submit_job).values() for kind in classes_in(hint)}
    assert found == {"SupportsDlpack", "Demand", "JobAccepted", "ItemResults", "JobSummary", "Assurance"}


@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_every_class_in_a_signature_is_exported(client: type) -> None:
    methods = methods_of(client)
    assert {"__init__", "predict", "submit_job", "plan", "status"} <= methods.keys()
    for name, method in methods.items():
        for hint in typing.get_type_hints(method).values():
            unnamed = [kind for kind in classes_in(hint) if getattr(mosel, kind.__name__, None) is not kind]
            assert unnamed == [], f"{client.__name__}.{name}"


def test_both_clients_have_the_same_methods_with_the_same_parameters() -> None:
    blocking, asynchronous = methods_of(Client), methods_of(AsyncClient)
    assert blocking.keys() == asynchronous.keys()
    for name in blocking:
        parameters = [
            [(p.name, p.kind, p.default) for p in inspect.signature(getattr(client, name)).parameters.values()]
            for client in (Client, AsyncClient)
        ]
        assert parameters[0] == parameters[1], name
