"""A toy family with weights to quantize: its submodel "doubler" makes each number wide, and narrow again."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from export.checkpoint.source import Source
from export.families import toy
from export.family import Component, Family, Part
from runtime.bundle import signature

WIDTH: Final = 64
NUMBERS: Final = (signature.Dim(name="numbers", min=1, opt=8, max=64),)


class Widening(nn.Module):
    """As a library's model: with a config, and without weights until they are read."""

    config = PreTrainedConfig()

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(1, WIDTH, bias=False)
        self.across = nn.Linear(WIDTH, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.down(self.across(self.up(x[:, None])))[:, 0],)


def parts(source: Source, reduced: bool) -> list[Part]:
    with torch.device("meta"):
        model = Widening()
    taken = signature.Signature(
        inputs=(signature.Tensor(name="x", dtype="float32", dims=NUMBERS),),
        outputs=(signature.Tensor(name="y", dtype="float32", dims=NUMBERS),),
    )
    return [Part("doubler", (Component("", model),), model, model, taken)]


FAMILY: Final = Family("wide", "doubling", ("ToyForWidening",), parts, toy.config, toy.assets)
