"""The Dockerfile, without an engine: tests/compose builds it."""

import re
import tomllib

from mosel.config import MAX_SOCKET_PATH_BYTES
from tests.deploy.support import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_what_the_build_may_read_is_there() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    # For builds without a network.
    assert [name for name in kept if not (ROOT / name).exists()] in ([], ["wheels"])
    packed = {include.split("/")[1] for include in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["include"]}
    assert packed | {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= set(kept)


def test_extras_are_those_of_the_project() -> None:
    extras = PROJECT["project"]["optional-dependencies"].keys()
    stated = re.findall(r'EXTRAS="([^"]+)"', DOCKERFILE) + re.findall(
        r"EXTRAS: (.+)", (ROOT / "deploy" / "compose.gpu.yml").read_text()
    )
    assert len(stated) == 3
    for names in stated:
        assert set(names.split()) <= extras
        assert "server" in names.split()


def test_nothing_in_it_is_root(image_environment: dict[str, str]) -> None:
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE) == ["10001:10001"]
    # In front of it, so that the last layers are the user's.
    assert DOCKERFILE.rindex("\nRUN ") < DOCKERFILE.index("\nUSER ")


def test_socket_paths_are_short_enough(image_environment: dict[str, str]) -> None:
    longest = f"{image_environment['MOSEL_RUN_DIR']}/encoder-{'m' * 30}.sock"
    assert len(longest) < MAX_SOCKET_PATH_BYTES
