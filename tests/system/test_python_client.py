"""docs/python-client.md as it stands: every program in it runs against the reference model."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mosel.config import FREE_PORTS, load_settings
from mosel.launcher import Launcher

PAGE = Path(__file__).parents[2] / "docs" / "python-client.md"
PROGRAMS = dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL))
PRINTS = {
    "ten_lines.py": r"(\d from (image\+pen|image|pen)\n){4}",
    "plan_first.py": r"jobs like this one bring \(('\w+',? ?)+\)\n(\('[\w+]+',\)\n){3}",
    "as_they_finish.py": r"StrategyInfo\(.*\)\nJobAccepted\(.*\)\n(\d+ of 256 \(.*\)\n)+JobSummary\(.*\)\n",
    "with_torch.py": r"\[\d \d\]\n",
    "at_the_same_time.py": r"\[('\d', ){7}'\d'\]\n",
}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with Launcher(load_settings(models=("digits",), gateway=FREE_PORTS, device="cpu")) as launcher:
        launcher.wait_ready(120)
        yield launcher.address


def test_the_page_has_these_programs_and_no_other() -> None:
    assert PROGRAMS.keys() == PRINTS.keys()


def test_the_first_one_has_ten_lines() -> None:
    assert len([line for line in PROGRAMS["ten_lines.py"].splitlines() if line]) <= 10


@pytest.mark.parametrize("name", PRINTS)
def test_it_runs(address: str, tmp_path: Path, name: str) -> None:
    program = tmp_path / name
    program.write_text(PROGRAMS[name].replace("127.0.0.1:8001", address))
    done = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(PRINTS[name], done.stdout), done.stdout
