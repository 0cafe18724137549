"""Models that are loaded, loaded anew and unloaded while the services run: no request fails, and none gets a mix."""

import contextlib
import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mosel.client import Client, ItemResults, JobAccepted, Prediction
from mosel.compute import networks
from mosel.compute.training import save_weights
from mosel.config import Settings
from mosel.errors import InvalidRequest, ModelNotFound, MoselError, PackageError, ServiceUnavailable
from mosel.launcher import Launcher
from mosel.packages.model_package import ModelPackage, load_package
from tests.fruit_on_disk import Fruit, Payloads, frozen, loaded_by, measured, same, slots_held

Draw = Callable[..., Payloads]
Until = Callable[..., None]
CHOICES = (["photo"], ["scent"], ["photo", "scent"])


@pytest.fixture(scope="module")
def fruit_on_disk(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Fruit:
    models = tmp_path_factory.mktemp("models")
    return Fruit(shutil.copytree(models_dir / "fruit", models / "fruit"), tmp_path_factory.mktemp("kept"))


@pytest.fixture(scope="module")
def launcher(settings_with: Callable[..., Settings], fruit_on_disk: Fruit) -> Iterator[Launcher]:
    """Services of this module alone; every tensor travels by shared memory."""
    settings = settings_with(
        models_dir=fruit_on_disk.folder.parent,
        stop_grace_ms=1000,
        transport={"inline_max_kib": 0, "lease_grace_ms": 200},
    )
    with Launcher(settings) as launcher:
        launcher.wait_ready(120)
        yield launcher


@pytest.fixture
def client(launcher: Launcher, until: Until) -> Iterator[Client]:
    """A client of services that all run, with the model loaded as it is on disk."""
    for child in launcher.ended():
        launcher.start_again(child.name)
    with Client(launcher.address, retries=None) as client:
        until(lambda: is_loaded(client), "all services are ready")
        yield client
        until(lambda: slots_held(client) == 0, "every slot is free")


def is_loaded(client: Client) -> bool:
    with contextlib.suppress(MoselError):
        client.load_model("fruit")
        return all(service.ready for service in client.status())
    return False


def health_of(launcher: Launcher, service: str) -> int:
    with grpc.insecure_channel(launcher.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int(stub.Check(health_pb2.HealthCheckRequest(service=service)).status)  # type: ignore[attr-defined]


def test_under_load_no_request_fails_and_each_is_answered_by_one_revision(
    client: Client, launcher: Launcher, fruit_on_disk: Fruit, draw: Draw, until: Until
) -> None:
    revisions = [fruit_on_disk.directly()]
    answers: list[tuple[int, Payloads, list[str], Prediction, int]] = []
    begun, stop = 0, threading.Event()

    def load(seed: int) -> None:
        with Client(launcher.address, retries=None) as own:
            for turn in range(100_000):
                payloads, chosen = draw(1 + 31 * (turn % 3), seed=seed * 100_000 + turn), CHOICES[turn % 3]
                before = begun
                answers.append((before, payloads, chosen, own.predict("fruit", payloads, modalities=chosen), begun))
                if stop.is_set():
                    return

    def some_more() -> None:
        """Waits for so many answers that some belong to calls that were not under way before."""
        enough = len(answers) + 12
        until(lambda: len(answers) >= enough or any(caller.done() for caller in callers), "more answers")

    with ThreadPoolExecutor(6) as pool:
        callers = [pool.submit(load, seed) for seed in range(6)]
        seen = set()
        for seed in range(3):
            some_more()
            revisions.append(fruit_on_disk.change(seed))
            seen.add(client.load_model("fruit").revision)
            begun += 1
        some_more()
        stop.set()
        for caller in callers:
            caller.result()
    assert len(seen) == 3
    answered_by = []
    for before, payloads, chosen, prediction, after in answers:
        equal = [i for i, direct in enumerate(revisions) if same(prediction.output, direct(payloads, chosen))]
        assert len(equal) == 1, "the answer is that of one revision"
        # What was loaded when it began, or while it was under way.
        assert before <= equal[0] <= after + 1
        answered_by.append(equal[0])
    assert set(answered_by) == set(range(4))
    assert set(loaded_by(client).values()) == {(load_package(fruit_on_disk.folder).id,)}


def test_a_job_whose_items_arrive_later_keeps_the_revision_that_it_began_with(
    client: Client, fruit_on_disk: Fruit, draw: Draw, until: Until
) -> None:
    before, payloads, go_on = fruit_on_disk.directly(), draw(10), threading.Event()
    old = load_package(fruit_on_disk.folder).id

    def slowly() -> Iterator[Payloads]:
        yield {name: array[:4] for name, array in payloads.items()}
        assert go_on.wait(60)
        yield {name: array[4:] for name, array in payloads.items()}

    events = client.submit_job("fruit", slowly(), size=10)
    assert isinstance(next(events), JobAccepted)
    after = fruit_on_disk.change(7)
    client.load_model("fruit")
    new = load_package(fruit_on_disk.folder).id
    assert same(client.predict("fruit", payloads).output, after(payloads, payloads))
    assert set(loaded_by(client).values()) == {(old, new)}
    go_on.set()
    results = [event for event in events if isinstance(event, ItemResults)]
    output = np.concatenate([event.output for event in results])[np.argsort([i for r in results for i in r.items])]
    assert same(output, before(payloads, payloads))
    until(lambda: set(loaded_by(client).values()) == {(new,)}, "the old networks are gone")


def test_what_is_loaded_already_is_not_loaded_again(client: Client) -> None:
    (before,) = client.models()
    assert client.load_model("fruit") == before
    # Weights take no time: what is known of the networks goes on to count.
    assert all(info.latency_ms > 0 for info in before.sets.values())


def test_other_weights_take_over_the_latencies_and_bring_their_own_accuracies(
    client: Client, fruit_on_disk: Fruit
) -> None:
    (before,) = client.models()
    fruit_on_disk.change(8)
    content = json.loads((fruit_on_disk.folder / "accuracy.json").read_text())
    content["validation"]["sets"]["scent"] = 0.5
    (fruit_on_disk.folder / "accuracy.json").write_text(json.dumps(content))
    after = client.load_model("fruit")
    assert {name: info.latency_ms for name, info in after.sets.items()} == {
        name: info.latency_ms for name, info in before.sets.items()
    }
    assert after.sets["scent"].accuracy == 0.5
    assert after.ready


BROKEN: dict[str, tuple[str, str, str, str]] = {
    "model.toml": ("model.toml", "[24, 24, 3]", "[24, -1, 3]", r"key 'modalities\.photo\.shape' holds \[24, -1, 3\]"),
    "weights": ("accuracy.json", 'content_hash": "', 'content_hash": "0', "not measured with the files of the package"),
    "code": ("networks.py", "from torch import", "from torsh import", r"networks\.py cannot be imported: ModuleNotF"),
    "shape": ("networks.py", "super().__init__(6, 8)", "super().__init__(7, 8)", r"keys 'encoders\.scent\.\*' do not"),
}


@pytest.mark.parametrize(("file", "old", "new", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_package_that_is_broken_leaves_the_model_as_it_is(
    client: Client, fruit_on_disk: Fruit, draw: Draw, file: str, old: str, new: str, message: str
) -> None:
    (before,), loaded, direct, payloads = client.models(), loaded_by(client), fruit_on_disk.directly(), draw(5)
    with fruit_on_disk.restored():
        fruit_on_disk.edit(file, old, new)
        if file != "accuracy.json":
            with contextlib.suppress(PackageError):
                measured(fruit_on_disk.folder)
        with pytest.raises(PackageError, match=message):
            client.load_model("fruit")
        assert client.models() == [before]
        assert same(client.predict("fruit", payloads).output, direct(payloads, payloads))
    assert loaded_by(client) == loaded


def test_inputs_and_code_may_change(client: Client, launcher: Launcher, fruit_on_disk: Fruit, draw: Draw) -> None:
    kept = set(launcher.settings.profiles_dir.iterdir())
    with fruit_on_disk.restored():
        fruit_on_disk.edit("model.toml", "shape = [6]", "shape = [3, 2]")
        fruit_on_disk.edit("networks.py", "class Scent(nn.Linear):\n", "class Scent(nn.Linear):\n    flat = True\n")
        fruit_on_disk.edit(
            "networks.py",
            "super().__init__(6, 8)\n",
            "super().__init__(6, 8)\n\n    def forward(self, payload: Tensor) -> Tensor:\n"
            "        return super().forward(payload.flatten(1))\n",
        )
        measured(fruit_on_disk.folder)
        model = client.load_model("fruit")
        assert model.modalities["scent"].shape == (3, 2)
        # Other networks, whose times are measured; for now only, as others may have computed meanwhile.
        assert all(info.latency_ms > 0 for info in model.sets.values())
        assert set(launcher.settings.profiles_dir.iterdir()) == kept
        payloads, direct = draw(4), fruit_on_disk.directly()
        with pytest.raises(InvalidRequest, match=r"payloads\.scent\.shape is \[4, 6\]; expected \[items, 3, 2\]"):
            client.predict("fruit", payloads)
        payloads["scent"] = payloads["scent"].reshape(4, 3, 2)
        assert same(client.predict("fruit", payloads).output, direct(payloads, payloads))
    client.load_model("fruit")
    payloads["scent"] = payloads["scent"].reshape(4, 6)
    assert same(client.predict("fruit", payloads).output, fruit_on_disk.directly()(payloads, payloads))


def test_unloading_finishes_what_is_under_way_and_frees_the_networks(
    client: Client,
    launcher: Launcher,
    fruit_on_disk: Fruit,
    draw: Draw,
    until: Until,
    run_mosel: Callable[..., CompletedProcess[str]],
) -> None:
    payloads, direct = draw(64), fruit_on_disk.directly()
    with ThreadPoolExecutor(2) as pool:
        with frozen(launcher.children["encoder/photo"]):
            under_way = pool.submit(client.predict, "fruit", payloads)
            until(lambda: is_under_way(client), "the job is under way")
            unloading = pool.submit(client.unload_model, "fruit")
            until(lambda: not client.models()[0].ready, "the model is known to go")
            with pytest.raises(ModelNotFound, match=r"model 'fruit' is not loaded \(any more\)"):
                client.predict("fruit", draw(1))
            with pytest.raises(ModelNotFound, match="is not loaded"):
                client.plan("fruit", 3)
            assert not unloading.done()
        assert same(under_way.result().output, direct(payloads, payloads))
        unloading.result()
    assert set(loaded_by(client).values()) == {()}
    (model,) = client.models()
    assert (model.ready, model.reason, model.sets) == (False, "not loaded", {})
    assert "fruit 1 (not ready: not loaded)" in run_mosel("models", "--address", launcher.address).stdout
    until(lambda: health_of(launcher, "fruit") == health_pb2.HealthCheckResponse.NOT_SERVING, "its health says so")
    with pytest.raises(ModelNotFound, match="model 'fruit' is not loaded; expected one of: none"):
        client.unload_model("fruit")
    assert client.load_model("fruit").ready
    assert same(client.predict("fruit", payloads).output, direct(payloads, payloads))
    until(lambda: health_of(launcher, "fruit") == health_pb2.HealthCheckResponse.SERVING, "its health says so")


def is_under_way(client: Client) -> bool:
    """Whether the selector has a job."""
    return any(service.counters["jobs"] for service in client.status() if service.name == "selector")


def test_unloading_ends_with_the_selector(client: Client, launcher: Launcher, draw: Draw, until: Until) -> None:
    selector = launcher.children["selector"].process
    with ThreadPoolExecutor(2) as pool:
        with frozen(launcher.children["encoder/photo"]):
            # What it has of slots is lost with the selector until then.
            under_way = pool.submit(client.predict, "fruit", draw(64), timeout_s=12)
            until(lambda: is_under_way(client), "the job is under way")
            unloading = pool.submit(client.unload_model, "fruit")
            until(lambda: not client.models()[0].ready, "the model is known to go")
            selector.send_signal(signal.SIGTERM)
            with pytest.raises(ServiceUnavailable, match=r"^service selector is stopping$"):
                unloading.result()
        with pytest.raises(ServiceUnavailable, match=r"^service selector is stopping$"):
            under_way.result()
    assert selector.wait(20) == 0
    launcher.start_again("selector")


def test_a_model_that_is_not_there_is_not_found(client: Client) -> None:
    for name in ("tree", "", "../fruit", "fruit/", "."):
        with pytest.raises(ModelNotFound, match=r"is not there; found: fruit"):
            client.load_model(name)


def test_as_commands(
    client: Client,
    launcher: Launcher,
    fruit_on_disk: Fruit,
    run_mosel: Callable[..., CompletedProcess[str]],
    until: Callable[..., None],
) -> None:
    fruit_on_disk.change(9)
    revision = load_package(fruit_on_disk.folder).revision
    done = run_mosel("reload", "fruit", "--address", launcher.address)
    assert (done.returncode, done.stdout) == (0, f"loaded fruit 1, revision {revision}\n"), done.stderr
    done = run_mosel("reload", "fruit", "--address", launcher.address)
    assert (done.returncode, done.stdout) == (0, f"nothing changed: fruit 1, revision {revision}\n"), done.stderr
    log = launcher.children["selector"].log
    until(lambda: '"nothing changed"' in log.read_text(), "the selector has logged it")
    done = run_mosel("unload", "fruit", "--address", launcher.address)
    assert (done.returncode, done.stdout) == (0, "unloaded fruit\n"), done.stderr
    done = run_mosel("unload", "fruit", "--address", launcher.address)
    assert (done.returncode, done.stderr) == (1, "error: model 'fruit' is not loaded; expected one of: none\n")


def renamed(fruit_on_disk: Fruit, name: str, *changes: tuple[str, str]) -> ModelPackage:
    """The same model under another name, in the same folder of models."""
    copy = Fruit(shutil.copytree(fruit_on_disk.folder, fruit_on_disk.folder.with_name(name)), Path())
    copy.edit("model.toml", 'name = "fruit"', f'name = "{name}"')
    for old, new in changes:
        copy.edit("model.toml", old, new)
    return measured(copy.folder)


def test_a_model_that_came_later_is_served_beside_the_others(client: Client, fruit_on_disk: Fruit, draw: Draw) -> None:
    payloads = draw(6)
    with pytest.raises(ModelNotFound, match="model is 'berry'"):
        client.predict("berry", payloads)
    package = renamed(fruit_on_disk, "berry")
    try:
        assert client.load_model("berry").ready
        assert {model.name: model.ready for model in client.models()} == {"fruit": True, "berry": True}
        direct = fruit_on_disk.directly()
        for name in ("berry", "fruit"):
            assert same(client.predict(name, payloads).output, direct(payloads, payloads))
        client.unload_model("berry")
        assert all(package.id not in models for models in loaded_by(client).values())
        assert same(client.predict("fruit", payloads).output, direct(payloads, payloads))
    finally:
        shutil.rmtree(package.folder)


def test_a_modality_needs_an_encoder(client: Client, launcher: Launcher, fruit_on_disk: Fruit, draw: Draw) -> None:
    package = renamed(fruit_on_disk, "nut", ("[modalities.scent]", "[modalities.shell]"))
    weights = Fruit(package.folder, Path())
    weights.edit("networks.py", '"scent": nn', '"shell": nn')
    content = json.loads((package.folder / "accuracy.json").read_text())
    sets = content["validation"]["sets"]
    content["validation"]["sets"] = {name.replace("scent", "shell"): value for name, value in sets.items()}
    encoders = {
        "photo": networks.load_encoder(package, "photo", torch.device("cpu")),
        "shell": package.load_attribute("networks:Scent")(),
    }
    save_weights(package.folder, encoders, package.load_attribute("networks:Fusion")())
    (package.folder / "accuracy.json").write_text(json.dumps(content))
    measured(package.folder)
    try:
        with pytest.raises(ServiceUnavailable, match=r"^service encoder/shell does not answer at unix:.*shell\.sock$"):
            client.load_model("nut")
        command = ("encoders", "--modality", "shell")
        launcher.children["encoder/shell"] = replace(launcher.children["encoder/scent"], command=command)
        launcher.start_again("encoder/shell")
        for _ in range(60):
            with contextlib.suppress(ServiceUnavailable):
                assert client.load_model("nut").ready
                break
        payloads = draw(3)
        answer = client.predict("nut", {"photo": payloads["photo"], "shell": payloads["scent"]})
        assert set(answer.modality_sets) == {"photo+shell"}
        client.unload_model("nut")
    finally:
        shutil.rmtree(package.folder)


def test_an_encoder_that_starts_again_has_what_is_loaded_and_no_more(
    client: Client, launcher: Launcher, until: Until
) -> None:
    client.unload_model("fruit")
    launcher.children["encoder/photo"].process.kill()
    launcher.children["encoder/photo"].process.wait()
    launcher.start_again("encoder/photo")
    until(lambda: "encoder/photo" in {s.name for s in client.status() if s.ready}, "the encoder is there")
    until(lambda: set(loaded_by(client).values()) == {()}, "it has let go of what was unloaded")


@pytest.mark.parametrize("name", ["encoder/photo", "fusion", "selector", "gateway"])
def test_a_service_that_starts_again_brings_all_to_what_is_on_disk_by_then(
    client: Client,
    launcher: Launcher,
    fruit_on_disk: Fruit,
    draw: Draw,
    until: Until,
    name: str,
) -> None:
    payloads, before, after = draw(20), fruit_on_disk.directly(), fruit_on_disk.change(len(name))
    new = load_package(fruit_on_disk.folder).id
    assert same(client.predict("fruit", payloads).output, before(payloads, payloads))
    # Else a selector that is killed leaves them to their leases.
    until(lambda: slots_held(client) == 0, "every slot is free")
    launcher.children[name].process.kill()
    launcher.children[name].process.wait()
    launcher.start_again(name)

    def settled() -> bool:
        with contextlib.suppress(MoselError):
            return same(client.predict("fruit", payloads, timeout_s=2).output, after(payloads, payloads))
        return False

    until(settled, "what is on disk is served")
    until(lambda: set(loaded_by(client).values()) == {(new,)}, "all services have that alone")
