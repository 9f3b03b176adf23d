"""diffusers' scheduler of each sampler, drawing from noise that it is given."""

from __future__ import annotations

import copy
import importlib
import json
import sys
import types
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from runtime.diffusion.spacing import SPACINGS

CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", "ddim", {}),
    "ddpm": ("DDPMScheduler", "ddpm", {}),
    "deis": ("DEISMultistepScheduler", "deis_multistep", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", "dpmsolver_multistep", {"solver_order": 2}),
    "dpmpp_2m_sde": (
        "DPMSolverMultistepScheduler",
        "dpmsolver_multistep",
        {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"},
    ),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", "dpmsolver_singlestep", {"solver_order": 2}),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", "dpmsolver_multistep", {"solver_order": 3}),
    "dpmpp_sde": ("DPMSolverSDEScheduler", "dpmsolver_sde", {}),
    "euler": ("EulerDiscreteScheduler", "euler_discrete", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", "euler_ancestral_discrete", {}),
    "heun": ("HeunDiscreteScheduler", "heun_discrete", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", "k_dpm_2_discrete", {}),
    "kdpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", "k_dpm_2_ancestral_discrete", {}),
    "lcm": ("LCMScheduler", "lcm", {}),
    "lms": ("LMSDiscreteScheduler", "lms_discrete", {}),
    "pndm": ("PNDMScheduler", "pndm", {}),
    "tcd": ("TCDScheduler", "tcd", {}),
    "unipc": ("UniPCMultistepScheduler", "unipc_multistep", {}),
}
"""By solver: the class, its module, and the fields that choose the solver."""
FLAGS = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas"}
WITH_ETA = {"ddim", "tcd"}


def split(name: str) -> tuple[str, str]:
    """The solver and the spacing of a sampler's name."""
    solver, _, spacing = name.rpartition("_")
    return (solver, spacing) if spacing in SPACINGS else (name, "")


def class_of(name: str) -> str:
    return CLASSES[split(name)[0]][0]


def reference(name: str, config: dict[str, Any]) -> Any:
    """The diffusers scheduler of that name, on that config."""
    return copy.deepcopy(_made(name, json.dumps(config)))


@cache  # some of them take long, since they begin with every timestep of training
def _made(name: str, config: str) -> Any:
    """That of dpmpp_sde needs torchsde only for its own noise."""
    solver, spacing = split(name)
    class_name, module, extra = CLASSES[solver]
    if module == "dpmsolver_sde" and "torchsde" not in sys.modules:
        sys.modules["torchsde"] = types.ModuleType("torchsde")
    found = getattr(importlib.import_module(f"diffusers.schedulers.scheduling_{module}"), class_name)
    flags = {flag: ending == spacing for ending, flag in FLAGS.items()} | {"use_lu_lambdas": spacing == "lu"}
    return found.from_config({**json.loads(config), **flags, **extra})


def feed(name: str, fresh: Callable[[], Any], patch: pytest.MonkeyPatch) -> None:
    """Have the scheduler of that name draw its noise from `fresh`, which gives torch tensors."""
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{CLASSES[split(name)[0]][1]}")
    if hasattr(module, "randn_tensor"):
        patch.setattr(module, "randn_tensor", lambda *args, **kwargs: fresh())
    if hasattr(module, "BrownianTreeNoiseSampler"):
        patch.setattr(module, "BrownianTreeNoiseSampler", lambda *args, **kwargs: Path(fresh))


class Path:
    """A path of Brownian motion over noise levels, drawn level by level: called with two of them it gives the increment
    between, of variance 1.
    """

    def __init__(self, fresh: Callable[[], Any]) -> None:
        self.fresh = fresh
        self.places: dict[float, Any] = {}

    def __call__(self, start: Any, end: Any) -> Any:
        first, last = float(start), float(end)
        lowest = min(self.places, default=first)
        self.places.setdefault(first, self.places.get(lowest, 0.0))
        self.places[last] = self.places[min(self.places)] + self.fresh() * np.sqrt(min(self.places) - last)
        return (self.places[last] - self.places[first]) / np.sqrt(first - last)
