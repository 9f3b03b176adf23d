"""NVIDIA GPUs through cuda-bindings: devices, memory, streams and recorded graphs.

Everything is asynchronous until `Stream.wait`: arrays copied to or from the device must live until then.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from runtime.bundle.signature import Array
from runtime.errors import EngineError, MissingDependency, ResourceExhausted
from runtime.optional import require

MODULE: Final = "cuda.bindings.runtime"
OUT_OF_MEMORY: Final = 2
"""cudaErrorMemoryAllocation."""
THREAD_LOCAL: Final = 1
"""cudaStreamCaptureModeThreadLocal: other threads may go on allocating while a stream is captured."""


@dataclass(frozen=True)
class Device:
    """A GPU: its number, its name, its compute capability (89 for 8.9) and its memory in bytes."""

    index: int
    name: str
    capability: int
    memory: int


def devices(extra: str) -> tuple[tuple[Device, ...], str]:
    """The usable GPUs in CUDA's order, and the reason where there are none. `extra` installs the bindings. Never
    raises.
    """
    try:
        cuda = require(MODULE, extra)
    except MissingDependency as error:
        return (), str(error)
    code, count = cuda.cudaGetDeviceCount()
    if int(code) != 0 or not count:
        return (), f"there is no NVIDIA GPU that CUDA can use ({_name(code) if int(code) else 'it counts none'})"
    found = []
    for index in range(count):
        code, properties = cuda.cudaGetDeviceProperties(index)
        if int(code) == 0:
            name = properties.name.decode(errors="replace").rstrip("\0")
            found.append(Device(index, name, 10 * properties.major + properties.minor, properties.totalGlobalMem))
    return tuple(found), "" if found else "CUDA counts GPUs that it does not describe"


def _name(code: Any) -> str:
    return str(getattr(code, "name", code))


class Stream:
    """A queue of work on one device. Every method raises EngineError when CUDA refuses; calls may come from any one
    thread at a time.
    """

    def __init__(self, device: Device, extra: str) -> None:
        self.device = device
        self._cuda = require(MODULE, extra)
        self.select()
        self._stream = self._do("create a stream", "cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        self._finalizer = weakref.finalize(self, self._cuda.cudaStreamDestroy, self._stream)
        self._finalizer.atexit = False  # the process frees everything by itself, and CUDA may be gone by then

    @property
    def handle(self) -> int:
        """The stream's address, for SDKs."""
        return int(self._stream)

    def select(self) -> None:
        """Make the device the current one of this thread, as CUDA requires first."""
        self._do("select its device", "cudaSetDevice", self.device.index)

    def to_device(self, address: int, array: Array) -> None:
        """Copy a contiguous array to the device."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._do("copy to the device", "cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self._stream)

    def to_host(self, array: Array, address: int) -> None:
        """Fill a contiguous array from the device."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._do(
            "copy from the device", "cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self._stream
        )

    def copy(self, to: int, address: int, nbytes: int) -> None:
        """Copy memory of the device."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._do("copy on the device", "cudaMemcpyAsync", to, address, nbytes, kind, self._stream)

    def zero(self, address: int, nbytes: int) -> None:
        self._do("clear memory", "cudaMemsetAsync", address, 0, nbytes, self._stream)

    def wait(self) -> None:
        """Wait until all work is done."""
        self._do("finish its work", "cudaStreamSynchronize", self._stream)

    def record(self, work: Callable[[], None]) -> Recorded:
        """Record what `work` puts into the stream instead of doing it (CUDA Graphs). Shapes and addresses are part of
        the record.
        """
        mode = self._cuda.cudaStreamCaptureMode(THREAD_LOCAL)
        self._do("begin a graph", "cudaStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            with contextlib.suppress(EngineError):  # a failed capture gives no graph; the error to report is the work's
                self._do("end a graph", "cudaStreamEndCapture", self._stream)
            raise
        graph = self._do("end a graph", "cudaStreamEndCapture", self._stream)
        try:
            return Recorded(self, self._do("make a graph", "cudaGraphInstantiate", graph, 0))
        finally:
            self._do("free a graph", "cudaGraphDestroy", graph)

    def close(self) -> None:
        """Destroy the stream. May be called twice."""
        self._finalizer()

    def _do(self, doing: str, function: str, *arguments: Any) -> Any:
        """Call a function of CUDA; return its result without the error code."""
        code, *values = getattr(self._cuda, function)(*arguments)
        if int(code) == OUT_OF_MEMORY:
            raise ResourceExhausted(
                f"{self.device.name} has too little free memory to {doing}: free some, or use smaller shapes"
            )
        if int(code) != 0:
            raise EngineError(f"CUDA could not {doing} on {self.device.name}: {_name(code)}")
        return values[0] if values else None


class Recorded:
    """Work that was recorded and can be repeated with one call, as long as what it reads and writes stays in place."""

    def __init__(self, stream: Stream, graph: Any) -> None:
        self._stream, self._graph = stream, graph
        self._finalizer = weakref.finalize(self, stream._cuda.cudaGraphExecDestroy, graph)
        self._finalizer.atexit = False

    def launch(self) -> None:
        """Put the work into its stream."""
        self._stream._do("run a graph", "cudaGraphLaunch", self._graph, self._stream._stream)

    def close(self) -> None:
        self._finalizer()


class Buffer:
    """Memory on the device, kept from call to call; freed by `close`, or when nobody holds it any more."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.address = 0
        self.nbytes = 0
        self._finalizer: weakref.finalize[Any, Buffer] | None = None

    def reserve(self, nbytes: int) -> int:
        """The address of at least so many bytes: the same as before where they suffice. The content is lost when the
        buffer grows.

        Raises ResourceExhausted when the device has too little memory.
        """
        if nbytes > self.nbytes or not self.address:
            self._stream.wait()  # what still reads the old memory
            self.close()
            self.address = int(self._stream._do(f"hold {nbytes / 1e6:.0f} MB more", "cudaMalloc", max(nbytes, 1)))
            self.nbytes = nbytes
            self._finalizer = weakref.finalize(self, self._stream._cuda.cudaFree, self.address)
            self._finalizer.atexit = False
        return self.address

    def close(self) -> None:
        """Free the memory. May be called twice."""
        if self._finalizer is not None:
            self._finalizer()
        self.address = self.nbytes = 0
