"""`mosel up` and the commands beside it, as a user types them; and docs/your-model.md as it stands."""

import contextlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import grpc
import psutil
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from mosel.cli import main
from mosel.client import Client
from mosel.errors import PackageError
from mosel.launcher import Launcher
from tests.fruit_on_disk import measured
from tests.running_up import left_behind, ready_address, up

Run = Callable[..., CompletedProcess[str]]
Command = Callable[..., list[str]]
Until = Callable[..., None]


def test_the_tutorial_as_it_is_written(
    tutorial_folder: Path, mosel_command: Command, run_mosel: Run, private: dict[str, str]
) -> None:
    with up(mosel_command("up", "--models", "my_models", "--grpc-port", "0"), private, tutorial_folder) as process:
        at = ready_address(process)
        children = psutil.Process(process.pid).children()
        assert len(children) == 1

        listed = run_mosel("models", "--address", at)
        assert "fruit 1 (ready): Apple, lemon or plum" in listed.stdout
        files = ["photo=photo.npy", "scent=scent.npy"]
        everything = run_mosel("predict", "fruit", *files, "--address", at, cwd=tutorial_folder)
        assert everything.stdout.count("│ photo+scent") == 5
        cheap = run_mosel("predict", "fruit", *files, "--min-accuracy", "0.6", "--address", at, cwd=tutorial_folder)
        assert cheap.stdout.count("│ scent") == 5
        assert "photo" not in cheap.stdout
        ask = (tutorial_folder / "ask_fruit.py").read_text().replace("127.0.0.1:8001", at)
        asked = subprocess.run(
            [sys.executable, "-c", ask], cwd=tutorial_folder, check=True, capture_output=True, text=True
        )
        assert re.fullmatch(r"((apple|lemon|plum) ){5}scent 0\.7\d\n", asked.stdout)

        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")
    assert not any(child.is_running() for child in children)
    assert left_behind(private) == []


def test_killed_it_takes_every_service_along(
    tutorial_folder: Path, mosel_command: Command, private: dict[str, str], until: Until
) -> None:
    with up(mosel_command("up", "--models", "my_models", "--grpc-port", "0"), private, tutorial_folder) as process:
        ready_address(process)
        children = psutil.Process(process.pid).children()
        process.kill()
        until(lambda: not any(child.is_running() for child in children), "every service has ended")
    assert list(Path(private["MOSEL_TRANSPORT__SHM_DIR"]).iterdir()) == []


@pytest.mark.parametrize(("placement", "processes"), [("single", 1), ("services", 5)])
def test_ctrl_c_while_it_starts(
    tutorial_folder: Path,
    mosel_command: Command,
    private: dict[str, str],
    until: Until,
    placement: str,
    processes: int,
) -> None:
    command = mosel_command("up", "--models", "my_models", "--grpc-port", "0", "--placement", placement)
    with up(command, private, tutorial_folder) as process:
        until(lambda: len(psutil.Process(process.pid).children()) == processes, "all services are started")
        children = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    # One that was being started just then notices by itself that nobody wants it.
    until(lambda: not any(child.is_running() for child in children), "every service has ended")
    until(lambda: left_behind(private) == [], "nothing is left behind")


def refusal(done: CompletedProcess[str]) -> str:
    """The one line that a refused command wrote."""
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr.removeprefix("error: ").rstrip("\n")


def test_a_taken_port(models_dir: Path, run_mosel: Run, private: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refused = run_mosel("up", "--models", str(models_dir), "--grpc-port", port, env=private)
    assert refusal(refused) == f"--grpc-port {port}: cannot listen on 127.0.0.1:{port}: Address already in use"
    assert left_behind(private) == []


def test_a_host_that_is_not_here(models_dir: Path, run_mosel: Run, private: dict[str, str]) -> None:
    for port in ("0", "8765"):
        arguments = ("--models", str(models_dir), "--host", "no.such.host.invalid", "--insecure", "--grpc-port", port)
        assert refusal(run_mosel("up", *arguments, env=private)).startswith(
            "--host no.such.host.invalid: cannot listen"
        )
    assert left_behind(private) == []


def test_a_folder_whose_name_is_too_long_for_sockets(
    models_dir: Path, run_mosel: Run, private: dict[str, str], tmp_path: Path
) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    refused = run_mosel(
        "up", "--models", str(models_dir), "--grpc-port", "0", env=private | {"XDG_RUNTIME_DIR": str(long)}
    )
    assert "bytes; expected fewer than 90: " in refusal(refused)
    assert list(long.iterdir()) == []


def test_a_runtime_folder_that_is_not_there_is_passed_over(
    models_dir: Path, monkeypatch: pytest.MonkeyPatch, settings_with: Callable[..., object]
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/no/such/folder")
    launcher = Launcher(settings_with())  # type: ignore[arg-type]
    assert launcher.settings.run_dir.parent == Path(tempfile.gettempdir())
    launcher.settings.run_dir.rmdir()


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_another_platform(
    models_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], platform: str
) -> None:
    monkeypatch.setattr("sys.argv", ["mosel", "up", "--models", str(models_dir)])
    monkeypatch.setattr("sys.platform", platform)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        f"error: the services need Linux, and this is {platform}: run them in a Linux container "
        "(README, 'Other platforms'); the Python client mosel.Client works here\n"
    )


def test_health(services: Launcher, run_mosel: Run) -> None:
    encoder = services.settings.encoder_address("photo")
    own_process = [[encoder]] if services.settings.placement == "services" else []
    for arguments in ([services.address], [services.address, "--service", "fruit"], *own_process):
        healthy = run_mosel("health", *arguments)
        assert (healthy.returncode, healthy.stdout, healthy.stderr) == (0, "SERVING\n", "")
    assert refusal(run_mosel("health", "127.0.0.1:1")) == "service at 127.0.0.1:1 is not reachable"
    unknown = refusal(run_mosel("health", services.address, "--service", "tree"))
    assert unknown == f"service tree at {services.address} answered NOT_FOUND"


def test_a_proxy_in_the_environment_is_passed_over(services: Launcher, run_mosel: Run) -> None:
    proxy = {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    assert run_mosel("models", "--address", services.address, env=proxy).returncode == 0
    assert run_mosel("health", services.address, env=proxy).returncode == 0


def test_status_and_models(services: Launcher, run_mosel: Run) -> None:
    status = run_mosel("status", "--address", services.address)
    assert status.returncode == 0
    for name in services.services:
        assert re.search(rf"{name} .* ready ", status.stdout)
    assert "not ready" not in status.stdout
    with Client(services.address) as client:
        forms = {service.name: service.forms for service in client.status()}
    assert not forms["gateway"]
    for name in ("encoder/photo", "encoder/scent", "fusion"):
        ((model, form),) = forms[name].items()
        assert model.startswith("fruit@")
        assert re.search(rf"{name} .* fruit {form} ", status.stdout)
    models = run_mosel("models", "--address", services.address)
    assert re.search(r"photo\+scent .* 0\.9\d+ .* yes", models.stdout)
    assert re.search(
        r"\n  latencies: quick profile of 20\d\d-.* while others used \d+ % of the processors, spread ", models.stdout
    )
    for command in ("status", "models"):
        refused = run_mosel(command, "--address", "127.0.0.1:1")
        assert refusal(refused) == "service gateway at 127.0.0.1:1 is not reachable"


def test_config_prints_what_is_in_force_and_refuses_what_is_no_setting(run_mosel: Run, tmp_path: Path) -> None:
    (tmp_path / "mosel.toml").write_text("[gateway]\ngrpc_port = 9001\nmax_items_per_job = 7\n")
    shown = run_mosel("config", cwd=tmp_path, env={"MOSEL_GATEWAY__GRPC_PORT": "9002"})
    assert "# file: mosel.toml\n" in shown.stdout
    assert "MOSEL_GATEWAY__GRPC_PORT=9002\n" in shown.stdout
    assert "MOSEL_GATEWAY__MAX_ITEMS_PER_JOB=7\n" in shown.stdout
    refused = run_mosel("config", cwd=tmp_path, env={"MOSEL_GATEWAY__GRPC_PORT": "many"})
    assert refusal(refused).startswith("setting 'gateway.grpc_port' holds 'many'; expected ")
    (tmp_path / "mosel.toml").write_text("[gateway]\nport = 9001\n")
    assert (
        refusal(run_mosel("config", cwd=tmp_path)) == "setting 'gateway.port' is unknown; `mosel config` lists them all"
    )


def test_reflection_lists_the_gateway(services: Launcher) -> None:
    with grpc.insecure_channel(services.address) as channel:
        known = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert {"mosel.v1.Gateway", "grpc.health.v1.Health"} <= known


BAD_PACKAGES = {
    "no description": ("model.toml", None, "", r".*: a model package \(a folder with .*\) to serve is not there"),
    "no TOML": ("model.toml", 'name = "fruit"', "name = ", r".*/fruit/model\.toml: not valid TOML: .*"),
    "missing key": (
        "model.toml",
        'version = "1"\n',
        "",
        r".*/fruit/model\.toml: key 'version' is missing; expected a string",
    ),
    "unknown key": (
        "model.toml",
        'version = "1"\n',
        'version = "1"\nflavour = 3\n',
        r".*/fruit/model\.toml: key 'flavour' is unknown; expected one of: .*weights.*",
    ),
    "wrong dtype": (
        "model.toml",
        '"UINT8"',
        '"FLOAT"',
        r".*/fruit/model\.toml: key 'modalities\.photo\.dtype' holds 'FLOAT'; expected one of BOOL, .*FP64",
    ),
    "wrong shape": (
        "model.toml",
        "[24, 24, 3]",
        "[24, -1, 3]",
        r".*/fruit/model\.toml: key 'modalities\.photo\.shape' holds \[24, -1, 3\]; expected a list of positive.*",
    ),
    "wrong name": (
        "model.toml",
        'name = "fruit"',
        'name = "tree"',
        r".*/fruit/model\.toml: name is 'tree'; expected the folder's name, 'fruit'",
    ),
    "labels": (
        "model.toml",
        '"apple", ',
        "",
        r".*/fruit/model\.toml: key 'output\.labels' holds 2 labels; expected 3, .*",
    ),
    "no accuracies": (
        "accuracy.json",
        None,
        "",
        r".*/fruit/accuracy\.json: no such file; write it with mosel\.compute\.training\.write_accuracy",
    ),
    "accuracies of other files": (
        "accuracy.json",
        r'"content_hash": "',
        r'"content_hash": "0',
        r".*/fruit/accuracy\.json: not measured with the files .*; `mosel calibrate fruit` measures again",
    ),
    "no weights": ("weights.safetensors", None, "", r".*/fruit/weights\.safetensors: (no such file|cannot be read).*"),
    "no such class": (
        "model.toml",
        "networks:Photo",
        "networks:Foto",
        r"mosel .*/fruit/networks\.py has no 'Foto', which model\.toml names as 'networks:Foto'",
    ),
    "no such module": (
        "model.toml",
        "networks:Fusion",
        "layers:Fusion",
        r"mosel .*/fruit/layers\.py: no such file, but model\.toml of 'fruit' names it",
    ),
    "weights that do not fit": (
        "networks.py",
        "nn.Linear(8, 3)}",
        "nn.Linear(9, 3)}",
        r"mosel .*/fruit/weights\.safetensors: keys 'fusion\.\*' do not fit networks:Fusion: .*",
    ),
    "embedding that is not as stated": (
        "model.toml",
        'encoder = "networks:Scent"\nembedding = [8]',
        'encoder = "networks:Scent"\nembedding = [7]',
        # Encoder and fusion both find it; the message is of whichever starts first.
        r".*/fruit/model\.toml: networks:(Fusion with .*scent fails .*|Scent returned \[1, 8\]; expected .*)",
    ),
    "code that does not run": (
        "networks.py",
        "from torch import Tensor, nn",
        "from torch import Tensor, nm",
        r".*/fruit/networks\.py cannot be imported: ImportError: cannot import name 'nm' from 'torch' .*",
    ),
}


@pytest.mark.parametrize(("file", "old", "new", "message"), BAD_PACKAGES.values(), ids=BAD_PACKAGES.keys())
def test_a_bad_package_is_refused_with_one_line(
    models_dir: Path,
    run_mosel: Run,
    private: dict[str, str],
    tmp_path: Path,
    file: str,
    old: str | None,
    new: str,
    message: str,
) -> None:
    package = tmp_path / "models" / "fruit"
    shutil.copytree(models_dir / "fruit", package)
    if old is None:
        (package / file).unlink()
    else:
        content = (package / file).read_text()
        assert old in content
        (package / file).write_text(content.replace(old, new))
        if file != "accuracy.json":
            with contextlib.suppress(PackageError):
                measured(package)
    refused = run_mosel("up", "--models", str(tmp_path / "models"), "--grpc-port", "0", env=private)
    assert re.match(message, refusal(refused)), refused.stderr
    assert left_behind(private) == []
