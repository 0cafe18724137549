"""Networks in other forms: the same numbers, none that would be wrong, and a choice that is made once."""

import gc
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mosel.compute import networks
from mosel.compute.forms import EAGER, TORCHSCRIPT, Forms, _Trial
from mosel.compute.networks import Loaded
from mosel.config import Settings
from mosel.modality import subsets
from mosel.packages.model_package import ModelPackage, load_package
from mosel.profiles.files import CallCost, Point, load_profile, profile_file, quick_profile, save_profile
from mosel.profiles.forms import kept_forms, share_forms
from mosel.profiles.hardware import this_hardware
from tests.fruit_on_disk import Fruit

CPU = torch.device("cpu")
MADE = "super().__init__(6, 8)\n"
Find = Callable[..., Loaded]


@pytest.fixture
def settings(settings_with: Callable[..., Settings], tmp_path: Path) -> Settings:
    return settings_with(profiles_dir=tmp_path / "profiles")


@pytest.fixture
def found(settings: Settings, caplog: pytest.LogCaptureFixture) -> Find:
    """Finds the form of a network of a package, as a service does."""
    caplog.set_level(logging.INFO, "mosel.compute.forms")

    def find(package: ModelPackage, lane: str = "scent", settings: Settings = settings) -> Loaded:
        caplog.clear()
        forms = Forms(settings, CPU)
        if lane == "fusion":
            return forms.of_fusion(Loaded.plain(package, networks.load_fusion(package, CPU)))
        return forms.of_encoder(Loaded.plain(package, networks.load_encoder(package, lane, CPU)), lane)

    return find


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the other forms take, as a share of the network as it is, instead of what is measured."""
    shares = {TORCHSCRIPT: 0.5}
    monkeypatch.setattr(
        _Trial,
        "relative_times",
        lambda trial: {form: 1.0 if form == EAGER else shares.get(form, 2.0) for form in trial.forms},
    )
    return shares


def changed(fruit: Fruit, code: str) -> None:
    """Has the encoder `scent` do this."""
    fruit.edit("networks.py", MADE, f"{MADE}\n    def forward(self, payload):\n        {code}\n")
    fruit.edit("networks.py", "from torch import Tensor, nn", "import torch\nfrom torch import Tensor, nn")


def told(caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    (record,) = [record for record in caplog.records if record.message == "form of a network"]
    return vars(record)


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("lane", ["photo", "scent"])
def test_an_encoder_computes_the_same_for_every_batch_size(found: Find, fruit: ModelPackage, lane: str) -> None:
    loaded, network = found(fruit, lane), networks.load_encoder(fruit, lane, CPU)
    assert loaded.form == TORCHSCRIPT
    assert not isinstance(loaded.network, type(network))
    for rows in (1, 2, 5, 64):
        payload = networks.encoder_inputs(fruit, lane, rows, CPU).flip(0)
        torch.testing.assert_close(loaded.network(payload), network(payload), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("faster")
def test_fusion_computes_the_same_for_every_modality_set(found: Find, fruit: ModelPackage) -> None:
    loaded, network = found(fruit, "fusion"), networks.load_fusion(fruit, CPU)
    assert loaded.form == TORCHSCRIPT
    for modality_set in subsets(fruit.modalities):
        for rows in (1, 7):
            inputs = {m: 3 * torch.randn(rows, 8) for m in sorted(modality_set)}
            torch.testing.assert_close(loaded.network(inputs), network(inputs), rtol=1e-4, atol=1e-5)


WRONG = {
    "branch on data": (
        "return super().forward(payload * (2 if payload.sum() > 50 else 1))",
        "it cannot be traced: Converting",
    ),
    "branch on the batch size": (
        "return super().forward(payload) * (2 if payload.shape[0] > 2**30 else 1)",
        "it cannot be traced: Converting",
    ),
    "length": ("return super().forward(payload) + torch.zeros(len(payload), 8)", "it cannot be traced: Using len"),
    "no tensor": ("return super().forward(torch.from_numpy(payload.numpy() * 2))", "it cannot be traced: Converting"),
    "other code": ("return super().forward(payload) * (1 + torch.jit.is_tracing())", "its numbers differ by 1 of"),
    "fails": ("return 1 / (1 - torch.jit.is_tracing()) * super().forward(payload)", "ZeroDivisionError"),
    "not finite": ("return super().forward(payload) + (float('nan') if torch.jit.is_tracing() else 0)", "not finite"),
}


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("name", WRONG)
def test_a_network_whose_trace_would_be_wrong_is_served_as_it_is(
    found: Find, changing: Fruit, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    code, reason = WRONG[name]
    changed(changing, code)
    package = load_package(changing.folder)
    for _ in range(2):  # what is kept says so, too
        assert found(package).form == EAGER
        assert reason in told(caplog)["not_used"][TORCHSCRIPT]


def test_fusion_whose_weights_would_be_there_too_often_is_served_as_it_is(
    found: Find, fruit: ModelPackage, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mosel.compute.forms._COPIES_MIB", 0)
    assert found(fruit, "fusion").form == EAGER
    assert "weights would be there 3 times" in told(caplog)["not_used"][TORCHSCRIPT]


def test_what_is_not_faster_is_not_used(found: Find, fruit: ModelPackage, faster: dict[str, float]) -> None:
    faster[TORCHSCRIPT] = 0.99
    assert found(fruit).form == EAGER


def test_the_forms_of_a_network_are_timed(found: Find, fruit: ModelPackage, caplog: pytest.LogCaptureFixture) -> None:
    loaded, record = found(fruit, "photo"), told(caplog)
    assert record["form"] == loaded.form
    assert record["speedup"] == 1 if loaded.form == EAGER else record["speedup"] >= 1.05
    assert record["largest_difference"] <= fruit.tolerance
    assert record["not_used"] == {}


@pytest.mark.usefixtures("faster")
def test_the_package_says_whether_and_how_exactly(
    found: Find, changing: Fruit, caplog: pytest.LogCaptureFixture
) -> None:
    changing.edit("model.toml", 'version = "1"', 'version = "1"\ntolerance = 1e-30')
    changed(changing, "return super().forward(payload) * (1.0005 if torch.jit.is_tracing() else 1)")
    assert found(load_package(changing.folder)).form == EAGER
    assert "its numbers differ by 0.0005" in told(caplog)["not_used"][TORCHSCRIPT]
    changing.edit("model.toml", "tolerance = 1e-30", "tolerance = 0.01")
    assert found(load_package(changing.folder)).form == TORCHSCRIPT
    assert told(caplog)["largest_difference"] == pytest.approx(0.0005, rel=0.01)
    changing.edit("model.toml", "tolerance = 0.01", "tolerance = 0.01\noptimise = false")
    assert found(load_package(changing.folder)).form == EAGER
    assert not caplog.records


def test_the_choice_is_kept_until_something_changes(
    found: Find, changing: Fruit, faster: dict[str, float], settings: Settings, settings_with: Callable[..., Settings]
) -> None:
    package = load_package(changing.folder)
    assert found(package).form == TORCHSCRIPT
    (file,) = (settings.profiles_dir / "forms").iterdir()
    kept = json.loads(file.read_text())
    assert (kept["lane"], kept["form"], kept["speedup"]) == ("scent", TORCHSCRIPT, 2.0)
    faster[TORCHSCRIPT] = 2.0
    assert found(package).form == TORCHSCRIPT
    # Time does not depend on weights.
    changing.change(1)
    assert found(load_package(changing.folder)).form == TORCHSCRIPT
    assert found(package, settings=settings_with(profiles_dir=settings.profiles_dir, workers=3)).form == EAGER
    for damaged in (kept | {"torch": "1.0"}, kept | {"form": "unknown"}, kept | {"lane": "photo"}, {"form": 3}, None):
        file.write_text("{" if damaged is None else json.dumps(damaged))
        assert found(package).form == EAGER
        assert json.loads(file.read_text())["form"] == EAGER
    changing.edit("networks.py", MADE, f"{MADE}        pass\n")
    faster[TORCHSCRIPT] = 0.5
    assert found(load_package(changing.folder)).form == TORCHSCRIPT


@pytest.mark.usefixtures("faster")
def test_a_kept_form_that_new_weights_make_wrong_is_not_used(
    found: Find, changing: Fruit, caplog: pytest.LogCaptureFixture
) -> None:
    changed(changing, "return super().forward(payload) + (1e-6 if torch.jit.is_tracing() else 0)")
    assert found(load_package(changing.folder)).form == TORCHSCRIPT
    weights = changing.folder / "weights.safetensors"
    save_file({key: tensor * 1e-4 for key, tensor in load_file(weights).items()}, weights)
    assert found(load_package(changing.folder)).form == EAGER
    assert "its numbers differ by" in told(caplog)["not_used"][TORCHSCRIPT]


@pytest.mark.usefixtures("faster")
def test_a_folder_that_cannot_be_written_only_costs_time(
    found: Find, fruit: ModelPackage, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    settings.profiles_dir.write_text("no folder")
    assert found(fruit).form == TORCHSCRIPT
    assert "form of a network not kept" in [record.message for record in caplog.records]


@pytest.mark.usefixtures("faster")
def test_a_profile_holds_for_the_forms_that_it_was_measured_with(
    found: Find, changing: Fruit, settings: Settings, tmp_path: Path
) -> None:
    package, hardware = load_package(changing.folder), this_hardware(settings, "cpu")
    points = (Point(batch_size=1, p50_ms=1, p95_ms=1),)
    lanes, sets = package.modalities, ("photo", "scent", "photo+scent")
    calls = dict.fromkeys((*lanes, "fusion"), CallCost(overhead_ms=0.5))
    before = quick_profile(package, hardware, dict.fromkeys(lanes, points), dict.fromkeys(sets, points), calls)
    save_profile(before, profile_file(package, hardware, settings))
    assert load_profile(package, settings, "cpu") == before
    found(package)
    assert kept_forms(package, hardware, settings.profiles_dir) == {"scent on cpu": TORCHSCRIPT}
    assert load_profile(package, settings, "cpu") is None
    # A full profile is measured in a folder of its own.
    (tmp_path / "apart").mkdir()
    share_forms(settings.profiles_dir, tmp_path / "apart")
    apart = settings.model_copy(update={"profiles_dir": tmp_path / "apart"})
    assert profile_file(package, hardware, apart).name == profile_file(package, hardware, settings).name
    after = before.model_copy(update={"others_share": 0.5})
    save_profile(after, profile_file(package, hardware, settings))
    assert load_profile(package, settings, "cpu") == load_profile(package, settings) == after
    changing.edit("model.toml", 'version = "1"', 'version = "1"\noptimise = false')
    assert load_profile(load_package(changing.folder), settings, "cpu") == before


@pytest.mark.usefixtures("faster")
def test_a_network_that_nobody_uses_any_more_is_freed(found: Find, fruit: ModelPackage, settings: Settings) -> None:
    """TorchScript keeps for good what is optimised where it was traced."""
    forms, before = Forms(settings, CPU), 0
    for time in range(4):
        wide = torch.nn.Sequential(torch.nn.Linear(6, 2048), torch.nn.Linear(2048, 2048), torch.nn.Linear(2048, 8))
        assert forms.of_encoder(Loaded.plain(fruit, wide.eval().requires_grad_(False)), "scent").form == TORCHSCRIPT
        del wide
        gc.collect()
        networks._give_memory_back(CPU)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        before = before if time else resident
    assert resident - before < 24e6, "16 MB of weights remain each time"
