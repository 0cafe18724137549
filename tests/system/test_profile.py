"""Profiles from measurement to use, with real services."""

import asyncio
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from mosel.client import Client
from mosel.config import Settings
from mosel.data.samples import Samples
from mosel.launcher import Launcher
from mosel.packages.calibration import UNLABELLED, Calibration, save_calibration
from mosel.packages.model_package import ModelPackage, load_package
from mosel.profiles.files import Profile, load_profile, profile_file, read_profile, save_profile
from mosel.profiles.measurement import calls_under_load, end_to_end, measured_accuracy
from mosel.runtime.channels import channel_options
from mosel.v1 import encoder_pb2, encoder_pb2_grpc, fusion_pb2, fusion_pb2_grpc, service_pb2

Run = Callable[..., CompletedProcess[str]]
Draw = Callable[..., dict[str, NDArray[Any]]]
SETS = {"photo", "scent", "photo+scent"}


@pytest.fixture
def settings(settings_with: Callable[..., Settings], tmp_path: Path) -> Settings:
    return settings_with(profiles_dir=tmp_path / "profiles")


@pytest.fixture
def quick(services: Launcher, fruit: ModelPackage) -> Profile:
    """What the selector of the shared services keeps."""
    kept = load_profile(fruit, services.settings)
    assert kept is not None
    return kept


def latencies(settings: Settings) -> dict[str, float]:
    """What freshly started services predict for one item, by modality set."""
    with Launcher(settings) as launcher:
        info = launcher.wait_ready(120)[0]
    return {name: known.latency_ms for name, known in info.sets.items()}


@pytest.mark.parametrize("services", ["services"], indirect=True)
def test_services_time_their_networks_and_say_what_they_compute_on(services: Launcher, fruit: ModelPackage) -> None:
    async def ask() -> list[tuple[service_pb2.ProfileReply, str]]:
        options = channel_options(services.settings)
        encoder_address, fusion_address = services.settings.encoder_address("photo"), services.settings.fusion_address
        async with (
            grpc.aio.insecure_channel(encoder_address, options) as to_encoder,
            grpc.aio.insecure_channel(fusion_address, options) as to_fusion,
        ):
            encoder, fusion = encoder_pb2_grpc.EncoderStub(to_encoder), fusion_pb2_grpc.FusionStub(to_fusion)
            common: dict[str, Any] = {"model": fruit.id, "batch_sizes": [1, 8], "repeats": 4, "concurrency": 2}
            of_encoder = await encoder.Profile(encoder_pb2.ProfileEncoderRequest(**common))
            of_fusion = await fusion.Profile(fusion_pb2.ProfileFusionRequest(modality_set="photo", **common))
            states = [await stub.Status(service_pb2.StatusRequest()) for stub in (encoder, fusion)]
        return [(of_encoder, states[0].resource), (of_fusion, states[1].resource)]

    for reply, resource in asyncio.run(ask()):
        assert resource == "cpu"
        assert [point.batch_size for point in reply.points] == [1, 8]
        assert all(0 < point.p50_ms <= point.p95_ms for point in reply.points)


@pytest.mark.slow
def test_the_first_start_keeps_a_quick_profile_and_the_next_one_uses_it(
    settings: Settings, fruit: ModelPackage, settings_with: Callable[..., Settings]
) -> None:
    assert latencies(settings).keys() == SETS
    kept = load_profile(fruit, settings, "cpu")
    assert kept is not None
    assert kept.quick
    assert kept.concurrency == settings.workers
    assert [p.batch_size for p in kept.fusion["photo+scent"]] == list(settings.selector.profile_batch_sizes)
    assert {name: a.value for name, a in kept.accuracy.items()} == {
        "+".join(sorted(s)): value for s, value in fruit.accuracy.sets.items()
    }
    # Slower than anything that could be measured here: whoever says so has read it.
    slow = {name: call.model_copy(update={"overhead_ms": 5000.0}) for name, call in kept.calls.items()}
    file = profile_file(fruit, kept.hardware, settings)
    save_profile(kept.model_copy(update={"calls": slow}), file)
    assert all(ms > 5000 for ms in latencies(settings).values())
    other = settings_with(profiles_dir=settings.profiles_dir, workers=1)
    assert all(ms < 5000 for ms in latencies(other).values())
    file.write_text("{")
    assert all(ms < 5000 for ms in latencies(settings).values())
    assert read_profile(file, fruit).quick


def test_up_says_what_it_measured(
    models_dir: Path, mosel_command: Callable[..., list[str]], settings: Settings
) -> None:
    command = mosel_command("up", "--models", str(models_dir), "--grpc-port", "0", "--device", "cpu")
    environment = os.environ | {"MOSEL_PROFILES_DIR": str(settings.profiles_dir), "COLUMNS": "200"}

    def said() -> str:
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = list(itertools.takewhile(lambda line: not line.startswith("ready: "), process.stdout))
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        return "".join(lines).strip()

    assert said() == (
        "no profile of fruit for this hardware yet: measured a quick one; `mosel profile fruit` makes a full one"
    )
    assert said() == ""


def test_accuracy_is_measured_through_the_services(
    client: Client, draw: Draw, directly: Callable[[dict[str, NDArray[Any]], Iterable[str]], NDArray[np.float32]]
) -> None:
    payloads = draw(100)
    samples = Samples(payloads, directly(payloads, ["photo", "scent"]).argmax(-1).astype(np.int64))
    told: list[str] = []
    accuracy = measured_accuracy(client, "fruit", ["scent", "photo+scent"], samples, told.append)
    assert accuracy["photo+scent"].value == 1
    assert accuracy["scent"].value == np.mean(directly(payloads, ["scent"]).argmax(-1) == samples.labels) < 1
    assert {known.samples for known in accuracy.values()} == {100}
    assert len(told) == 2


def test_jobs_and_calls_are_timed_through_the_services(client: Client, draw: Draw, quick: Profile) -> None:
    payloads, told = draw(8), list[str]()
    times, calls, edge = end_to_end(client, quick, payloads, (1, 8), told.append)
    assert times.keys() == SETS
    assert calls.keys() == quick.calls.keys()
    assert calls != quick.calls
    assert edge.ms > 0
    assert edge.item_ms >= 0
    assert len(told) == len(SETS) * 2
    for points in times.values():
        assert [point.size for point in points] == [1, 8]
        assert all(0 < point.p50_ms <= point.p95_ms for point in points)
    # Of the others, each at another moment, a busy machine may have been quicker.
    assert all(edge.ms < point.p50_ms for point in times["photo+scent"])
    loaded, edge_cpu_ms = calls_under_load(client, quick, calls, payloads, 1, time.process_time, told.append)
    assert edge_cpu_ms > 0
    assert loaded.keys() == quick.calls.keys()
    assert all(call.overhead_ms >= 0 for call in loaded.values())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_full_profile_as_a_user_makes_it(run_mosel: Run, models_dir: Path, tmp_path: Path) -> None:
    env = {"MOSEL_PROFILES_DIR": str(tmp_path / "profiles"), "MOSEL_DEVICE": "cpu"}
    made = run_mosel("profile", "fruit", "--models", str(models_dir), "--batch-sizes", "1,4", env=env)
    assert made.returncode == 0, made.stderr
    (file,) = (tmp_path / "profiles").glob("fruit-*.json")
    assert f"profile: {file}" in made.stdout
    assert f"picture: {file.with_suffix('.png')}" in made.stdout
    assert "accuracy: the model package: calibration split, 1000 samples" in made.stdout
    profile = read_profile(file)
    assert not profile.quick
    assert {p.batch_size for points in profile.fusion.values() for p in points} == {1, 4}
    assert {p.size for points in profile.end_to_end.values() for p in points} == {1, 2, 4, 8, 16, 32}

    planned = run_mosel("plan", "fruit", "--models", str(models_dir), "--size", "4", "--min-accuracy", "0.7", env=env)
    assert planned.returncode == 0, planned.stderr
    (marked,) = re.findall(r"-> +│ (.*?) +│", planned.stdout)
    assert marked == "scent"
    assert " photo+scent " in planned.stdout


def test_plans_that_cannot_be(run_mosel: Run, models_dir: Path, quick: Profile, tmp_path: Path) -> None:
    file = tmp_path / "fruit.json"
    save_profile(quick, file)
    arguments = ("plan", "fruit", "--models", str(models_dir), "--profile", str(file))
    too_accurate = run_mosel(*arguments, "--min-accuracy", "0.999")
    assert too_accurate.returncode == 1
    assert "->" not in too_accurate.stdout
    assert "refused: min_accuracy 0.999 cannot be met" in too_accurate.stdout
    too_fast = run_mosel(*arguments, "--latency-slo-ms", "0.0001")
    assert too_fast.returncode == 1
    assert "refused: " in too_fast.stdout
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": "tree"}))
    assert "key 'model' holds 'tree'; expected 'fruit'" in run_mosel(*arguments).stderr
    nothing = run_mosel("plan", "fruit", "--models", str(models_dir), env={"MOSEL_PROFILES_DIR": str(tmp_path / "no")})
    assert "no profile of fruit for this hardware" in nothing.stderr


def test_a_plan_says_what_is_guaranteed_and_saved(
    run_mosel: Run, models_dir: Path, quick: Profile, tmp_path: Path
) -> None:
    file, folder, rows = tmp_path / "fruit.json", tmp_path / "models" / "fruit", 2000
    save_profile(quick, file)
    shutil.copytree(models_dir / "fruit", folder)
    sets = [frozenset({"photo"}), frozenset({"scent"}), frozenset({"photo", "scent"})]
    calibration = Calibration(
        content_hash=load_package(folder).content_hash,
        sets=sets,
        answers=np.tile(np.arange(rows, dtype=np.int32)[:, np.newaxis] % 3, len(sets)),
        confidence=np.ones((rows, len(sets)), np.float32),
        labels=np.full(rows, UNLABELLED, np.int32),
        groups=np.arange(rows, dtype=np.int32)[:, np.newaxis],
        group_names=["item"],
        certify=np.arange(rows) % 4 != 0,
    )
    save_calibration(folder / "calibration.npz", calibration)
    arguments = ("plan", "fruit", "--models", str(folder.parent), "--profile", str(file))
    planned = run_mosel(*arguments, "--max-accuracy-loss", "0.02")
    assert planned.returncode == 0, planned.stderr
    assert re.findall(r"-> +│ (.*?) +│", planned.stdout) == ["scent"]
    assert re.search(r"guaranteed at most 0\.0\d\d worse than everything \(95 %\); would save \d\d %", planned.stdout)
    of_operator = run_mosel(*arguments, env={"MOSEL_GATEWAY__MAX_ACCURACY_LOSS": "0.02"})
    assert "floor of the settings" in of_operator.stdout, of_operator.stderr


@pytest.mark.parametrize("sizes", ["", "0", "4..1", "one", "1,-2"])
def test_batch_sizes_that_make_no_sense(run_mosel: Run, models_dir: Path, sizes: str) -> None:
    refused = run_mosel("profile", "fruit", "--models", str(models_dir), f"--batch-sizes={sizes}")
    assert refused.returncode == 1
    assert refused.stderr == f"error: --batch-sizes is '{sizes}'; expected numbers from 1, such as 1,2,4,8 or 1..32\n"
