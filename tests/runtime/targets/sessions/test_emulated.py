"""What is compiled for a provider that is not here computes what the canonical graph says: tried on the CPU."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.bundle.manifest import Bundle
from runtime.engine import Slot
from tests.runtime.targets.conftest import (
    COUNTS,
    FLOOR,
    Make,
    Reference,
    canonical,
    emulated,
    quantized,
    snr_db,
    tokens,
)

__all__ = ["emulated"]
ROUNDED = 20.0
"""dB, where inputs are rounded to 8 bits: another order of sums falls on the other side of a step now and then, float16
more often.
"""
RECIPES = [
    ("none", "float32"),
    ("none", "float16"),
    ("int8", "float32"),
    ("int8-weight", "float16"),
    ("int4", "float32"),
    ("int4", "float16"),
]


@pytest.mark.parametrize("name", ["cuda", "directml"])
@pytest.mark.parametrize(("recipe", "compute"), RECIPES)
@pytest.mark.parametrize("kind", ["diffusion_bundle", "vlm_bundle"])
def test_every_submodel_agrees(
    request: pytest.FixtureRequest, emulated: Make, name: str, kind: str, recipe: str, compute: Any
) -> None:
    bundle = Bundle(request.getfixturevalue(kind))
    for original in bundle.manifest.submodels:
        if recipe == "int4" and original.name.startswith("vae"):
            continue  # families keep it at int8
        submodel = original.computing(compute)
        graph = quantized(bundle, submodel, recipe) / submodel.graph
        engine = emulated(name, submodel, graph)
        if submodel.signature.states:
            reference, slot = Reference(submodel, graph), Slot()
            found = [
                snr_db(engine.run(call, slot)["logits"], reference.run(call)) for call in tokens(submodel, 1, COUNTS)
            ]
        else:
            inputs = submodel.signature.sample(submodel.signature.sample_lengths(), seed=1)
            (wanted,) = canonical(submodel, graph).run(None, inputs)
            found = [snr_db(next(iter(engine.run(inputs).values())), wanted)]
        rounded = b"QuantizeLinear" in graph.read_bytes()  # the other kind is spelled DequantizeLinear
        print(f"{name} {bundle.name} {submodel.name} {recipe} {compute}: {min(found):.1f} dB")
        assert min(found) > (ROUNDED if rounded else FLOOR[compute])
        engine.close()
