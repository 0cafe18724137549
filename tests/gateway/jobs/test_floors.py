"""Whose floor a job is held to."""

from dataclasses import replace

import pytest

from gateway.jobs.checks import CheckedJob
from gateway.jobs.floors import Floors
from mosel.packages.model_package import ModelPackage
from mosel.v1.gateway_pb2 import CALLER, EFFORT_UNSPECIFIED, FLOOR_SOURCE_UNSPECIFIED, MODEL, SETTINGS, TENANT

NOBODY = FLOOR_SOURCE_UNSPECIFIED
TENANTS = {"alice": 0.01, "strict": 0.0, "bob": None}


@pytest.fixture
def job(fruit: ModelPackage) -> CheckedJob:
    """One whose caller says nothing, of a model that says 0.04."""
    package = replace(fruit, max_accuracy_loss=0.04)
    return CheckedJob(package, 4, ("photo", "scent"), None, None, False, EFFORT_UNSPECIFIED, late_ok=False)


@pytest.mark.parametrize(
    ("tenant", "for_all", "loss", "source"),
    [
        ("alice", 0.02, 0.01, TENANT),
        ("strict", 0.02, 0.0, TENANT),
        ("bob", 0.02, 0.02, SETTINGS),
        (None, 0.02, 0.02, SETTINGS),
        (None, 0.0, 0.0, SETTINGS),
        ("alice", None, 0.01, TENANT),
        ("bob", None, 0.04, MODEL),
        (None, None, 0.04, MODEL),
    ],
)
def test_the_nearest_that_states_a_floor_counts(
    job: CheckedJob, tenant: str | None, for_all: float | None, loss: float, source: int
) -> None:
    resolved = Floors(for_all, TENANTS.__getitem__).resolve(job, tenant)
    assert (resolved.min_accuracy, resolved.max_accuracy_loss, resolved.floor_source) == (None, loss, source)


@pytest.mark.parametrize("stated", [{"min_accuracy": 0.0}, {"max_accuracy_loss": 0.0}, {"max_accuracy_loss": 0.5}])
@pytest.mark.parametrize("exact", [False, True])
def test_what_the_caller_states_wins(job: CheckedJob, stated: dict[str, float], exact: bool) -> None:
    asked = replace(job, exact=exact, **stated)  # type: ignore[arg-type]
    assert Floors(0.02, TENANTS.__getitem__).resolve(asked, "alice") == replace(asked, floor_source=CALLER)


def test_modalities_that_the_caller_fixed_are_what_it_wants(job: CheckedJob) -> None:
    asked = replace(job, exact=True)
    assert Floors(0.02, TENANTS.__getitem__).resolve(asked, "alice") == asked
    assert asked.floor_source == NOBODY


def test_without_any_floor_there_is_none(job: CheckedJob, fruit: ModelPackage) -> None:
    asked = replace(job, package=fruit)
    assert Floors(None, TENANTS.__getitem__).resolve(asked, "bob") == asked
