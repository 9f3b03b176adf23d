"""Which devices this machine has: processor, NVIDIA GPUs, Intel GPUs and NPUs, DirectX adapters, Apple's; their
features and memory.

Each kind is asked of the library that knows it best, if that is installed: NVIDIA's management library (nvidia-ml-py)
or else CUDA, OpenVINO, ONNX Runtime (which lists DXGI's adapters on Windows). What cannot be asked is told in
`Machine.notes`. Nothing here raises.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from runtime.errors import MissingDependency
from runtime.optional import require
from runtime.placing.containers import Allowance, allowance
from runtime.targets.nvidia import cuda

DeviceKind = Literal["cpu", "cuda", "intel-gpu", "intel-npu", "directx", "apple"]
HOST: Final = "cpu"
EXTRA: Final = "devices"
FEATURES: Final = {
    **{name: name.upper() for name in ("avx2", "avx512f", "neon", "sve", "bf16", "i8mm")},
    **{"avx_vnni": "AVX-VNNI", "avx512_vnni": "AVX512-VNNI", "avx512vnni": "AVX512-VNNI", "avx512_bf16": "AVX512-BF16"},
    **{"amx_tile": "AMX", "amx_int8": "AMX-INT8", "amx_bf16": "AMX-BF16"},
    **{
        "asimd": "NEON",
        "asimddp": "DOTPROD",
        "advsimd": "NEON",
        "feat_dotprod": "DOTPROD",
        "feat_bf16": "BF16",
        "feat_i8mm": "I8MM",
    },
}
"""What kernels of quantized layers are chosen by: flags of /proc/cpuinfo and names of macOS' hw.optional, as the makers
write them.
"""
WINDOWS_FEATURES: Final = {19: "NEON", 40: "AVX2", 41: "AVX512F", 43: "DOTPROD"}
"""PF_ARM_NEON_INSTRUCTIONS_AVAILABLE and so on, of Windows' IsProcessorFeaturePresent."""


@dataclass(frozen=True)
class Device:
    """One device. `name` is what --device calls it; bytes of memory are None where they cannot be told.

    `shares` names the device whose memory it uses, "cpu" for an integrated GPU; "" if its memory is its own.
    """

    name: str
    kind: DeviceKind
    model: str
    memory: int | None = None
    free: int | None = None
    features: tuple[str, ...] = ()
    shares: str = ""


@dataclass(frozen=True)
class Machine:
    """The devices, the processor first; what of it this process may use; and what could not be asked, and why."""

    devices: tuple[Device, ...]
    allowed: Allowance
    notes: tuple[str, ...] = ()

    @property
    def host(self) -> Device:
        return self.devices[0]

    def find(self, name: str) -> Device | None:
        """The device that a target calls by this name: "CPU", "CUDAExecutionProvider", "cuda:1", "GPU.0"; None where it
        is unknown.
        """
        known = plain(name)
        return next((device for device in self.devices if device.name == known), None)

    def memory_of(self, name: str) -> Device:
        """The device whose memory is used by what runs on the one of this name; the processor's for what is
        not known.
        """
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
"""How targets name devices, and the name here that it stands for."""


def plain(name: str) -> str:
    """A device's name here, from a target's name for it, with or without its description in parentheses."""
    short = name.partition(" (")[0].strip().casefold()
    for pattern, plain in reversed(PLAIN):
        if found := re.fullmatch(pattern, short):
            return plain.format((found[1] if found.groups() else None) or 0)
    return short


def detect() -> Machine:
    """This machine as it is now. Takes some tenths of a second."""
    allowed, notes = allowance(), list[str]()
    found = [_host(allowed)]
    for look in (_nvidia, _intel, _directx, _apple):
        try:
            found += look(notes.append)
        except Exception as error:  # drivers fail in many ways, and a list of devices must come of it all the same
            notes.append(f"{look.__name__.strip('_')}: {type(error).__name__}: {error}")
    return Machine(tuple(found), allowed, tuple(notes))


def _host(allowed: Allowance) -> Device:
    total, free = _host_memory()
    limits = [value for value in (total, allowed.memory) if value is not None]
    left = [value for value in (free, allowed.free) if value is not None]
    return Device(HOST, "cpu", processor(), min(limits, default=None), min(left, default=None), processor_features())


def processor() -> str:
    """The processor's name as the system gives it, the same as in measured rows.

    On x86 with Linux, family and model follow: virtual machines call processors of several generations "AMD EPYC".
    """
    told = dict(re.findall(r"^(model name|Model|cpu family|model)[ \t]*:[ \t]*(.*\S)", _cpuinfo(), re.MULTILINE))
    if name := told.get("model name") or told.get("Model"):
        return (
            f"{name} (family {told['cpu family']}, model {told['model']})"
            if {"cpu family", "model"} <= told.keys()
            else name
        )
    brand = _sysctl("machdep.cpu.brand_string").rstrip(b"\0").decode(errors="replace")
    return brand or platform.processor() or platform.machine()


def cores() -> int:
    """Cores among the processors that this process may use, fewer than those where a core runs several threads; 0 where
    that is unknown.
    """
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    found = set()
    for block in _cpuinfo().split("\n\n"):
        told = dict(re.findall(r"^(processor|physical id|core id)[ \t]*:[ \t]*(\d+)", block, re.MULTILINE))
        if len(told) == 3 and (usable is None or int(told["processor"]) in usable):
            found.add((told["physical id"], told["core id"]))
    return len(found)


def processor_features() -> tuple[str, ...]:
    """Its instruction sets that matter here, such as AVX512-VNNI."""
    listed = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    flags: Iterable[str] = listed[1].split() if listed else ()
    if platform.system() == "Darwin":
        names = ("AdvSIMD", "arm.FEAT_DotProd", "arm.FEAT_BF16", "arm.FEAT_I8MM", "avx2_0", "avx512f")
        flags = [
            name.removeprefix("arm.").removesuffix("_0").lower()
            for name in names
            if any(_sysctl(f"hw.optional.{name}"))
        ]
    if platform.system() == "Windows":
        return _windows_features()
    return tuple(dict.fromkeys(FEATURES[flag] for flag in FEATURES if flag in set(flags)))


def _windows_features() -> tuple[str, ...]:
    import ctypes

    present: Any = getattr(ctypes, "windll").kernel32.IsProcessorFeaturePresent  # noqa: B009 (other systems' stubs lack it)
    return tuple(name for number, name in WINDOWS_FEATURES.items() if present(number))


def _cpuinfo() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text(errors="replace") if file.is_file() else ""


def _sysctl(name: str) -> bytes:
    """A value of macOS' sysctl(3), a text with its end or a number; empty elsewhere."""
    if platform.system() != "Darwin":
        return b""
    import ctypes

    libc, size = ctypes.CDLL(None), ctypes.c_size_t(256)
    buffer = ctypes.create_string_buffer(size.value)
    failed = libc.sysctlbyname(name.encode(), buffer, ctypes.byref(size), None, 0)
    return b"" if failed else buffer.raw[: size.value]


def _host_memory() -> tuple[int | None, int | None]:
    """Bytes of the machine's memory, and of what programs can still get of it."""
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
    """Through NVML where nvidia-ml-py is installed, which tells free memory as well; else through CUDA."""
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
            yield Device(f"cuda:{gpu.index}", "cuda", gpu.name, gpu.memory, None, (f"SM{gpu.capability}",))
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
    """The GPUs that CUDA shows this process, in its order: CUDA_VISIBLE_DEVICES has numbers or UUIDs, and ends at the
    first bad one.

    CUDA numbers by PCI bus, as NVML does, where CUDA_DEVICE_ORDER says so or the GPUs are alike.
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
    except nvml.NVMLError:  # of a slice of a GPU
        features = ()
    return Device(
        f"cuda:{number}", "cuda", _text(nvml.nvmlDeviceGetName(handle)), int(memory.total), int(memory.free), features
    )


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _intel(note: Callable[[str], None]) -> Iterator[Device]:
    """GPUs and NPUs that OpenVINO finds. An integrated GPU, and every NPU, works in the memory of the host."""
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
    """A property of a device; None where the plugin has none of that name."""
    try:
        return core.get_property(device, name)
    except (RuntimeError, TypeError):
        return None


def _directx(note: Callable[[str], None]) -> Iterator[Device]:
    """GPUs that DXGI lists, through ONNX Runtime. The number is DXGI's, which DirectML counts by."""
    if platform.system() != "Windows":
        return
    try:
        sdk = require("onnxruntime", "directml")
    except MissingDependency:
        return
    seen = set()
    for found in sdk.get_ep_devices():
        told = dict(found.device.metadata)
        number = told.get("DxgiAdapterNumber", "")
        if number.isdecimal() and number not in seen:
            seen.add(number)
            megabytes = told.get("DxgiVideoMemory", "").partition(" ")[0]
            memory = int(megabytes) << 20 if megabytes.isdecimal() else None
            shares = HOST if told.get("Discrete") == "0" else ""
            yield Device(
                f"directx:{number}", "directx", told.get("Description") or found.device.vendor, memory, None, (), shares
            )


def _apple(note: Callable[[str], None]) -> Iterator[Device]:
    """Apple's GPU and Neural Engine, which Core ML chooses between: all work in the memory of the host."""
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        yield Device("apple", "apple", f"{processor()}: GPU and Neural Engine", shares=HOST)
