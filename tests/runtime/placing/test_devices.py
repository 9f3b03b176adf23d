"""Detection: this machine as it is, and others' libraries as their documentation has them."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.engine import targets
from runtime.placing import devices, processor
from runtime.placing.containers import Allowance
from runtime.placing.devices import Device, Machine, detect

GB = 10**9


class NVML:
    """nvidia-ml-py's functions for two GPUs."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.open = 0
        self.broken = False

    def nvmlInit(self) -> None:  # noqa: N802 (names are NVML's)
        if self.broken:
            raise self.NVMLError("Driver/library version mismatch")
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlSystemGetDriverVersion": lambda: "580.95.05",
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetUUID": lambda handle: f"GPU-{'ab'[handle]}000-1",
            "nvmlDeviceGetName": lambda handle: ("NVIDIA L4", b"NVIDIA T4")[handle],
            "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(
                total=(24, 16)[handle] * GB, free=(20, 4)[handle] * GB
            ),
            "nvmlDeviceGetCudaComputeCapability": lambda handle: ((8, 9), (7, 5))[handle],
        }
        if name not in answers:
            raise AttributeError(name)
        return answers[name]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> NVML:
    library = NVML()
    monkeypatch.setitem(sys.modules, "pynvml", library)  # type: ignore[arg-type]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return library


def gpus(machine: Machine) -> list[Device]:
    return [device for device in machine.devices if device.kind == "cuda"]


def test_this_machine() -> None:
    machine = detect()
    host = machine.host
    assert (host.name, host.kind, host.shares) == ("cpu", "cpu", "") and host.model
    assert host.memory and host.free and 0 < host.free <= host.memory
    if platform.machine() in ("x86_64", "AMD64") and platform.system() == "Linux":
        flags = Path("/proc/cpuinfo").read_text()
        assert ("AVX2" in host.features) == (" avx2 " in flags) and ("AVX512-VNNI" in host.features) == (
            " avx512_vnni " in flags
        )


def test_the_memory_of_a_container_is_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "allowance", lambda: Allowance(1.5, 3 * GB, 10**6))
    host = detect().host
    assert (host.memory, host.free) == (3 * GB, 10**6)


def test_nvidia(nvml: NVML) -> None:
    assert gpus(detect()) == [
        Device("cuda:0", "cuda", "NVIDIA L4", 24 * GB, 20 * GB, ("SM89",), driver="580.95.05"),
        Device("cuda:1", "cuda", "NVIDIA T4", 16 * GB, 4 * GB, ("SM75",), driver="580.95.05"),
    ]
    assert nvml.open == 0


@pytest.mark.parametrize(
    ("visible", "names"),
    [("1", ["NVIDIA T4"]), ("", []), ("GPU-b,0", ["NVIDIA T4", "NVIDIA L4"]), ("0,7,1", ["NVIDIA L4"]), ("-1", [])],
)
def test_only_gpus_that_cuda_shows(nvml: NVML, monkeypatch: pytest.MonkeyPatch, visible: str, names: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = gpus(detect())
    assert [gpu.model for gpu in found] == names and [gpu.name for gpu in found] == [
        f"cuda:{i}" for i in range(len(names))
    ]


def test_a_broken_driver_hides_nothing_else(nvml: NVML) -> None:
    nvml.broken = True
    assert detect().host.name == "cpu" and not gpus(detect())


def test_nvidia_without_its_library(monkeypatch: pytest.MonkeyPatch, fake_cuda: Any) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(devices, "_kernel_module", lambda: "580.95.05")
    machine = detect()
    assert gpus(machine) == [Device("cuda:0", "cuda", "Fake 4090", 1 << 32, None, ("SM89",), driver="580.95.05")]
    assert any("pip install 'enginecast[devices]'" in note for note in machine.notes)


def test_intel(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = {
        ("GPU.0", "FULL_DEVICE_NAME"): "Intel(R) Iris(R) Xe Graphics (iGPU)", ("GPU.0",
            "DEVICE_TYPE"): "Type.INTEGRATED",
        ("GPU.0", "GPU_DEVICE_TOTAL_MEM_SIZE"): 13 * GB, ("GPU.1",
            "FULL_DEVICE_NAME"): "Intel(R) Arc(TM) A770 Graphics (dGPU)",
        ("GPU.1", "DEVICE_TYPE"): "Type.DISCRETE", ("GPU.1", "GPU_DEVICE_TOTAL_MEM_SIZE"): 16 * GB,
        ("GPU.1", "OPTIMIZATION_CAPABILITIES"): ["FP16", "INT8", "GPU_HW_MATMUL"], ("NPU",
            "FULL_DEVICE_NAME"): "Intel(R) AI Boost",
    }  # fmt: skip

    class Core:
        available_devices = ("CPU", "GPU.0", "GPU.1", "NPU")

        def get_property(self, device: str, name: str) -> Any:
            if (device, name) not in properties:
                raise RuntimeError(f"Option not found: {name}")
            return properties[device, name]

    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=Core))  # type: ignore[arg-type]
    machine = detect()
    assert machine.devices[1:] == (
        Device("gpu:0", "intel-gpu", "Intel(R) Iris(R) Xe Graphics (iGPU)", 13 * GB, shares="cpu"),
        Device(
            "gpu:1",
            "intel-gpu",
            "Intel(R) Arc(TM) A770 Graphics (dGPU)",
            16 * GB,
            None,
            ("FP16", "INT8", "GPU_HW_MATMUL"),
        ),
        Device("npu", "intel-npu", "Intel(R) AI Boost", shares="cpu"),
    )
    assert (
        machine.memory_of("GPU").name == "cpu"
        and machine.memory_of("GPU.1").name == "gpu:1"
        and machine.memory_of("NPU").name == "cpu"
    )


def test_directx(monkeypatch: pytest.MonkeyPatch) -> None:
    def adapter(vendor: str, **metadata: str) -> Any:
        return SimpleNamespace(device=SimpleNamespace(vendor=vendor, metadata=metadata))

    found = [
        adapter("Intel"),
        adapter("AMD", DxgiAdapterNumber="0", DxgiVideoMemory="8176 MB", Discrete="1", Description="Radeon RX 6600"),
        adapter("Intel", DxgiAdapterNumber="1", DxgiVideoMemory="128 MB", Discrete="0"),
        adapter("AMD", DxgiAdapterNumber="0", DxgiVideoMemory="8176 MB", Discrete="1", Description="Radeon RX 6600"),
    ]
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(get_ep_devices=lambda: found))  # type: ignore[arg-type]
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    monkeypatch.setattr(processor, "_windows_features", lambda: ("AVX2",))
    machine = detect()
    assert machine.devices[1:] == (
        Device("directx:0", "directx", "Radeon RX 6600", 8176 << 20),
        Device("directx:1", "directx", "Intel", 128 << 20, shares="cpu"),
    )
    assert machine.memory_of("dml:0").name == "directx:0" and machine.memory_of("dml:1").name == "cpu"


def test_apple(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "hw.optional.AdvSIMD": b"\1\0\0\0",
        "hw.optional.arm.FEAT_DotProd": b"\1\0\0\0",
        "hw.optional.arm.FEAT_BF16": b"\0\0\0\0",
    }
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(processor, "cpuinfo", lambda: "")
    monkeypatch.setattr(processor, "sysctl", lambda name: values.get(name, b"Apple M4\0" if "brand" in name else b""))
    machine = detect()
    assert machine.host.model == "Apple M4" and machine.host.features == ("NEON", "DOTPROD")
    assert machine.devices[-1] == Device("apple", "apple", "Apple M4: GPU and Neural Engine", shares="cpu")


def test_names_that_targets_use_are_known() -> None:
    machine = detect()
    for engine in targets().values():
        for name in engine.available().devices:
            assert machine.find(name) is not None, f"{engine.target}: {name}"
    assert machine.memory_of("none") is machine.host
