"""Lists the devices of this machine with their features and memory: the processor, NVIDIA GPUs, Intel GPUs and NPUs,
DirectX adapters, Apple's GPU and Neural Engine.

Each kind of device is listed by its vendor's library, if that is installed: NVIDIA GPUs by nvidia-ml-py or else CUDA,
Intel devices by OpenVINO, DirectX adapters by ONNX Runtime. `Machine.notes` reports every query that failed.
`detect` never raises.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from runtime.errors import MissingDependency
from runtime.optional import require
from runtime.placing.containers import Allowance, allowance
from runtime.placing.processor import processor, processor_features
from runtime.targets.nvidia import cuda

DeviceKind = Literal["cpu", "cuda", "intel-gpu", "intel-npu", "directx", "apple"]
HOST: Final = "cpu"
EXTRA: Final = "devices"


@dataclass(frozen=True)
class Device:
    """One device. `name` is its name for --device. `memory` and `free` are in bytes, None where they are unknown.

    `shares` names the device whose memory it uses ("cpu" for an integrated GPU), "" if it has its own memory. `driver`
    is the version of its driver, "" where it is not known.
    """

    name: str
    kind: DeviceKind
    model: str
    memory: int | None = None
    free: int | None = None
    features: tuple[str, ...] = ()
    shares: str = ""
    driver: str = ""


@dataclass(frozen=True)
class Machine:
    """The devices, the processor first; the share of the processor that this process may use; notes on failed
    queries.
    """

    devices: tuple[Device, ...]
    allowed: Allowance
    notes: tuple[str, ...] = ()

    @property
    def host(self) -> Device:
        return self.devices[0]

    def find(self, name: str) -> Device | None:
        """The device with this name, in any target's spelling ("CPU", "CUDAExecutionProvider", "cuda:1", "GPU.0"); None
        if it is unknown.
        """
        known = plain(name)
        return next((device for device in self.devices if device.name == known), None)

    def memory_of(self, name: str) -> Device:
        """The device whose memory is used by engines on the device with this name. The processor for unknown names."""
        found = self.find(name) or self.host
        return next((device for device in self.devices if device.name == found.shares), found)


PLAIN: Final = (
    (r"cpu.*|.*cpuexecutionprovider", "cpu"),
    (r"(?:cuda|cudaexecutionprovider|tensorrt.*provider|nvtensorrt.*provider)(?:[:.](\d+))?", "cuda:{}"),
    (r"(?:gpu|intel-gpu)(?:[:.](\d+))?", "gpu:{}"),
    (r"npu(?:[:.]\d+)?", "npu"),
    (r"(?:dml|directml|directx|dmlexecutionprovider)(?:[:.](\d+))?", "directx:{}"),
    (r"(?:apple|coreml|all|ane|cpu_and_gpu|cpu_and_ne|mlcomputeunits.*|coremlexecutionprovider)", "apple"),
)
"""Patterns for the targets' names of devices, each with the name that this program uses."""


def plain(name: str) -> str:
    """This program's name of a device, from a target's name, with or without a description in parentheses."""
    short = name.partition(" (")[0].strip().casefold()
    for pattern, plain in reversed(PLAIN):
        if found := re.fullmatch(pattern, short):
            return plain.format((found[1] if found.groups() else None) or 0)
    return short


def detect() -> Machine:
    """The devices that this machine has now. Takes some tenths of a second."""
    allowed, notes = allowance(), list[str]()
    found = [_host(allowed)]
    for look in (_nvidia, _intel, _directx, _apple):
        try:
            found += look(notes.append)
        except Exception as error:  # drivers fail in many ways; the other devices are listed all the same
            notes.append(f"{look.__name__.strip('_')}: {type(error).__name__}: {error}")
    return Machine(tuple(found), allowed, tuple(notes))


def host_memory(allowed: Allowance) -> tuple[int | None, int | None]:
    """The memory that this process may use, and what of it is free, in bytes; None where the system does not say it."""
    total, free = _host_memory()
    limits = [value for value in (total, allowed.memory) if value is not None]
    left = [value for value in (free, allowed.free) if value is not None]
    return min(limits, default=None), min(left, default=None)


def _host(allowed: Allowance) -> Device:
    return Device(HOST, "cpu", processor(), *host_memory(allowed), processor_features())


def _host_memory() -> tuple[int | None, int | None]:
    """Total and available memory of the machine in bytes."""
    file = Path("/proc/meminfo")
    if file.is_file():
        fields = {
            name: int(kilobytes) * 1024
            for name, kilobytes in re.findall(r"^(\w+):\s+(\d+) kB$", file.read_text(), re.MULTILINE)
        }
        return fields.get("MemTotal"), fields.get("MemAvailable")
    try:
        memory = require("psutil", EXTRA).virtual_memory()
    except MissingDependency:
        return None, None
    return int(memory.total), int(memory.available)


def _nvidia(note: Callable[[str], None]) -> Iterator[Device]:
    """GPUs listed by NVML, with free memory, if nvidia-ml-py is installed; else by CUDA, without it."""
    try:
        nvml = require("pynvml", EXTRA)
    except MissingDependency as error:
        found, reason = cuda.devices(EXTRA)
        if found or Path("/dev/nvidiactl").exists():
            note(
                f"nvidia: free memory is not known: {error}"
                if found
                else f"nvidia: there is a driver, but {error}; {reason}"
            )
        for gpu in found:
            features = (f"SM{gpu.capability}",)
            yield Device(f"cuda:{gpu.index}", "cuda", gpu.name, gpu.memory, None, features, driver=_kernel_module())
        return
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        if Path("/dev/nvidiactl").exists():
            note(f"nvidia: {error}")
        return
    try:
        for number, handle in enumerate(_visible(nvml)):
            yield _nvml_device(nvml, number, handle)
    finally:
        nvml.nvmlShutdown()


def _visible(nvml: Any) -> list[Any]:
    """The GPUs that CUDA shows this process, in its order. CUDA_VISIBLE_DEVICES lists numbers or UUIDs; CUDA ignores
    everything from the first invalid one on.

    NVML numbers GPUs by PCI bus. CUDA does so if CUDA_DEVICE_ORDER is PCI_BUS_ID or all GPUs are of one model.
    """
    handles = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return handles
    by_name = {_text(nvml.nvmlDeviceGetUUID(handle)): handle for handle in handles}
    visible = []
    for word in (word.strip() for word in wanted.split(",")):
        if word.isdecimal() and int(word) < len(handles):
            visible.append(handles[int(word)])
        elif word and word.startswith("GPU-") and any(name.startswith(word) for name in by_name):
            visible.append(next(handle for name, handle in by_name.items() if name.startswith(word)))
        elif word.startswith("MIG-"):
            visible.append(nvml.nvmlDeviceGetHandleByUUID(word.encode()))
        else:
            break
    return visible


def _nvml_device(nvml: Any, number: int, handle: Any) -> Device:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        features: tuple[str, ...] = (f"SM{major}{minor}",)
    except nvml.NVMLError:  # a MIG slice reports none
        features = ()
    name, driver = _text(nvml.nvmlDeviceGetName(handle)), _text(nvml.nvmlSystemGetDriverVersion())
    return Device(f"cuda:{number}", "cuda", name, int(memory.total), int(memory.free), features, driver=driver)


def _kernel_module() -> str:
    """The version of NVIDIA's driver, as its kernel module tells it on Linux."""
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", file.read_text(errors="replace")) if file.is_file() else None
    return found[0] if found else ""


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _intel(note: Callable[[str], None]) -> Iterator[Device]:
    """GPUs and NPUs that OpenVINO finds. Integrated GPUs and all NPUs use the host's memory."""
    try:
        core = require("openvino", "openvino").Core()
    except MissingDependency:
        return
    for name in core.available_devices:
        kind = name.partition(".")[0]
        if kind not in ("GPU", "NPU"):
            continue
        memory = _property(core, name, f"{kind}_DEVICE_TOTAL_MEM_SIZE")
        shared = kind == "NPU" or "integrated" in str(_property(core, name, "DEVICE_TYPE")).casefold()
        features = tuple(str(one) for one in _property(core, name, "OPTIMIZATION_CAPABILITIES") or ())
        kinds: dict[str, DeviceKind] = {"GPU": "intel-gpu", "NPU": "intel-npu"}
        model = str(_property(core, name, "FULL_DEVICE_NAME") or name)
        yield Device(
            plain(name), kinds[kind], model, int(memory) if memory else None, None, features, HOST if shared else ""
        )


def _property(core: Any, device: str, name: str) -> Any:
    """A property of a device; None if its plugin does not know the property."""
    try:
        return core.get_property(device, name)
    except (RuntimeError, TypeError):
        return None


def _directx(note: Callable[[str], None]) -> Iterator[Device]:
    """GPUs that DXGI lists, through ONNX Runtime. They have DXGI's numbers, which DirectML uses too."""
    if platform.system() != "Windows":
        return
    try:
        sdk = require("onnxruntime", "directml")
    except MissingDependency:
        return
    seen = set()
    for found in sdk.get_ep_devices():
        metadata = dict(found.device.metadata)
        number = metadata.get("DxgiAdapterNumber", "")
        if number.isdecimal() and number not in seen:
            seen.add(number)
            megabytes = metadata.get("DxgiVideoMemory", "").partition(" ")[0]
            memory = int(megabytes) << 20 if megabytes.isdecimal() else None
            shares = HOST if metadata.get("Discrete") == "0" else ""
            model = metadata.get("Description") or found.device.vendor
            yield Device(f"directx:{number}", "directx", model, memory, None, (), shares)


def _apple(note: Callable[[str], None]) -> Iterator[Device]:
    """Apple's GPU and Neural Engine as one device: Core ML chooses between them. Both use the host's memory."""
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        yield Device("apple", "apple", f"{processor()}: GPU and Neural Engine", shares=HOST)
