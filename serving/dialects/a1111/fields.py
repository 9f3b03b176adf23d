"""The messages that clients of Automatic1111's web UI and of SD.Next send, with the state of each field: the parameters
of the constructors in processing.py and additions in api/models.py of https://github.com/AUTOMATIC1111/stable-diffusion-webui.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, model_validator

from runtime import limits
from serving.dialects.http.states import Body, NoEffect, Refused

KEPT: Final = NoEffect("the server keeps no pictures")
FACES: Final = Refused("there is no model for faces here: send 0", but=(0.0,))
CHURN: Final = NoEffect("belongs to s_churn")
PREPROCESSING: Final = NoEffect("belongs to a preprocessor")


def _no_switch(value: Any) -> Any:
    """Raise ValueError for true and false, which Python takes for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("expected a number or a name, not true or false")
    return value


Resizing = Annotated[Literal["Just Resize", "Crop and Resize", "Resize and Fill", 0, 1, 2], BeforeValidator(_no_switch)]
ControlMode = Annotated[
    Literal["Balanced", "My prompt is more important", "ControlNet is more important", 0, 1, 2],
    BeforeValidator(_no_switch),
]

TASK: Final = Field(default=None, min_length=1, max_length=limits.JOB_ID.most)
"""The id of a job, which its client chooses."""


class Options(Body):
    """Settings of a client: those of its requests from then on, or of one request (override_settings)."""

    sd_model_checkpoint: str | None = None
    show_progress_every_n_steps: int | None = Field(default=None, ge=-1, le=limits.PREVIEW_EVERY.most)
    live_previews_enable: bool | None = None
    enable_pnginfo: bool | None = None
    samples_format: Literal["png", "jpg", "jpeg", "webp"] | None = None
    jpeg_quality: int | None = Field(default=None, ge=1, le=limits.QUALITY.most)
    webp_lossless: Annotated[bool | None, Refused("files in WebP have a quality: send png", but=(False,))] = None
    sd_vae: Annotated[str | None, Refused("a bundle has one VAE: build it with another", but=("Automatic", "None"))] = (
        None
    )
    CLIP_stop_at_last_layers: Annotated[int | None, Refused("a bundle has the layers it was built with", but=(1,))] = (
        None
    )
    eta_noise_seed_delta: Annotated[int | None, Refused("seeds are taken as they are", but=(0,))] = None
    img2img_fix_steps: Annotated[bool | None, Refused("a share of the steps is taken: send more", but=(False,))] = None
    return_grid: Annotated[bool | None, Refused("pictures are returned one by one", but=(False,))] = None


class UnitPicture(Body):
    """A picture of a ControlNet unit, as older clients send it."""

    image: str
    mask: Annotated[str | None, Refused("controls have no masks: leave it out", but=("",))] = None


class Unit(Body):
    """One control network of a request (https://github.com/Mikubill/sd-webui-controlnet, its wiki, "API")."""

    enabled: bool = True
    model: str
    image: str | UnitPicture | None = None
    input_image: str | None = None
    weight: float = 1.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    resize_mode: Resizing = "Crop and Resize"
    mask: Annotated[str | None, Refused("controls have no masks: leave it out", but=("",))] = None
    module: Annotated[
        str | None,
        Refused(
            "none runs here: send edges or depths themselves",
            but=("none", "None", ""),
        ),
    ] = None
    control_mode: ControlMode | None = None
    guessmode: bool | None = None
    low_vram: Annotated[bool | None, NoEffect("where a network runs is decided when its model is loaded")] = None
    pixel_perfect: Annotated[bool | None, PREPROCESSING] = None
    processor_res: Annotated[int | None, PREPROCESSING] = None
    threshold_a: Annotated[float | None, PREPROCESSING] = None
    threshold_b: Annotated[float | None, PREPROCESSING] = None
    save_detected_map: Annotated[bool | None, PREPROCESSING] = None
    hr_option: Annotated[
        str | None, Refused("controls count in both passes: send Both", but=("Both", "HiResFixOption.BOTH"))
    ] = None


class Units(Body):
    """The arguments of the script ControlNet."""

    args: list[Unit] = Field(default_factory=list)


class Scripts(Body):
    """The scripts that always run, by name in any case."""

    controlnet: Units = Units()

    @model_validator(mode="before")
    @classmethod
    def _lower(cls, given: Any) -> Any:
        return {str(name).lower(): value for name, value in given.items()} if isinstance(given, dict) else given


def _given(value: Any) -> Any:
    """null is as good as nothing, as with fields of one value."""
    return {} if value is None else value


class Drawing(Body):
    """What txt2img and img2img have in common. None is the model's own default."""

    prompt: str = ""
    negative_prompt: str = ""
    seed: int | None = -1
    sampler_name: str | None = None
    sampler_index: str | int | None = None
    scheduler: str | None = None
    batch_size: int = 1
    n_iter: int = 1
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    eta: float | None = None
    override_settings: Annotated[Options, BeforeValidator(_given, json_schema_input_type=Options | None)] = Options()
    alwayson_scripts: Annotated[Scripts, BeforeValidator(_given, json_schema_input_type=Scripts | None)] = Scripts()
    force_task_id: str | None = TASK
    send_images: bool = True
    disable_extra_networks: bool = False
    styles: list[str] | None = None
    subseed: int | None = -1
    subseed_strength: float | None = None
    seed_resize_from_h: int | None = None
    seed_resize_from_w: int | None = None
    restore_faces: Annotated[bool | None, Refused("there is no model for faces here: send false", but=(False,))] = None
    tiling: Annotated[
        bool | None, Refused("padding is in the compiled graphs: edges do not continue; send false", but=(False,))
    ] = None
    s_churn: Annotated[float | None, Refused("samplers add no noise of their own: send 0", but=(0.0,))] = None
    s_noise: Annotated[float | None, Refused("samplers add noise as published: send 1", but=(1.0,))] = None
    s_min_uncond: Annotated[float | None, Refused("guidance counts in every step: send 0", but=(0.0,))] = None
    s_tmin: Annotated[float | None, CHURN] = None
    s_tmax: Annotated[float | None, CHURN] = None
    override_settings_restore_afterwards: Annotated[
        bool | None, Refused("they are of one request: options keep settings", but=(True,))
    ] = None
    refiner_checkpoint: str | None = None
    refiner_switch_at: float | None = None
    script_name: str | None = None
    script_args: list[Any] | None = None
    save_images: Annotated[
        bool | None, Refused("the server keeps no pictures: save those of the response", but=(False,))
    ] = None
    do_not_save_samples: Annotated[bool | None, KEPT] = None
    do_not_save_grid: Annotated[bool | None, KEPT] = None
    infotext: str | None = None


class TextToImage(Drawing):
    """POST /sdapi/v1/txt2img."""

    enable_hr: bool | None = None
    denoising_strength: float | None = None
    firstphase_width: int | None = None
    firstphase_height: int | None = None
    hr_scale: float | None = None
    hr_upscaler: str | None = None
    hr_second_pass_steps: int | None = None
    hr_resize_x: int | None = None
    hr_resize_y: int | None = None
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str | None = None
    hr_negative_prompt: str | None = None
    hr_checkpoint_name: Annotated[
        str | None, Refused("one model draws both passes: send the picture to img2img of the other", but=("", "None"))
    ] = None


class ImageToImage(Drawing):
    """POST /sdapi/v1/img2img."""

    init_images: list[str] = Field(min_length=1)
    denoising_strength: float | None = None
    resize_mode: int = 0
    mask: str | None = None
    mask_blur: float | None = None
    mask_blur_x: float | None = None
    mask_blur_y: float | None = None
    inpainting_mask_invert: int = 0
    inpainting_fill: int = 0
    inpaint_full_res: bool = True
    inpaint_full_res_padding: int = 0
    include_init_images: bool = False
    refiner_checkpoint: Annotated[
        str | None, Refused("one model draws on a picture: send the result to img2img of the refiner", but=("", "None"))
    ] = None
    refiner_switch_at: Annotated[float | None, NoEffect("belongs to refiner_checkpoint")] = None
    mask_round: Annotated[bool | None, Refused("masks of latents are rounded: send true", but=(True,))] = None
    image_cfg_scale: Annotated[float | None, NoEffect("belongs to models that edit by instructions")] = None
    initial_noise_multiplier: Annotated[float | None, Refused("noise is taken as drawn: send 1", but=(1.0,))] = None
    latent_mask: Annotated[str | None, Refused("send mask", but=("",))] = None


class PngInfo(Body):
    """POST /sdapi/v1/png-info."""

    image: str


class Extras(Body):
    """What POST /sdapi/v1/extra-single-image and extra-batch-images have in common."""

    resize_mode: Annotated[Literal[0, 1], BeforeValidator(_no_switch)] = 0
    upscaling_resize: float = Field(default=2, ge=1, le=8)
    upscaling_resize_w: int = 512
    upscaling_resize_h: int = 512
    upscaling_crop: bool = True
    upscaler_1: str = "None"
    upscaler_2: str = "None"
    extras_upscaler_2_visibility: float = Field(default=0, ge=0, le=1)
    show_extras_results: Annotated[bool | None, NoEffect("pictures are always in the response")] = None
    gfpgan_visibility: Annotated[float | None, FACES] = None
    codeformer_visibility: Annotated[float | None, FACES] = None
    codeformer_weight: Annotated[float | None, NoEffect("belongs to codeformer_visibility")] = None
    upscale_first: Annotated[bool | None, NoEffect("belongs to models for faces")] = None


class ExtraPicture(Extras):
    """POST /sdapi/v1/extra-single-image."""

    image: str


class NamedPicture(Body):
    """A picture of a batch. Its name says nothing here."""

    data: str
    name: Annotated[str | None, NoEffect("the server writes no files")] = None


class ExtraPictures(Extras):
    """POST /sdapi/v1/extra-batch-images."""

    pictures: list[NamedPicture] = Field(alias="imageList", min_length=1, max_length=limits.PICTURES.most)


class TaskId(Body):
    """A job of the client's: its force_task_id. None is every job of this client."""

    id_task: str | None = TASK


class TaskProgress(Body):
    """POST /internal/progress, as the web UI's own page sends it."""

    id_task: str = Field(min_length=1, max_length=limits.JOB_ID.most)
    id_live_preview: int = -1
    live_preview: bool = True


class Interrogation(Body):
    """POST /sdapi/v1/interrogate. The model "clip" is the first chat model."""

    image: str
    model: str = "clip"


class Question(Body):
    """POST /sdapi/v1/vqa and /sdapi/v1/caption. The first chat model is used where `model` is left out."""

    image: str
    model: str | None = None
    question: str | None = None
    prompt: str | None = None
    system: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    num_beams: int | None = None
    backend: Annotated[str | None, Refused("pictures are described by chat models: send vlm", but=("vlm",))] = None


class Command(Body):
    """What the client of a job's WebSocket may send."""

    command: Literal["interrupt", "skip"]
