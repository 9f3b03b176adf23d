"""A toy family of one submodel from several folders: a base whose adapter was published elsewhere, as the projections
of an image adapter are, and the controls that a build adds. Its pipeline reads an offset of the base.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from export.checkpoint.source import Source
from export.family import Component, Family, Part
from runtime.bundle import signature

NUMBERS: Final = (signature.Dim(name="numbers", min=1, opt=4, max=64),)


class Scale(nn.Module):
    """x * factor; a control has nothing else."""

    config = PreTrainedConfig()

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Base(Scale):
    """The base as its library has it once an adapter was added."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter, self.offset = Scale(), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.tanh(self.adapter(x))


class Joined(nn.Module):
    """The base, and each control times its scale."""

    def __init__(self, base: Base, controls: list[Scale], scales: list[float]) -> None:
        super().__init__()
        self.base, self.controls, self.scales = base, nn.ModuleList(controls), scales

    def forward(self, x: Tensor) -> tuple[Tensor]:
        total = self.base(x)
        for control, scale in zip(self.controls, self.scales, strict=True):
            total = total + scale * control(x)
        return (total,)


def parts(source: Source, reduced: bool) -> list[Part]:
    added = source.added("control")
    with torch.device("meta"):
        base, controls = Base(), [Scale() for _ in added]
    taken = signature.Signature(
        inputs=(signature.Tensor(name="x", dtype="float32", dims=NUMBERS),),
        outputs=(signature.Tensor(name="y", dtype="float32", dims=NUMBERS),),
    )
    components = (
        Component("", base, tensors={"offset": "offset"}),
        Component("adapter", base.adapter),
        *(Component(f"control.{one.name}", model, one.path) for one, model in zip(added, controls, strict=True)),
    )
    joined = Joined(base, controls, [one.scale for one in added])
    return [Part("doubler", components, joined, joined, taken)]


def config(source: Source) -> dict[str, Any]:
    return {"times": json.loads((source.root / "config.json").read_text())["times"]}


def assets(source: Source) -> dict[str, Path]:
    return {}


FAMILY: Final = Family("joined", "shifting", ("ToyForJoining",), parts, config, assets, additions=("control",))
