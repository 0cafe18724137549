"""Settings."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mosel.config import MAX_SOCKET_PATH_BYTES, Settings, load_settings, reference_models
from mosel.errors import ConfigError


@pytest.fixture(autouse=True)
def nothing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MOSEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def write(content: str, name: str = "mosel.toml") -> Path:
    file = Path(name)
    file.write_text(content)
    return file


def test_the_default_models_are_the_reference_models() -> None:
    assert load_settings().models_dir == reference_models()
    assert {"digits", "har"} <= {folder.name for folder in reference_models().iterdir()}


def test_file_gives_way_to_environment_and_environment_to_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().gateway.grpc_port == 8001
    write("[gateway]\ngrpc_port = 1\nmax_items_per_job = 7\nhost = 'file'")
    assert load_settings().gateway.grpc_port == 1
    monkeypatch.setenv("MOSEL_GATEWAY__GRPC_PORT", "2")
    monkeypatch.setenv("MOSEL_GATEWAY__HOST", "environment")
    assert load_settings().gateway.grpc_port == 2
    gateway = load_settings(gateway={"grpc_port": 3}).gateway
    assert (gateway.grpc_port, gateway.host, gateway.max_items_per_job) == (3, "environment", 7)


def test_another_file_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    write("log_level = 'error'")
    monkeypatch.setenv("MOSEL_CONFIG", str(write("log_level = 'debug'", "other.toml")))
    assert load_settings().log_level == "debug"
    monkeypatch.setenv("MOSEL_CONFIG", "nowhere.toml")
    with pytest.raises(ConfigError, match=r"MOSEL_CONFIG names nowhere\.toml, which is no file"):
        load_settings()


@pytest.mark.parametrize(
    ("content", "key"), [("nope = 1", "nope"), ("[gateway]\nport = 1", "gateway.port"), ("[nope]\na = 1", "nope")]
)
def test_an_unknown_key_in_the_file_is_named(content: str, key: str) -> None:
    write(content)
    with pytest.raises(ConfigError, match=f"setting '{key}' is unknown; `mosel config` lists them all"):
        load_settings()


@pytest.mark.parametrize(
    ("variable", "named"),
    [
        ("MOSEL_NOPE", "MOSEL_NOPE"),
        ("MOSEL_NOPE__PORT", "MOSEL_NOPE__PORT"),
        ("MOSEL_GRPC_PORT", "MOSEL_GRPC_PORT"),
        ("MOSEL_GATEWAY__PORT", "gateway.port"),
    ],
)
def test_an_unknown_environment_variable_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, named: str) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ConfigError, match=rf"{named}('? is unknown| is no setting); `mosel config` lists them all"):
        load_settings()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"gateway": {"grpc_port": 65536}}, r"'gateway\.grpc_port' holds 65536"),
        ({"gateway": {"grpc_port": "http"}}, r"'gateway\.grpc_port' holds 'http'"),
        (
            {"gateway": {"max_accuracy_loss": 2}},
            r"'gateway\.max_accuracy_loss' holds 2; expected less than or equal to 1",
        ),
        ({"gateway": {"max_accuracy_loss": math.nan}}, r"'gateway\.max_accuracy_loss' holds nan"),
        ({"gateway": {"max_accuracy_loss": "low"}}, r"'gateway\.max_accuracy_loss' holds 'low'"),
        ({"device": "tpu"}, "'device' holds 'tpu'.*'auto', 'cpu' or 'cuda'"),
        ({"selector": {"max_queued_items": 0}}, r"'selector\.max_queued_items' holds 0"),
        ({"selector": {"profile_batch_sizes": []}}, r"'selector\.profile_batch_sizes' holds"),
        ({"selector": {"profile_batch_sizes": [0]}}, r"'selector\.profile_batch_sizes\.0' holds 0"),
        ({"encoders": {"torch_threads": {"pen": 0}}}, r"'encoders\.torch_threads\.pen' holds 0"),
        ({"encoders": {"replicas": {"pen": -1}}}, r"'encoders\.replicas\.pen' holds -1"),
        ({"encoders": {"replicas": {"pen": 0}}}, r"replicas\.pen is 0, and addresses\.pen does not say where they are"),
        (
            {"encoders": {"replicas": {"pen": 3}, "addresses": {"pen": ["a:1", "a:2"]}}},
            r"replicas\.pen is 3, but addresses\.pen names 2",
        ),
        ({"encoders": {"addresses": {"pen": ["a:1", "a:1"]}}}, r"addresses\.pen names an address twice"),
        ({"encoders": {"addresses": {"pen": []}}}, r"'encoders\.addresses\.pen' holds \[\]"),
        ({"encoders": {"addresses": {"pen/2": "a:1"}}}, r"addresses has 'pen/2'; expected a modality"),
        ({"tls": {"certificate": "c"}}, r"'tls' holds .*; expected certificate and key, and client_ca only beside"),
        ({"tls": {"client_ca": "c"}}, r"'tls' holds .*; expected certificate and key, and client_ca only beside them"),
        ({"internal_tls": {"certificate": "c", "key": "k"}}, r"'internal_tls' holds .*; expected certificate, key and"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(**flags)


def test_a_variable_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOSEL_GATEWAY", "{")
    with pytest.raises(ConfigError, match="gateway"):
        load_settings()


def test_a_file_that_is_no_toml_is_named() -> None:
    write("gateway = [")
    with pytest.raises(ConfigError, match=r"mosel\.toml"):
        load_settings()


def test_batch_sizes_are_put_in_order() -> None:
    assert load_settings(selector={"profile_batch_sizes": [8, 1, 8]}).selector.profile_batch_sizes == (1, 8)


def test_settings_cannot_be_changed() -> None:
    settings = load_settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.gateway.__setattr__("grpc_port", 1)


def test_services_have_sockets_of_their_own_unless_told_otherwise() -> None:
    settings = load_settings(run_dir="/run/m", fusion={"address": "host:1"}, encoders={"addresses": {"pen": "host:2"}})
    assert settings.selector_address == "unix:/run/m/selector.sock"
    assert settings.encoder_address("image") == "unix:/run/m/encoder-image.sock"
    assert settings.encoder_address("pen") == "host:2"
    assert settings.fusion_address == "host:1"
    assert settings.gateway_address == "127.0.0.1:8001"
    assert settings.local_gateway_address == "unix:/run/m/gateway-8001.sock"


def test_a_modality_has_as_many_encoders_as_addresses_or_replicas() -> None:
    encoders = {"addresses": {"pen": ["", "host:2"], "ink": "host:1"}, "replicas": {"image": 2, "pen": 1, "ink": 0}}
    settings = load_settings(run_dir="/run/m", encoders=encoders)
    assert settings.encoder_addresses("audio") == {"audio": "unix:/run/m/encoder-audio.sock"}
    assert settings.encoder_addresses("image") == {
        "image": "unix:/run/m/encoder-image.sock",
        "image/2": "unix:/run/m/encoder-image-2.sock",
    }
    assert settings.encoder_addresses("pen") == {"pen": "unix:/run/m/encoder-pen.sock", "pen/2": "host:2"}
    assert settings.encoder_addresses("ink") == {"ink": "host:1"}
    assert settings.encoder_address("pen", 2) == "host:2"
    with pytest.raises(ConfigError, match="--replica is 3, but pen has 2 by the settings"):
        settings.encoder_address("pen", 3)


@pytest.mark.parametrize("letter", ["x", "é"])
def test_a_socket_path_that_is_too_long_is_refused_in_bytes(letter: str) -> None:
    rest = len("/selector.sock")
    wide = len(os.fsencode(letter))
    longest = "/" + letter * ((MAX_SOCKET_PATH_BYTES - 2 - rest) // wide)
    assert load_settings(run_dir=longest).selector_address.endswith("/selector.sock")
    with pytest.raises(ConfigError, match=r"run_dir: .* bytes; expected fewer than 90: choose a shorter run_dir"):
        _ = load_settings(run_dir=longest + letter).selector_address


def test_a_token_in_the_environment_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOSEL_TOKEN", "secret")
    assert "secret" not in str(load_settings())


text = st.text(st.characters(exclude_categories=["C"]), max_size=12)
one_each = st.lists(text, min_size=1, max_size=3, unique=True)


@hypothesis_settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    models=st.lists(text, max_size=3),
    run_dir=text.map(lambda name: f"/tmp/{name}"),
    host=text | st.sampled_from(["1", "true", "null", "[]", '"x"', "{"]),
    addresses=st.dictionaries(text.filter(lambda name: "/" not in name), text | one_each, max_size=2),
    threads=st.dictionaries(st.sampled_from(["pen", "IMAGE"]), st.integers(1, 64)),
    grace=st.floats(0, 1e6),
    sizes=st.lists(st.integers(1, 64), min_size=1, max_size=4),
    parent_pid=st.integers(0, 2**22),
    tokens_file=st.none() | st.just("/tmp/tokens"),
    insecure=st.booleans(),
    certificates=st.none() | st.just("/tmp/c"),
    loss=st.none() | st.floats(0, 1),
)
def test_a_child_process_gets_the_same_settings_from_its_environment(
    models: list[str],
    run_dir: str,
    host: str,
    addresses: dict[str, str | list[str]],
    threads: dict[str, int],
    grace: float,
    sizes: list[int],
    parent_pid: int,
    tokens_file: str | None,
    insecure: bool,
    certificates: str | None,
    loss: float | None,
) -> None:
    settings = load_settings(
        models=models,
        run_dir=run_dir,
        parent_pid=parent_pid,
        gateway={
            "host": host,
            "grpc_port": 0,
            "tokens_file": tokens_file,
            "insecure": insecure,
            "max_accuracy_loss": loss,
        },
        tls={"certificate": certificates, "key": certificates},
        internal_tls={"certificate": certificates, "key": certificates, "ca": certificates},
        encoders={"addresses": addresses, "torch_threads": threads},
        selector={"profile_batch_sizes": sizes},
        transport={"lease_grace_ms": grace},
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.as_environment().items():
            patch.setenv(name, value)
        assert load_settings() == settings


def test_the_environment_names_every_setting() -> None:
    names = set(load_settings().as_environment())
    assert {"MOSEL_MODELS_DIR", "MOSEL_GATEWAY__GRPC_PORT", "MOSEL_TRANSPORT__SHM_DIR"} <= names
    leaves = sum(
        len(getattr(section, "model_fields", {"": None}))
        for section in (field.annotation for field in Settings.model_fields.values())
    )
    assert len(names) == leaves
