"""The comparison with others, rehearsed with the servers that are always there."""

import re
import sys
from pathlib import Path

import pytest

from bench.null_model import NAME as NOTHING
from bench.peers import __main__ as peers
from bench.peers.contestants import CONTESTANTS, DIGITS, KSERVE, TRITON, WORKS, Contestant, Work
from bench.peers.servers import NotInstalled, Servers
from bench.peers.windows import Window, median_of, payloads_of, request_of
from mosel.packages.model_package import load_package

MODELS = Path(__file__).parents[2] / "models"
ONE = Work(NOTHING, 1, 1)


def test_every_contestant_has_works_and_every_row_a_name_of_its_own() -> None:
    names = [(contestant.work, contestant.name) for contestant in CONTESTANTS]
    assert len(set(names)) == len(names)
    assert {work.model for work in WORKS} == {contestant.work for contestant in CONTESTANTS}


def test_a_server_that_is_not_installed_says_so_in_its_row() -> None:
    ceiling, kserve = (next(c for c in CONTESTANTS if c.name == name) for name in ("ceiling", "KServe"))
    faster = Contestant("faster", "single-nothing", NOTHING)
    measured = {
        (ONE, ceiling): [Window(100.0, 9.0, 10.0), Window(300.0, 8.0, 11.0), Window(200.0, 7.0, 90.0)],
        (ONE, faster): [Window(300.0, 1.0, 2.0)],
    }
    rows = list(peers.table([ONE], [ceiling, kserve, faster], measured, {KSERVE: "not installed (--peers)"}))
    assert {len(row) for row in rows} == {6}
    assert [list(row[1:]) for row in rows[2:]] == [
        ["ceiling", "200", "1.00", "8.00", "11.00"],
        ["KServe", "not installed (--peers)", "", "", ""],
        ["faster", "300", "1.50", "1.00", "2.00"],
    ]


def test_medians_are_of_each_figure() -> None:
    assert median_of([Window(1, 9, 4), Window(3, 8, 5), Window(2, 7, 6)]) == Window(2, 8, 5)


def test_floors_are_sets_to_those_who_know_none() -> None:
    package = load_package(MODELS / DIGITS)
    payloads = payloads_of(package, 3)
    by_name = {c.name: request_of(c, payloads) for c in CONTESTANTS if not c.plan_first}
    assert by_name["ceiling fast, 0.85"].parameters["modalities"].string_param == "image,pen"
    assert by_name["single, 0.85"].parameters["min_accuracy"].double_param == 0.85
    assert not by_name["single, all"].parameters
    assert [tensor.name for tensor in by_name["Triton fast, image+pen alone"].inputs] == ["image", "pen"]
    assert {len(request.raw_input_contents) for name, request in by_name.items() if "alone" not in name} == {3}


@pytest.mark.parametrize("name", [TRITON, KSERVE])
def test_without_their_environments_others_are_not_there(tmp_path: Path, name: str) -> None:
    with Servers({}, None, tmp_path) as servers, pytest.raises(NotInstalled, match=r"not installed \(--peers\)"):
        servers.start(name)
    with Servers({}, tmp_path, tmp_path) as servers, pytest.raises(NotInstalled, match=f"not installed in {tmp_path}"):
        servers.start(name)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_our_own_kinds_side_by_side(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["ceiling", "single", "services", "KServe"]
    arguments = ["--rounds", "1", "--seconds", "0.2", "--items", "8", "1", "--only", *words]
    monkeypatch.setattr(sys, "argv", ["peers", *arguments])
    peers.main()
    lines = capsys.readouterr().out.splitlines()
    taking_part = [c for c in CONTESTANTS if c.server != TRITON]
    works = [work for work in WORKS if work.items in (1, 8)]
    rows = [line for line in lines if re.match(r"\| (nothing|digits), jobs of", line)]
    assert len(rows) == sum(c.work == work.model for c in taking_part for work in works)
    assert sum("not installed" in row for row in rows) == 2
    figures = [row.split(" | ")[2:] for row in rows if "not installed" not in row]
    assert all(float(figure) > 0 for row in figures for figure in row[0].split() + row[2].split())
