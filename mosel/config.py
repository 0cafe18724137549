"""Settings: one frozen tree, from file < environment < flag.

Units are in the names; unknown keys are errors. The file is `mosel.toml` in the working folder, or what `MOSEL_CONFIG`
names. An environment variable is `MOSEL_` and the key, with `__` between section and key:
`MOSEL_GATEWAY__GRPC_PORT=9001`. Flags are those of the `mosel` commands.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import platformdirs
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource
from pydantic_settings.exceptions import SettingsError

from mosel.errors import ConfigError
from mosel.modality import lane_of
from mosel.validation import explain

# sockaddr_un holds 108 bytes; some systems fewer. Names of services take up to 30 of them.
MAX_SOCKET_PATH_BYTES = 90
# Whether the services of a machine share a process.
Placement = Literal["single", "services"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
# How long an HTTP connection may be idle: longer than the proxies in front keep theirs, most of them for 60 s.
HTTP_IDLE_S = 75.0
_ENV_PREFIX = "MOSEL_"
# Environment variables that are not settings of a service.
_OTHER_VARIABLES = {"MOSEL_CHECK_MESSAGES", "MOSEL_CONFIG", "MOSEL_DATA", "MOSEL_TOKEN"}

# Flags of the section `gateway` for services that may listen anywhere.
FREE_PORTS = {"grpc_port": 0, "http_port": 0, "metrics_port": 0}

Port = Annotated[int, Field(ge=0, le=65535)]
# An environment variable that is empty is a file that is not there.
OptionalFile = Annotated[Path | None, BeforeValidator(lambda value: value or None)]
# Likewise for a number.
OptionalFraction = Annotated[
    Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None,
    BeforeValidator(lambda value: None if value == "" else value),
]
# One address may stand without a list.
Addresses = Annotated[
    tuple[str, ...], Field(min_length=1), BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
]
BatchSizes = Annotated[
    tuple[PositiveInt, ...], Field(min_length=1), AfterValidator(lambda sizes: tuple(sorted({*sizes})))
]


def reference_models() -> Path:
    """The folder of the reference models: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "reference_models"
    return installed if installed.is_dir() else package.parent / "models"


def _default_run_dir() -> Path:
    return Path(os.environ.get("XDG_RUNTIME_DIR", tempfile.gettempdir())) / f"mosel-{os.getuid()}"


def _default_profiles_dir() -> Path:
    return platformdirs.user_cache_path("mosel") / "profiles"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GatewaySettings(_Section):
    """The public edge."""

    host: str = "127.0.0.1"
    grpc_port: Port = 8001
    http_port: Port = 8000
    metrics_port: Port = 8002
    max_items_per_job: int = Field(1024, ge=1)
    max_jobs_in_flight: int = Field(256, ge=1)
    default_deadline_ms: float = Field(30_000, gt=0)
    # The floor of callers who state none and whose tenant has none: the most accuracy that may be lost against running
    # everything that was sent, 0..1. Without it that of the model counts.
    max_accuracy_loss: OptionalFraction = None
    # How old a caller's connection gets. Then it connects anew, and finds gateways that have come since.
    max_connection_age_s: float = Field(300, gt=0)
    # The tenants and the hashes of their tokens (docs/security.md); without it everybody may call.
    tokens_file: OptionalFile = None
    # Other machines may reach services that TLS and tokens do not protect.
    insecure: bool = False
    # One line in the log for each request.
    access_log: bool = True
    http_idle_s: float = Field(HTTP_IDLE_S, gt=0)
    # Of HTTP requests: JSON takes many times its size while it is read, binary data does not; and a body that is still
    # not there after so long is waited for no more.
    max_json_mib: int = Field(8, ge=1)
    max_body_ms: float = Field(60_000, gt=0)


class TlsSettings(_Section):
    """TLS on the public ports, off without a certificate; with `client_ca` callers show certificates, too."""

    certificate: OptionalFile = None
    key: OptionalFile = None
    client_ca: OptionalFile = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.certificate is None) != (self.key is None) or (self.client_ca and not self.certificate):
            raise ValueError("expected certificate and key, and client_ca only beside them")
        return self


class InternalTlsSettings(_Section):
    """Mutual TLS between services that listen on TCP; a certificate of `ca` makes a peer one of them."""

    certificate: OptionalFile = None
    key: OptionalFile = None
    ca: OptionalFile = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if len({file is None for file in (self.certificate, self.key, self.ca)}) > 1:
            raise ValueError("expected certificate, key and ca, or none of them")
        return self


class SelectorSettings(_Section):
    """The brain. Addresses default to sockets in `run_dir`."""

    address: str = ""
    # Which queued jobs give up modalities when deadlines get close (docs/scheduling.md).
    policy: Literal["all", "aggressive", "greedy", "mosel"] = "mosel"
    # With which confidence floors are met where a model has calibration rows (docs/floors.md); 0.5: in expectation, for
    # comparisons. And what becomes of a job whose floor nothing guarantees.
    floor_confidence: float = Field(0.95, ge=0.5, lt=1)
    when_not_guaranteed: Literal["run_everything", "refuse"] = "run_everything"
    max_queued_items: int = Field(4096, ge=1)
    # Kept free before each deadline: what a job spends outside the selector, on its way there and back to its caller.
    reply_ms: float = Field(3.0, ge=0)
    profile_batch_sizes: BatchSizes = (1, 2, 4, 8, 16, 32)
    profile_repeats: int = Field(5, ge=1)


class EncoderSettings(_Section):
    """Encoder processes; everything is by modality, `torch_threads` for each worker."""

    # Of each encoder that a modality has; an empty one is a socket in `run_dir`.
    addresses: dict[str, Addresses] = {}
    # How many of them `mosel up` starts, the first ones; without addresses, how many there are.
    replicas: dict[str, NonNegativeInt] = {}
    torch_threads: dict[str, PositiveInt] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for modality, addresses in self.addresses.items():
            if "/" in modality:
                raise ValueError(f"addresses has '{modality}'; expected a modality, with a list of its addresses")
            given = [address for address in addresses if address]
            if len(set(given)) < len(given):
                raise ValueError(f"addresses.{modality} names an address twice; expected one for each encoder")
        for modality, replicas in self.replicas.items():
            named = len(self.addresses.get(modality, ()))
            if named and replicas > named:
                raise ValueError(f"replicas.{modality} is {replicas}, but addresses.{modality} names {named}")
            if not named and not replicas:
                raise ValueError(f"replicas.{modality} is 0, and addresses.{modality} does not say where they are")
        return self


class FusionSettings(_Section):
    """The fusion process."""

    address: str = ""
    torch_threads: int = Field(1, ge=1)


class TransportSettings(_Section):
    """Tensor transport between processes."""

    shm_dir: Path = Path("/dev/shm")  # noqa: S108
    gateway_arena_mib: int = Field(256, ge=1)
    encoder_arena_mib: int = Field(256, ge=1)
    inline_max_kib: int = Field(64, ge=0)
    # When every slot is in use: how long to wait for one, and what may travel inline instead.
    full_wait_ms: float = Field(50, ge=0)
    inline_when_full_max_kib: int = Field(1024, ge=0)
    # The worst path that is accepted; what falls below it is not used, and the service says why.
    require: Literal["inline", "fetch", "posix_shm", "cuda_ipc", "in_process"] = "inline"
    lease_grace_ms: float = Field(5_000, ge=0)
    max_message_mib: int = Field(64, ge=1)


class TracingSettings(_Section):
    """OpenTelemetry; off while no endpoint is named."""

    # Of a collector that takes OTLP over gRPC: http://host:4317, or https:// for TLS.
    otlp_endpoint: str = Field("", pattern=r"^(https?://[^/\s]+)?$")
    # Of the requests whose callers bring no trace; a caller's trace is recorded if it says so.
    sample_ratio: float = Field(1.0, ge=0, le=1)


class Settings(BaseSettings):
    """Everything that can be set."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=_ENV_PREFIX, env_nested_delimiter="__")

    models_dir: Path = Field(default_factory=reference_models)
    models: tuple[str, ...] = ()
    run_dir: Path = Field(default_factory=_default_run_dir)
    # Measured profiles of models on this machine (docs/profiling.md).
    profiles_dir: Path = Field(default_factory=_default_profiles_dir)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Of the services that `mosel up` starts: all in one process, or each in its own.
    placement: Placement = "single"
    # Calls that one encoder or fusion service computes at the same time; the selector keeps as many under way.
    workers: int = Field(2, ge=1)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    # The process to end with; 0: none.
    parent_pid: int = Field(0, ge=0)
    stop_grace_ms: float = Field(5_000, ge=0)
    gateway: GatewaySettings = GatewaySettings()
    tls: TlsSettings = TlsSettings()
    internal_tls: InternalTlsSettings = InternalTlsSettings()
    selector: SelectorSettings = SelectorSettings()
    encoders: EncoderSettings = EncoderSettings()
    fusion: FusionSettings = FusionSettings()
    transport: TransportSettings = TransportSettings()
    tracing: TracingSettings = TracingSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flag over environment over file; nothing else is read."""
        file = TomlConfigSettingsSource(settings_cls, toml_file=config_file())
        return init_settings, env_settings, file

    @model_validator(mode="after")
    def _largest_job_fits(self) -> Self:
        if self.gateway.max_items_per_job > self.selector.max_queued_items:
            raise ValueError("gateway.max_items_per_job is above selector.max_queued_items: such jobs never fit")
        return self

    @property
    def gateway_address(self) -> str:
        """Where the gateway listens."""
        return f"{self.gateway.host}:{self.gateway.grpc_port}"

    @property
    def local_gateway_address(self) -> str:
        """Where the gateway listens for this user, who needs no token there: only this user can open the socket."""
        # Several gateways of one machine may share a folder, but never a port.
        return self._socket(f"gateway-{self.gateway.grpc_port}")

    @property
    def http_address(self) -> str:
        """Where the gateway speaks HTTP."""
        return f"{self.gateway.host}:{self.gateway.http_port}"

    @property
    def selector_address(self) -> str:
        """Where the selector listens."""
        return self.selector.address or self._socket("selector")

    @property
    def fusion_address(self) -> str:
        """Where the fusion service listens."""
        return self.fusion.address or self._socket("fusion")

    def encoder_addresses(self, modality: str) -> dict[str, str]:
        """Where the encoders of a modality listen, by lane."""
        given = self.encoders.addresses.get(modality) or ("",) * self.encoders.replicas.get(modality, 1)
        lanes = [lane_of(modality, number) for number in range(1, len(given) + 1)]
        return {
            lane: address or self._socket(f"encoder-{lane.replace('/', '-')}")
            for lane, address in zip(lanes, given, strict=True)
        }

    def encoder_address(self, modality: str, replica: int = 1) -> str:
        """Where an encoder of a modality listens.

        Raises:
            ConfigError: the modality has not so many.
        """
        addresses = self.encoder_addresses(modality)
        lane = lane_of(modality, replica)
        if lane not in addresses:
            raise ConfigError(
                f"--replica is {replica}, but {modality} has {len(addresses)} by the settings encoders.addresses and "
                "encoders.replicas"
            )
        return addresses[lane]

    def _socket(self, name: str) -> str:
        path = self.run_dir / f"{name}.sock"
        if len(os.fsencode(path)) >= MAX_SOCKET_PATH_BYTES:
            raise ConfigError(
                f"run_dir: the socket path {path} has {len(os.fsencode(path))} bytes; "
                f"expected fewer than {MAX_SOCKET_PATH_BYTES}: choose a shorter run_dir "
                "(for mosel up: XDG_RUNTIME_DIR or TMPDIR)"
            )
        return f"unix:{path}"

    def as_environment(self) -> dict[str, str]:
        """The settings as the environment variables that give a child process the same settings."""
        variables: dict[str, str] = {}
        for name, value in self.model_dump(mode="json").items():
            section = type(self).model_fields[name].annotation
            nested = isinstance(section, type) and issubclass(section, _Section)
            for key, leaf in value.items() if nested else ((None, value),):
                variable = f"{_ENV_PREFIX}{name}" + (f"__{key}" if key else "")
                variables[variable.upper()] = _as_variable(leaf)
        return variables


def _as_variable(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def load_settings(**flags: Any) -> Settings:
    """The effective settings.

    Args:
        flags: values given on the command line; they win over environment and file.

    Raises:
        ConfigError: names the first wrong key, what it holds and what was expected.
    """
    _refuse_unknown_variables(os.environ)
    if "MOSEL_CONFIG" in os.environ and not config_file().is_file():
        raise ConfigError(f"environment variable MOSEL_CONFIG names {config_file()}, which is no file")
    try:
        return Settings(**flags)
    except ValidationError as error:
        unknown = error.errors()[0]["type"] == "extra_forbidden"
        hint = "; `mosel config` lists them all" if unknown else ""
        raise ConfigError(f"{explain(error, 'setting')}{hint}") from None
    except SettingsError as error:
        raise ConfigError(str(error)) from None
    except ValueError as error:
        raise ConfigError(f"{config_file()}: {error}") from None


def config_file() -> Path:
    """The settings file that is read if it exists."""
    return Path(os.environ.get("MOSEL_CONFIG", "mosel.toml"))


def _refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    known = {f"{_ENV_PREFIX}{name}".upper() for name in Settings.model_fields}
    for variable in environment:
        head = variable.split("__")[0]
        if variable.startswith(_ENV_PREFIX) and head not in known and variable not in _OTHER_VARIABLES:
            raise ConfigError(f"environment variable {variable} is no setting; `mosel config` lists them all")
