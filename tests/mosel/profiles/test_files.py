"""Profile files: what is written is read, and only what belongs to these weights on this hardware."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mosel.config import Settings
from mosel.errors import ConfigError
from mosel.packages.model_package import ModelPackage, load_package
from mosel.profiles.files import (
    CallCost,
    Point,
    Profile,
    load_profile,
    profile_file,
    quick_profile,
    read_profile,
    save_profile,
    wilson,
)
from mosel.profiles.hardware import device_name, this_hardware

POINTS = (Point(batch_size=1, p50_ms=1, p95_ms=2), Point(batch_size=8, p50_ms=3, p95_ms=4))
SETS = ("photo", "scent", "photo+scent")
LANES = ("photo", "scent", "fusion")


@pytest.fixture
def settings(settings_with: Callable[..., Settings], tmp_path: Path) -> Settings:
    return settings_with(profiles_dir=tmp_path / "profiles")


@pytest.fixture
def quick(fruit: ModelPackage, settings: Settings) -> Profile:
    calls = dict.fromkeys(LANES, CallCost(overhead_ms=0.5))
    hardware = this_hardware(settings, "cpu")
    return quick_profile(fruit, hardware, dict.fromkeys(fruit.modalities, POINTS), dict.fromkeys(SETS, POINTS), calls)


def keep(profile: Profile, package: ModelPackage, settings: Settings) -> Path:
    file = profile_file(package, profile.hardware, settings)
    save_profile(profile, file)
    return file


def test_what_is_kept_is_found_again(quick: Profile, fruit: ModelPackage, settings: Settings) -> None:
    assert load_profile(fruit, settings, "cpu") is None
    file = keep(quick, fruit, settings)
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(settings.profiles_dir.iterdir()) == [file]
    assert load_profile(fruit, settings, "cpu") == load_profile(fruit, settings) == read_profile(file, fruit) == quick


@pytest.mark.parametrize(
    "flags",
    [{"workers": 3}, {"fusion": {"torch_threads": 2}}, {"encoders": {"torch_threads": {"photo": 2}}}],
    ids=["workers", "threads of fusion", "threads of an encoder"],
)
def test_other_settings_have_other_profiles(
    quick: Profile, fruit: ModelPackage, settings: Settings, settings_with: Callable[..., Settings], flags: Any
) -> None:
    file = keep(quick, fruit, settings)
    other = settings_with(profiles_dir=settings.profiles_dir, **flags)
    assert load_profile(fruit, other, "cpu") is None
    assert profile_file(fruit, this_hardware(other, "cpu"), other) != file


def test_other_hardware_has_other_profiles(
    quick: Profile, fruit: ModelPackage, settings: Settings, settings_with: Callable[..., Settings]
) -> None:
    for change in ({"cpu": "another"}, {"cores": 1000.0}):
        keep(quick.model_copy(update={"hardware": quick.hardware.model_copy(update=change)}), fruit, settings)
    assert load_profile(fruit, settings) is None
    gpu = quick.model_copy(update={"hardware": this_hardware(settings, "A GPU")})
    keep(gpu, fruit, settings)
    assert load_profile(fruit, settings, "cpu") is None
    assert load_profile(fruit, settings, "A GPU") == gpu
    # These settings say that nothing is computed on a GPU.
    assert load_profile(fruit, settings) is None
    assert load_profile(fruit, settings_with(profiles_dir=settings.profiles_dir, device="auto")) == gpu


def test_other_files_have_other_profiles(
    quick: Profile, fruit: ModelPackage, settings: Settings, tmp_path: Path
) -> None:
    file = keep(quick, fruit, settings)
    changed = shutil.copytree(fruit.folder, tmp_path / "fruit")
    for name in ("weights.safetensors", "networks.py"):
        with (changed / name).open("a") as content:
            content.write("\n")
        other = load_package(changed)
        assert load_profile(other, settings) is None
        assert profile_file(other, quick.hardware, settings) != file
        with pytest.raises(ConfigError, match=rf"{file}: key 'content_hash' holds '\w+'; expected '\w+'"):
            read_profile(file, other)
    with pytest.raises(ConfigError, match="key 'model' holds 'fruit'; expected 'tree'"):
        read_profile(file, replace(fruit, name="tree"))
    renumbered = replace(fruit, version="2")
    with pytest.raises(ConfigError, match="key 'version' holds '1'; expected '2'"):
        read_profile(file, renumbered)
    assert load_profile(renumbered, settings) is None


def test_a_full_profile_goes_before_a_quick_one(
    quick: Profile, fruit: ModelPackage, settings_with: Callable[..., Settings], settings: Settings
) -> None:
    keep(quick, fruit, settings)
    full = quick.model_copy(update={"quick": False, "hardware": this_hardware(settings, "A GPU")})
    keep(full, fruit, settings)
    assert load_profile(fruit, settings_with(profiles_dir=settings.profiles_dir, device="auto")) == full
    assert load_profile(fruit, settings) == quick


def test_damaged_files_are_named_or_passed_over(
    quick: Profile, fruit: ModelPackage, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    file = keep(quick, fruit, settings)
    whole = json.loads(file.read_text())

    def damaged(content: str) -> str:
        file.write_text(content)
        caplog.clear()
        assert load_profile(fruit, settings) is None
        assert [record.message for record in caplog.records] == ["profile ignored"]
        with pytest.raises(ConfigError) as error:
            read_profile(file)
        return str(error.value).removeprefix(f"profile {file}: ")

    assert damaged(json.dumps(whole)[:-9]).startswith("Invalid JSON")
    assert damaged(json.dumps(whole | {"surprise": 1})) == "key 'surprise' is unknown"
    slow = whole["encoders"] | {"photo": [POINTS[1].model_dump(), POINTS[0].model_dump()]}
    assert "batch sizes are [8, 1]" in damaged(json.dumps(whole | {"encoders": slow}))
    negative = whole["calls"] | {"fusion": {"overhead_ms": -1, "factor": 1}}
    assert damaged(json.dumps(whole | {"calls": negative})).startswith(
        "key 'calls.fusion.overhead_ms' holds -1; expected"
    )
    fewer = {name: points for name, points in whole["fusion"].items() if name != "scent"}
    assert "fusion has photo, photo+scent; expected photo, photo+scent, scent" in damaged(
        json.dumps(whole | {"fusion": fewer})
    )
    file.unlink()
    with pytest.raises(ConfigError, match=r"No such file or directory; `mosel profile` makes one"):
        read_profile(file)


def test_what_cannot_be_written_leaves_nothing_behind(quick: Profile, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        save_profile(quick, tmp_path / "file" / "profile.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        save_profile(quick, tmp_path / "folder")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


def test_devices_have_names() -> None:
    assert device_name(["cpu", "cpu"]) == "cpu"
    # The driver of this machine knows no such GPU.
    assert device_name(["cpu", "0-1", "0-1"]) == "GPU 0-1 and cpu"


@given(right=st.integers(0, 500), samples=st.integers(1, 500))
def test_the_interval_holds_the_value_and_shrinks_with_samples(right: int, samples: int) -> None:
    value = min(right, samples) / samples
    few, many = wilson(value, samples), wilson(value, 100 * samples)
    assert 0 <= few.low <= value <= few.high <= 1
    assert few.low <= many.low
    assert many.high <= few.high
    assert many.high - many.low < few.high - few.low


def test_the_interval_is_wilson_s() -> None:
    # Brown, Cai, DasGupta, "Interval estimation for a binomial proportion", 2001: solves |p - x| = z sqrt(x(1-x)/n).
    interval = wilson(0.9, 50)
    for bound in (interval.low, interval.high):
        assert abs(0.9 - bound) == pytest.approx(1.959964 * (bound * (1 - bound) / 50) ** 0.5)
    assert (wilson(0.5, 0).low, wilson(0.5, 0).high) == (0, 1)


def test_profiles_hold_no_nonsense() -> None:
    for field in ({"p50_ms": float("nan")}, {"p50_ms": float("inf")}, {"batch_size": 0}):
        with pytest.raises(ValidationError):
            Point.model_validate({"batch_size": 1, "p50_ms": 1.0, "p95_ms": 1.0} | field)
