"""Energy, as Linux and NVIDIA's library count it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from profiles import energy


class NVML:
    """nvidia-ml-py's functions for a GPU that counts energy, and one that does not."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.millijoules = 5000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802 (names are NVML's)
        if handle:
            raise self.NVMLError("Not Supported")
        return self.millijoules

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
        }
        if name not in answers:
            raise AttributeError(name)
        return answers[name]


def zone(folder: Path, name: str, microjoules: int, most: int = 1_000_000) -> Path:
    (folder / name).mkdir()
    (folder / name / "max_energy_range_uj").write_text(f"{most}\n")
    (folder / name / "energy_uj").write_text(f"{microjoules}\n")
    return folder / name / "energy_uj"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)


def test_packages_are_added_and_their_parts_are_not(tmp_path: Path) -> None:
    """The count of the second one begins anew meanwhile."""
    one, other = zone(tmp_path, "intel-rapl:0", 100_000), zone(tmp_path, "intel-rapl:1", 900_000)
    zone(tmp_path, "intel-rapl:0:0", 1)

    def work() -> str:
        one.write_text("400000")
        other.write_text("100000")
        return "done"

    value, joules = energy.metered(energy.meter(tmp_path), work)
    assert value == "done" and joules == pytest.approx(0.3 + 0.2)


def test_where_nothing_is_counted(tmp_path: Path) -> None:
    (tmp_path / "intel-rapl:0").mkdir()  # kept from this user
    assert energy.meter(tmp_path) == () == energy.meter(tmp_path / "none")
    assert energy.metered((), lambda: 3) == (3, None)


def test_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = NVML()
    monkeypatch.setitem(sys.modules, "pynvml", library)  # type: ignore[arg-type]
    meter = energy.meter(tmp_path)
    assert len(meter) == 1
    assert energy.metered(meter, lambda: setattr(library, "millijoules", 7500))[1] == pytest.approx(2.5)
