"""`mosel observe` on running services: callers notice nothing, and what is told is what the networks answer."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mosel.client import Client, ObserveEvent
from mosel.config import Settings
from mosel.errors import Unreachable
from mosel.launcher import Launcher
from mosel.modality import parse_set
from mosel.packages.calibration import read_calibration
from mosel.packages.model_package import load_package
from tests.fruit_on_disk import slots_held

Payloads = dict[str, NDArray[Any]]
Draw = Callable[..., Payloads]
Directly = Callable[[Payloads, Iterable[str]], NDArray[Any]]
Until = Callable[..., None]
Run = Callable[..., subprocess.CompletedProcess[str]]
Command = Callable[..., list[str]]

SETS = ("photo", "photo+scent", "scent")


@pytest.fixture(scope="module")
def launcher(settings_with: Callable[..., Settings], models_dir: Path, tmp_path_factory: Any) -> Iterator[Launcher]:
    """Services of this module alone, with a copy of the model; every tensor travels by shared memory."""
    models = tmp_path_factory.mktemp("models")
    shutil.copytree(models_dir / "fruit", models / "fruit")
    transport = {"inline_max_kib": 0, "lease_grace_ms": 200}
    with Launcher(settings_with(models_dir=models, transport=transport)) as launcher:
        launcher.wait_ready(120)
        yield launcher


@pytest.fixture
def client(launcher: Launcher, until: Until) -> Iterator[Client]:
    with Client(launcher.address, retries=None) as client:
        yield client
        until(lambda: slots_held(client) == 0, "every slot is free")


class Callers:
    """They send jobs of their own sizes, with and without floors, for as long as the block runs.

    Whatever they get is what the networks answer at the sets that it says it ran, one of those that are expected.
    """

    def __init__(self, address: str, draw: Draw, directly: Directly, *sets: str) -> None:
        self._address, self._draw, self._directly, self._sets = address, draw, directly, sets
        self._stop, self._wrong = threading.Event(), list[str]()
        self.answered: list[Payloads] = []
        self._threads = [threading.Thread(target=self._call, args=(number,)) for number in range(2)]

    def __enter__(self) -> "Callers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        assert self._wrong == []
        assert self.answered

    def _call(self, number: int) -> None:
        with Client(self._address, retries=None) as client:
            while not self._stop.is_set():
                seed = number + len(self._threads) * len(self.answered)
                payloads = self._draw(1 + seed % 9, seed=seed)
                floor = (None, 0.0, 0.8)[seed % 3]
                try:
                    prediction = client.predict("fruit", payloads, min_accuracy=floor)
                    outputs = {name: self._directly(payloads, parse_set(name)) for name in self._sets}
                    expected = [outputs[name][row] for row, name in enumerate(prediction.modality_sets)]
                    np.testing.assert_allclose(prediction.output.astype(np.float32), expected, atol=1e-5)
                except Exception as error:
                    self._wrong.append(f"{floor}: {type(error).__name__} {error}")
                self.answered.append(payloads)


def test_callers_get_the_answers_of_everything_and_rows_those_of_each_set(
    client: Client, launcher: Launcher, draw: Draw, directly: Directly
) -> None:
    told: list[ObserveEvent] = []
    with closing(client.observe("fruit")) as events:
        told.append(next(events))
        with Callers(launcher.address, draw, directly, "photo+scent") as callers:
            while sum(len(items.answers) for event in told for items in event.observed) < 200:
                told.append(next(events))
        with pytest.raises(Unreachable, match="observed already"):
            next(client.observe("fruit"))
        items = sum(len(payloads["scent"]) for payloads in callers.answered)
        while told[-1].items < items:
            told.append(next(events))
        last = told[-1]
    assert {(event.revision, event.modality_sets) for event in told} == {
        (load_package(launcher.settings.models_dir / "fruit").revision, SETS)
    }
    assert (last.items, last.jobs, last.others) == (items, len(callers.answered), 0)
    assert min(last.observing_ms, last.compute_ms) > 0
    expected = set()
    for payloads in callers.answered:
        outputs = [directly(payloads, parse_set(name)) for name in SETS]
        expected.add(tuple(np.stack([output.argmax(1) for output in outputs], 1).ravel().tolist()))
    rows = [items for event in told for items in event.observed]
    assert len({items.job for items in rows}) == len(rows)
    for row in rows:
        assert row.answers.shape == row.confidences.shape == (row.size, 3)
        assert tuple(row.answers.ravel().tolist()) in expected
    confidences = {
        tuple(np.stack([directly(payloads, parse_set(name)).max(1) for name in SETS], 1).round(3).ravel().tolist())
        for payloads in callers.answered
    }
    rounded = [tuple(row.confidences.round(3).ravel().tolist()) for row in rows]
    # Rounding differs for some.
    assert sum(one in confidences for one in rounded) > 0.9 * len(rounded)


def test_afterwards_floors_save_again(client: Client, draw: Draw, until: Until) -> None:
    with closing(client.observe("fruit")) as events:
        next(events)
        assert set(client.predict("fruit", draw(3), min_accuracy=0.0).modality_sets) == {"photo+scent"}
        # Who fixed its modalities, or sent less, gets what it asked for.
        assert set(client.predict("fruit", draw(3), modalities=["scent"]).modality_sets) == {"scent"}
        assert set(client.predict("fruit", {"photo": draw(3)["photo"]}).modality_sets) == {"photo"}
    until(lambda: observed(client)[0] == 0, "its end is noticed")
    assert set(client.predict("fruit", draw(3), min_accuracy=0.0).modality_sets) == {"scent"}


def test_an_encoder_that_is_killed_meanwhile_harms_no_floor(
    client: Client, launcher: Launcher, draw: Draw, until: Until
) -> None:
    with closing(client.observe("fruit")) as events:
        next(events)
        launcher.children["encoder/photo"].process.kill()
        until(lambda: not all(info.available for info in client.models()[0].sets.values()), "it is away")
        prediction = client.predict("fruit", draw(3), min_accuracy=0.0)
        assert (set(prediction.modality_sets), prediction.unavailable_modalities) == ({"scent"}, ("photo",))
        until(lambda: bool(launcher.ended()), "it has ended")
        launcher.start_again("encoder/photo")
        until(lambda: all(info.available for info in client.models()[0].sets.values()), "it is back")
        assert set(client.predict("fruit", draw(3), min_accuracy=0.0).modality_sets) == {"photo+scent"}
        until(lambda: bool(next(events).observed), "items are observed again")


def test_the_command_shows_what_a_loss_would_save_and_keeps_the_rows(
    client: Client, launcher: Launcher, draw: Draw, directly: Directly, run_mosel: Run, tmp_path: Path
) -> None:
    folder = launcher.settings.models_dir
    with Callers(launcher.address, draw, directly, *SETS):
        arguments = ("--items", "400", "--models", str(folder), "--address", launcher.address, "--save")
        ran = run_mosel("observe", "fruit", *arguments, "--plot", str(tmp_path / "plot.png"))
    assert ran.stderr == ""
    assert re.search(
        r"fruit: \d{3,} items of \d+ jobs were observed; .* items/s answered; observing took .*%", ran.stdout
    )
    for loss in ("1 point ", "2 points", "3 points", "6 points"):
        assert loss in ran.stdout
    assert "guaranteed at 95 %" in ran.stdout
    # The answers to noise hardly agree.
    assert ("MOSEL_GATEWAY__MAX_ACCURACY_LOSS=" in ran.stdout) != ("nothing can be saved" in ran.stdout)
    assert (tmp_path / "plot.png").stat().st_size > 5000
    rows = read_calibration(folder / "fruit" / "calibration.npz")
    assert (len(rows.labels) >= 400, rows.is_labelled, list(rows.group_names)) == (True, False, ["job"])
    assert sorted(rows.sets, key=sorted) == sorted(map(parse_set, SETS), key=sorted)
    for group in np.unique(rows.groups):
        assert len({*rows.certify[rows.groups[:, 0] == group].tolist()}) == 1
    jobs, certify = np.unique(rows.groups), np.unique(rows.groups[rows.certify])
    assert len(certify) == len(jobs) - int(np.ceil(len(jobs) / 4))
    assert load_package(folder / "fruit").calibration is not None


def test_interrupted_it_shows_what_there_is_and_killed_it_ends_the_observation(
    client: Client, launcher: Launcher, draw: Draw, directly: Directly, mosel_command: Command, until: Until
) -> None:
    command = mosel_command(
        "observe",
        "fruit",
        "--models",
        str(launcher.settings.models_dir),
        "--address",
        launcher.address,
        "--items",
        "1000000",
    )
    with Callers(launcher.address, draw, directly, *SETS), running(command) as process:
        until(lambda: observed(client)[1] > 0, "items are observed")
        told = observed(client)[1]
        until(lambda: observed(client)[1] > told, "it was told of them a while ago")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "items of" in out
    with running(command) as process:
        until(lambda: observed(client)[0] == 1, "it observes")
        process.kill()
        until(lambda: observed(client)[0] == 0, "its end is noticed")


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"COLUMNS": "200"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def observed(client: Client) -> tuple[int, int]:
    """Models that are observed, and items that were so far."""
    counters = next(service.counters for service in client.status() if service.name == "selector")
    return counters["models_observed"], counters["items_observed"]
