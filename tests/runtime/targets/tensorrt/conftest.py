"""An SDK with the parts of TensorRT's Python API that running an engine needs: its plans are lowered graphs that ONNX
Runtime runs.
"""

from __future__ import annotations

import ctypes
import enum
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from runtime.bundle.manifest import Artifact, Bundle
from runtime.engine import Engine, Options
from runtime.targets.tensorrt.engine import TensorRT
from runtime.targets.tensorrt.lower import lower
from runtime.targets.tensorrt.sdk import SDK
from runtime.targets.tensorrt.settings import TensorRTSettings

NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}
Loader = Callable[..., Engine]


class Level(enum.IntEnum):
    ERROR = 1
    INTERNAL_ERROR = 0


class FakeContext:
    """Shapes, addresses, and a run of the graph on what lies there when the work is done."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.places: dict[str, int] = {}
        self.memory = (0, 0)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return profile < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        known = self.engine.inputs[name].shape
        fits = len(known) == len(shape) and all(
            isinstance(length, str) or length == given for length, given in zip(known, shape, strict=True)
        )
        if self.engine.num_optimization_profiles == 2 and self.profile == 0 and name == "position_ids":
            fits = fits and shape[1] == 1
        if not fits:
            self.engine.logger.log(Level.ERROR, f"{name} has a wrong shape")
        self.shapes[name] = tuple(shape)
        return fits

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self.engine.inputs or name in self.engine.outputs
        self.places[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        return sorted(set(self.engine.inputs) - set(self.shapes))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.engine.output_shapes(self.shapes)[name]

    def update_device_memory_size_for_shapes(self) -> int:
        return 64 * sum(int(np.prod(shape)) for shape in self.shapes.values())

    def set_device_memory(self, address: int, nbytes: int) -> None:
        assert nbytes >= self.update_device_memory_size_for_shapes()
        self.memory = address, nbytes

    def execute_async_v3(self, stream: int) -> bool:
        engine, shapes, places, memory = self.engine, dict(self.shapes), dict(self.places), self.memory
        assert stream == 7 and set(places) == set(engine.inputs) | set(engine.outputs)

        def work() -> None:
            engine.cuda.require(*memory)
            feed = {
                name: engine.view(places[name], shapes[name], value.type).copy()
                for name, value in engine.inputs.items()
            }
            for (name, value), result in zip(engine.outputs.items(), engine.session.run(None, feed), strict=True):
                engine.view(places[name], result.shape, value.type)[...] = result

        engine.cuda.put(work)
        return not engine.refuses


class FakeEngine:
    """A plan that was loaded."""

    streamable_weights_size = 0
    refuses = False

    def __init__(self, plan: bytes, logger: Any, cuda: Any) -> None:
        head, graph = plan.split(b"\n", 1)
        settings = onnxruntime.SessionOptions()
        settings.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", json.loads(head)["weights"]
        )
        settings.log_severity_level, settings.intra_op_num_threads = 3, 1
        self.session = onnxruntime.InferenceSession(graph, settings, disabled_optimizers=["QDQPropagationTransformer"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.num_optimization_profiles = 2 if "write_indices" in self.inputs else 1
        self.logger, self.cuda = logger, cuda
        self.known: dict[str, dict[str, tuple[int, ...]]] = {}

    def view(self, address: int, shape: tuple[int, ...], kind: str) -> Any:
        nbytes = int(np.prod(shape)) * np.dtype(NUMPY[kind]).itemsize
        return np.frombuffer(
            (ctypes.c_char * nbytes).from_address(self.cuda.require(address, nbytes)), NUMPY[kind]
        ).reshape(shape)

    def output_shapes(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        key = repr(sorted(shapes.items()))
        if key not in self.known:
            feed = {name: np.zeros(shapes[name], NUMPY[value.type]) for name, value in self.inputs.items()}
            self.known[key] = {
                name: result.shape for name, result in zip(self.outputs, self.session.run(None, feed), strict=True)
            }
        return self.known[key]

    def get_tensor_shape(self, name: str) -> list[int]:
        return [-1 if isinstance(length, str) else length for length in self.inputs[name].shape]

    def get_tensor_dtype(self, name: str) -> Any:
        return np.dtype(NUMPY[self.inputs[name].type])

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return name.replace("present.", "past_key_values.") if name.startswith("present.") else None

    def create_execution_context(self, strategy: int) -> FakeContext:
        assert strategy == 2
        return FakeContext(self)


class FakeTensorRT:
    """The module."""

    __version__ = "99.1"
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=2)

    class ILogger:
        Severity = Level

    def __init__(self, cuda: Any) -> None:
        self.cuda = cuda
        self.engines: list[FakeEngine] = []

    def Runtime(self, logger: Any) -> Any:  # noqa: N802 (the SDK's name)
        def deserialize(plan: bytes) -> FakeEngine | None:
            if not plan.startswith(b'{"weights"'):
                logger.log(Level.ERROR, "magic tag does not match")
                return None
            self.engines.append(FakeEngine(plan, logger, self.cuda))
            return self.engines[-1]

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


class FakeTarget(TensorRT):
    """The target on the fake SDK."""

    target = "fake-tensorrt"
    sdk = SDK("fake_tensorrt", "FakeRT", "tensorrt", ahead=False)


def with_engines(bundle: Bundle, root: Path, key: dict[str, str]) -> Path:
    """A copy of the bundle's manifest and graphs (as links) with an engine of the fake target for each submodel."""
    root.mkdir()
    (root / "onnx").symlink_to(bundle.root / "onnx")
    folder = root / "engines" / FakeTarget.target
    folder.mkdir(parents=True)
    artifacts = []
    for submodel in bundle.manifest.submodels:
        graph = bundle.root / submodel.graph
        head = json.dumps({"weights": str(graph.parent)}).encode()
        (folder / f"{submodel.name}.engine").write_bytes(
            head + b"\n" + lower(submodel, graph, TensorRTSettings()).content
        )
        artifacts.append(
            Artifact(target=FakeTarget.target, submodel=submodel.name, files=(f"{submodel.name}.engine",), key=key)
        )
    manifest = bundle.manifest.model_copy(update={"artifacts": tuple(artifacts)})
    (root / "manifest.json").write_text(manifest.model_dump_json())
    return root


@pytest.fixture
def fake_tensorrt(fake_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """The fake SDK, importable, on the fake GPU."""
    fake = FakeTensorRT(fake_cuda)
    monkeypatch.setitem(sys.modules, "fake_tensorrt", fake)  # type: ignore[arg-type]
    return fake


@pytest.fixture
def load_fake(fake_tensorrt: FakeTensorRT, tmp_path: Path) -> Iterator[Loader]:
    """Load a submodel of a bundle on the fake SDK, from an engine with the given key."""
    opened: list[Engine] = []
    roots: dict[str, Path] = {}

    def load(bundle: Bundle, name: str, key: dict[str, str] | None = None, options: Options | None = None) -> Engine:
        key = {"sdk": "99.1", "compute_capability": "8.9", "weights": "engine"} if key is None else key
        place = f"{bundle.name}-{len(roots)}" if repr((bundle.root, key)) not in roots else ""
        if place:
            roots[repr((bundle.root, key))] = with_engines(bundle, tmp_path / place, key)
        root = roots[repr((bundle.root, key))]
        opened.append(FakeTarget.load(bundle.submodel(name), root, options or Options()))
        return opened[-1]

    yield load
    for engine in opened:
        engine.close()
