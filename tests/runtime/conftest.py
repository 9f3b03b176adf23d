# ruff: noqa: N802, N815 (names are those of CUDA)
"""A CUDA runtime in the memory of the host: work waits in its stream until somebody waits for it, and no address
outside is touched.
"""

from __future__ import annotations

import ctypes
import enum
import importlib
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest


class Code(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorStreamCaptureUnsupported = 900


class FakeCuda:
    """The functions of `cuda.bindings.runtime` that are used. `memory` is how many bytes may be held at once."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = enum.IntEnum(
        "cudaMemcpyKind", ["cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost", "cudaMemcpyDeviceToDevice"]
    )
    cudaStreamCaptureMode = enum.IntEnum("cudaStreamCaptureMode", {"Global": 0, "ThreadLocal": 1, "Relaxed": 2})

    def __init__(self) -> None:
        self.memory = 1 << 32
        self.live: dict[int, Any] = {}
        self.queue: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None
        self.allocations = self.launches = self.graphs = 0
        self.broken = ""
        self.real: Any = None

    def put(self, work: Callable[[], None]) -> None:
        """Work of a kernel or a copy: done when the stream is waited for, or recorded."""
        (self.queue if self.captured is None else self.captured).append(work)

    def require(self, address: int, nbytes: int) -> int:
        """The address, if so many bytes there are allocated."""
        for start, block in self.live.items():
            if start <= address and address + nbytes <= start + len(block):
                return address
        raise AssertionError(f"{nbytes} bytes at {address:#x} are not allocated")

    def _code(self, function: str) -> Code:
        return Code.cudaErrorInvalidValue if self.broken == function else Code.cudaSuccess

    def cudaGetDeviceCount(self) -> tuple[Code, int]:
        return self._code("cudaGetDeviceCount"), 1

    def cudaGetDeviceProperties(self, index: int) -> tuple[Code, Any]:
        return Code.cudaSuccess, SimpleNamespace(name=b"Fake 4090\0\0", major=8, minor=9, totalGlobalMem=self.memory)

    def cudaSetDevice(self, index: int) -> tuple[Code]:
        return (self._code("cudaSetDevice"),)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Code, int]:
        return self._code("cudaStreamCreateWithFlags"), 7

    def cudaStreamDestroy(self, stream: int) -> tuple[Code]:
        return (Code.cudaSuccess,)

    def cudaMalloc(self, nbytes: int) -> tuple[Code, int]:
        assert self.captured is None, "no allocation while work is recorded"
        if sum(map(len, self.live.values())) + nbytes > self.memory:
            return Code.cudaErrorMemoryAllocation, 0
        block = ctypes.create_string_buffer(b"\xff" * nbytes, nbytes)
        self.live[ctypes.addressof(block)] = block
        self.allocations += 1
        return Code.cudaSuccess, ctypes.addressof(block)

    def cudaFree(self, address: int) -> tuple[Code]:
        assert not self.queue, "memory is freed while work waits"
        del self.live[address]
        return (Code.cudaSuccess,)

    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> tuple[Code]:
        assert stream == 7
        kinds = self.cudaMemcpyKind
        if kind != kinds.cudaMemcpyDeviceToHost:
            self.require(target, nbytes)
        if kind != kinds.cudaMemcpyHostToDevice:
            self.require(source, nbytes)
        self.put(lambda: ctypes.memmove(target, source, nbytes) and None)
        return (self._code("cudaMemcpyAsync"),)

    def cudaMemsetAsync(self, address: int, value: int, nbytes: int, stream: int) -> tuple[Code]:
        self.require(address, nbytes)
        self.put(lambda: ctypes.memset(address, value, nbytes) and None)
        return (Code.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Code]:
        work, self.queue = self.queue, []
        for one in work:
            one()
        return (self._code("cudaStreamSynchronize"),)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Code]:
        self.captured = []
        return (Code.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Code, Any]:
        captured, self.captured = self.captured, None
        return Code.cudaSuccess, captured

    def cudaGraphInstantiate(self, graph: list[Callable[[], None]], flags: int) -> tuple[Code, Any]:
        self.graphs += 1
        return Code.cudaSuccess, list(graph)

    def cudaGraphDestroy(self, graph: Any) -> tuple[Code]:
        return (Code.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph: Any) -> tuple[Code]:
        self.graphs -= 1
        return (Code.cudaSuccess,)

    def cudaGraphLaunch(self, graph: list[Callable[[], None]], stream: int) -> tuple[Code]:
        self.launches += 1
        self.queue += graph
        return (self._code("cudaGraphLaunch"),)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """The CUDA runtime replaced by one in the host's memory, with one GPU of compute capability 8.9; `real` is what it
    stands for.
    """
    fake = FakeCuda()
    try:
        fake.real = importlib.import_module("cuda.bindings.runtime")
    except ImportError:
        fake.real = None
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)  # type: ignore[arg-type]
    yield fake
