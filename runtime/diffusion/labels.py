"""Samplers as Automatic1111's web UI and SD.Next show them: a label such as "DPM++ 2M", a schedule such as "Karras".

The schedule "Automatic" is the one that the web UI chooses for a sampler; "Uniform" is that of the model's own
timesteps (its modules sd_samplers_kdiffusion.py and sd_schedulers.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from runtime.diffusion.solver import samplers, solvers
from runtime.errors import InvalidInput, did_you_mean

LABELS: Final[Mapping[str, str]] = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "deis": "DEIS",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_2s": "DPM++ 2S",
    "dpmpp_3m": "DPM++ 3M",
    "dpmpp_sde": "DPM++ SDE",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "kdpm2": "DPM2",
    "kdpm2_ancestral": "DPM2 a",
    "lcm": "LCM",
    "lms": "LMS",
    "pndm": "PLMS",
    "tcd": "TCD",
    "unipc": "UniPC",
}
"""The label of each solver. A test compares them with the solvers that there are."""
AUTOMATIC: Final = "Automatic"
SCHEDULES: Final[Mapping[str, str]] = {
    "": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
    "beta": "Beta",
    "lu": "Lu",
}
"""The label of each spacing of noise levels (`runtime.diffusion.spacing.SPACINGS`)."""
UPSCALERS: Final[Mapping[str, str]] = {
    "latent": "Latent",
    "latent_antialiased": "Latent (antialiased)",
    "latent_bicubic": "Latent (bicubic)",
    "latent_bicubic_antialiased": "Latent (bicubic antialiased)",
    "latent_nearest": "Latent (nearest)",
    "latent_nearest_exact": "Latent (nearest-exact)",
    "lanczos": "Lanczos",
    "nearest": "Nearest",
}
"""The label of each way to enlarge pictures (`runtime.vision.enlarging.UPSCALERS`)."""
CHOSEN: Final[Mapping[str, str]] = {
    "dpmpp_2m": "karras",
    "dpmpp_2m_sde": "exponential",
    "dpmpp_sde": "karras",
    "kdpm2": "karras",
    "kdpm2_ancestral": "karras",
}
"""The spacing that "Automatic" is for these solvers. For others it is "Uniform"."""


def shown(sampler: str) -> tuple[str, str]:
    """The labels of a sampler's solver and schedule. A sampler that is not known is its own label."""
    solver, _, spacing = sampler.rpartition("_")
    if sampler in LABELS:
        solver, spacing = sampler, ""
    if sampler not in samplers():
        return sampler, AUTOMATIC
    return LABELS[solver], AUTOMATIC if CHOSEN.get(solver, "") == spacing else SCHEDULES[spacing]


def named(label: str, schedule: str = "") -> str:
    """The sampler with these labels, in any case; "DPM++ 2M Karras" names both, and an empty schedule is "Automatic".

    Raises InvalidInput naming `sampler` or `schedule`.
    """
    solver, schedule = _solver(label), schedule
    if solver is None:
        for name in (name for name in SCHEDULES.values() if label.casefold().endswith(f" {name.casefold()}")):
            solver, schedule = _solver(label[: -len(name) - 1]), schedule or name
    if solver is None:
        raise InvalidInput("sampler", f"'{label}' is not known: {did_you_mean(label, LABELS.values())}")
    if schedule.casefold() in ("", AUTOMATIC.casefold()):
        spacing: str | None = CHOSEN.get(solver, "")
    else:
        spacing = next((key for key, name in SCHEDULES.items() if name.casefold() == schedule.casefold()), None)
    if spacing is None:
        raise InvalidInput(
            "schedule", f"'{schedule}' is not known: {did_you_mean(schedule, [AUTOMATIC, *SCHEDULES.values()])}"
        )
    if spacing and spacing not in solvers()[solver].spacings:
        able = ", ".join([AUTOMATIC, SCHEDULES[""], *(SCHEDULES[one] for one in solvers()[solver].spacings)])
        raise InvalidInput("schedule", f"'{schedule}' is none of {LABELS[solver]}, expected one of {able}")
    return f"{solver}_{spacing}" if spacing else solver


def upscaler(label: str) -> str:
    """The way to enlarge with this label, in any case; "None" is Lanczos, as in the web UI. Raises InvalidInput naming
    `upscaler`.
    """
    known = {name.casefold(): way for way, name in UPSCALERS.items()} | {"none": "lanczos"}
    if (found := known.get(label.casefold())) is None:
        raise InvalidInput("upscaler", f"'{label:.64}' is not known: {did_you_mean(label, UPSCALERS.values())}")
    return found


def _solver(label: str) -> str | None:
    """The solver with this label, in any case."""
    return next((solver for solver, name in LABELS.items() if name.casefold() == label.casefold()), None)
