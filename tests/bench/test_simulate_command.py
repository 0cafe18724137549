from datetime import date
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mosel.cli import app
from mosel.errors import ConfigError
from mosel.profiles.files import CallCost, Point, Profile, save_profile, wilson
from mosel.profiles.hardware import Hardware, Versions


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    points = (Point(batch_size=1, p50_ms=4, p95_ms=5), Point(batch_size=8, p50_ms=20, p95_ms=22))
    made_up = Profile(
        model="two",
        version="1",
        content_hash="0",
        hardware=Hardware(cpu="any", cores=2, device="cpu", workers=2, torch_threads={}),
        versions=Versions(python="3", torch="2", mosel="0"),
        measured_on=date(2024, 1, 1),
        quick=False,
        concurrency=2,
        accuracy_source="made up [for a test]",
        accuracy_measured=False,
        accuracy={name: wilson(value, 100) for name, value in {"a": 0.8, "b": 0.7, "a+b": 0.9}.items()},
        encoders={"a": points, "b": points},
        fusion={"a": points, "b": points, "a+b": points},
        calls={lane: CallCost(overhead_ms=1) for lane in ("a", "b", "fusion")},
    )
    save_profile(made_up, tmp_path / "two.json")
    return tmp_path / "two.json"


def simulate(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["simulate", "--seconds", "5", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_a_trace_is_run_against_a_profile(profile: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("second,requests\n0,5\n1,20\n")
    shown = simulate("--profile", str(profile), "--trace", str(trace), "--policy", "greedy", "--rate", "20")
    assert "made up [for a test]" in shown
    assert "greedy, 20 jobs/s for 5 s" in shown
    assert "jobs missed" in shown


def test_without_shedding_every_job_is_answered(profile: Path) -> None:
    shown = simulate("--profile", str(profile), "--rate", "60", "--policy", "all", "--late-ok")
    assert "late" in shown
    assert "refused" not in shown


def test_an_unknown_policy_is_named(profile: Path) -> None:
    with pytest.raises(ConfigError, match="--policy is 'best'; expected one of all"):
        simulate("--profile", str(profile), "--policy", "best")


def test_a_missing_profile_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json"):
        simulate("--profile", str(tmp_path / "none.json"))
