"""Which scheduler classes are served, and which of their fields count, against diffusers' own classes."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

from runtime.diffusion.published import CLASSES, READ, SERVED, SchedulerConfig, SchedulerFields, as_drawn_before
from runtime.diffusion.solver import samplers
from runtime.errors import InvalidInput

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # torch tensors inside diffusers

PAGE = Path(__file__).parents[3] / "docs" / "compatibility.md"
ELSEWHERE = {"DPMSolverSDEScheduler"}
"""Classes that diffusers makes only where further packages are installed."""


def fields(class_name: str) -> dict[str, Any]:
    """The parameters of the class with their defaults."""
    parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.name != "self"}


def parsed(class_name: str, **given: Any) -> SchedulerConfig:
    return SchedulerConfig.parse({"_class_name": class_name, **given})


@pytest.mark.parametrize("class_name", sorted(set(SERVED) - ELSEWHERE))
def test_a_class_reads_the_fields_that_diffusers_gives_it(class_name: str) -> None:
    theirs, treatment = fields(class_name), CLASSES[class_name]
    assert treatment.reads == theirs.keys() & READ
    for name in theirs.keys() & SchedulerFields.model_fields:
        assert getattr(parsed(class_name).read(class_name), name) == theirs[name], name


@pytest.mark.parametrize("class_name", sorted(set(SERVED) - ELSEWHERE))
def test_what_diffusers_saves_is_read(class_name: str, tmp_path: Path) -> None:
    """A scheduler_config.json with every field of its class at its default."""
    getattr(diffusers, class_name)().save_pretrained(tmp_path)
    config = SchedulerConfig.parse(json.loads((tmp_path / "scheduler_config.json").read_text()))
    assert config.sampler == CLASSES[class_name].sampler in samplers()
    assert bool(config.note) != CLASSES[class_name].exact
    assert SchedulerConfig.model_validate_json(config.model_dump_json()).read(class_name) == config.read(class_name)


def test_every_class_is_one_of_diffusers() -> None:
    from diffusers import schedulers

    assert not [name for name in CLASSES if not hasattr(diffusers, name) and not hasattr(schedulers, name)]


def test_compatible_classes_are_all_in_the_table() -> None:
    """Those that diffusers lets its Stable Diffusion pipelines take."""
    from diffusers.schedulers import KarrasDiffusionSchedulers

    assert {scheduler.name for scheduler in KarrasDiffusionSchedulers} <= CLASSES.keys()


@pytest.mark.parametrize(
    ("class_name", "given", "sampler"),
    [
        ("DDIMScheduler", {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "ddim"),
        (
            "EulerAncestralDiscreteScheduler",
            {"use_karras_sigmas": True, "interpolation_type": "cubic"},
            "euler_ancestral",
        ),
        (
            "PNDMScheduler",
            {"use_karras_sigmas": True, "thresholding": True, "algorithm_type": "sde-dpmsolver++"},
            "pndm",
        ),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "algorithm_type": "dpmsolver"}, "euler_karras"),
        ("UniPCMultistepScheduler", {"use_karras_sigmas": True}, "unipc_karras"),
        ("LMSDiscreteScheduler", {"use_karras_sigmas": True, "tensor_format": "pt"}, "lms_karras"),
        ("DDIMScheduler", {"tensor_format": "np", "timestep_values": None, "predict_epsilon": True}, "ddim"),
        ("DPMSolverMultistepScheduler", {"solver_type": "bh2", "algorithm_type": "deis", "shift": 3.0}, "dpmpp_2m"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "euler_at_final": True}, "dpmpp_3m"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "use_lu_lambdas": True}, "dpmpp_3m_lu"),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
            "dpmpp_2m_sde_karras",
        ),
        (
            "DPMSolverSinglestepScheduler",
            {"solver_type": "heun", "use_exponential_sigmas": True},
            "dpmpp_2s_exponential",
        ),
        ("EulerDiscreteScheduler", {"use_beta_sigmas": True}, "euler_beta"),
        ("DEISMultistepScheduler", {"algorithm_type": "dpmsolver", "solver_order": 3}, "deis"),
        ("UniPCMultistepScheduler", {"solver_type": "bh1", "solver_order": 1, "disable_corrector": []}, "unipc"),
        ("SASolverScheduler", {"use_beta_sigmas": True}, "dpmpp_2m_beta"),
        ("LCMScheduler", {"original_inference_steps": 100}, "lcm"),
    ],
)
def test_the_class_decides_which_fields_count(class_name: str, given: dict[str, Any], sampler: str) -> None:
    config = parsed(class_name, **given)
    assert config.sampler == sampler
    assert bool(config.note) != CLASSES[class_name].exact


@pytest.mark.parametrize(
    ("class_name", "given", "named"),
    [
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "solver_order 3"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "algorithm_type 'dpmsolver'"),
        ("DPMSolverMultistepScheduler", {"solver_order": 1}, "solver_order 1"),
        ("DPMSolverSinglestepScheduler", {"solver_order": 3}, "solver_order 3"),
        ("UniPCMultistepScheduler", {"predict_x0": False, "disable_corrector": [0]}, "predict_x0 False, disable_corr"),
        ("EulerDiscreteScheduler", {"sigma_max": 80.0}, "sigma_max 80.0"),
    ],
)
def test_another_walk_of_a_served_class_is_replaced(class_name: str, given: dict[str, Any], named: str) -> None:
    config = parsed(class_name, **given)
    assert named in config.note and class_name in config.note and f"{config.sampler} draws" in config.note


@pytest.mark.parametrize(
    ("class_name", "given", "named"),
    [
        ("CMStochasticIterativeScheduler", {}, "is for models that were distilled without"),
        ("LMSDiscreteScheduler", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "set the others to false"),
        ("UniPCMultistepScheduler", {"solver_order": 4}, "solver_order '4'"),
        ("FlowMatchEulerDiscreteScheduler", {}, "predict a flow"),
        ("EDMEulerScheduler", {}, "EDM preconditioning"),
        ("DDIMInverseScheduler", {}, "does not draw from noise"),
        ("UnCLIPScheduler", {}, "another kind of model"),
        ("DDIMSchedular", {}, "did you mean 'DDIMScheduler'"),
        (None, {}, "None is no scheduler class"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas True"),
        ("DDIMScheduler", {"thresholding": True}, "thresholding True"),
        ("DDPMScheduler", {"variance_type": "learned_range"}, "variance_type 'learned_range'"),
        (
            "EulerDiscreteScheduler",
            {"timestep_type": "continuous", "prediction_type": "v_prediction"},
            "timestep_type 'continuous'",
        ),
        ("DDIMScheduler", {"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'"),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'"),
        ("DDIMScheduler", {"timestep_spacing": "even"}, "timestep_spacing 'even'"),
        ("DDIMScheduler", {"trained_betas": [0.1]}, "trained_betas has 1 values"),
        ("DDIMScheduler", {"num_train_timesteps": "many"}, "num_train_timesteps 'many'"),
        ("DDPMScheduler", {"beta_end": 1.5}, "beta_end '1.5'"),
    ],
)
def test_what_would_draw_wrong_pictures_is_refused_by_name(class_name: str, given: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parsed(class_name, **given)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("file", "sampler"),
    [
        ({"_class_name": "PNDMScheduler", "steps_offset": 1}, "dpmpp_2m"),
        ({"_class_name": "UniPCMultistepScheduler", "use_karras_sigmas": True, "solver_order": 3}, "dpmpp_2m_karras"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "euler_karras"),
        ({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True}, "euler"),
        ({"_class_name": "DDPMScheduler", "use_karras_sigmas": True}, "dpmpp_2m"),
        ({"_class_name": "DPMSolverMultistepScheduler", "euler_at_final": True, "solver_type": "heun"}, "dpmpp_2m"),
        ({"_class_name": "DDIMScheduler", "clip_sample": False}, "ddim"),
    ],
)
def test_a_bundle_that_names_no_sampler_draws_as_it_did(file: dict[str, Any], sampler: str) -> None:
    kept, name = as_drawn_before(file)
    assert name == sampler
    ignored = ("euler_at_final", "solver_type", "solver_order", "use_beta_sigmas")
    added = {"skip_prk_steps": True} if file["_class_name"] == "PNDMScheduler" else {}
    assert kept == added | {key: value for key, value in file.items() if key not in ignored}


def test_the_page_shows_the_table() -> None:
    section = PAGE.read_text().split("## Noise schedules (scheduler classes)")[1].split("\n## ")[0]
    items = section.replace("\n  ", " ")
    rows = re.findall(r"^- (`\w+`(?:, `\w+`)*): (\w+: (?:`\w+`|[^\n]+(?=\.\n)))", items, re.MULTILINE)
    shown = {name: done for names, done in rows for name in re.findall(r"`(\w+Scheduler)`", names)}
    expected = {}
    for name, treatment in CLASSES.items():
        done = "drawn" if treatment.exact else "replaced"
        expected[name] = f"refused: {treatment.refused}" if treatment.refused else f"{done}: `{treatment.sampler}`"
    assert shown == expected
