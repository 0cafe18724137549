"""Everything that needs a GPU, in one command of under nine minutes; each step has a time limit of its own.

python -m bench.gpu --out FOLDER                  # report.md there, and the output of each step
python -m bench.gpu --out FOLDER --device cpu     # the same without a GPU, to rehearse it
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.machine import machine_line

_TESTS = ("pytest", "-q", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Step:
    """A part of the run: a title, the module and arguments that it runs, and the seconds that it may take."""

    name: str
    title: str
    command: tuple[str, ...]
    limit_s: float


def steps(out: Path, device: str) -> list[Step]:
    """The parts in their order; their limits together stay under nine minutes. A rehearsal is as short as it can be."""
    served: tuple[str, ...] = ()
    transport: tuple[str, ...] = ("--messages", "5000", "--kills", "4")
    overhead: tuple[str, ...] = ("--rounds", "2", "--seconds", "1")
    if device == "cpu":
        served = ("--models", "digits")
        transport = ("--messages", "100", "--kills", "1", "--largest-mib", "1", "--repeats", "5")
        overhead = ("--rounds", "1", "--seconds", "0.1")
    report = ("bench.gpu.transport", "--out", str(out / "transport.md"))
    return [
        Step("served", "Predictions of the services against the processor", ("bench.gpu.served", *served), 120),
        Step("tests", "The tests marked gpu", _TESTS, 110),
        Step("transport", "Device memory between two processes", (*report, *transport), 170),
        Step("overhead", "What the services cost", ("bench.overhead", *overhead), 110),
    ]


def main() -> None:
    """Runs all steps, whatever becomes of each, and exits with 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the report and the output of each step")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearse it without a GPU")
    parser.add_argument("--only", nargs="*", default=None, help="names of steps (default: all)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Everything that needs a GPU, measured",
        "",
        f"`python -m bench.gpu --device {arguments.device}`. {machine_line()}. {_gpu(arguments.device)}",
    ]
    failed = []
    for step in steps(arguments.out, arguments.device):
        if arguments.only is None or step.name in arguments.only:
            ended, output = _run(step, arguments.device, arguments.out / f"{step.name}.log")
            print(f"{step.name}: {ended}", flush=True)
            failed += [] if ended.startswith("well") else [step.name]
            written = arguments.out / f"{step.name}.md"
            text = written.read_text(encoding="utf-8") if written.exists() else f"```\n{output.strip()}\n```\n"
            lines += ["", f"## {step.title}: {ended}", "", text]
            (arguments.out / "report.md").write_text("\n".join(lines), encoding="utf-8")
    if failed:
        raise SystemExit(f"not well: {', '.join(failed)}; their output is in {arguments.out}")


def _run(step: Step, device: str, log: Path) -> tuple[str, str]:
    """Runs a step within its limit; says how it ended, and what it printed."""
    environment = os.environ | {"MOSEL_DEVICE": device, "PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
    started = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", *step.command], stdout=stream, stderr=stream, env=environment, start_new_session=True
        )
        try:
            code = process.wait(step.limit_s)
            ended = "well" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            ended = f"stopped at its limit of {step.limit_s:.0f} s"
        finally:
            _kill_group(process)
    return f"{ended}, after {time.monotonic() - started:.0f} s", log.read_text(encoding="utf-8", errors="replace")


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Ends a step and what it left running."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _gpu(device: str) -> str:
    if device == "cpu":
        return "A rehearsal: no GPU was used, and no figure below is one of a GPU."
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() + "."
    except (OSError, subprocess.CalledProcessError) as error:
        return f"nvidia-smi does not answer: {error}."


if __name__ == "__main__":
    main()
