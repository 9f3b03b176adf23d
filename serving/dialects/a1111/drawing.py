"""What txt2img and img2img ask for, as requests: one for each of `n_iter` batches."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from runtime import limits
from runtime.diffusion.defaults import ImageAbilities
from runtime.diffusion.guides import Control, Style
from runtime.diffusion.labels import LABELS, named
from runtime.diffusion.solver import solvers
from runtime.errors import InvalidInput
from runtime.scripting import Scripts
from runtime.tasks.image import ImageRequest
from runtime.vision.images import Picture, PictureFile
from serving.dialects.a1111.canvas import Ground, fitted, ground
from serving.dialects.a1111.choosing import HASH
from serving.dialects.a1111.fields import Drawing, ImageToImage, Options, Unit
from serving.dialects.a1111.passes import chosen_seed, noise_of, second_pass
from serving.dialects.a1111.scripts import PLOT, chosen, varies
from serving.dialects.a1111.words import words
from serving.dialects.http.pictures import file_of

PREVIEWS: Final = 10
"""A preview is drawn every so many steps, unless the client chose another number (show_progress_every_n_steps)."""
ANCESTRAL: Final = frozenset({"dpmpp_2m_sde", "dpmpp_sde", "euler_ancestral", "kdpm2_ancestral", "lcm"})
"""Solvers with noise in every step, as much as the web UI's have with the eta that is usual there."""
USUAL_ETA: Final = 1.0
FIELDS: Final[Mapping[str, str]] = {
    "controls": "alwayson_scripts.ControlNet.args",
    "guess_mode": "alwayson_scripts.ControlNet.args",
    "styles": "alwayson_scripts.ControlNet.args",
    "guidance_scale": "cfg_scale",
    "image": "init_images",
    "images": "batch_size",
    "loras": "prompt",
    "model": "override_settings.sd_model_checkpoint",
    "preview_every": "override_settings.show_progress_every_n_steps",
    "sampler": "sampler_name",
    "scripts": "script_name",
    "scripts.styles": "styles",
    "scripts.styles.names": "styles",
    **dict.fromkeys(("grid", "x", "y", "z"), "script_args"),
    "schedule": "scheduler",
    "strength": "denoising_strength",
    "denoising_end": "refiner_switch_at",
    "denoising_start": "refiner_switch_at",
    "latents": "refiner_checkpoint",
    "variation_seed": "subseed",
    "variation_strength": "subseed_strength",
    "noise_size": "seed_resize_from_h",
    "mask_fill": "inpainting_fill",
    "upscaler": "hr_upscaler",
    "hires": "enable_hr",
    "hires.scale": "hr_scale",
    "hires.width": "hr_resize_x",
    "hires.height": "hr_resize_y",
    "hires.upscaler": "hr_upscaler",
    "hires.steps": "hr_second_pass_steps",
    "hires.strength": "denoising_strength",
    "hires.prompt": "hr_prompt",
    "hires.negative_prompt": "hr_negative_prompt",
    "hires.sampler": "hr_sampler_name",
}
"""The client's names of fields of requests."""
MODES: Final[Mapping[Any, int]] = {
    "Balanced": 0, "My prompt is more important": 1, "ControlNet is more important": 2,
}  # fmt: skip
GUESSING: Final = 2
"""The mode in which controls are followed without a prompt."""
PLACES: Final = {0: "Just Resize", 1: "Crop and Resize", 2: "Resize and Fill"}


@dataclass(frozen=True)
class Work:
    """Requests to draw one after the other, and what becomes of their pictures: `ground` puts them into the picture
    that they were drawn on, where that is not done by the model. `facts` are further parameters of the pictures.
    """

    requests: tuple[ImageRequest, ...]
    ground: Ground | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


def work(message: Drawing, options: Options, able: ImageAbilities | None, scripts: Scripts) -> Work:
    """The requests of a message. Pictures are decoded: call it in a thread. `options` are those of the client with
    those of the message, `able` is what the model draws, `scripts` are the installed ones. Raises InvalidInput.
    """
    limits.IMAGES.number("n_iter", message.n_iter)
    limits.IMAGES.number("batch_size", message.batch_size)
    limits.IMAGES.number("n_iter", message.n_iter * message.batch_size)
    edge = able.default_edge if able else None
    drawn = _ground(message, edge) if isinstance(message, ImageToImage) else None
    named_scripts, facts = chosen(message, scripts)
    if facts and drawn is not None and drawn.original is not None:
        raise InvalidInput(
            "script_name",
            f"{PLOT} draws whole pictures: send inpaint_full_res false, and inpainting_fill 1 with a mask",
        )
    shared = {
        **words(message),
        **_sampler(message),
        "width": message.width,
        "height": message.height,
        "steps": message.steps,
        "guidance_scale": message.cfg_scale,
        "images": message.batch_size,
        "preview_every": previews(options),
        "prompt_weights": True,
        **_units(message, able.styles if able else ()),
        "scripts": named_scripts,
        **(drawn.fields if drawn else {}),
        **noise_of(message, varies(named_scripts)),
        **second_pass(message),
    }
    whole = ImageRequest(**shared | {"images": message.n_iter * message.batch_size}, seed=chosen_seed(message.seed))
    return Work(tuple(_batches(whole, message.batch_size)), drawn, facts)


def _batches(whole: ImageRequest, size: int) -> Iterator[ImageRequest]:
    """The request of each batch of so many pictures."""
    for start in range(0, whole.images, size):
        yield replace(whole.single(start), images=size)


def previews(options: Options) -> int:
    """Every how many steps a preview is drawn, 0 for none."""
    every = PREVIEWS if options.show_progress_every_n_steps is None else options.show_progress_every_n_steps
    return 0 if options.live_previews_enable is False else max(0, every)


def _sampler(message: Drawing) -> dict[str, Any]:
    """The sampler and its eta."""
    label = message.sampler_name or message.sampler_index
    if isinstance(label, int):
        raise InvalidInput("sampler_index", f"is {label}, expected a name such as {LABELS['euler']}")
    schedule = message.scheduler or ""
    if not label:
        if schedule.casefold() not in ("", "automatic"):
            raise InvalidInput("scheduler", f"is '{schedule}' without a sampler: send sampler_name, too")
        return {"eta": message.eta or 0.0}
    sampler = named(label, schedule)
    solver = next(name for name in (sampler, sampler.rpartition("_")[0]) if name in solvers())
    if solver in ANCESTRAL and message.eta not in (None, USUAL_ETA):
        raise InvalidInput(
            "eta", f"is {message.eta:g}, and {LABELS[solver]} adds noise as published: send 1, or leave it"
        )
    return {"sampler": sampler, "eta": (message.eta or 0.0) if solvers()[solver].eta else 0.0}


def _ground(message: ImageToImage, edge: int | None) -> Ground:
    """What the picture is drawn on."""
    if len(message.init_images) > 1:
        raise InvalidInput("init_images", "holds several pictures, expected one: send a request for each")
    picture = file_of(message.init_images[0], "init_images")
    mask = file_of(message.mask, "mask") if message.mask else None
    return ground(message, picture, mask, edge)


def _units(message: Drawing, styles: Collection[str]) -> dict[str, Any]:
    """The units of ControlNet: controls, and for the names of image adapters styles."""
    units = [unit for unit in message.alwayson_scripts.controlnet.args if unit.enabled]
    limits.CONTROLS.length("controls", units)
    found: dict[str, Any] = {"controls": (), "styles": (), "guess_mode": _guessing(units)}
    for number, unit in enumerate(units):
        field = f"{FIELDS['controls']}[{number}]"
        name = HASH.sub("", unit.model)
        if name not in styles:
            picture, share = _shown(unit, message, field), (unit.guidance_start, unit.guidance_end)
            found["controls"] += (Control(name, picture, unit.weight, *share),)
        elif (unit.guidance_start, unit.guidance_end) != (0, 1):
            raise InvalidInput(field, f"{name} is an image adapter, which counts in every step: send 0 and 1")
        else:
            found["styles"] += (Style(name, _shown(unit, message, field), unit.weight),)
    return found


def _guessing(units: Sequence[Unit]) -> bool:
    """Whether controls count more than the prompt: the less, the finer they are, and not for the negative prompt."""
    modes = {GUESSING if unit.guessmode else MODES.get(unit.control_mode, unit.control_mode or 0) for unit in units}
    if modes - {0, GUESSING} or len(modes) > 1:
        raise InvalidInput(
            f"{FIELDS['controls']}.control_mode", "is one for all controls here, expected Balanced (0), or ControlNet "
            "is more important (2): send less weight where the prompt is to count more"
        )  # fmt: skip
    return GUESSING in modes


def _shown(unit: Unit, message: Drawing, field: str) -> Picture | PictureFile:
    """The picture that a control follows: its own, or the one that is drawn on."""
    given = unit.image.image if unit.image is not None and not isinstance(unit.image, str) else unit.image
    text = given or unit.input_image
    if not text and isinstance(message, ImageToImage):
        text = message.init_images[0]
    if not text:
        raise InvalidInput(f"{field}.image", "is missing: send the picture that the control is to follow")
    place = unit.resize_mode if isinstance(unit.resize_mode, str) else PLACES[unit.resize_mode]
    mode = next(number for number, name in PLACES.items() if name == place)
    return fitted(file_of(text, f"{field}.image"), mode, message.width, message.height, f"{field}.resize_mode")
