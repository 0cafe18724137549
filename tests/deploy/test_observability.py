"""Alerts and dashboard: they parse, they ask for metrics that exist, and every alert fires when it should."""

import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from mosel.client import Client
from mosel.errors import Unreachable
from mosel.launcher import Launcher
from tests.deploy.support import ROOT

# Encoders that fusion calls itself are not called by anybody else.
PLACEMENTS = ("services",)
DEPLOY = ROOT / "deploy"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "mosel.json").read_text())
RULES = [rule for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
ALERTS = [rule["alert"] for rule in RULES if "alert" in rule]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {"$__rate_interval": "1m", "$model": "digits"}


def promtool(*arguments: str | Path) -> None:
    if not shutil.which("promtool"):
        pytest.skip("no promtool here (Debian: prometheus)")
    command = ["promtool", *map(str, arguments)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def expressions() -> list[str]:
    """All that the dashboard asks for, and all that rules do."""
    asked = [target["expr"] for panel in PANELS for target in panel["targets"]]
    for variable, value in VARIABLES.items():
        asked = [expression.replace(variable, value) for expression in asked]
    return asked + [rule["expr"] for rule in RULES]


def test_prometheus_takes_its_configuration_and_rules() -> None:
    promtool("check", "config", DEPLOY / "prometheus.yml")
    promtool("check", "rules", DEPLOY / "alerts.yml")


def test_every_alert_fires_when_it_should_and_only_then() -> None:
    tests = (ROOT / "tests" / "deploy" / "alerts_test.yml").read_text()
    assert {alert for alert in ALERTS if alert not in tests} == set()
    promtool("test", "rules", ROOT / "tests" / "deploy" / "alerts_test.yml")


def test_every_alert_is_explained() -> None:
    told = re.findall(r"^\| `(Mosel\w+)` \|", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    assert sorted(told) == sorted(ALERTS)


def test_everything_that_is_asked_for_can_be_parsed(tmp_path: Path) -> None:
    rules = [{"record": f"asked:{number}", "expr": asked} for number, asked in enumerate(expressions())]
    assert len(rules) > 40
    file = tmp_path / "asked.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "asked", "rules": rules}]}))
    promtool("check", "rules", file)


def test_the_dashboard_is_laid_out_without_gaps_or_overlaps() -> None:
    taken = Counter(
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    )
    assert set(taken.values()) == {1}
    height = max(y for _, y in taken) + 1
    assert set(taken) == {(x, y) for x in range(24) for y in range(height)}
    identities = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(identities)) == len(identities)
    assert all(panel["title"] and panel["description"] and panel["fieldConfig"]["defaults"]["unit"] for panel in PANELS)


def test_every_metric_and_label_that_is_asked_for_exists(services: Launcher, client: Client, draw: Any) -> None:
    client.predict("fruit", draw(2))
    with pytest.raises(Unreachable):
        client.predict("fruit", draw(2), min_accuracy=1.0)
    page = httpx.get(services.metrics_address).raise_for_status().text
    exist = set()
    for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", page, re.MULTILINE):
        exist |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"} if kind == "histogram" else {name}
    asked = {name for expression in expressions() for name in re.findall(r"\b(mosel_\w+)", expression)}
    assert len(asked) > 20
    assert asked - exist == set()
    labels = set(re.findall(r"[{,](\w+)=\"", page)) | {"job", "le"}
    grouped = {
        label.strip() for by in re.findall(r"by \(([^)]*)\)", " ".join(expressions())) for label in by.split(",")
    }
    assert grouped - labels == set()
