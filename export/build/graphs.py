"""Graphs without weights, from a model's config files alone: for a model that is looked at before it is downloaded, or
whose weights do not fit the disk.

A folder of them has `<submodel>.onnx`, whose weights are external data without a place, and `graphs.json`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
from pydantic import TypeAdapter

from export.build.parts import TOOLS, library_parts, traced, twin_parity, versions_of
from export.build.staging import GRAPHS, check_place, staging
from export.checkpoint.additions import Addition
from export.checkpoint.changes import products, read_loras
from export.checkpoint.source import resolve
from export.family import Part, family_of
from export.graph.weights import absent_weights
from export.report.progress import Listener, Progress, ProgressStep
from runtime.bundle.manifest import Frozen, Parity
from runtime.bundle.signature import Signature
from runtime.placing.heap import return_freed_memory


class Graph(Frozen):
    """A graph without weights: its number of nodes, how many values its weights have, and the parity of the reduced
    twin, the same code with fewer layers and random weights.
    """

    submodel: str
    nodes: int
    weights: int
    parity: Parity
    signature: Signature


def build_graphs(
    source: str,
    output: Path,
    additions: Sequence[Addition] = (),
    force: bool = False,
    listen: Listener = lambda report: None,
) -> tuple[list[Graph], dict[str, float]]:
    """Write the graphs of a model whose folder needs its small files only; return what they are, and the seconds that
    each stage took.

    Every part that the family knows is traced: which of them a pipeline calls shows in a build. Raises InvalidInput,
    SourceError, UnsupportedModel, ParityError or ResourceExhausted; `output` is then as it was.
    """
    check_place(output, GRAPHS)
    found = replace(resolve(source, weights=False), additions=tuple(additions))
    family = family_of(found)
    parts = library_parts(found, family)
    models = {component.folder: component.model for part in parts for component in part.components}
    products(read_loras(found), models, found.architecture)  # they change weights alone, and are refused all the same
    return_freed_memory()
    progress, graphs, tools = Progress(list(_steps(parts)), listen), [], versions_of(TOOLS)
    with staging(output, force, GRAPHS) as folder:
        for part in parts:
            with progress.step(part.name, "trace") as notes:
                model = ir.load(traced(found, part, tools))
                ir.save(model, folder / f"{part.name}.onnx")
                notes.append(f"{model.graph.num_nodes()} nodes")
            with progress.step(part.name, "parity") as notes:
                proof = twin_parity(family, found, part.name, tools)
                notes.append(f"twin, error {proof.error:.1e}")
            graphs.append(
                Graph(
                    submodel=part.name,
                    nodes=model.graph.num_nodes(),
                    weights=sum(weight.size for weight in absent_weights(model)),
                    parity=proof,
                    signature=part.signature,
                )
            )
        (folder / GRAPHS.mark).write_bytes(TypeAdapter(list[Graph]).dump_json(graphs, indent=1))
    return graphs, progress.timings


def _steps(parts: list[Part]) -> Iterator[ProgressStep]:
    for part in parts:
        yield ProgressStep(part.name, "trace", 2 + sum(1 for _ in part.module.modules()) * 0.04)
        yield ProgressStep(part.name, "parity", 5)
