"""Quantizing, writing and compiling the submodels of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from calibration.observe.half import HalfCompute, store
from calibration.quantize.plan import LayerPlan
from calibration.quantize.tuning import Tuning
from export.build.bundle import place
from export.build.learned import captured
from export.build.state import Build, part_graph
from export.family import Part
from export.graph import weights as graph
from export.report.progress import Progress
from runtime.bundle.manifest import Artifact, Submodel
from runtime.engine import CompileOptions, Engine, target


def write(
    part: Part,
    model: ir.Model,
    plans: Sequence[LayerPlan] | None,
    tuning: Tuning | None,
    folder: Path,
    requested: tuple[str, str] | None = None,
) -> Submodel:
    """Quantize as planned, if at all, and write one graph with its weights.

    `requested` is the form that weights should take, and why those do not whose plans give no reason: the manifest then
    says what they did.
    """
    tuning, folded = tuning or Tuning(), model
    if plans is not None:
        model = tuning.quantize(folded, plans)
    weights = graph.weights_of(model, folded, plans or (), *requested) if requested else ()
    nbytes = graph.write(model, folder / "onnx" / part.name)
    return Submodel(
        name=part.name,
        signature=part.signature,
        graph=place(part.name),
        precision=graph.precision(model),
        nbytes=nbytes,
        dynamic=any(planned.dynamic for planned in plans or ()),
        bfloat16=tuning.bfloat16(plans or ()),
        activation_ranges=tuning.activation_ranges(folded, plans or ()),
        weights=weights,
    )


def written(
    state: Build,
    part: Part,
    model: ir.Model,
    plans: Sequence[LayerPlan] | None,
    tuning: Tuning | None,
    folder: Path,
    progress: Progress,
) -> Submodel:
    """A part quantized and written, and what targets may compute it in."""
    with progress.step(part.name, "write") as notes:
        chosen = state.recipe(part)
        if chosen is not None and chosen.half:
            model = store(model, chosen.half)
        made = write(part, model, plans, tuning, folder, state.requested(part))
        notes.append(f"{made.nbytes / 1e6:.1f} MB {made.precision}")
        rounded = "int4" in made.precision.weights and not (tuning and tuning.codes)
        if rounded and state.options.quant != "auto":
            notes.append("rounded without data: a set of `enginecast calibrate` makes it better")
        half = state.half(part)
        if half is None:
            return made
        found = HalfCompute.measure(
            folder / made.graph, half, captured(state, folder).samples[part.name], part_graph(state, part)
        )
        computed = f"computes in {found.compute} at {found.snr_db:.1f} dB, {len(found.keep)} nodes in float32"
        notes.append(found.reason or computed)
        return made.computing(found.compute, tuple(found.keep))


def compiled(engine: type[Engine], submodel: Submodel, folder: Path, options: CompileOptions | None = None) -> Artifact:
    return engine.compile_with(
        options or CompileOptions(), submodel, folder / submodel.graph, folder / "engines" / engine.target
    )


def compile_all(state: Build, folder: Path, submodels: Sequence[Submodel], progress: Progress) -> list[Artifact]:
    """What each target makes of each submodel."""
    found = []
    for name in state.options.targets:
        for submodel in submodels:
            with progress.step(submodel.name, f"compile {name}"):
                options = CompileOptions(state.options.settings.get(name, {}), progress.compiling)
                found.append(compiled(target(name), submodel, folder, options))
    return found
