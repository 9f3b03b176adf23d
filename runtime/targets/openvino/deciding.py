"""Times the choices that depend on the processor on the first layers of a submodel (`runtime.placing.choices`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from runtime.bundle.manifest import Submodel, sha256
from runtime.bundle.signature import Signature
from runtime.engine import Options
from runtime.errors import EngineError
from runtime.files import key_of
from runtime.optional import require
from runtime.placing.choices import Choice, Decision, Subject, Unworthy, decide
from runtime.placing.containers import allowance
from runtime.placing.processor import cores
from runtime.targets.openvino.devices import Where
from runtime.targets.openvino.fixed import fixed_first, needs_shape, varies
from runtime.targets.openvino.graph import StoredGraph
from runtime.targets.openvino.part import cut, where_to_cut
from runtime.targets.openvino.reading import read_graph
from runtime.targets.openvino.settings import (
    CHOICES,
    SHAPES_CHOICE,
    TARGET,
    allows_half,
    has_bfloat16,
    processor_rounds,
    settings_for,
)

MARGIN: Final = 0.02
MARGINS: Final = {"compute": 0.05, "zero_points": 0.05, SHAPES_CHOICE: 0.1}
"""bfloat16 is noisier, zero points improve the output by 1 dB or more, and each fixed shape takes seconds to compile:
leaving the default must pay.
"""
PART: Final = 10**11
"""Multiplications of the part of a submodel that is timed for its choices: about 0.3 s on two cores."""
UNWORTHY: Final = 2 * 10**9
"""Submodels with fewer multiplications in a call take milliseconds: nothing is measured for them."""
ANSWER: Final = 64
"""Steps of one token that a decoder is timed with after one prompt."""


def decisions_for(
    core: Any, submodel: Submodel, graph: StoredGraph, where: Where, options: Options
) -> dict[str, Decision]:
    """The decisions on this submodel's choices for this device and processor."""
    choices = [
        Choice(name, values, MARGINS.get(name, MARGIN))
        for name, values in _possible(core, submodel, where, options).items()
    ]
    if not choices:
        return {}
    described = submodel.model_dump(mode="json", exclude={"name", "parity"})
    key = key_of(described, sha256(graph.path), options.threads, dict(options.settings))
    subject = Subject(submodel.name, TARGET, str(require("openvino", "openvino").__version__), key)
    own = {name: value for name, value in options.settings.items() if name in CHOICES}
    return decide(choices, subject, _Parts(core, submodel, graph, where, options), own)


def _possible(core: Any, submodel: Submodel, where: Where, options: Options) -> dict[str, tuple[str, ...]]:
    """The values of each choice that the submodel, the processor and the settings leave open."""
    if not where.plain:
        return {}
    open_ones = {
        "compute": allows_half(core, submodel, options),
        "attention": bool(submodel.bfloat16) and has_bfloat16(core),
        "zero_points": bool(submodel.activation_ranges),
        SHAPES_CHOICE: varies(submodel) and not submodel.signature.states and not needs_shape(submodel, where),
        "activation_group": submodel.dynamic
        and "DYNAMIC_QUANTIZATION_GROUP_SIZE" not in options.settings
        and processor_rounds(),
        "threads": not options.threads
        and "INFERENCE_NUM_THREADS" not in options.settings
        and 0 < cores() < allowance().threads,
    }
    return {name: CHOICES[name] for name, is_open in open_ones.items() if is_open}


class _Parts:
    """Compiles the first layers of a submodel with different choices, to time them."""

    def __init__(self, core: Any, submodel: Submodel, graph: StoredGraph, where: Where, options: Options) -> None:
        self.core, self.submodel, self.graph, self.where, self.options = core, submodel, graph, where, options
        self.end: str | None = None

    def __call__(self, values: Mapping[str, str]) -> Callable[[], object]:
        """A function that runs the part once, for the calls of a denoising step or of an answer. Raises EngineError."""
        signature, calls = self.submodel.signature, _calls(self.submodel.signature)
        try:
            if self.end is None:
                self.end, total = where_to_cut(
                    self.core.read_model(self.graph.path), _shapes(signature, calls[0][0]), PART
                )
                if total < UNWORTHY:
                    raise Unworthy
            fixed = fixed_first(self.submodel, self.where, values)
            model = cut(read_graph(self.core, self.submodel, self.graph, self.where, values, fixed), self.end)
            config = settings_for(self.core, self.submodel, self.where, self.options, values)
            request = self.core.compile_model(model, self.where.name, config).create_infer_request()
            names = [port.any_name for port in model.inputs]
            feeds = [({name: signature.sample(lengths)[name] for name in names}, times) for lengths, times in calls]
        except (RuntimeError, ValueError) as error:
            raise EngineError(f"OpenVINO could not compile a part of {self.submodel.name}: {error}") from None

        def run() -> None:
            for feed, times in feeds:
                for _ in range(times):
                    request.infer(feed, share_inputs=True)

        return run


def _calls(signature: Signature) -> list[tuple[dict[str, int], int]]:
    """Lengths of typical calls with the number of such calls; the first has most work.

    A decoder reads a prompt of half its context and at most 512 tokens, then writes an answer.
    """
    usual = {name: dim.opt for name, dim in signature.dims.items()}
    if signature.port is None:
        return [(usual, 1)]
    prompt = min(512, max(1, signature.longest // 2))
    first, step = signature.port.lengths(0, prompt), signature.port.lengths(prompt, 1)
    return [(usual | first, 1), (usual | step, ANSWER)]


def _shapes(signature: Signature, lengths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape(lengths) for tensor in signature.graph_inputs}
