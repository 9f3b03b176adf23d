"""Published noise schedules: what is done with each scheduler class of diffusers, and what a sampler reads of a
scheduler_config.json.

The class decides which fields count, as it does when diffusers loads the file: a field that the class does not have is
ignored, whichever class left it there. A solver of ours reads the fields of the diffusers class that it equals, so
that a sampler chosen by a request sees what that class would see of the same file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, RootModel, ValidationError, model_validator

from runtime.errors import InvalidInput, did_you_mean

Spacing = Literal["leading", "trailing", "linspace"]
Beta = Annotated[float, Field(gt=0, lt=1)]


def _none_is_unbounded(value: object) -> object:
    return -math.inf if value is None else value  # JSON has no infinity


class SchedulerFields(BaseModel):
    """The fields that samplers compute with. Betas are variances of one training step; timesteps count training steps
    from 0.

    A field that is absent takes the default of the diffusers class that reads it: where that differs from the one here,
    it stands in `CLASSES`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_train_timesteps: int = Field(default=1000, ge=2, le=1_000_000)
    beta_start: Beta = 0.0001
    beta_end: Beta = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: tuple[Beta, ...] | None = None
    """One for each training timestep, in place of the schedule that the fields above describe."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    timestep_spacing: Spacing = "linspace"
    steps_offset: int = Field(default=0, ge=0)
    rescale_betas_zero_snr: bool = False
    set_alpha_to_one: bool = True
    clip_sample: bool = False
    """True by default in DDIM and DDPM, although diffusers' Stable Diffusion pipeline always turns it off."""
    clip_sample_range: float = Field(default=1.0, gt=0)
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    """Euler only."""
    skip_prk_steps: bool = False
    """PNDM only: begin without Runge and Kutta's method."""
    variance_type: str | None = None
    """DDPM only, of fresh noise. A variance that the model predicts is refused."""
    solver_order: int = Field(default=2, ge=1, le=3)
    """UniPC and DEIS; of DPM++ the sampler's name says it."""
    solver_type: Literal["midpoint", "heun", "bh1", "bh2", "logrho"] = "midpoint"
    """Heun for DPM++, bh1 for UniPC; every other value stands for the solver's own usual one, as in diffusers."""
    lower_order_final: bool = True
    """DPM++, UniPC and DEIS."""
    euler_at_final: bool = False
    """DPM++ only."""
    lambda_min_clipped: Annotated[float, BeforeValidator(_none_is_unbounded)] = -math.inf
    """DPM++ only: the least log of signal over noise that the walk begins at."""
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    """Euler, DPM++ and UniPC."""
    original_inference_steps: int = Field(default=50, ge=1)
    """LCM and TCD: how many timesteps the model was distilled on."""
    timestep_scaling: float = Field(default=10.0, ge=0)
    """LCM only."""

    @model_validator(mode="after")
    def _one_beta_a_timestep(self) -> SchedulerFields:
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise ValueError(
                f"trained_betas has {len(self.trained_betas)} values, expected num_train_timesteps "
                f"{self.num_train_timesteps}"
            )
        return self


TAKEN: Final[Mapping[str, tuple[object, ...]]] = {
    "thresholding": (False, None),
    "use_flow_sigmas": (False, None),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
"""Fields that say what the model predicts, and the values that samplers here take: with another value the pictures
would be wrong.
"""

WALKED: Final[Mapping[str, tuple[object, ...]]] = {
    "sigma_min": (None,),
    "sigma_max": (None,),
    "solver_order": (2,),
    "algorithm_type": ("dpmsolver++", "deis"),  # the classes of DPM++ take the second as the first
    "predict_x0": (True,),
    "disable_corrector": ([], None),
}
"""Fields that say how the same path is walked, and the values implemented here: with another value a sampler of ours
takes its place.
"""

SPACED_BY: Final = {
    "use_karras_sigmas": "karras",
    "use_lu_lambdas": "lu",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
}
"""The fields that choose a spacing of noise levels, and how it ends a sampler's name."""


@dataclass(frozen=True)
class Treatment:
    """What is done with a scheduler class of diffusers.

    `sampler` draws: the class itself where `exact`, else in its place, which is reported. There is none where `refused`
    says why. `variants` are other samplers of the class, each with the fields that choose it. `reads` are the fields of
    the class that count here; `defaults` its own for those that a file leaves out; `walks` the values of fields in
    `WALKED` that this class has besides.
    """

    sampler: str = ""
    exact: bool = True
    reads: frozenset[str] = frozenset()
    defaults: Mapping[str, object] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    walks: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    refused: str = ""


NOISE: Final = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
SPACED: Final = (*NOISE, "timestep_spacing", "steps_offset")
SIGMAS: Final = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
SOLVER: Final = (
    "thresholding",
    "solver_order",
    "algorithm_type",
    "solver_type",
    "lower_order_final",
    "use_flow_sigmas",
)
CLIPPED: Final = ("clip_sample", "clip_sample_range")
LATE: Final = {"beta_start": 0.00085, "beta_end": 0.012}
LEADING: Final = {"timestep_spacing": "leading"}
DISTILLED: Final = {**LATE, "beta_schedule": "scaled_linear"}

CONSISTENCY: Final = (
    "is for models that were distilled without classifier-free guidance on another noise schedule: such models are not "
    "served"
)
FLOW: Final = "is for models that predict a flow, which is another noise schedule: such models are not served"
PRECONDITIONED: Final = (
    "is for models with EDM preconditioning, which is another noise schedule: such models are not served"
)
CONTINUOUS: Final = "is for models with a continuous noise schedule: such models are not served"
NO_DRAWING: Final = "does not draw from noise: save the pipeline with one that does, such as DDIMScheduler"
OTHER_MODELS: Final = "is for another kind of model: such models are not served"


def _exact(sampler: str, *reads: str, **defaults: object) -> Treatment:
    return Treatment(sampler, reads=frozenset(reads), defaults=defaults)


_DDIM: Final = _exact(
    "ddim", *SPACED, *CLIPPED, "set_alpha_to_one", "thresholding", "rescale_betas_zero_snr", clip_sample=True, **LEADING
)
_DDPM: Final = _exact(
    "ddpm", *SPACED, *CLIPPED, "variance_type", "thresholding", "rescale_betas_zero_snr",
    variance_type="fixed_small", clip_sample=True, **LEADING,
)  # fmt: skip
_LCM: Final = (
    *SPACED, *CLIPPED, "original_inference_steps", "timestep_scaling", "set_alpha_to_one", "thresholding",
    "rescale_betas_zero_snr",
)  # fmt: skip

CLASSES: Final[Mapping[str, Treatment]] = {
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "PNDMScheduler": _exact("pndm", *SPACED, "set_alpha_to_one", "skip_prk_steps", set_alpha_to_one=False, **LEADING),
    "EulerDiscreteScheduler": _exact(
        "euler", *SPACED, *SIGMAS, "interpolation_type", "sigma_min", "sigma_max", "timestep_type",
        "rescale_betas_zero_snr", "final_sigmas_type",
    ),
    "EulerAncestralDiscreteScheduler": _exact("euler_ancestral", *SPACED, "rescale_betas_zero_snr"),
    "LMSDiscreteScheduler": _exact("lms", *SPACED, *SIGMAS),
    "HeunDiscreteScheduler": _exact("heun", *SPACED, *SIGMAS, *CLIPPED, **LATE),
    "KDPM2DiscreteScheduler": _exact("kdpm2", *SPACED, *SIGMAS, **LATE),
    "KDPM2AncestralDiscreteScheduler": _exact("kdpm2_ancestral", *SPACED, *SIGMAS, **LATE),
    "DPMSolverSDEScheduler": _exact("dpmpp_sde", *SPACED, *SIGMAS, **LATE),
    "DPMSolverMultistepScheduler": Treatment(
        "dpmpp_2m",
        reads=frozenset(
            (*SPACED, *SIGMAS, *SOLVER, "euler_at_final", "use_lu_lambdas", "final_sigmas_type", "lambda_min_clipped",
                "variance_type", "rescale_betas_zero_snr")
        ),
        variants={"dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_3m": {"solver_order": 3}},
    ),
    "DPMSolverSinglestepScheduler": _exact(
        "dpmpp_2s", *NOISE, *SIGMAS, *SOLVER, "final_sigmas_type", "lambda_min_clipped", "variance_type",
        lower_order_final=False,
    ),
    "UniPCMultistepScheduler": Treatment(
        "unipc",
        reads=frozenset(
            (*SPACED, *SIGMAS, "thresholding", "solver_order", "solver_type", "lower_order_final", "use_flow_sigmas",
                "final_sigmas_type", "rescale_betas_zero_snr", "sigma_min", "sigma_max", "predict_x0",
                "disable_corrector")
        ),
        defaults={"solver_type": "bh2"},
        walks={"solver_order": (1, 3)},
    ),
    "DEISMultistepScheduler": Treatment(
        "deis",
        reads=frozenset((*SPACED, *SIGMAS, *SOLVER)),
        defaults={"solver_type": "logrho", "final_sigmas_type": "sigma_min"},
        walks={"solver_order": (1, 3), "algorithm_type": ("dpmsolver",)},
    ),
    "LCMScheduler": _exact("lcm", *_LCM, **DISTILLED, **LEADING),
    "TCDScheduler": _exact("tcd", *_LCM, **DISTILLED, **LEADING),
    "SASolverScheduler": Treatment(
        "dpmpp_2m",
        exact=False,
        reads=frozenset(
            (*SPACED, *SIGMAS, "thresholding", "algorithm_type", "lower_order_final", "use_flow_sigmas",
                "lambda_min_clipped", "variance_type")
        ),
    ),
    "CMStochasticIterativeScheduler": Treatment(refused=CONSISTENCY),
    **dict.fromkeys(
        ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler",
            "FlowMapEulerDiscreteScheduler",
            "SCMScheduler"),
        Treatment(refused=FLOW),
    ),
    **dict.fromkeys(
        ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"),
        Treatment(refused=PRECONDITIONED)
    ),
    **dict.fromkeys(("KarrasVeScheduler", "ScoreSdeVeScheduler", "ScoreSdeVpScheduler", "IPNDMScheduler"),
        Treatment(refused=CONTINUOUS)),
    **dict.fromkeys(("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler", "RePaintScheduler"),
        Treatment(refused=NO_DRAWING)),
    **dict.fromkeys(
        ("UnCLIPScheduler", "VQDiffusionScheduler", "AmusedScheduler", "DDPMWuerstchenScheduler",
            "CogVideoXDDIMScheduler",
            "CogVideoXDPMScheduler"),
        Treatment(refused=OTHER_MODELS),
    ),
}  # fmt: skip
"""What is done with each class. docs/compatibility.md shows this table; a test keeps the two equal."""

SERVED: Final = tuple(name for name, treatment in CLASSES.items() if not treatment.refused)
CLASS: Final = "_class_name"
READ: Final = {*SchedulerFields.model_fields, *TAKEN, *WALKED, *SPACED_BY, CLASS, "timestep_type"}
"""The fields of scheduler files that count in some class."""


class SchedulerConfig(RootModel[Mapping[str, Any]]):
    """A published scheduler_config.json, whose class is served. Raises ValueError or InvalidInput where it is not."""

    model_config = ConfigDict(frozen=True)

    @classmethod
    def parse(cls, published: Mapping[str, Any]) -> SchedulerConfig:
        """Read a scheduler_config.json. Raises InvalidInput naming the class, or each field, that is not served, and
        why.
        """
        found = cls({name: value for name, value in published.items() if name in READ and value != -math.inf})
        found.check()
        return found

    def check(self) -> None:
        """Raises InvalidInput naming the class, or each field, that is not served, and why."""
        name = self.root.get(CLASS)
        if name not in CLASSES:
            raise InvalidInput(
                "scheduler", f"{name!r} is no scheduler class that is served: {did_you_mean(str(name), SERVED)}"
            )
        if refused := self.treatment.refused:
            raise InvalidInput("scheduler", f"{name} {refused}")
        own = self._own
        faults = [f"{key} {own[key]!r}" for key, values in TAKEN.items() if key in own and own[key] not in values]
        if own.get("timestep_type") == "continuous" and own.get("prediction_type") == "v_prediction":
            faults.append("timestep_type 'continuous' with prediction_type 'v_prediction'")
        if len(spacings := [key for key in SPACED_BY if own.get(key)]) > 1:
            raise InvalidInput(
                "scheduler", f"{name} has {' and '.join(spacings)}, expected one of them: set the others to false"
            )
        if faults:
            raise InvalidInput(
                "scheduler",
                f"{name} with {', '.join(faults)} is not served: the model expects what no sampler here computes",
            )
        self.read(str(name))
        self.read_for(self._solver)

    @property
    def treatment(self) -> Treatment:
        """What is done with its class."""
        return CLASSES[self.root[CLASS]]

    @property
    def _solver(self) -> str:
        """That of the first of its class's variants whose fields the file has, else its class's own."""
        own = self._own
        fitting = (name for name, chosen in self.treatment.variants.items() if chosen.items() <= own.items())
        return next(fitting, self.treatment.sampler)

    @property
    def sampler(self) -> str:
        """The sampler that draws where a request names none."""
        own = self._own
        return "_".join((self._solver, *(ending for key, ending in SPACED_BY.items() if own.get(key))))

    @property
    def note(self) -> str:
        """What is drawn otherwise than published, in a sentence; empty where nothing is."""
        own, name = self._own, self.root[CLASS]
        chosen, walks = self.treatment.variants.get(self._solver, {}), self.treatment.walks
        other = [
            f"{key} {own[key]!r}"
            for key, values in WALKED.items()
            if key in own and key not in chosen and own[key] not in (*values, *walks.get(key, ()))
        ]
        if self.treatment.exact and not other:
            return ""
        what = f"{name} with {', '.join(other)}" if self.treatment.exact else name
        return (
            f"{what} is replaced: {self.sampler} draws on the same noise schedule, "
            "unless a request names another sampler"
        )

    @property
    def trained(self) -> int:
        """The timesteps that the model was trained on."""
        return int(self.root.get("num_train_timesteps", SchedulerFields.model_fields["num_train_timesteps"].default))

    def read(self, class_name: str) -> SchedulerFields:
        """What the class of that name reads of the file. Raises InvalidInput naming each field whose value is not
        served.
        """
        reader = CLASSES[class_name]
        values = {name: value for name, value in reader.defaults.items() if name not in NOISE}
        values |= {name: value for name, value in self.treatment.defaults.items() if name in NOISE}
        values |= {
            name: value
            for name, value in self.root.items()
            if name in reader.reads and name in SchedulerFields.model_fields
        }
        try:
            return SchedulerFields.model_validate(values)
        except ValidationError as error:
            faults = [": ".join(filter(None, (_where(fault), fault["msg"]))) for fault in error.errors()]
            raise InvalidInput("scheduler", f"the model's noise schedule is not served: {'; '.join(faults)}") from None

    def read_for(self, solver: str) -> SchedulerFields:
        """What the solver of that name reads of the file: what the class that it equals reads, else what the file's own
        class does. Raises InvalidInput naming each field whose value is not served.
        """
        return self.read(SOURCES.get(solver, self.root[CLASS]))

    @property
    def _own(self) -> dict[str, Any]:
        """The fields that its own class reads."""
        return {name: value for name, value in self.root.items() if name in self.treatment.reads}


def _where(fault: Mapping[str, Any]) -> str:
    return f"{'.'.join(map(str, fault['loc']))} {str(fault['input'])[:80]!r}" if fault["loc"] else ""


SOURCES: Final = {
    sampler: name
    for name, treatment in reversed(list(CLASSES.items()))
    if treatment.sampler and treatment.exact
    for sampler in (treatment.sampler, *treatment.variants)
}
"""The diffusers class that each solver equals."""


def as_drawn_before(published: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """What a bundle draws with that names no sampler: its scheduler file, and the sampler.

    Such bundles are older than most solvers: dpmpp_2m took the place of those that were not there, and fields that say
    how the path is walked, but for Karras spacing, were ignored. PNDM's `skip_prk_steps` was not kept, which every
    Stable Diffusion model sets.
    """
    name = published.get(CLASS)
    solver = {
        "DDIMScheduler": "ddim",
        "DDIMParallelScheduler": "ddim",
        "EulerDiscreteScheduler": "euler",
        "EulerAncestralDiscreteScheduler": "euler_ancestral",
    }.get(str(name), "dpmpp_2m")
    ignored = {*WALKED, "solver_type", "euler_at_final", *SPACED_BY} - {"use_karras_sigmas"}
    kept = {key: value for key, value in published.items() if key not in ignored}
    karras = kept.get("use_karras_sigmas") and "use_karras_sigmas" in CLASSES.get(str(name), Treatment()).reads
    kept = {"skip_prk_steps": True, **kept} if name == "PNDMScheduler" else kept
    return kept, f"{solver}_karras" if karras else solver
