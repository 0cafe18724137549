"""Everything that docker-compose.yml starts, and what tests do with it."""

import subprocess
from dataclasses import dataclass

from tests.deploy.support import ROOT

UP_S = 600


@dataclass(frozen=True)
class Stack:
    """Everything that the compose file starts, in a project of its own.

    Attributes:
        docker: the program.
        compose: the command that knows the project.
        environment: of both.
        grpc_port, http_port, metrics_port: where the gateway is.
    """

    docker: str
    compose: list[str]
    environment: dict[str, str]
    grpc_port: int
    http_port: int
    metrics_port: int

    @property
    def address(self) -> str:
        """The gateway's."""
        return f"127.0.0.1:{self.grpc_port}"

    def run(self, *arguments: str, check: bool = True) -> str:
        """What `docker` prints."""
        return run([self.docker, *arguments], self.environment, check=check)

    def up(self, *services: str) -> None:
        """Starts services, and returns when what they wait for is healthy."""
        run([*self.compose, "up", "-d", "--no-build", *services], self.environment, timeout_s=UP_S)

    def stop(self, *services: str) -> None:
        """Stops services as compose does: those first that depend on others."""
        run([*self.compose, "stop", *services], self.environment)

    def stop_at_once(self, *services: str) -> None:
        """Stops services as a Docker engine does that stops itself."""
        self.run("stop", *(self.container(service) for service in services))

    def container(self, service: str) -> str:
        """Its id, whether it runs or not."""
        label = f"label=com.docker.compose.service={service}"
        project = f"label=com.docker.compose.project={self.compose[self.compose.index('-p') + 1]}"
        return self.run("ps", "-aq", "--filter", label, "--filter", project).strip()

    def inspect(self, service: str, template: str) -> str:
        """Something that Docker knows of a service's container."""
        return self.run("inspect", "--format", template, self.container(service)).strip()

    def inside(self, service: str, command: str, check: bool = True) -> str:
        """What a shell command prints in a service's container."""
        return self.run("exec", self.container(service), "sh", "-c", command, check=check)

    def kill(self, service: str) -> None:
        """Kills what runs in a container with -9: a crash. After `docker kill` Docker would leave it dead."""
        self.inside(service, "kill -9 -1", check=False)

    def is_healthy(self, service: str) -> bool:
        """Whether its health check succeeds."""
        return self.inspect(service, "{{.State.Health.Status}}") == "healthy"


def run(command: list[str], environment: dict[str, str], timeout_s: float = 120, check: bool = True) -> str:
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0 or not check, f"{' '.join(command)}:\n{done.stdout}\n{done.stderr}"
    return done.stdout
