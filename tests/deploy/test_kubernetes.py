"""The manifests: every overlay is rendered by kustomize, and checked against the schemas of Kubernetes."""

import copy
import functools
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import kubernetes_validate
import pytest
import yaml

from mosel.config import Settings
from tests.deploy.support import ROOT, Started

Manifest = dict[str, Any]

OVERLAYS = ROOT / "deploy" / "kubernetes" / "overlays"
# The oldest Kubernetes that an overlay is for, as it says itself.
OLDEST = {"cpu": "1.30", "gpu": "1.34", "protected": "1.30"}
NEWEST = "1.37"
GATEWAY = ("spec", "template", "spec", "containers", 0)
UNITS = {"Mi": 1024**2, "Gi": 1024**3}


def program() -> list[str] | None:
    """What renders; kubectl before 1.27 has a kustomize that is too old."""
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    if shutil.which("kubectl"):
        told = subprocess.run(["kubectl", "version", "--client"], capture_output=True, text=True, check=False).stdout
        version = re.search(r"v1\.(\d+)\.|Minor:\"(\d+)", told)
        if version and int(version[1] or version[2]) >= 27:
            return ["kubectl", "kustomize"]
    return None


@pytest.fixture(scope="session")
def rendered() -> Callable[[str], list[Manifest]]:
    """The manifests of an overlay; a test may change them."""
    command = program()

    @functools.cache
    def manifests(overlay: str) -> list[Manifest]:
        if command is None:
            pytest.skip("neither kustomize nor kubectl 1.27 here")
        made = subprocess.run(
            [*command, str(OVERLAYS / overlay)], capture_output=True, text=True, timeout=60, check=False
        )
        assert made.returncode == 0, made.stderr
        assert "deprecated" not in made.stderr
        return [manifest for manifest in yaml.safe_load_all(made.stdout) if manifest]

    return lambda overlay: copy.deepcopy(manifests(overlay))


@pytest.fixture(params=sorted(OLDEST))
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def manifests(overlay: str, rendered: Callable[[str], list[Manifest]]) -> list[Manifest]:
    return rendered(overlay)


@pytest.fixture
def pod(manifests: list[Manifest]) -> Manifest:
    template: Manifest = one(manifests, "Deployment")["spec"]["template"]
    return template


def one(manifests: Sequence[Manifest], kind: str) -> Manifest:
    (found,) = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


def check(manifest: Manifest, version: str) -> None:
    """Raises where a manifest is not what its kind should be; a kind without a schema is an error as well."""
    kubernetes_validate.validate(manifest, version, strict=True)


def containers(pod: Manifest) -> list[Manifest]:
    return [*pod["spec"]["initContainers"], *pod["spec"]["containers"]]


def size(text: str) -> int:
    return int(text[:-2]) * UNITS[text[-2:]]


def test_every_overlay_is_known_here() -> None:
    assert {folder.name for folder in OVERLAYS.iterdir()} == OLDEST.keys()


def test_every_manifest_is_valid(overlay: str, manifests: list[Manifest]) -> None:
    for manifest in manifests:
        for version in (OLDEST[overlay], NEWEST):
            check(manifest, version)
    kinds = {manifest["kind"] for manifest in manifests}
    assert kinds >= {"Namespace", "ConfigMap", "Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"}


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        pytest.param("Deployment", ("spec", "template", "spec", "readinessGate"), [], id="an unknown field"),
        pytest.param("Deployment", (*GATEWAY, "readinesProbe"), {}, id="an unknown field deep inside"),
        pytest.param("Deployment", (*GATEWAY, "ports"), {"grpc": 8001}, id="a map for a list"),
        pytest.param("Deployment", ("spec", "replicas"), "two", id="a word for a number"),
        pytest.param("Deployment", ("spec", "template", "spec", "containers"), None, id="no containers"),
        pytest.param("Deployment", ("kind",), "Deploymint", id="a kind that does not exist"),
        pytest.param("PodDisruptionBudget", ("apiVersion",), "policy/v9", id="a version that does not exist"),
    ],
)
def test_what_is_broken_is_found(manifests: list[Manifest], kind: str, path: Sequence[str | int], value: Any) -> None:
    manifest: Any = one(manifests, kind)
    check(manifest, NEWEST)
    place = manifest
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises((kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError)):
        check(manifest, NEWEST)


def test_a_pod_is_one_cell(
    manifests: list[Manifest], pod: Manifest, check_cell: Callable[[Sequence[Started], int], None]
) -> None:
    environment = one(manifests, "ConfigMap")["data"]
    (memory,) = [volume for volume in pod["spec"]["volumes"] if volume["name"] == "shared-memory"]
    assert memory["emptyDir"]["medium"] == "Memory"
    cell = []
    for container in containers(pod):
        # Started, or ready, means more than alive: warm. Of the gateway, that the model can be run.
        warm = container["readinessProbe" if container["name"] == "gateway" else "startupProbe"]
        health, alive = (probe.get("exec", {}).get("command", []) for probe in (warm, container["livenessProbe"]))
        assert alive == health[:3]
        cell.append(Started(container["command"], environment, health))
        assert container["envFrom"] == [{"configMapRef": {"name": one(manifests, "ConfigMap")["metadata"]["name"]}}]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert (mounts["/dev/shm"], mounts["/run/mosel"]) == ("shared-memory", "sockets")
        assert set(mounts.values()) <= {volume["name"] for volume in pod["spec"]["volumes"]}
    check_cell(cell, size(memory["emptyDir"]["sizeLimit"]))
    # Of whatever Service there is, Kubernetes would make a MOSEL_... that is no setting.
    assert pod["spec"]["enableServiceLinks"] is False
    assert pod["spec"]["shareProcessNamespace"] is True


def test_the_gateway_stops_first_and_everybody_has_time(
    manifests: list[Manifest], pod: Manifest, settings_of: Callable[[Started], Settings]
) -> None:
    assert [container["name"] for container in pod["spec"]["containers"]] == ["gateway"]
    # Started in this order, in front of the gateway, and stopped behind it, the last one first.
    assert {container["restartPolicy"] for container in pod["spec"]["initContainers"]} == {"Always"}
    assert pod["spec"]["initContainers"][-1]["name"] == "selector"
    (gateway,) = pod["spec"]["containers"]
    settings = settings_of(Started(gateway["command"], one(manifests, "ConfigMap")["data"], []))
    needed_s = gateway["lifecycle"]["preStop"]["sleep"]["seconds"] + 2 * settings.stop_grace_ms / 1000
    assert pod["spec"]["terminationGracePeriodSeconds"] > needed_s


def test_probes_reach_the_gateway(
    overlay: str, manifests: list[Manifest], pod: Manifest, settings_of: Callable[[Started], Settings]
) -> None:
    (gateway,) = pod["spec"]["containers"]
    settings = settings_of(Started(gateway["command"], one(manifests, "ConfigMap")["data"], []))
    port, (model,) = settings.gateway.grpc_port, settings.models
    ports = {"http": settings.gateway.http_port, "grpc": port, "metrics": settings.gateway.metrics_port}
    assert {place["name"]: place["containerPort"] for place in gateway["ports"]} == ports
    # The kubelet's own bring neither a certificate nor a token. Other machines come in, with both or with neither.
    assert ("grpc" in gateway["livenessProbe"]) == (settings.tls.certificate is None) == settings.gateway.insecure
    assert (settings.gateway.tokens_file is None) == settings.gateway.insecure == (overlay != "protected")
    if settings.gateway.insecure:
        assert gateway["startupProbe"]["grpc"] == gateway["livenessProbe"]["grpc"] == {"port": port}
        assert gateway["readinessProbe"]["grpc"] == {"port": port, "service": model}


def test_nothing_may_do_more_than_it_must(manifests: list[Manifest], pod: Manifest) -> None:
    assert one(manifests, "Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    spec = pod["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert (spec["securityContext"]["runAsNonRoot"], spec["securityContext"]["runAsUser"]) == (True, 10001)
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers(pod):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        resources = container["resources"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"]
        assert "cpu" in resources["requests"]
        assert "cpu" not in resources["limits"]
    policy = one(manifests, "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"] == []


def test_everything_selects_the_cells(manifests: list[Manifest], pod: Manifest) -> None:
    labels = pod["metadata"]["labels"]
    names = {place["name"] for place in pod["spec"]["containers"][0]["ports"]}
    for manifest in manifests:
        spec = manifest.get("spec", {})
        match manifest["kind"]:
            case "Service":
                assert spec["selector"] == labels
                assert {port["targetPort"] for port in spec["ports"]} <= names
            case "Deployment" | "PodDisruptionBudget":
                assert spec["selector"] == {"matchLabels": labels}
            case "NetworkPolicy":
                assert spec["podSelector"] == {"matchLabels": labels}
                assert {port["port"] for rule in spec["ingress"] for port in rule["ports"]} == names
                # Callers are no cells.
                peers = [peer.get("podSelector", {}) for rule in spec["ingress"] for peer in rule["from"]]
                assert all(labels.items().isdisjoint(peer.get("matchLabels", {}).items()) for peer in peers)
    services = {m["metadata"]["name"]: m["spec"] for m in manifests if m["kind"] == "Service"}
    assert services["mosel"]["clusterIP"] == services["mosel-metrics"]["clusterIP"] == "None"


def test_one_claim_gives_a_gpu_to_all_who_compute(rendered: Callable[[str], list[Manifest]]) -> None:
    manifests = rendered("gpu")
    spec = one(manifests, "Deployment")["spec"]["template"]["spec"]
    (claim,) = spec["resourceClaims"]
    assert claim["resourceClaimTemplateName"] == one(manifests, "ResourceClaimTemplate")["metadata"]["name"]
    using = {c["name"] for c in spec["initContainers"] if c["resources"].get("claims") == [{"name": claim["name"]}]}
    assert using == {c["name"] for c in spec["initContainers"]} - {"selector"}
    assert one(manifests, "ConfigMap")["data"]["MOSEL_DEVICE"] == "cuda"
