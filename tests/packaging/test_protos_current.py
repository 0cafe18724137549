"""The committed code in mosel/v1 is what the protos give."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_generated_code_is_what_the_protos_give() -> None:
    command = [sys.executable, "scripts/generate_protos.py", "--check"]
    result = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
