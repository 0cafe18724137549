"""Does what `mosel observe` predicts happen when it is switched on? A client that knows nothing of either, under load.

It sends the test items; then the model is observed while it goes on; then the rows that were observed are kept and
`max_accuracy_loss` is written into model.toml, in a copy of the package that had no calibration rows; and the client
sends the test items again.
"""

import argparse
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from rich import box
from rich.console import Console
from rich.table import Table

from bench.accuracy import standard_error
from bench.items import Items, items_of
from bench.machine import machine_line
from mosel import Client, ObservedItems, Prediction
from mosel.cli.prospects import Prospect, prospects, rows_of
from mosel.config import FREE_PORTS, load_settings
from mosel.launcher import Launcher
from mosel.packages.calibration import save_calibration
from mosel.packages.model_package import ModelPackage, find_packages, load_package
from mosel.profiles.files import needed_profile

_IN_FLIGHT = 4
_READY_TIMEOUT_S = 300.0
_COMPUTED = ("mosel_encode_duration_seconds_sum", "mosel_fuse_duration_seconds_sum")

console = Console(width=140)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--data", type=Path, help="folder with the recordings")
    parser.add_argument("--observe", type=int, default=2000, help="items")
    parser.add_argument("--job-items", type=int, default=1)
    arguments = parser.parse_args()
    kept = load_settings(models=(arguments.model,), gateway=FREE_PORTS)
    package = find_packages(kept.models_dir, kept.models)[arguments.model]
    items = items_of(package, arguments.data)
    if items.labels is None:
        raise SystemExit(f"error: model '{package.name}' cannot be measured: {items.source}")
    with TemporaryDirectory(prefix="mosel-observed-") as scratch:
        folder = copytree(package.folder, Path(scratch) / package.name)
        (folder / "calibration.npz").unlink(missing_ok=True)
        copy, settings = load_package(folder), kept.model_copy(update={"models_dir": Path(scratch)})
        with Launcher(settings) as launcher, Client(launcher.local_address) as client:
            launcher.wait_ready(_READY_TIMEOUT_S)
            run = _Run(launcher, client, copy, items, arguments.job_items)
            console.print(machine_line(), f"model {package.name}: {items.source}", sep="\n")
            console.print(run.table(arguments.observe))


class _Run:
    """Running services, and what is sent to them."""

    def __init__(self, launcher: Launcher, client: Client, package: ModelPackage, items: Items, job_items: int) -> None:
        self._launcher, self._client, self._package, self._items = launcher, client, package, items
        count = len(items.groups)
        self._jobs = [slice(start, min(start + job_items, count)) for start in range(0, count, job_items)]
        self._manifest = (package.folder / "model.toml").read_text(encoding="utf-8")

    def table(self, observe: int) -> Table:
        """Each loss: predicted, and what happened."""
        everything = self._send()
        found = self._observe(observe)
        columns = (
            "at most",
            "predicted to save",
            "saved by profile",
            "of the networks' time",
            "lost",
            "std. error",
            "holds",
        )
        table = Table(title=f"observed, then switched on: jobs of {self._jobs[0].stop} items", box=box.SIMPLE_HEAD)
        for column in columns:
            table.add_column(column, justify="right")
        for prospect in found:
            self._switch_on(prospect.loss)
            after = self._send()
            lost = everything.right - after.right
            error = standard_error(list(zip(map(tuple, self._items.groups.tolist()), lost.tolist(), strict=True)))
            holds = "yes" if lost.mean() <= prospect.loss + 1.645 * error else "no"
            shares = prospect.saved, after.saved, 1 - after.compute_s / everything.compute_s
            figures = (*(f"{share:.1%}" for share in shares), f"{lost.mean():+.4f}", f"{error:.4f}", holds)
            table.add_row(f"{prospect.loss:g}", *figures)
        return table

    def _observe(self, observe: int) -> list[Prospect]:
        jobs, sets = list[ObservedItems](), tuple[str, ...]()
        with self._traffic(), closing(self._client.observe(self._package.name)) as events:
            for event in events:
                jobs, sets = [*jobs, *event.observed], event.modality_sets
                if sum(len(job.answers) for job in jobs) >= observe:
                    break
        rows = rows_of(self._package, sets, jobs, "observed")
        save_calibration(self._package.folder / "calibration.npz", rows)
        measured = needed_profile(self._package, self._launcher.settings, None)
        console.print(f"{len(rows.labels)} items of {len(jobs)} jobs were observed")
        return prospects(rows, measured, [job.size for job in jobs])

    def _switch_on(self, loss: float) -> None:
        text = f"max_accuracy_loss = {loss}\n{self._manifest}"
        (self._package.folder / "model.toml").write_text(text, encoding="utf-8")
        self._client.load_model(self._package.name)

    @contextmanager
    def _traffic(self) -> Iterator[None]:
        """The jobs again and again, meanwhile."""
        stop = threading.Event()

        def caller(first: int) -> None:
            at = first
            while not stop.is_set():
                self._predict(self._jobs[at % len(self._jobs)])
                at += _IN_FLIGHT

        with ThreadPoolExecutor(_IN_FLIGHT) as pool:
            callers = [pool.submit(caller, first) for first in range(_IN_FLIGHT)]
            try:
                yield
            finally:
                stop.set()
        for done in callers:
            done.result()

    def _send(self) -> "_Sent":
        """Every item once."""
        before = _compute_s(self._launcher)
        with ThreadPoolExecutor(_IN_FLIGHT) as pool:
            answers = list(pool.map(self._predict, self._jobs))
        return _Sent(self._items, self._package, self._jobs, answers, _compute_s(self._launcher) - before)

    def _predict(self, rows: slice) -> Prediction:
        return self._client.predict(self._package.name, self._items.payloads_of(rows))


class _Sent:
    """What became of every item.

    Attributes:
        right: [N], 0 or 1.
        saved: the mean share of compute that was saved, by the profile.
        compute_s: seconds of all networks together.
    """

    def __init__(
        self,
        items: Items,
        package: ModelPackage,
        jobs: Sequence[slice],
        answers: Sequence[Prediction],
        compute_s: float,
    ) -> None:
        names, self.compute_s = package.output.labels, compute_s
        scored = [items.scored(rows, prediction.labels, names) for rows, prediction in zip(jobs, answers, strict=True)]
        self.right: NDArray[np.float64] = np.array([float(right) for of_job in scored for _, right in of_job])
        sizes = [rows.stop - rows.start for rows in jobs]
        self.saved = float(np.average([prediction.assurance.saved for prediction in answers], weights=sizes))


def _compute_s(launcher: Launcher) -> float:
    """Seconds that the networks of all services have computed since they were started."""
    with urllib.request.urlopen(launcher.metrics_address, timeout=10) as page:  # noqa: S310 (our own address)
        text = page.read().decode()
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return sum(sample.value for sample in samples if sample.name in _COMPUTED)


if __name__ == "__main__":
    main()
