"""A checkout that was copied somewhere and is not installed."""

import subprocess
import sys

CODE = """
import importlib.metadata

known = importlib.metadata.distribution

def distribution(name):
    if name.startswith("mosel"):
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)

importlib.metadata.distribution = distribution
import encoders.__main__, fusion.__main__, gateway.__main__, selector.__main__
import mosel
from gateway.inference.metadata import server_metadata
from mosel.profiles.hardware import this_software
print(server_metadata()["version"], this_software().mosel, mosel.__version__)
"""


def test_it_knows_its_version_and_every_service_can_be_imported() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.split())) == 1
