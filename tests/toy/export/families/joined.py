"""A toy family of one submodel from three folders: a base whose adapter was published elsewhere, as the projections of
an image adapter are, and a control that is added to what the base gives. Its pipeline reads an offset of the base.
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
    def __init__(self, base: Base, control: Scale) -> None:
        super().__init__()
        self.base, self.control = base, control

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.base(x) + self.control(x),)


def parts(source: Source, reduced: bool) -> list[Part]:
    with torch.device("meta"):
        base, control = Base(), Scale()
    taken = signature.Signature(
        inputs=(signature.Tensor(name="x", dtype="float32", dims=NUMBERS),),
        outputs=(signature.Tensor(name="y", dtype="float32", dims=NUMBERS),),
    )
    components = (
        Component("", base, tensors={"offset": "offset"}),
        Component("adapter", base.adapter),
        Component("control", control, root=source.root.parent / "control"),
    )
    return [Part("doubler", components, Joined(base, control), lambda x: (base(x) + control(x),), taken)]


def config(source: Source) -> dict[str, Any]:
    return {"times": json.loads((source.root / "config.json").read_text())["times"]}


def assets(source: Source) -> dict[str, Path]:
    return {}


FAMILY: Final = Family("joined", "shifting", ("ToyForJoining",), parts, config, assets)
