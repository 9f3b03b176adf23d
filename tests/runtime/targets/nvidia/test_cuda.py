"""Memory, streams and recorded work, on a CUDA runtime in the host's memory."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

from runtime.errors import EngineError, ResourceExhausted
from runtime.targets.nvidia import cuda


@pytest.fixture
def stream(fake_cuda: Any) -> cuda.Stream:
    (device,), _ = cuda.devices("tensorrt")
    return cuda.Stream(device, "tensorrt")


def test_devices_are_described(fake_cuda: Any) -> None:
    found, reason = cuda.devices("tensorrt")
    assert found == (cuda.Device(0, "Fake 4090", 89, 1 << 32),) and not reason


def test_the_real_runtime_has_what_the_fake_one_has(fake_cuda: Any) -> None:
    """Where cuda-bindings is installed: the same functions, which answer a code and as many values."""
    if fake_cuda.real is None:
        pytest.skip("cuda-bindings is not installed")
    names = [name for name in dir(fake_cuda) if name.startswith("cuda")]
    assert not [name for name in names if not hasattr(fake_cuda.real, name)]
    assert isinstance(fake_cuda.real.cudaGetDeviceCount(), tuple) and len(fake_cuda.real.cudaGetDeviceCount()) == 2
    assert int(fake_cuda.real.cudaError_t.cudaErrorMemoryAllocation) == cuda.OUT_OF_MEMORY
    assert fake_cuda.real.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal == cuda.THREAD_LOCAL


def test_why_there_are_none(fake_cuda: Any) -> None:
    fake_cuda.broken = "cudaGetDeviceCount"
    found, reason = cuda.devices("tensorrt")
    assert found == () and reason == "there is no NVIDIA GPU that CUDA can use (cudaErrorInvalidValue)"


def test_what_went_to_the_device_comes_back(stream: cuda.Stream) -> None:
    sent, received = np.arange(12, dtype=np.float32).reshape(3, 4), np.zeros((3, 4), np.float32)
    buffer = cuda.Buffer(stream)
    stream.to_device(buffer.reserve(sent.nbytes), sent)
    stream.to_host(received, buffer.address)
    assert not received.any(), "copies are asynchronous"
    stream.wait()
    np.testing.assert_array_equal(received, sent)
    stream.zero(buffer.address, 16)
    stream.to_host(received, buffer.address)
    stream.wait()
    assert not received[0].any() and received[1:].all()


def test_a_buffer_stays_until_it_must_grow(stream: cuda.Stream, fake_cuda: Any) -> None:
    buffer = cuda.Buffer(stream)
    first = buffer.reserve(100)
    assert buffer.reserve(40) == buffer.reserve(100) == first and fake_cuda.allocations == 1
    buffer.reserve(101)
    assert buffer.nbytes == 101 and len(fake_cuda.live) == 1, "the old memory is freed"
    buffer.close()
    buffer.close()
    assert not fake_cuda.live and buffer.reserve(0), "nothing has an address too"


def test_a_dropped_buffer_is_freed(stream: cuda.Stream, fake_cuda: Any) -> None:
    cuda.Buffer(stream).reserve(8)
    gc.collect()
    assert not fake_cuda.live


def test_too_little_memory(stream: cuda.Stream, fake_cuda: Any) -> None:
    fake_cuda.memory = 1000
    with pytest.raises(
        ResourceExhausted,
        match="Fake 4090 has too little free memory to hold 0 MB more: free some, or use smaller shapes",
    ):
        cuda.Buffer(stream).reserve(1001)


def test_an_error_says_what_was_being_done(stream: cuda.Stream, fake_cuda: Any) -> None:
    fake_cuda.broken = "cudaStreamSynchronize"
    with pytest.raises(EngineError, match="CUDA could not finish its work on Fake 4090: cudaErrorInvalidValue"):
        stream.wait()


def test_recorded_work_is_done_when_it_is_launched(stream: cuda.Stream, fake_cuda: Any) -> None:
    done: list[int] = []
    recorded = stream.record(lambda: fake_cuda.put(lambda: done.append(1)))
    stream.wait()
    assert not done
    for _ in range(3):
        recorded.launch()
    stream.wait()
    assert done == [1, 1, 1]
    recorded.close()
    recorded.close()
    assert fake_cuda.graphs == 0


def test_work_that_fails_while_it_is_recorded(stream: cuda.Stream, fake_cuda: Any) -> None:
    def fail() -> None:
        raise EngineError("refused")

    with pytest.raises(EngineError, match="refused"):
        stream.record(fail)
    assert fake_cuda.captured is None, "the stream takes work again"
