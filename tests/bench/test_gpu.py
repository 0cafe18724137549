"""`python -m bench.gpu` from its start to its end, where there is no GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu.__main__ import steps


@pytest.mark.timeout(300)
def test_everything_that_needs_a_gpu_is_rehearsed_without_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "report.md").read_text()
    for step in steps(tmp_path, "cpu"):
        assert f"## {step.title}: well" in report
    assert "* encoder/audio to fusion: posix_shm" in report
    assert "* encoder/audio to fusion: in_process" in report
    assert "**NO**" not in report
    assert "A rehearsal" in report


def test_the_limits_of_all_steps_together_stay_under_nine_minutes(tmp_path: Path) -> None:
    assert sum(step.limit_s for step in steps(tmp_path, "cuda")) < 9 * 60
