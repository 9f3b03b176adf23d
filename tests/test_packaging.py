"""What is shipped: the wheel's content, its metadata, and layers that import only what is below them."""

from __future__ import annotations

import email
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from runtime.engine import targets

ROOT = Path(__file__).parents[1]
PACKAGES = {"enginecast", "export", "runtime", "serving", "calibration", "profiles"}
HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "optimum",
    "nncf",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "openvino",
    "accelerate",
    "safetensors",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
        str(ROOT),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path, names: set[str]) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return email.message_from_bytes(
            archive.read(next(name for name in names if name.endswith(".dist-info/METADATA")))
        )


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path, names: set[str]) -> None:
    assert wheel.name.startswith("enginecast-")
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES
    assert not [name for name in names if "test" in Path(name).name or name.endswith((".pyc", ".proto"))]


def test_the_wheel_holds_every_module_and_row(names: set[str]) -> None:
    listed = subprocess.run(
        ["git", "ls-files", *sorted(PACKAGES)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    assert set(listed.stdout.split()) <= names
    assert any(name.startswith("profiles/rows/") for name in names)


def test_the_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 3_000_000, "no sample is in it"


def test_commands(wheel: Path, names: set[str]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert "enginecast = serving.cli.commands:main" in text and "export = export.cli.commands:main" in text


def test_a_serving_machine_installs_nothing_of_the_build_side(metadata: Message) -> None:
    assert metadata["Name"] == "enginecast"
    required = metadata.get_all("Requires-Dist") or []
    base = {
        line.split(";")[0].split(">")[0].split("=")[0].split("<")[0].strip()
        for line in required
        if "extra ==" not in line
    }
    assert "onnxruntime" in base and not base & HEAVY
    extras = set(metadata.get_all("Provides-Extra") or [])
    assert extras == {
        "openvino",
        "tensorrt",
        "tensorrt-rtx",
        "cuda",
        "directml",
        "coreml",
        "devices",
        "signing",
        "tls",
        "metrics",
        "tracing",
        "top",
        "http",
        "ui",
        "plots",
        "constrained",
        "export",
        "dev",
        "docs",
        "ray",
        "reference",
    }


def test_every_target_file_has_its_extra(metadata: Message) -> None:
    assert set(targets()) - {"onnxruntime"} <= set(metadata.get_all("Provides-Extra") or [])


PINS = {
    canonicalize_name(pin.name): pin.specifier
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
    for pin in [Requirement(line)]
}


def direct_requirements() -> list[Requirement]:
    """Requirements in pyproject.toml: of the project, of all its extras and of its build."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = content["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    return [Requirement(text) for text in (*project["dependencies"], *extras, *content["build-system"]["requires"])]


def installed(requirements: list[Requirement]) -> dict[str, str]:
    """Installed packages that these requirements need, directly or not, with their versions."""
    found: dict[str, str] = {}
    seen, waiting = set[str](), list(requirements)
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        try:
            package = distribution(requirement.name)
        except PackageNotFoundError:
            continue
        found[canonicalize_name(requirement.name)] = package.version
        needed = [Requirement(text) for text in package.requires or ()]
        wanted = ("", *requirement.extras)
        waiting += [
            one for one in needed if one.marker is None or any(one.marker.evaluate({"extra": name}) for name in wanted)
        ]
    return found


def test_constraints_pin_every_direct_requirement() -> None:
    assert not {canonicalize_name(one.name) for one in direct_requirements()} - PINS.keys()
    assert all(len(pin) == 1 and str(pin).startswith("==") for pin in PINS.values())


def test_constraints_pin_every_installed_package() -> None:
    """Only what an install resolved is checked, so all extras together are checked where all are installed."""
    versions = installed(direct_requirements())
    assert len(versions) > 50
    assert not versions.keys() - PINS.keys(), "add these packages to constraints.txt"
    assert not {name: version for name, version in versions.items() if version not in PINS[name]}


def test_layers_import_only_what_is_below_them() -> None:
    code = "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports(no_cache=True))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert len(contracts) >= 2
