"""The number formats of a submodel: of its stored weights, of its layers' inputs, and of its computation."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

Compute = Literal["float32", "float16", "bfloat16"]
Form = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]

NESTED: Final = " W4A8"
QUANTIZED: Final = " W8A8"
"""Ends of a label: both say that the inputs of layers are quantized; the first that int4 weights are nested in int8."""


class Precision(BaseModel):
    """The number formats of a submodel. Its text, such as "int8 + float16 W8A8", is the label that users see.

    `weights` are the formats of the large weights, most bytes first, such as "int8". `activations` is the format that
    the graph rounds the inputs of quantized layers to. `nested` says that int4 weights are nested in int8
    (`runtime.targets.lowering.nested`). `compute` is the type that targets with kernels for it compute in; others
    compute in float32.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: tuple[Form, ...]
    activations: Literal["float", "int8", "fp8"] = "float"
    nested: bool = False
    compute: Compute = "float32"

    def __str__(self) -> str:
        end = NESTED if self.nested else QUANTIZED if self.activations != "float" else ""
        return " + ".join(self.weights) + end

    @classmethod
    def parse(cls, label: str, compute: Compute = "float32") -> Precision:
        """The precision with this label. Raises ValidationError for a text that is none."""
        weights = label.removesuffix(NESTED).removesuffix(QUANTIZED)
        forms = tuple(weights.split(" + ")) if weights else ()
        rounded: Literal["int8", "fp8"] = "fp8" if "fp8" in forms else "int8"
        activations = rounded if label.endswith((NESTED, QUANTIZED)) else "float"
        return cls(weights=forms, activations=activations, nested=label.endswith(NESTED), compute=compute)

    @property
    def quantized(self) -> bool:
        """Whether some of the large weights are."""
        return not {"int8", "int4", "nf4", "fp8"}.isdisjoint(self.weights)
