"""The parity gate: a submodel's graph against the torch module it was made from, on sample inputs derived from its signature.

Both sides read the checkpoint through memory maps and hold one layer in float32 at a time, so the comparison takes little memory
whatever the model's size: the torch side casts a module's parameters only while it runs, the graph side runs unoptimised, node by node.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from calibration.lean import lean_session
from export.family import Part
from export.graph import parameter_names
from export.source import TensorRef
from runtime.bundle import Parity
from runtime.errors import ParityError
from runtime.signature import Array

SEED: Final = 0


def check(part: Part, model: ir.Model, weights: Mapping[str, TensorRef], method: str) -> Parity:
    """Compare every output and state; return the worst. Raises ParityError when it is beyond the part's floor or not finite."""
    inputs = part.signature.sample(part.signature.sample_lengths(), SEED)
    names = [tensor.name for tensor in part.signature.graph_outputs]
    with mapped(part, weights), torch.inference_mode():
        expected = [tensor.float().numpy() for tensor in part.module(*(torch.from_numpy(array) for array in inputs.values()))]
    worst: Parity | None = None
    for name, wanted, got in zip(names, expected, lean_session(model).run(names, inputs), strict=True):
        found = _compare(name, wanted, got, part.floor, method)
        if not found.error <= part.floor:  # NaN is beyond every floor
            raise ParityError(
                f"submodel '{part.name}': output '{name}' of the ONNX graph differs from torch by {found.error:.2e} of its largest value, "
                f"expected at most {part.floor:.0e}. No bundle was written. If the checkpoint runs well in torch, please report this"
            )
        if worst is None or found.error > worst.error:
            worst = found
    assert worst is not None
    return worst


def _compare(name: str, wanted: Array, got: Array, floor: float, method: str) -> Parity:
    difference = np.abs(got.astype(np.float64) - wanted.astype(np.float64))
    scale = float(np.abs(wanted).max(initial=0))
    noise, signal = float((difference**2).mean()), float((wanted.astype(np.float64) ** 2).mean())
    error = float(difference.max(initial=0)) / (scale or 1.0)
    snr = 10 * np.log10(signal / noise) if noise and signal else 300.0
    return Parity(method=method, tensor=name, error=error, floor=floor, snr_db=float(np.clip(snr, -300, 300)))


@contextmanager
def mapped(part: Part, weights: Mapping[str, TensorRef]) -> Iterator[None]:
    """While active, the part's module computes in float32 with the checkpoint's weights, each cast only while its module runs."""
    names = parameter_names(part.module, part.component.model)
    handles = []
    for path, module in part.module.named_modules():
        stored = {
            key: _view(weights[names[f"{path}.{key}" if path else key]])
            for key in module._parameters
            if module._parameters[key] is not None
        }
        if stored:
            handles += [module.register_forward_pre_hook(_load(stored)), module.register_forward_hook(_drop(stored))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _load(stored: Mapping[str, torch.Tensor]) -> Any:
    def hook(module: nn.Module, _inputs: Any) -> None:
        for key, tensor in stored.items():
            module._parameters[key] = nn.Parameter(tensor.float(), requires_grad=False)

    return hook


def _drop(stored: Mapping[str, torch.Tensor]) -> Any:
    def hook(module: nn.Module, _inputs: Any, _outputs: Any) -> None:
        for key, tensor in stored.items():
            module._parameters[key] = nn.Parameter(tensor.to("meta"), requires_grad=False)

    return hook


def _view(ref: TensorRef) -> torch.Tensor:
    """A tensor on the memory map itself. numpy has no bfloat16 that torch knows, so those bytes travel as int16."""
    array = ref.array()
    is_bfloat16 = array.dtype == ml_dtypes.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a map that is not writable: nothing writes to it
        tensor = torch.from_numpy(array.view(np.int16) if is_bfloat16 else array)
    return tensor.view(torch.bfloat16) if is_bfloat16 else tensor
