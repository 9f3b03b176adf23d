"""DirectML through ONNX Runtime: any GPU with DirectX 12, on Windows. It compiles on any machine, and can be emulated
on the CPU.

Graphs are lowered to operators that the provider has kernels for (`runtime/targets/lowering/opset21.py`), checked
against its table (`runtime/targets/sessions/kernels.py`) and opened with all lengths fixed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pydantic import Field, field_validator

from runtime.bundle.manifest import Artifact, Submodel
from runtime.bundle.signature import Signature
from runtime.engine import Availability, CompileOptions, Engine, Options
from runtime.errors import EngineError, EngineUnavailable, MissingDependency
from runtime.settings import Texts
from runtime.targets.lowering.attention import grouped_fits
from runtime.targets.lowering.half import to_half
from runtime.targets.lowering.nested import widen
from runtime.targets.lowering.opset21 import to_opset21
from runtime.targets.lowering.static_cache import capacity, with_static_cache
from runtime.targets.sessions.base import SessionEngine, stored
from runtime.targets.sessions.kernels import DIRECTML, OPSET, check
from runtime.targets.sessions.sessions import ACCURACY, CPU, Device, sdk
from runtime.targets.sessions.shapes import parse_shapes, shapes_of
from runtime.targets.sessions.stored import SessionPlan, load_graph, store

if TYPE_CHECKING:
    import onnx_ir as ir

PROVIDER: Final = "DmlExecutionProvider"
PACKAGE: Final = "pip install 'enginecast[directml]', on Windows and in place of onnxruntime"
PIECES: Final = (1, 32)
"""Numbers of new positions that a decoder has sessions for by default: one, and a piece of a prompt."""


class DirectMLSettings(Texts):
    """Settings of `compile_with`, as texts from a command line.

    `shapes`: the lengths to compile for, "height=64,width=64;height=96,width=64"; calls with others are refused. By
    default a session is made for each new shape. Dims of other submodels are ignored. A decoder's shapes are lengths of
    `sequence`, by default 1 and 32: calls are split into such pieces, so one of them should be 1. `context`: positions
    that a decoder's cache holds; by default the model's whole context. `grouped`: whether single steps use
    GroupQueryAttention, which updates the cache in place and supports no padding. It is never used for decoders with
    windowed attention, which DirectML's kernel does not have, nor for heads of a size that it has no kernel for.
    """

    shapes: tuple[Mapping[str, int], ...] = ()
    context: int = Field(default=0, ge=0)
    grouped: bool = True

    @field_validator("shapes", mode="before")
    @classmethod
    def _shapes(cls, text: str) -> tuple[dict[str, int], ...]:
        return parse_shapes(text)


class DirectMLLoadSettings(Texts):
    """Settings of `Options.settings` when loading.

    `fallback`: which nodes may run on the CPU. "shapes": those that compute lengths, the engine's `device` says how
    many; "none"; "any".
    """

    fallback: str = Field(default="shapes", pattern="^(shapes|none|any)$")


class DirectML(SessionEngine):
    """Sessions on a DirectX 12 device, by its number among the display adapters: "dml:0"."""

    target = "directml"
    packages = ("onnxruntime-directml", "onnx", "onnx-ir")
    rank = 25
    precisions = frozenset({"float32", "float16", "int8", "int4"})
    compile_settings = DirectMLSettings

    @classmethod
    def available(cls) -> Availability:
        try:
            package = sdk()
        except MissingDependency as error:
            return Availability(False, reason=str(error))
        if PROVIDER not in package.get_available_providers():
            reason = f"this ONNX Runtime ({package.package_name}) has no {PROVIDER}: {PACKAGE}"
            return Availability(False, reason=reason, version=package.__version__, compiles=True)
        return Availability(True, ("dml:0",), version=package.__version__, compiles=True)

    @classmethod
    def compile_with(cls, options: CompileOptions, submodel: Submodel, graph: Path, output: Path) -> Artifact:
        start = time.perf_counter()
        settings = DirectMLSettings.parse(options.settings)
        signature = submodel.signature
        positions = capacity(signature, settings.context) if signature.states else 0
        shapes = shapes_of(settings.shapes, signature)
        plan = SessionPlan(
            graph=f"{submodel.name}.onnx", capacity=positions, shapes=shapes, compute=submodel.precision.compute
        )
        model, nested = cls._lowered(submodel, graph, positions, steps=False)
        plan, models = plan.model_copy(update={"nested": nested}), {plan.graph: model}
        if signature.states:
            sequence = signature.decoder.sequence
            sizes = shapes or tuple({sequence: size} for size in PIECES if size <= positions)
            plan = plan.model_copy(update={"cache": "fixed", "shapes": sizes})
            if settings.grouped and _steps_fit(signature) and any(shape.get(sequence) == 1 for shape in sizes):
                plan = plan.model_copy(update={"step": f"{submodel.name}.step.onnx"})
                models[plan.step], _ = cls._lowered(submodel, graph, positions, steps=True)
        options.progress(0.5, "Lowered")
        files = store(output, submodel, plan, models)
        options.progress(1.0, "Graph written")
        key = {"opset": str(OPSET)}
        return Artifact(
            target=cls.target, submodel=submodel.name, files=files, key=key, seconds=time.perf_counter() - start
        )

    @classmethod
    def _lowered(
        cls, submodel: Submodel, graph: Path, positions: int, steps: bool
    ) -> tuple[ir.Model, dict[str, tuple[int, ...]]]:
        """The graph as the provider has kernels for it, and `Plan.nested`. Raises EngineError naming nodes that it has
        none for.
        """
        model = load_graph(graph)
        nested = widen(model)
        if submodel.precision.compute == "bfloat16":
            raise EngineError(
                f"could not compile {submodel.name}: DirectML computes in float32 and float16, not in bfloat16: choose "
                "another --quant"
            )
        if submodel.precision.compute != "float32":
            model = to_half(model, submodel.precision.compute, submodel.keep)
        if submodel.signature.states:
            model = with_static_cache(model, submodel.signature, positions)
        to_opset21(model, DIRECTML, positions if steps else 0)
        check(model, DIRECTML, submodel.name)
        return model, nested

    @classmethod
    def load(cls, submodel: Submodel, root: Path, options: Options) -> Engine:
        settings = DirectMLLoadSettings.parse(options.settings)
        found = cls.available()
        if not found.usable:
            raise EngineUnavailable(f"{cls.target} cannot run here: {found.reason}")
        memory, _, number = (options.device or "dml:0").partition(":")
        if memory != "dml" or not (number or "0").isdecimal():
            raise EngineUnavailable(
                f"DirectML has no device '{options.device}' here: expected dml:0, or the number of another display "
                "adapter"
            )
        device = Device(PROVIDER, "dml", int(number or 0), {"device_id": number or "0"})
        return cls._opened(submodel, root, options, device, f"{cls.target}:dml:{device.index}", settings.fallback)

    @classmethod
    def emulate(cls, submodel: Submodel, root: Path, options: Options) -> Engine:
        """The lowered graphs on the CPU provider, at the same fixed lengths."""
        return cls._opened(submodel, root, options, Device(CPU), f"{cls.target} on {CPU}", "any")

    @classmethod
    def _opened(
        cls, submodel: Submodel, root: Path, options: Options, device: Device, name: str, fallback: str
    ) -> DirectML:
        plan, opened = stored(submodel, root, cls.target, device, options, entries={ACCURACY: "0"}, fallback=fallback)
        return cls(submodel, name, device, plan, opened, fallback=fallback)


def _steps_fit(signature: Signature) -> bool:
    """Whether GroupQueryAttention computes what the decoder's attention does."""
    sizes = [state.past.dims[-1] for state in signature.states]
    return not any(signature.windows) and all(isinstance(size, int) and grouped_fits(size) for size in sizes)
