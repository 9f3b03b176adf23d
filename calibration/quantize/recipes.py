"""Recipes: how a submodel is quantized, by the name that users give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from runtime.errors import InvalidInput, did_you_mean
from runtime.targets.lowering.half import Half


@dataclass(frozen=True)
class Recipe:
    """How a submodel is quantized. `bits` and `block` are those of MatMul and, with `activations`, of convolutions;
    Gemm's is int8.

    `block` is the number of consecutive inputs that share an int4 scale; a weight of fewer than `worth` elements is
    int8 instead, and, with `spare_last`, that of the layer which makes a submodel's output. `activations` quantizes the
    inputs of these layers to int8 too, which needs their ranges; `naive` does so for every layer, on the largest
    magnitude seen: what the methods of calibration are measured against. `fp8` makes both E4M3 where both are
    quantized; `nf4` makes weights of 4 bits nf4 instead of int4. `half` quantizes nothing: all weights are stored in it
    (`calibration.observe.half`), and targets that can compute in it.
    """

    name: str
    bits: Literal[4, 8, 16]
    block: int = 64
    worth: int = 1 << 15
    spare_last: bool = False
    activations: bool = False
    naive: bool = False
    fp8: bool = False
    nf4: bool = False
    half: Half | None = None

    @property
    def packages(self) -> tuple[str, ...]:
        """Distributions that the values of its weights depend on, besides those which make graphs."""
        return ("numpy", "scipy") if self.bits < 16 else ("numpy",)

    @property
    def four_bits(self) -> Literal["int4", "nf4"]:
        """What its weights of 4 bits are."""
        return "nf4" if self.nf4 else "int4"

    @property
    def precisions(self) -> frozenset[str]:
        """What a target must have kernels for: none for half, which all read and compute in float32 where they must."""
        return frozenset(
            {4: {self.four_bits, "int8"}, 8: {"int8", "fp8"} if self.fp8 else {"int8"}, 16: set()}[self.bits]
        )


RECIPES: Final[Mapping[str, Recipe]] = {
    recipe.name: recipe
    for recipe in (
        Recipe("int8", 8, activations=True),
        Recipe("int8-naive", 8, activations=True, naive=True),
        Recipe("int8-weight", 8),
        Recipe("int4", 4, spare_last=True, activations=True),
        Recipe("nf4", 4, spare_last=True, nf4=True),
        Recipe("fp8", 8, activations=True, fp8=True),
        Recipe("fp16", 16, half="float16"),
        Recipe("bf16", 16, half="bfloat16"),
    )
}
INT4_EVERYWHERE: Final = replace(RECIPES["int4"], worth=0, spare_last=False, activations=False)
"""int4 for every weight of a MatMul that can have it: what a search chooses from."""


def recipe(name: str, activations: bool = True, least_bits: int = 4) -> Recipe:
    """The recipe of that name; without `activations`, its weight-only form; that of int8 where it would go below
    `least_bits`.

    Raises InvalidInput with the nearest name.
    """
    if name not in RECIPES:
        raise InvalidInput("quant", f"'{name}' is not a recipe: {did_you_mean(name, RECIPES)}")
    found = RECIPES[name] if RECIPES[name].bits >= least_bits else RECIPES["int8"]
    if activations or not found.activations:
        return found
    return replace(found, activations=False) if found.bits == 4 else RECIPES["int8-weight"]
