"""A package of which one file was replaced by hand: never served under the old name."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mosel.client import Client
from mosel.config import Settings
from mosel.errors import MoselError, PackageError
from mosel.launcher import Launcher
from mosel.modality import subsets
from mosel.packages.calibration import Calibration, save_calibration
from mosel.packages.model_package import load_package
from tests.fruit_on_disk import Fruit, Payloads, loaded_by, measured, same

Draw = Callable[..., Payloads]
Until = Callable[..., None]
PHOTO, SCENT = ["photo"], ["scent"]


def calibrated(folder: Path, seed: int = 0) -> None:
    """Writes accuracies and calibration rows as if they had been measured with the files as they are."""
    package, rng = load_package(folder), np.random.default_rng(seed)
    sets = subsets(package.modalities)
    answers = rng.integers(0, 3, (40, len(sets))).astype(np.int32)
    rows = Calibration(
        content_hash=package.content_hash,
        sets=sets,
        answers=answers,
        confidence=np.full(answers.shape, 0.5, np.float32),
        labels=answers[:, 0].copy(),
        groups=np.arange(40, dtype=np.int32)[:, None],
        group_names=["basket"],
        certify=np.arange(40) > 7,
    )
    save_calibration(folder / "calibration.npz", rows)
    measured(folder)


@pytest.fixture(scope="module")
def fruit_on_disk(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Fruit:
    """A package whose module reads a file, and that has another encoder for photos."""
    models = tmp_path_factory.mktemp("models")
    fruit = Fruit(shutil.copytree(models_dir / "fruit", models / "fruit"), tmp_path_factory.mktemp("kept"))
    (fruit.folder / "tables").mkdir()
    (fruit.folder / "tables" / "scale.txt").write_text("1.0")
    fruit.edit("networks.py", "payload.permute(0, 3, 1, 2) / 255", "SCALE * payload.permute(0, 3, 1, 2) / 255")
    fruit.edit(
        "networks.py",
        "from torch import Tensor, nn\n",
        "from pathlib import Path\n\nfrom torch import Tensor, nn\n\n"
        'SCALE = float((Path(__file__).parent / "tables" / "scale.txt").read_text())\n',
    )
    fruit.edit(
        "networks.py",
        "class Scent(",
        "class Negative(Photo):\n    def forward(self, payload: Tensor) -> Tensor:\n"
        "        return super().forward(255 - payload)\n\n\nclass Scent(",
    )
    calibrated(fruit.folder)
    return fruit


@pytest.fixture(scope="module")
def launcher(settings_with: Callable[..., Settings], fruit_on_disk: Fruit) -> Iterator[Launcher]:
    """One running system for all files."""
    with Launcher(settings_with(models_dir=fruit_on_disk.folder.parent, stop_grace_ms=1000)) as launcher:
        launcher.wait_ready(120)
        yield launcher


@pytest.fixture
def client(launcher: Launcher, until: Until) -> Iterator[Client]:
    """A client of services that all have the model as it is on disk."""
    with Client(launcher.address, retries=None) as client:
        until(lambda: is_loaded(client), "all services have the model")
        yield client


def is_loaded(client: Client) -> bool:
    with contextlib.suppress(MoselError):
        client.load_model("fruit")
        (model,) = client.models()
        return model.ready and not model.reason and all(service.ready for service in client.status())
    return False


def change_weights(fruit: Fruit) -> None:
    file = fruit.folder / "weights.safetensors"
    save_file({name: array * 2 for name, array in load_file(file).items()}, file)


def change_data(fruit: Fruit) -> None:
    fruit.edit("tables/scale.txt", "1.0", "3.0")


def of_another_model(fruit: Fruit, file: str) -> None:
    """Puts a measurement there that was made while another file was in its place."""
    own = (fruit.folder / "networks.py").read_text()
    kept = {name: (fruit.folder / name).read_bytes() for name in ("accuracy.json", "calibration.npz")}
    fruit.edit("networks.py", "/ 255", "/ 250")
    calibrated(fruit.folder, seed=1)
    (fruit.folder / "networks.py").write_text(own)
    for name in kept.keys() - {file}:
        (fruit.folder / name).write_bytes(kept[name])


# What is done by hand, and the file that the refusal names.
REFUSED: dict[str, tuple[Callable[[Fruit], None], str]] = {
    "python": (lambda fruit: fruit.edit("networks.py", "/ 255", "/ 128"), "accuracy.json"),
    "weights": (change_weights, "accuracy.json"),
    "data": (change_data, "accuracy.json"),
    "model.toml": (lambda fruit: fruit.edit("model.toml", '"networks:Photo"', '"networks:Negative"'), "accuracy.json"),
    "accuracy.json": (lambda fruit: of_another_model(fruit, "accuracy.json"), "accuracy.json"),
    "calibration.npz": (lambda fruit: of_another_model(fruit, "calibration.npz"), "calibration.npz"),
}


@pytest.mark.parametrize(("change", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_what_was_measured_with_another_file_is_refused_and_the_model_stays_as_it_is(
    client: Client,
    fruit_on_disk: Fruit,
    draw: Draw,
    until: Until,
    change: Callable[[Fruit], None],
    named: str,
) -> None:
    (before,), payloads, old = client.models(), draw(5), fruit_on_disk.directly()

    def answers(chosen: list[str]) -> bool:
        return same(client.predict("fruit", payloads, modalities=chosen).output, old(payloads, chosen))

    with fruit_on_disk.restored():
        change(fruit_on_disk)
        refusal = rf"{named}: not measured with the files of the package .* `mosel calibrate fruit` measures again"
        with pytest.raises(PackageError, match=refusal):
            client.load_model("fruit")
        assert client.models()[0].revision == before.revision
        assert answers(PHOTO)
        assert answers(SCENT)
        # Measured again, it is another revision, with other answers where a file says so.
        calibrated(fruit_on_disk.folder, seed=2)
        new = fruit_on_disk.directly()
        until(lambda: is_loaded(client), "what was measured again is loaded")
        assert client.models()[0].revision != before.revision
        output = client.predict("fruit", payloads, modalities=PHOTO).output
        assert same(output, new(payloads, PHOTO))
        assert same(output, old(payloads, PHOTO)) == (change not in CHANGES_ANSWERS)


CHANGES_ANSWERS = [REFUSED[kind][0] for kind in ("python", "weights", "data", "model.toml")]


def test_a_model_that_a_restart_took_away_comes_back_with_its_files(
    client: Client, launcher: Launcher, fruit_on_disk: Fruit, draw: Draw, until: Until
) -> None:
    """What is on disk when an encoder starts again suits that encoder, but not the other one."""
    payloads, direct, loaded = draw(5), fruit_on_disk.directly(), loaded_by(client)
    with fruit_on_disk.restored():
        fruit_on_disk.edit("networks.py", "super().__init__(6, 8)", "super().__init__(7, 8)")
        calibrated(fruit_on_disk.folder)
        launcher.children["encoder/photo"].process.kill()
        launcher.children["encoder/photo"].process.wait()
        launcher.start_again("encoder/photo")
        until(lambda: "encoder/photo" in client.models()[0].reason, "the encoder cannot load what is served")
    until(lambda: loaded_by(client) == loaded, "the model is back, and nobody asked for it")
    until(lambda: client.models()[0].ready, "it is ready")
    assert same(client.predict("fruit", payloads).output, direct(payloads, payloads))
