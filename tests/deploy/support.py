"""What every deployment is made of."""

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Started:
    """A container that runs a service: what is started in it, with which environment, and how its health is asked."""

    command: Sequence[str]
    environment: Mapping[str, str]
    health: Sequence[str]

    @property
    def module(self) -> str:
        """gateway, selector, encoders or fusion."""
        assert list(self.command[:2]) == ["python", "-m"]
        return self.command[2]

    @property
    def modality(self) -> str:
        """Of an encoder."""
        assert list(self.command[3:-1]) == ["--modality"]
        return self.command[-1]


def compose_program() -> list[str] | None:
    """Whichever generation of compose there is."""
    if (
        shutil.which("docker")
        and not subprocess.run(
            ["docker", "compose", "version"], capture_output=True, timeout=60, check=False
        ).returncode
    ):
        return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else None
