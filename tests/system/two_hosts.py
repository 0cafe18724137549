"""Two hosts on one machine: network namespaces with an address each, joined by a link that can be cut."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from mosel.config import Settings

_LINK = "link0"


@dataclass(frozen=True)
class Host:
    """A network namespace, its address on the link, and the settings of what runs there."""

    namespace: str
    address: str
    folder: Path
    settings: Settings

    @contextlib.contextmanager
    def running(self, module: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """A service on this host; its log is `MODULE.log` in the folder."""
        with (self.folder / f"{module}.log").open("ab") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, sys.executable, "-P", "-m", module, *arguments],
                env=os.environ | self.settings.as_environment(),
                stdout=log,
                stderr=log,
            )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def set_link(self, state: str) -> None:
        """`up` or `down`: the other host hears nothing of either."""
        _ip("-n", self.namespace, "link", "set", _LINK, state)


@contextlib.contextmanager
def two_hosts(make: Callable[..., Settings], certificates: Path, **flags: object) -> Iterator[tuple[Host, Host]]:
    """Both; the flags are those of `load_settings` for both. Skips the test where this machine cannot have them."""
    with contextlib.ExitStack() as stack:
        names = [f"mosel-{os.getpid()}-{letter}" for letter in "ab"]
        for name in names:
            stack.enter_context(_namespace(name))
        _ip("link", "add", _LINK, "netns", names[0], "type", "veth", "peer", "name", _LINK, "netns", names[1])
        hosts = []
        for number, name in enumerate(names, 1):
            address = f"10.83.7.{number}"
            _ip("-n", name, "address", "add", f"{address}/24", "dev", _LINK)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", _LINK, "up")
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mosel-host-", dir="/dev/shm")))
            settings = make(run_dir=folder / "run", **_merged(flags, folder, certificates, address))
            hosts.append(Host(name, address, folder, settings))
        yield hosts[0], hosts[1]


def authority(folder: Path) -> trustme.CA:
    """A new one, whose certificate is in the folder."""
    made = trustme.CA()
    made.cert_pem.write_to_path(str(folder / "ca.pem"))
    return made


def _merged(flags: dict[str, object], folder: Path, certificates: Path, address: str) -> dict[str, object]:
    transport = flags.get("transport", {})
    assert isinstance(transport, dict)
    names = {"certificate": f"{address}.pem", "key": f"{address}.key", "ca": "ca.pem"}
    tls = {name: certificates / file for name, file in names.items()}
    shm_dir = folder / "shm"
    shm_dir.mkdir()
    return flags | {"transport": transport | {"shm_dir": shm_dir}, "internal_tls": tls, "parent_pid": os.getpid()}


@contextlib.contextmanager
def _namespace(name: str) -> Iterator[None]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and the command ip for network namespaces")
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no network namespace can be made here: {made.stderr.strip()}")
    try:
        yield
    finally:
        _ip("netns", "delete", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
