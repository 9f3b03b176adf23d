"""What a build kept is reused by the same code alone: every file that decides counts, and no other."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from export.build.keys import OTHERS, code_of, deciding
from export.build.options import Options
from export.build.state import Build
from runtime.engine import targets


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A copy of the packages, to change."""
    root = tmp_path_factory.mktemp("packages")
    for name in OTHERS:
        source = Path(str(importlib.import_module(name).__file__)).parent
        shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    return {name: root / name for name in OTHERS}


def sources(packages: dict[str, Path]) -> Iterator[tuple[str, Path]]:
    return ((name, file) for name, root in packages.items() for file in sorted(root.rglob("*.py")))


def test_each_file_that_decides_counts_and_no_other(packages: dict[str, Path]) -> None:
    before, counted = code_of(packages), 0
    for name, file in sources(packages):
        text, path = file.read_text(), file.relative_to(packages[name])
        file.write_text(text + "# changed\n")
        decides = path.parts[0] not in OTHERS[name]
        assert (code_of(packages) != before) == decides, f"{name}/{path}"
        file.write_text(text)
        counted += decides
    assert code_of(packages) == before and counted > 100


def test_a_file_that_moves_counts_where_it_lies(packages: dict[str, Path]) -> None:
    file = packages["runtime"] / "targets" / "lowering" / "half.py"
    deep = file.parent / "deeper" / "half.py"
    before = code_of(packages)
    deep.parent.mkdir()
    file.rename(deep)
    moved = code_of(packages)
    deep.write_text(deep.read_text() + "# changed\n")
    assert len({before, moved, code_of(packages)}) == 3
    assert "targets/lowering/deeper/half.py" in deciding("runtime", packages["runtime"])


@pytest.mark.parametrize(
    "path",
    [
        "runtime/targets/lowering/static_cache.py",
        "runtime/targets/onnxruntime/integers.py",
        "runtime/bundle/signature.py",
        "runtime/targets/sessions/cuda_kernels.txt",
        "calibration/quantize/gptq.py",
        "export/families/llava.py",
    ],
)
def test_what_lowers_and_quantizes_decides(path: str) -> None:
    package, _, rest = path.partition("/")
    assert rest in deciding(package, Path(str(importlib.import_module(package).__file__)).parent)


@pytest.mark.parametrize(
    "path", ["calibration/ground/machine.py", "export/report/page.py", "runtime/placing/devices.py"]
)
def test_what_reports_and_measures_does_not(path: str) -> None:
    package, _, rest = path.partition("/")
    root = Path(str(importlib.import_module(package).__file__)).parent
    assert (root / rest).is_file() and rest not in deciding(package, root)


def test_versions_are_those_that_targets_and_recipes_declare(tiny_vlm: Path, tmp_path: Path) -> None:
    assert all(engine.packages for engine in targets().values())
    both = ("onnxruntime", "openvino")
    state = Build.open(Options(str(tiny_vlm), tmp_path / "out", both, quant="int8"))
    assert {"openvino", "onnxruntime", "scipy", "torch", "python"} <= state.versions.keys()
    assert "openvino" not in state.tools, "a graph is the same whatever it is compiled for"
    alone = Build.open(Options(str(tiny_vlm), tmp_path / "out", ("onnxruntime",), quant="none"))
    assert {"openvino", "scipy"}.isdisjoint(alone.versions) and alone.key != state.key
