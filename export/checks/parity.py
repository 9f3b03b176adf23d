"""The parity gate: a submodel's graph against the library's own model, on sample inputs derived from the signature.

Compared are the library's own forward and attention, not the module that was traced: a fault of that module is found,
too. Decoders are called several times in a row, from an empty cache to beyond every window of their attention and at
the last positions of their context.

Both sides read the checkpoint through memory maps and hold one layer in float32 at a time, so the comparison takes
little memory whatever the model's size: the torch side casts a module's parameters only while it runs, the graph side
runs unoptimised, node by node.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from calibration.observe.lean import lean_session
from export.checkpoint.source import TensorRef
from export.family import Part
from export.finished.agreement import REACH
from runtime.bundle.manifest import Parity
from runtime.bundle.signature import Array, Signature
from runtime.errors import ParityError

SEED: Final = 0


def check(part: Part, model: ir.Model, weights: Mapping[str, TensorRef], method: str) -> Parity:
    """Compare every output and state of every call; return the worst. Raises ParityError when it is beyond the part's
    floor or not finite.

    `weights` are those of the part's components by their names in its graph.
    """
    names, session = [tensor.name for tensor in part.signature.graph_outputs], lean_session(model)
    worst: Parity | None = None
    wanted, got = dict[str, Array](), dict[str, Array]()
    for inputs in samples(part.signature):
        wanted = _library(part, weights, inputs | _carried(part.signature, wanted))
        got = dict(zip(names, session.run(names, inputs | _carried(part.signature, got)), strict=True))
        for name in names:
            found = _compare(name, wanted[name], got[name], part.floor, method)
            if not found.error <= part.floor:  # NaN is beyond every floor
                raise ParityError(
                    f"submodel '{part.name}': output '{name}' of the ONNX graph differs from torch by "
                    f"{found.error:.2e} of its largest "
                    f"value, expected at most {part.floor:.0e}. No bundle was written. If the checkpoint runs well in "
                    "torch, please "
                    "report this"
                )
            if worst is None or found.error > worst.error:
                worst = found
    assert worst is not None
    return worst


def worst(found: Sequence[Parity]) -> Parity:
    """The comparison with the largest error."""
    return max(found, key=lambda one: one.error)


def beyond_reach(signature: Signature) -> bool:
    """Whether attention is limited to a window that samples do not leave."""
    return max(signature.windows, default=0) >= REACH


def samples(signature: Signature) -> Iterator[dict[str, Array]]:
    """The inputs of each call, those of a decoder in one sequence: its past begins empty, and is then what the call
    before gave.
    """
    lengths = signature.sample_lengths()
    if not signature.states:
        yield signature.sample(lengths, SEED)
        return
    past, context = 0, signature.longest
    ends = [window + 1 for window in signature.windows if 0 < window < REACH]
    steps = [3, 2, 1, *(2 for _ in ends), 1]
    for number, count in enumerate(steps):
        if 3 <= number < 3 + len(ends):
            count = max(count, ends[number - 3] - past)
        count = min(count, context - past)
        if count < 1:
            return
        call = signature.decoder.lengths(past, count, lengths[signature.decoder.batch])
        found = signature.sample(lengths | call, SEED + number)
        if number == len(steps) - 1:  # rotary embeddings at the end of the context
            shift = context - past - count
            found |= {t.name: found[t.name] + shift for t in signature.inputs if t.values == "positions"}
        yield found
        past += count


def _carried(signature: Signature, outputs: Mapping[str, Array]) -> dict[str, Array]:
    """The past that follows from the outputs of the call before."""
    return {state.past.name: outputs[state.present.name] for state in signature.states if outputs}


def _library(part: Part, weights: Mapping[str, TensorRef], inputs: Mapping[str, Array]) -> dict[str, Array]:
    """What the library's own model gives for the inputs of a call."""
    names = [tensor.name for tensor in part.signature.graph_outputs]
    feed = [torch.from_numpy(inputs[tensor.name]) for tensor in part.signature.graph_inputs]
    with mapped(part, weights), torch.inference_mode():
        return {name: tensor.float().numpy() for name, tensor in zip(names, part.reference(*feed), strict=True)}


def _compare(name: str, wanted: Array, got: Array, floor: float, method: str) -> Parity:
    difference = np.abs(got.astype(np.float64) - wanted.astype(np.float64))
    scale = float(np.abs(wanted).max(initial=0))
    noise, signal = float((difference**2).mean()), float((wanted.astype(np.float64) ** 2).mean())
    error = float(difference.max(initial=0)) / (scale or 1.0)
    snr = 10 * np.log10(signal / noise) if noise and signal else 300.0
    return Parity(method=method, tensor=name, error=error, floor=floor, snr_db=float(np.clip(snr, -300, 300)))


@contextmanager
def mapped(part: Part, weights: Mapping[str, TensorRef]) -> Iterator[None]:
    """While active, the library's models of a part compute in float32 with the checkpoint's weights, each cast only
    while its module runs.
    """
    handles, names = [], part.names()
    models = [component.model for component in part.components]

    def stored(own: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        return {key: _view(weights[names[id(parameter)]]) for key, parameter in own.items()}

    for module in dict.fromkeys(module for model in models for module in model.modules()):
        owners = [module]
        if _reads_children(module):
            owners += module.children()
        for owner in owners:
            if own := _own(owner):
                handles += [
                    module.register_forward_pre_hook(_load(owner, stored(own))),
                    module.register_forward_hook(_drop(owner, own)),
                ]
    roots = [(model, _own(model)) for model in models]
    for model, own in roots:  # at once: references call the parts of a model, not the model
        _load(model, stored(own))(model, None)
    try:
        yield
    finally:
        for model, own in roots:
            model._parameters.update(own)
        for handle in handles:
            handle.remove()


def _reads_children(module: nn.Module) -> bool:
    """Whether a module itself reads the weights of the layers in it: MultiheadAttention those of its projection, and
    modules of embeddings alone, as BLIP-2's, those of an embedding, to find its device.
    """
    children = list(module.children())
    return isinstance(module, nn.MultiheadAttention) or (
        bool(children) and all(isinstance(child, nn.Embedding) for child in children)
    )


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return {key: parameter for key, parameter in module._parameters.items() if parameter is not None}


def _load(owner: nn.Module, stored: Mapping[str, torch.Tensor]) -> Any:
    def hook(_module: nn.Module, _inputs: Any) -> None:
        for key, tensor in stored.items():
            owner._parameters[key] = nn.Parameter(tensor.float(), requires_grad=False)

    return hook


def _drop(owner: nn.Module, own: Mapping[str, nn.Parameter]) -> Any:
    def hook(_module: nn.Module, _inputs: Any, _outputs: Any) -> None:
        owner._parameters.update(own)

    return hook


def _view(ref: TensorRef) -> torch.Tensor:
    """A tensor on the memory map itself. numpy has no bfloat16 that torch knows, so those bytes travel as int16."""
    array = ref.array()
    is_bfloat16 = array.dtype == ml_dtypes.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a map that is not writable: nothing writes to it
        tensor = torch.from_numpy(array.view(np.int16) if is_bfloat16 else array)
    return tensor.view(torch.bfloat16) if is_bfloat16 else tensor
