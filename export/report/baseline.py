"""Baselines of a bundle's speed: the library's own modules in PyTorch, and the float model on the bundle's targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin

from calibration.ground import machine
from export.checkpoint.tensors import TensorRef
from export.family import Part
from export.report.speed import Speed, carry_out, measure_speed
from export.task import SpeedEffort
from runtime.bundle.manifest import Artifact, Bundle, Submodel
from runtime.bundle.signature import Array
from runtime.engine import Availability, CompileOptions, Engine, Options, Slot
from runtime.errors import EngineError, EngineUnavailable, UnsupportedModel
from runtime.placing.loading import LoadedModel, choose_target, load_model

ATTENTION: Final = "sdpa"
"""The attention that transformers chooses where it can."""
TRIAL: Final = SpeedEffort(steps=2, tokens=2)
"""A short request that shows whether PyTorch can run the model as its pipeline calls it."""
Weights = Callable[[Part], Mapping[str, TensorRef]]
"""The tensors of a part's components by their names in its graph."""


class TorchEngine(Engine):
    """A part in PyTorch: eager, float32, on the CPU, as the library runs it. The states of a slot are the library's own
    cache.
    """

    target = "torch"
    rank = 99
    device = "torch:cpu"

    def __init__(self, submodel: Submodel, part: Part, weights: Mapping[str, TensorRef]) -> None:
        self.submodel = submodel
        _fill(part, weights)
        self._module: Any = _generator(part) if submodel.signature.states else part.module
        self._slots: WeakKeyDictionary[Slot, DynamicCache] = WeakKeyDictionary()

    @classmethod
    def available(cls) -> Availability:
        return Availability(True, (cls.device,), version=torch.__version__)

    @classmethod
    def compile_with(cls, options: CompileOptions, submodel: Submodel, graph: Path, output: Path) -> Artifact:
        raise EngineError("PyTorch compiles nothing here: its engine is made from a part of a checkpoint")

    @classmethod
    def load(cls, submodel: Submodel, root: Path, options: Options) -> Engine:
        raise EngineError("PyTorch loads no bundle: its engine is made from a part of a checkpoint")

    def run(self, inputs: Mapping[str, Array], slot: Slot | None = None) -> dict[str, Array]:
        signature = self.submodel.signature
        feed = {tensor.name: torch.tensor(inputs[tensor.name]) for tensor in signature.inputs}
        try:
            with torch.inference_mode():
                if not signature.states:
                    results = self._module(*feed.values())
                else:
                    cache = self._slots.setdefault(slot or Slot(), DynamicCache())
                    results = (self._module(**feed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits,)
        except Exception as error:  # the libraries raise exceptions of every kind
            reason = " ".join(str(error).split())
            raise EngineError(f"PyTorch could not run {self.submodel.name}: {type(error).__name__}: {reason}") from None
        return {tensor.name: result.numpy() for tensor, result in zip(signature.outputs, results, strict=True)}

    def copy(self, slot: Slot, to: Slot) -> None:
        if slot in self._slots:
            self._slots[to] = deepcopy(self._slots[slot])

    def trim(self, slot: Slot, length: int) -> None:
        if length == 0:
            self._slots.pop(slot, None)
        elif slot in self._slots and (surplus := self._slots[slot].get_seq_length() - length) > 0:
            self._slots[slot].crop(-surplus)

    def close(self) -> None:
        self._slots.clear()
        self._module = None


def _fill(part: Part, weights: Mapping[str, TensorRef]) -> None:
    """Give the part's module its parameters in float32; those that it has already, from another part of its components,
    stay.
    """
    names = part.parameters()
    filled: dict[TensorRef, nn.Parameter] = {}
    for path, module in part.module.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                ref = weights[names[f"{path}.{key}" if path else key]]
                if ref not in filled:
                    filled[ref] = nn.Parameter(torch.from_numpy(ref.array().astype(np.float32)), requires_grad=False)
                module._parameters[key] = filled[ref]


def _generator(part: Part) -> nn.Module:
    """The library's smallest model that holds the part's weights and makes tokens, with the library's own attention."""
    wanted = {id(parameter) for parameter in part.module.parameters()}
    having = [
        module
        for component in part.components
        for module in component.model.modules()
        if isinstance(module, GenerationMixin) and wanted <= {id(parameter) for parameter in module.parameters()}
    ]
    if not having:
        raise UnsupportedModel(
            f"'{part.name}' is no model of transformers that makes tokens: it cannot be timed in PyTorch"
        )
    found: Any = min(having, key=lambda module: len(list(module.parameters())))
    found.set_attn_implementation(ATTENTION)
    return found


def torch_model(model: LoadedModel, parts: Sequence[Part], weights: Weights) -> LoadedModel:
    """The same model with PyTorch for an engine. `parts` are new ones, without weights: they get theirs, in float32.

    Raises UnsupportedModel when a part keeps states and is no language model of transformers.
    """
    engines = {part.name: TorchEngine(model.bundle.submodel(part.name), part, weights(part)) for part in parts}
    return replace(model, target=TorchEngine.target, device=TorchEngine.device, engines=engines)


def compare_speed(
    quantized: Bundle,
    floating: Bundle,
    parts: Sequence[Part],
    weights: Weights,
    effort: SpeedEffort | None = None,
) -> Speed:
    """Time a bundle beside that of the same checkpoint without quantization, and PyTorch.

    `parts` and `weights` are the checkpoint's, the parts new ones without weights. Each target of the bundle that can
    be used here takes part, with all threads; what PyTorch cannot run is left out. Raises EngineUnavailable when there
    is no target, EngineError when an engine cannot run.
    """
    threads, left_out, usable = machine.threads(), list[str](), list[str]()
    for name in quantized.targets:
        try:
            usable.append(choose_target(quantized, name).target)
        except EngineUnavailable as error:
            left_out.append(f"{name}: {error}")
    if not usable:
        raise EngineUnavailable(f"no target of bundle {quantized.root} can be timed here. {'; '.join(left_out)}")
    with ExitStack() as stack:
        pairs = [
            tuple(
                stack.enter_context(closing(load_model(bundle, name, Options(threads=threads))))
                for bundle in (floating, quantized)
            )
            for name in usable
        ]
        models = [model for pair in pairs for model in pair]
        before = torch.get_num_threads()
        stack.callback(torch.set_num_threads, before)
        torch.set_num_threads(threads)
        try:
            library = stack.enter_context(closing(torch_model(pairs[0][0], parts, weights)))
            carry_out(library, TRIAL)
            models.insert(0, library)
        except (UnsupportedModel, EngineError) as error:
            left_out.append(f"torch: {error}")
        return measure_speed(models, threads, effort, left_out)
