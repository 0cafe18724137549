"""Side by side on the same work: this server in both placements, the ceiling, and Triton and KServe where installed.

python -m bench.peers [--peers FOLDER]

Windows of all alternate; medians are printed, as Markdown. `bench/peers/foreign/install FOLDER` installs the peers.
"""

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from bench.machine import machine_line
from bench.null_model import NAME as NOTHING
from bench.null_model import write_null_model
from bench.peers.contestants import CONTESTANTS, DIGITS, WORKS, Contestant, Work
from bench.peers.servers import NotInstalled, Servers
from bench.peers.windows import Window, measure, median_of, payloads_of
from mosel.config import load_settings
from mosel.packages.model_package import find_packages

_HEADER = ("work", "server", "items/s", "against the first", "p50 ms", "p99 ms")

Measured = Mapping[tuple[Work, Contestant], Sequence[Window]]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--peers", type=Path, help="where Triton and KServe are installed")
    parser.add_argument("--rounds", type=int, default=3, help="windows of each kind")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a window")
    parser.add_argument("--only", nargs="*", default=[], help="servers whose names have one of these words")
    parser.add_argument("--items", type=int, nargs="*", default=[], help="only jobs of so many items")
    arguments = parser.parse_args()
    works = [work for work in WORKS if not arguments.items or work.items in arguments.items]
    words = arguments.only
    contestants = [c for c in CONTESTANTS if not words or any(word in c.name for word in words)]
    measured, absent = run(works, contestants, arguments.peers, arguments.rounds, arguments.seconds)
    print(f"{machine_line()}; {arguments.rounds} windows of {arguments.seconds:g} s each, medians\n")
    for row in table(works, contestants, measured, absent):
        print(f"| {' | '.join(row)} |")


def run(
    works: Sequence[Work], contestants: Sequence[Contestant], peers: Path | None, rounds: int, seconds: float
) -> tuple[Measured, Mapping[str, str]]:
    """Starts the servers and measures; returns the windows, and why some servers are not there."""
    measured: defaultdict[tuple[Work, Contestant], list[Window]] = defaultdict(list)
    absent: dict[str, str] = {}
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        digits = find_packages(load_settings().models_dir, (DIGITS,))[DIGITS]
        packages = {DIGITS: digits, NOTHING: write_null_model(folder / "models", digits)}
        with Servers(packages, peers, folder) as servers:
            addresses: dict[str, str] = {}
            for server in dict.fromkeys(c.server for c in contestants):
                try:
                    addresses[server] = servers.start(server)
                except NotInstalled as error:
                    absent[server] = str(error)
            windows = [
                (work, c) for work in works for _ in range(rounds) for c in contestants if takes_part(c, work, absent)
            ]
            for work, contestant in track(windows, "measuring", console=console, transient=True):
                payloads = payloads_of(packages[contestant.work], work.items)
                found = measure(addresses[contestant.server], contestant, work, payloads, seconds)
                measured[work, contestant].append(found)
    return measured, absent


def takes_part(contestant: Contestant, work: Work, absent: Mapping[str, str]) -> bool:
    """Whether a contestant is measured with a work."""
    return contestant.work == work.model and contestant.server not in absent


def table(
    works: Sequence[Work], contestants: Sequence[Contestant], measured: Measured, absent: Mapping[str, str]
) -> Iterator[Sequence[str]]:
    """The rows of the table, its header first; rates against the first server that is there."""
    yield _HEADER
    yield ["---"] * len(_HEADER)
    for work in works:
        name = f"{work.model}, jobs of {work.items}, {work.in_flight} in flight"
        first = 0.0
        for contestant in contestants:
            if contestant.work != work.model:
                continue
            if contestant.server in absent:
                yield name, contestant.name, absent[contestant.server], "", "", ""
                continue
            seen = median_of(measured[work, contestant])
            first = first or seen.items_per_s
            against = f"{seen.items_per_s / first:.2f}"
            yield name, contestant.name, f"{seen.items_per_s:.0f}", against, f"{seen.p50_ms:.2f}", f"{seen.p99_ms:.2f}"


if __name__ == "__main__":
    main()
