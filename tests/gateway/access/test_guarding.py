"""A tokens file that changes while a guard follows it."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.access.guard import Guard
from gateway.access.guarding import guarding
from gateway.access.tenants import hash_of
from mosel.errors import ConfigError, Unauthenticated

LOOK_EVERY_S = 0.01


def write(path: Path, *tokens: str) -> None:
    # As editors and Kubernetes do it: a new file takes the place of the old one.
    new = path.with_suffix(".new")
    new.write_text("".join(f'[{token}]\ntoken_sha256 = "{hash_of(token)}"\n' for token in tokens))
    new.chmod(0o600)
    new.replace(path)


def knows(guard: Guard, token: str) -> bool:
    try:
        return guard.identify([f"Bearer {token}"]) == token
    except Unauthenticated:
        return False


async def becomes(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 (a file, and nothing that could tell)
            await asyncio.sleep(LOOK_EVERY_S)


async def test_without_a_file_there_is_no_guard() -> None:
    async with guarding(None, Counter()) as guard:
        assert guard is None


async def test_a_wrong_file_at_the_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        async with guarding(tmp_path / "tokens.toml", Counter()):
            pass


async def test_tenants_that_come_and_go_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    write(path, "alice")
    async with guarding(path, Counter(), LOOK_EVERY_S) as guard:
        assert guard is not None
        assert knows(guard, "alice")
        write(path, "alice", "bob")
        await becomes(lambda: knows(guard, "bob"))
        assert knows(guard, "alice")
        write(path, "bob")
        await becomes(lambda: not knows(guard, "alice"))
        assert knows(guard, "bob")


@pytest.mark.parametrize("how", ["broken", "open to others", "gone"])
async def test_while_the_file_is_wrong_the_tenants_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    path = tmp_path / "tokens.toml"
    write(path, "alice")
    async with guarding(path, Counter(), LOOK_EVERY_S) as guard:
        assert guard is not None
        if how == "broken":
            path.write_text("[bob")
        elif how == "open to others":
            path.chmod(0o644)
        else:
            path.unlink()
        await becomes(lambda: any(record.levelno == logging.ERROR for record in caplog.records))
        await asyncio.sleep(10 * LOOK_EVERY_S)
        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == 1, "once for each change"
        assert str(path) in vars(errors[0])["reason"]
        assert knows(guard, "alice")
        write(path, "bob")
        await becomes(lambda: knows(guard, "bob"))
        assert not knows(guard, "alice")
