"""A toy family: a checkpoint that holds one number, by which the submodel "doubler" multiplies."""

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


class Doubler(nn.Module):
    """As a library's model: with a config, and without weights until they are read."""

    config = PreTrainedConfig()

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x * self.factor,)


def parts(source: Source, reduced: bool) -> list[Part]:
    with torch.device("meta"):
        model = Doubler()
    taken = signature.Signature(
        inputs=(signature.Tensor(name="x", dtype="float32", dims=NUMBERS),),
        outputs=(signature.Tensor(name="y", dtype="float32", dims=NUMBERS),),
    )
    return [Part("doubler", (Component("", model),), model, model, taken)]


def config(source: Source) -> dict[str, Any]:
    return {"times": json.loads((source.root / "config.json").read_text())["times"]}


def assets(source: Source) -> dict[str, Path]:
    return {}


FAMILY: Final = Family("toy", "doubling", ("ToyForDoubling",), parts, config, assets)
