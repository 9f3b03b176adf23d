"""NVIDIA GPUs through ONNX Runtime's CUDA provider. It compiles on any machine, and can be emulated on the CPU.

Graphs are lowered to operators that the provider has kernels for (`runtime/targets/lowering/opset21.py`) and checked
against its table (`runtime/targets/sessions/kernels.py`). Decoders that compute in half use GroupQueryAttention over
buffers that grow; it does not support float32, where caches have a fixed length.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import platform
import re
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import Field

from runtime.bundle.manifest import Artifact, Submodel
from runtime.engine import Availability, CompileOptions, Engine, Options
from runtime.errors import EngineUnavailable, MissingDependency
from runtime.settings import Texts
from runtime.targets.lowering.attention import with_grouped_cache
from runtime.targets.lowering.half import to_half
from runtime.targets.lowering.logits import with_logits_start
from runtime.targets.lowering.nested import widen
from runtime.targets.lowering.opset21 import to_opset21
from runtime.targets.lowering.static_cache import capacity, with_static_cache
from runtime.targets.nvidia import cuda
from runtime.targets.sessions.base import SessionEngine, stored
from runtime.targets.sessions.kernels import CUDA, OPSET, check, outside
from runtime.targets.sessions.sessions import ACCURACY, CPU, Device, sdk
from runtime.targets.sessions.stored import SessionPlan, load_graph, store

if TYPE_CHECKING:
    import onnx_ir as ir

PROVIDER: Final = "CUDAExecutionProvider"
EXTRA: Final = "cuda"
DRIVER: Final = re.compile(r"libcuda\.so|nvcuda\.dll")
PACKAGE: Final = "pip install 'enginecast[cuda]', in place of onnxruntime"


class CUDASettings(Texts):
    """Settings of `compile_with`, as texts from a command line.

    `context`: positions that a decoder's cache holds at most; by default the model's whole context.
    """

    context: int = Field(default=0, ge=0)


class CUDALoadSettings(Texts):
    """Settings of `Options.settings` when loading.

    `fallback`: which nodes may run on the CPU. "shapes": those that compute lengths, the engine's `device` says how
    many; "none"; "any". `graphs`: record the work of a shape and replay it (CUDA graphs), for submodels without states;
    there is a session for each shape then. `tf32`: allows float32 products to be computed in TensorFloat-32, with 10
    bits of mantissa.
    """

    fallback: str = Field(default="shapes", pattern="^(shapes|none|any)$")
    graphs: bool = False
    tf32: bool = False


class CUDAEngine(SessionEngine):
    """Sessions on one GPU, "cuda:0"."""

    target = "cuda"
    packages = ("onnxruntime-gpu", "onnx", "onnx-ir")
    rank = 15
    precisions = frozenset({"float32", "float16", "bfloat16", "int8", "int4"})
    compile_settings = CUDASettings

    @classmethod
    def available(cls) -> Availability:
        try:
            package = sdk()
        except MissingDependency as error:
            return Availability(False, reason=str(error))
        version = package.__version__
        reason = _provider_reason(package)
        if reason:
            return Availability(False, reason=reason, version=version, compiles=True)
        found, reason = cuda.devices(EXTRA)
        names = tuple(f"cuda:{device.index} ({device.name})" for device in found)
        return Availability(bool(names), names, reason, version, compiles=True)

    @classmethod
    def compile_with(cls, options: CompileOptions, submodel: Submodel, graph: Path, output: Path) -> Artifact:
        start = time.perf_counter()
        settings = CUDASettings.parse(options.settings)
        plan = SessionPlan(graph=f"{submodel.name}.onnx", compute=submodel.precision.compute)
        if submodel.signature.states:
            form = "fixed" if submodel.precision.compute == "float32" else "grouped"
            plan = plan.model_copy(update={"cache": form, "capacity": capacity(submodel.signature, settings.context)})
        model, nested = cls._lowered(submodel, graph, plan)
        plan = plan.model_copy(update={"nested": nested})
        options.progress(0.5, "Lowered")
        files = store(output, submodel, plan, {plan.graph: model})
        options.progress(1.0, "Graph written")
        key = {"opset": str(OPSET)}
        return Artifact(
            target=cls.target, submodel=submodel.name, files=files, key=key, seconds=time.perf_counter() - start
        )

    @classmethod
    def _lowered(
        cls, submodel: Submodel, graph: Path, plan: SessionPlan
    ) -> tuple[ir.Model, dict[str, tuple[int, ...]]]:
        """The graph as the provider has kernels for it, and `Plan.nested`: what it cannot do in half stays float32.

        Raises EngineError naming the rest.
        """
        canonical = load_graph(graph)
        nested = widen(canonical)
        if submodel.precision.compute == "float32":
            model = canonical
        else:
            trial = to_half(canonical, submodel.precision.compute, submodel.keep)
            _to_provider(trial, submodel, plan)
            names = {node.name for node in canonical.graph}
            lacking = {str(node.name) for node, _ in outside(trial, CUDA)} & names
            model = to_half(canonical, submodel.precision.compute, {*submodel.keep, *lacking})
        model = _to_provider(model, submodel, plan)
        check(model, CUDA, submodel.name)
        return model, nested

    @classmethod
    def load(cls, submodel: Submodel, root: Path, options: Options) -> Engine:
        settings = CUDALoadSettings.parse(options.settings)
        found = cls.available()
        if not found.usable:
            raise EngineUnavailable(f"{cls.target} cannot run here: {found.reason}")
        devices, _ = cuda.devices(EXTRA)
        chosen = next((device for device in devices if options.device in ("", "cuda", f"cuda:{device.index}")), None)
        if chosen is None:
            raise EngineUnavailable(
                f"ONNX Runtime has no device '{options.device}' here: it found {', '.join(found.devices)}"
            )
        replay = settings.graphs and not submodel.signature.states
        provider = {
            "device_id": str(chosen.index),
            "use_tf32": str(int(settings.tf32)),
            "enable_cuda_graph": str(int(replay)),
        }
        device = Device(PROVIDER, "cuda", chosen.index, provider)
        name = f"{cls.target}:{chosen.index} ({chosen.name})" + (" with CUDA graphs" if replay else "")
        return cls._opened(submodel, root, options, device, name, settings.fallback, replay)

    @classmethod
    def emulate(cls, submodel: Submodel, root: Path, options: Options) -> Engine:
        """The lowered graph on the CPU provider, which has no kernels for bfloat16."""
        if submodel.precision.compute == "bfloat16":
            raise EngineUnavailable(
                f"what {cls.target} compiles cannot be computed here: ONNX Runtime has no kernels for bfloat16 on the "
                "CPU"
            )
        return cls._opened(submodel, root, options, Device(CPU), f"{cls.target} on {CPU}", "any", replay=False)

    @classmethod
    def _opened(
        cls, submodel: Submodel, root: Path, options: Options, device: Device, name: str, fallback: str, replay: bool
    ) -> SessionEngine:
        plan, opened = stored(submodel, root, cls.target, device, options, entries={ACCURACY: "0"}, fallback=fallback)
        return cls(submodel, name, device, plan, opened, vary=not replay, replay=replay, fallback=fallback)


def _to_provider(model: ir.Model, submodel: Submodel, plan: SessionPlan) -> ir.Model:
    """The graph in the provider's operators, changed in place; with caches of fixed length it is a copy."""
    if submodel.signature.states:
        with_logits_start(model, submodel.signature)
    if plan.cache == "grouped":
        with_grouped_cache(model, submodel.signature)
    elif plan.cache == "fixed":
        model = with_static_cache(model, submodel.signature, plan.capacity)
    to_opset21(model, CUDA)
    return model


@cache
def _provider_reason(package: Any) -> str:
    """Why the provider cannot be used; empty where it can. Loads CUDA's libraries, from where pip or torch put them.

    ONNX Runtime itself would print a warning and compute on the CPU.
    """
    if PROVIDER not in package.get_available_providers():
        return f"this ONNX Runtime ({package.package_name}) has no {PROVIDER}: {PACKAGE}"
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        package.preload_dlls()
    name = "onnxruntime_providers_cuda.dll" if platform.system() == "Windows" else "libonnxruntime_providers_cuda.so"
    try:
        ctypes.CDLL(str(Path(package.__file__).with_name("capi") / name))
    except OSError as error:
        if DRIVER.search(str(error)):
            return f"there is no NVIDIA driver ({error})"
        return (
            f"its CUDA libraries do not load ({error}): ONNX Runtime {package.__version__} needs CUDA "
            f"{package.cuda_version} and cuDNN 9. "
            "pip install 'onnxruntime-gpu[cuda,cudnn]' nvidia-cublas, or install them as NVIDIA says"
        )
    return ""
