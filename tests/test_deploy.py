"""What deploy/ ships: Kubernetes knows every field, the server every setting, and the limits agree with each other."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

import serving.cli.commands
from serving.dialects.grpc.server import LEAVING_SECONDS
from serving.settings import PREFIX, Settings, configure

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
VERSION = "1.32"
COMMANDS = set(typer.main.get_group(serving.cli.commands.app).commands)


def documents(*patterns: str) -> Iterator[Any]:
    """The documents of YAML files, each with its name for messages."""
    for pattern in patterns:
        for file in sorted(DEPLOY.glob(pattern)):
            for number, content in enumerate(yaml.safe_load_all(file.read_text())):
                yield pytest.param(content, id=f"{file.name}-{number}")


MANIFESTS = [each for each in documents("kubernetes/*.yaml") if each.id != "kustomization.yaml-0"]


def loaded(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def settings(file: str) -> Settings:
    return configure({}, DEPLOY / file, {}).settings


DEPLOYMENT = loaded("kubernetes/deployment.yaml")["spec"]["template"]["spec"]
PREDICTOR = loaded("kserve/inferenceservice.yaml")["spec"]["predictor"]
COMPOSED = loaded("docker/compose.yaml")["services"]["enginecast"]
PODS = pytest.mark.parametrize("pod", [DEPLOYMENT, PREDICTOR], ids=["deployment", "kserve"])


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_kubernetes_knows_every_field(manifest: Any) -> None:
    kubernetes_validate.validate(manifest, VERSION, strict=True)


def test_kubernetes_knows_every_field_of_kserves_pod() -> None:
    """The schema of KServe is not part of Kubernetes; that of the pod in it is."""
    spec = {name: PREDICTOR[name] for name in ("containers", "volumes")}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "predictor"}, "spec": spec}
    kubernetes_validate.validate(pod, VERSION, strict=True)


def test_a_wrong_field_would_be_found() -> None:
    wrong = loaded("kubernetes/service.yaml")
    wrong["spec"]["selektor"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSION, strict=True)


def test_the_kustomization_has_every_manifest() -> None:
    listed = loaded("kubernetes/kustomization.yaml")
    files = {file.name for file in (DEPLOY / "kubernetes").iterdir()} - {"kustomization.yaml"}
    assert {*listed["resources"], *listed["configMapGenerator"][0]["files"]} == files


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_makes_manifests_that_kubernetes_knows() -> None:
    command = ["kubectl", "kustomize", str(DEPLOY / "kubernetes")]
    made = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    manifests = list(yaml.safe_load_all(made))
    for manifest in manifests:
        kubernetes_validate.validate(manifest, VERSION, strict=True)
    (deployment,) = (each for each in manifests if each["kind"] == "Deployment")
    (config,) = (each for each in manifests if each["kind"] == "ConfigMap")
    volumes = deployment["spec"]["template"]["spec"]["volumes"]
    assert volumes[0]["configMap"]["name"] == config["metadata"]["name"] and "server.toml" in config["data"]


@PODS
def test_pods_meet_the_restricted_standard(pod: Any) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/"""
    (container,) = pod["containers"]
    context = pod.get("securityContext", {}) | container["securityContext"]
    assert context["runAsNonRoot"] and context["runAsUser"] > 0 and not context["allowPrivilegeEscalation"]
    assert context["capabilities"] == {"drop": ["ALL"]} and context["seccompProfile"]["type"] == "RuntimeDefault"
    assert context["readOnlyRootFilesystem"] and container["resources"]["limits"]["memory"]


@PODS
def test_every_mount_has_its_volume_and_the_written_folders_are_writable(pod: Any) -> None:
    (container,) = pod["containers"]
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} == {volume["name"] for volume in pod["volumes"]}
    assert {path for path, mount in mounts.items() if not mount.get("readOnly")} == {"/cache", "/tmp"}


def test_probes_call_the_client_at_the_servers_port() -> None:
    (container,) = DEPLOYMENT["containers"]
    port = settings("kubernetes/server.toml").address.rpartition(":")[2]
    assert port == str(container["ports"][0]["containerPort"])
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        command = container[probe]["exec"]["command"]
        assert command[0] == "enginecast" and command[1] in COMMANDS and command[-1] == f"localhost:{port}"


def test_kserve_gives_settings_that_there_are() -> None:
    (container,) = PREDICTOR["containers"]
    given = {each["name"]: each["value"] for each in container["env"]}
    found = configure({}, None, {name: value for name, value in given.items() if name.startswith(PREFIX)}).settings
    port = str(container["ports"][0]["containerPort"])
    assert found.insecure and found.address.endswith(f":{port}")
    assert {container[probe]["grpc"]["port"] for probe in ("readinessProbe", "livenessProbe")} == {int(port)}


@pytest.mark.parametrize("name", ["docker", "kubernetes", "systemd"])
def test_every_setting_of_a_file_exists_and_the_server_is_protected(name: str) -> None:
    found = settings(f"{name}/server.toml")
    assert found.tls_cert and found.tls_key and found.tokens and not found.insecure


def test_running_requests_get_their_time_before_the_end() -> None:
    unit = (DEPLOY / "systemd/enginecast.service").read_text()
    stop = re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    waits = {
        "docker": float(COMPOSED["stop_grace_period"].removesuffix("s")),
        "kubernetes": DEPLOYMENT["terminationGracePeriodSeconds"] - 5.0,  # preStop
        "systemd": float(stop[1]) if stop else 0.0,
    }
    for name, wait in waits.items():
        assert wait > settings(f"{name}/server.toml").grace + LEAVING_SECONDS, name


def test_the_composed_container_is_confined() -> None:
    assert (
        COMPOSED["read_only"] and COMPOSED["cap_drop"] == ["ALL"] and COMPOSED["mem_limit"] and COMPOSED["pids_limit"]
    )
    assert all(port.startswith("127.0.0.1:") for port in COMPOSED["ports"])
    written = {volume.split(":")[1] for volume in COMPOSED["volumes"] if not volume.endswith(":ro")}
    assert written == {"/cache"} and COMPOSED["tmpfs"][0].startswith("/tmp:")


class TestDockerfile:
    lines = re.sub(r"\\\n\s*", "", (DEPLOY / "docker/Dockerfile").read_text()).splitlines()

    def values(self, instruction: str) -> list[str]:
        """What follows an instruction, wherever it stands."""
        return [line.removeprefix(f"{instruction} ") for line in self.lines if line.startswith(f"{instruction} ")]

    def test_it_copies_what_the_wheel_is_made_of_and_no_more(self) -> None:
        copied = {name for line in self.values("COPY") if "--from" not in line for name in line.split()[:-1]}
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        packages = set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
        assert copied == packages | {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
        assert all((ROOT / name).exists() for name in copied)
        ignored = (DEPLOY / "docker/Dockerfile.dockerignore").read_text().splitlines()
        assert {line[1:] for line in ignored if line.startswith("!")} == copied

    def test_its_extras_exist_and_need_no_torch(self) -> None:
        extras = next(line for line in self.values("ARG") if line.startswith("EXTRAS="))[7:].split(",")
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        needed = [package for extra in extras for package in known[extra]]
        assert needed and not [package for package in needed if package.startswith(("torch", "transformers", "nncf"))]

    def test_it_does_not_run_as_root(self) -> None:
        assert self.values("USER") == ["65532:65532"] == [COMPOSED["user"]]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_knows_the_unit_and_finds_it_confined(tmp_path: Path) -> None:
    text = (DEPLOY / "systemd/enginecast.service").read_text()
    unit = tmp_path / "enginecast.service"
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE))
    for command in (["verify"], ["security", "--offline=true", "--threshold=20"]):  # 2.0 of 10
        ended = subprocess.run(["systemd-analyze", *command, unit], capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0 and "Unknown" not in ended.stderr, ended.stderr + ended.stdout
