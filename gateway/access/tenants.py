"""The tenants and their tokens, as the tokens file states them."""

import hashlib
import hmac
import json
import math
import os
import secrets
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from mosel.errors import ConfigError
from mosel.secret_files import read_file

SETTING = "gateway.tokens_file"

# Names go into logs and metrics.
TenantName = Annotated[str, StringConstraints(pattern="^[A-Za-z0-9_-]{1,64}$")]
Hash = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class Tenant(BaseModel):
    """One tenant: what its tokens hash to, and what it may do. A limit that is missing does not bind it.

    Attributes:
        token_sha256: SHA-256 of each of its tokens, in hexadecimal digits; several while one replaces another.
        admin: whether it may also load and unload models and look at the services.
        requests_per_s: requests a second, on average.
        burst: requests at once; without it as many as come in a second, at least one.
        max_concurrent: requests under way at the same time.
        payload_bytes_per_s: bytes of requests a second, on average; as many at once.
        max_accuracy_loss: the floor of its requests that state none: the most accuracy, 0..1, that may be lost against
            running everything that was sent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    token_sha256: Annotated[
        tuple[Hash, ...], Field(min_length=1), BeforeValidator(lambda v: [v] if isinstance(v, str) else v)
    ]
    admin: bool = False
    requests_per_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    burst: int | None = Field(None, ge=1)
    max_concurrent: int | None = Field(None, ge=1)
    payload_bytes_per_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_accuracy_loss: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)

    @property
    def most_at_once(self) -> int:
        """Requests that may come at once."""
        return self.burst or math.ceil(self.requests_per_s or 1)


Tenants = Mapping[str, Tenant]

_FILE = TypeAdapter(dict[TenantName, Tenant])


def new_token() -> str:
    """A token that nobody can guess: 256 random bits. The prefix lets tools find it where it does not belong."""
    return f"mosel_{secrets.token_urlsafe(32)}"


def hash_of(token: str) -> str:
    """What is kept of a token.

    SHA-256 is right here, and no slow hash is needed: those make up for passwords that can be guessed, and 256 random
    bits cannot, however fast each try is.
    """
    return hashlib.sha256(token.encode()).hexdigest()


def find_tenant(tenants: Tenants, token: str) -> str | None:
    """The name of the tenant that a token belongs to.

    Takes the same time whichever it is, and if it is none: every hash is compared, in constant time.
    """
    given, found = hash_of(token), None
    for name, tenant in tenants.items():
        for known in tenant.token_sha256:
            if hmac.compare_digest(given, known):
                found = name
    return found


def read_tenants(path: Path) -> Tenants:
    """Reads a tokens file.

    Raises:
        ConfigError: it cannot be read, others may read it, or something in it is wrong; never says what a hash is.
    """
    tenants = _parse(read_file(path, SETTING, secret=True), path)
    if not tenants:
        raise ConfigError(f"{SETTING}: {path} names no tenant; `mosel token NAME --file {path}` adds one")
    return tenants


def tenant_entry(name: str, tenant: Mapping[str, object]) -> str:
    """What a tokens file has to say of a tenant, whose fields may be None.

    Raises:
        ConfigError: the name or a field is wrong.
    """
    fields = {key: value for key, value in tenant.items() if value is not None}
    _check({name: fields}, "tenant")
    # What JSON makes of strings, numbers, booleans and lists is TOML, too.
    return f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in fields.items())


def add_tenant(path: Path, name: str, entry: str) -> None:
    """Adds an entry to a tokens file, which is made, for this user alone, if it is not there.

    Raises:
        ConfigError: the file cannot be read or written, is wrong, or has the tenant already.
    """
    if path.exists():
        content = read_file(path, SETTING, secret=True)
        if name in _parse(content, path):
            raise ConfigError(
                f"{path} has a tenant {name} already; for a second token make one without --file, "
                "and add its hash to token_sha256"
            )
        entry = f"\n{entry}" if content else entry
    try:
        # One write: a gateway that looks at the file finds all of it or nothing.
        with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w") as file:  # noqa: PTH123
            file.write(entry)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _parse(content: bytes, path: Path) -> Tenants:
    try:
        return _check(tomllib.loads(content.decode()), f"{SETTING}: {path}")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{SETTING}: {path}: {error}") from None


def _check(entries: object, where: str) -> Tenants:
    try:
        tenants = _FILE.validate_python(entries)
    except ValidationError as error:
        first = error.errors(include_input=False, include_context=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}: {key}: {first['msg']}") from None
    owners: dict[str, str] = {}
    for name, tenant in tenants.items():
        for known in tenant.token_sha256:
            if owners.setdefault(known, name) != name:
                raise ConfigError(f"{where}: {owners[known]} and {name} have the same token; expected others")
    return tenants
