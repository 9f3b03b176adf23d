"""Control networks (Zhang et al. 2023, arXiv 2302.05543): what each makes of a picture, such as edges, is added to the
hidden states of the denoiser.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from PIL import Image

from runtime.bundle.manifest import Frozen
from runtime.diffusion.calls import Arrays, Part, run
from runtime.diffusion.guides import Control
from runtime.diffusion.named import check_names
from runtime.diffusion.schedule import Latents
from runtime.diffusion.solver import Sampler
from runtime.diffusion.tiling import Pixels
from runtime.errors import InvalidInput
from runtime.vision.images import resized

PICTURE: Final = "control_picture"
DOWN: Final = "down_block_residual_"
SHARED: Final = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")
"""The inputs that networks have in common with the denoiser."""
MID: Final = "mid_block_residual"


def submodel(name: str) -> str:
    """The submodel of a control network."""
    return f"controlnet.{name}"


def is_down(name: str) -> bool:
    """Whether this is the name of a residual of the down blocks."""
    return name.startswith(DOWN)


def residual_names(count: int) -> list[str]:
    """The names of so many residuals: those of the down blocks, then that of the middle one."""
    return [*(f"{DOWN}{i}" for i in range(count - 1)), MID]


class Controls(Frozen):
    """The control networks of a bundle, by name, and the residuals that its denoiser takes: the channels of each, and
    how many latents lie along one of its places.
    """

    names: tuple[str, ...]
    residuals: tuple[tuple[int, int], ...]

    def check(self, controls: Sequence[Control]) -> None:
        """Raises InvalidInput naming `controls` for a name that the bundle does not have, or that is given twice."""
        names = [control.name for control in controls]
        check_names("controls", "control", names, self.names, "give each control once")

    def zeros(self, sample: Latents) -> Arrays:
        """The residuals of no network for a sample [rows, channels, height, width]."""
        rows, _, height, width = sample.shape
        return {
            name: np.zeros((rows, channels, math.ceil(height / over), math.ceil(width / over)), np.float32)
            for name, (channels, over) in zip(residual_names(len(self.residuals)), self.residuals, strict=True)
        }


@dataclass(frozen=True)
class Network:
    """A control network at work on a request: its `control`, and the size (height, width) of what is drawn, to which
    its picture is resized as diffusers does it. `calls` are those calls of the denoiser that it takes part in. `guess`
    is as in `ImageRequest.guess_mode`.
    """

    control: Control
    size: tuple[int, int]
    calls: range
    guess: bool = False

    @classmethod
    def of(cls, control: Control, size: tuple[int, int], calls: int, guess: bool) -> Network:
        """Of a request whose denoiser is called so often. Equals diffusers: a call takes part if all of it lies between
        `start` and `end`.
        """
        inside = [i for i in range(calls) if control.start <= i / calls and (i + 1) / calls <= control.end]
        return cls(control, size, range(inside[0], inside[-1] + 1) if inside else range(0), guess)

    @cached_property
    def pixels(self) -> Pixels:
        """The picture, float32 [1, 3, height, width], 0 to 1. Raises InvalidInput where its file is damaged."""
        picture = resized(self.control.image, self.size[::-1], Image.Resampling.LANCZOS)
        return np.ascontiguousarray((picture.astype(np.float32) / np.float32(255)).transpose(2, 0, 1)[None])

    def residuals(self, inputs: Arrays) -> Part[Arrays]:
        """What it adds to the denoiser that is called with these inputs. To guess, it sees the prompt's row alone."""
        rows = len(inputs["sample"])
        seen = 1 if self.guess else rows
        shown = {PICTURE: np.repeat(self.pixels, seen, axis=0)}
        shared = {name: inputs[name][-seen:] for name in SHARED if name in inputs}
        outputs = yield from run(submodel(self.control.name), **shared, **shown)
        finest, scale = -1 if self.guess else 0, np.float32(self.control.scale)
        scales = np.logspace(finest, 0, len(outputs), dtype=np.float32) * scale
        named = zip(residual_names(len(outputs)), scales, strict=True)
        return {name: _padded(outputs[name] * scale, rows) for name, scale in named}


def _padded(array: Latents, rows: int) -> Latents:
    """So many rows, of which the first are zeros where the array has fewer."""
    if len(array) == rows:
        return array
    return np.concatenate([np.zeros((rows - len(array), *array.shape[1:]), np.float32), array])


@dataclass(frozen=True)
class Controlling:
    """The control networks of a request; without `settings` the model has none."""

    settings: Controls | None
    networks: tuple[Network, ...] = ()

    def __call__(self, call: int, inputs: Arrays) -> Part[Arrays]:
        """The residuals for call number `call` (from 0) of the denoiser with these inputs: the sum of all networks."""
        if self.settings is None:
            return {}
        total: Arrays = {}
        for network in self.networks:
            if call in network.calls:
                added = yield from network.residuals(inputs)
                total = {name: total[name] + value for name, value in added.items()} if total else added
        return total or self.settings.zeros(inputs["sample"])


def controlling(
    settings: Controls | None, controls: Sequence[Control], size: tuple[int, int], sampler: Sampler, guess: bool
) -> Controlling:
    """The networks of a request's controls, which draws pictures of that size (height, width). `guess` is as in
    `ImageRequest.guess_mode`. Raises InvalidInput naming `controls`.
    """
    if settings is None:
        if controls:
            raise InvalidInput(
                "controls", "are of control networks, and this bundle has none: build it with --controlnet"
            )
        return Controlling(None)
    settings.check(controls)
    return Controlling(settings, tuple(Network.of(control, size, sampler.calls, guess) for control in controls))
