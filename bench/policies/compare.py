"""The whole comparison, on services that it starts."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bench.items import Items, items_of
from bench.machine import machine_line, profile_line
from bench.policies.gains import Gain, Knees, gains, speedups_over_all
from bench.policies.runs import Row, Served, Setting, Simulated
from bench.policies.tables import gains_table, points, runs_table, speedups_table, write_results
from bench.serving import serve
from bench.simulation import world_and_demands
from bench.workload import SLACKS, TS, mean_size
from mosel.config import Settings
from mosel.launcher import Launcher
from mosel.packages.model_package import ModelPackage
from mosel.profiles.files import Profile

# The load at which completion times are compared, with shedding off, and for how long.
_SATURATED, _SATURATED_S = 1.2, 290.0
# What waits at most in such a run, beyond the excess of the mean load, as a share of the capacity times its length.
_BURSTS = 0.3
_READY_TIMEOUT_S = 300.0
# The first calls of a service are slow, and say nothing about the others.
_WARM_UP_LOAD, _WARM_UP_S = 0.5, 3.0
# Bounds of the services that a comparison must not run into: what it measures is the policies.
_MANY_JOBS = 100_000
_MOST_ARENA_MIB = 4096


@dataclass(frozen=True)
class Options:
    """What to compare.

    Attributes:
        policies: of the selector.
        slacks, ts: of the workload.
        loads: in capacities of `all`; empty: around each policy's own 5 % misses.
        seconds: length of a run.
        trace: requests per second that arrivals follow; None: Poisson.
        saturated_trace: the same for the runs without shedding.
        saturated_s: their length; 0: none.
        data: folder with labelled recordings; None: wherever they are found.
        seed: of the workload.
    """

    policies: tuple[str, ...] = ("all", "aggressive", "greedy", "mosel")
    slacks: tuple[float, ...] = SLACKS
    ts: tuple[float, ...] = TS
    loads: tuple[float, ...] = ()
    seconds: float = 30.0
    trace: Path | None = None
    saturated_trace: Path | None = None
    saturated_s: float = _SATURATED_S
    data: Path | None = None
    seed: int = 0


console = Console(width=140, highlight=False)


def compare(
    settings: Settings, package: ModelPackage, profile: Profile, options: Options, out: Path | None = None
) -> None:
    """Runs everything, prints the tables, and writes results and a picture into a folder."""
    comparison = _Comparison(settings, package, profile, options)
    for line in comparison.about():
        console.print(line, soft_wrap=True, markup=False)
    rows, found = comparison.loads()
    console.print(runs_table(rows, "runs on real services"), gains_table(found))
    saturated = comparison.without_shedding() if options.saturated_s else []
    if speedups := speedups_over_all(saturated):
        console.print(speedups_table(speedups, comparison.saturated_title()))
    console.print(machine_line())
    if out is not None:
        write_results(out, {"about": comparison.about()}, [*rows, *saturated], found)
        from bench.policies.plots import write_plot

        write_plot(out / "policies.png", rows, f"{package.name}: policies by load\n{package.description}")
        console.print(f"results: {out}", soft_wrap=True)


class _Comparison:
    def __init__(self, settings: Settings, package: ModelPackage, profile: Profile, options: Options) -> None:
        self._settings, self._package, self._profile, self._options = settings, package, profile, options
        self._items: Items = items_of(package, options.data)
        world, demands = world_and_demands(profile)
        self._workload = Simulated.of(world, demands, options.trace, options.seed)
        self._saturated = Simulated.of(world, demands, options.saturated_trace, options.seed)
        self._knees = Knees(self._workload, options.slacks[len(options.slacks) // 2])

    def about(self) -> list[str]:
        """What was compared, in lines."""
        options = self._options
        arrivals = "Poisson" if options.trace is None else options.trace.name
        how = f"items: {self._items.source}; arrivals: {arrivals}, open loop; runs of {options.seconds:g} s"
        unit = f"load 1 is {self._workload.capacity:.2f} jobs/s, what all answers when it never idles (simulated)"
        return [machine_line(), profile_line(self._profile, self._package.description), how, unit]

    def loads(self) -> tuple[list[Row], list[Gain]]:
        """Every policy, slack and t under several loads."""
        options = self._options
        with self._services(self._workload, options.seconds, options.policies) as services:
            for slack in options.slacks:
                for policy in options.policies:
                    for t in self._ts(policy):
                        for row in self._runs(services, policy, slack, t):
                            self._say(row)
        console.print("simulating what could be gained at all")
        return services.rows, list(gains(services.rows, self._workload, self._knees))

    def without_shedding(self) -> list[Row]:
        """Completion times at a load that `all` cannot serve, without shedding."""
        options = self._options
        slack = options.slacks[len(options.slacks) // 2]
        policies = tuple(policy for policy in options.policies if policy in ("all", "mosel"))
        backlog = round((_SATURATED - 1 + _BURSTS) * self._saturated.capacity * options.saturated_s)
        with self._services(self._saturated, options.saturated_s, policies, backlog) as services:
            for policy in policies:
                for t in self._ts(policy):
                    self._say(services.run(Setting(policy, slack, t, _SATURATED), late_ok=True))
        return services.rows

    def saturated_title(self) -> str:
        """What the runs without shedding were."""
        trace = self._options.saturated_trace
        arrivals = "Poisson arrivals" if trace is None else trace.name
        return f"completion time at {_SATURATED:g} times the capacity of all, shedding off, {arrivals}"

    def _ts(self, policy: str) -> Sequence[float | None]:
        return (None,) if policy == "all" else self._options.ts

    def _runs(self, services: Served, policy: str, slack: float, t: float | None) -> Iterator[Row]:
        if self._options.loads:
            yield from (services.run(Setting(policy, slack, t, load)) for load in self._options.loads)
        else:
            yield from services.around(policy, slack, t, self._knees.of(policy, slack, t, False))

    def _services(
        self, workload: Simulated, seconds: float, policies: Sequence[str], backlog: int = 0
    ) -> contextlib.AbstractContextManager[Served]:
        return served(self._settings, self._package, self._items, workload, seconds, policies, backlog)

    def _say(self, row: Row) -> None:
        s, setting = row.summary, row.setting
        console.print(
            f"{setting.policy}, slack {setting.slack:g}, t {points(setting.t)}, load {setting.load:.2f}: "
            f"{s.items_per_s:.1f} items/s in time, {s.job_miss_ratio:.1%} of jobs missed, mean {s.mean_ms:.0f} ms",
            soft_wrap=True,
        )


@contextlib.contextmanager
def served(
    settings: Settings,
    package: ModelPackage,
    items: Items,
    workload: Simulated,
    seconds: float,
    policies: Sequence[str],
    backlog: int = 0,
) -> Iterator[Served]:
    """The services under every policy, side by side: each stands idle while another is run.

    Args:
        settings: what is not set here.
        package: the model.
        items: what jobs bring along.
        workload: when they come and what they ask for.
        seconds: length of a run.
        policies: of the selector.
        backlog: jobs that must be able to wait at the same time.
    """
    with contextlib.ExitStack() as stack:
        launchers = {}
        for policy in policies:
            launchers[policy] = stack.enter_context(Launcher(_settings_for(policy, settings, items, backlog)))
            # One after another: those that start disturb those that measure.
            launchers[policy].wait_ready(_READY_TIMEOUT_S)
            setting = Setting(policy, SLACKS[-1], None, _WARM_UP_LOAD)
            serve(launchers[policy], package, workload.arrivals(setting, _WARM_UP_S), items)
        yield Served(launchers, package, items, workload, seconds)


def _settings_for(policy: str, settings: Settings, items: Items, backlog: int) -> Settings:
    """Settings with a policy, under which so many jobs can wait at the same time."""
    item_bytes = sum(payload[:1].nbytes for payload in items.payloads.values())
    # Slots come in six sizes, and are up to four times as large as what is in them.
    arena_mib = settings.transport.gateway_arena_mib + round(backlog * mean_size() * item_bytes * 4 * 6 / 2**20)
    return settings.model_copy(
        update={
            "selector": settings.selector.model_copy(update={"policy": policy, "max_queued_items": 32 * _MANY_JOBS}),
            "gateway": settings.gateway.model_copy(update={"max_jobs_in_flight": _MANY_JOBS}),
            "transport": settings.transport.model_copy(update={"gateway_arena_mib": min(arena_mib, _MOST_ARENA_MIB)}),
        }
    )
