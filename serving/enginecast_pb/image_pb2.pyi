from serving.enginecast_pb import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GenerateRequest(_message.Message):
    __slots__ = ("model", "prompt", "negative_prompt", "width", "height", "steps", "guidance_scale", "sampler", "eta", "seed", "images", "preview_every", "image", "strength", "mask", "mask_blur", "keep_unmasked", "extend", "mask_fill", "controls", "styles", "guess_mode", "loras", "guidance_start", "guidance_end", "forecast", "prompt_weights", "denoising_end", "denoising_start", "latents", "original_size", "crop_top_left", "target_size", "aesthetic_score", "negative_original_size", "negative_crop_top_left", "negative_target_size", "negative_aesthetic_score", "variation_strength", "variation_seed", "noise_size", "hires", "scripts", "terms")
    class LorasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_FIELD_NUMBER: _ClassVar[int]
    ETA_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_EVERY_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    MASK_BLUR_FIELD_NUMBER: _ClassVar[int]
    KEEP_UNMASKED_FIELD_NUMBER: _ClassVar[int]
    EXTEND_FIELD_NUMBER: _ClassVar[int]
    MASK_FILL_FIELD_NUMBER: _ClassVar[int]
    CONTROLS_FIELD_NUMBER: _ClassVar[int]
    STYLES_FIELD_NUMBER: _ClassVar[int]
    GUESS_MODE_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_START_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_END_FIELD_NUMBER: _ClassVar[int]
    FORECAST_FIELD_NUMBER: _ClassVar[int]
    PROMPT_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    DENOISING_END_FIELD_NUMBER: _ClassVar[int]
    DENOISING_START_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_SIZE_FIELD_NUMBER: _ClassVar[int]
    CROP_TOP_LEFT_FIELD_NUMBER: _ClassVar[int]
    TARGET_SIZE_FIELD_NUMBER: _ClassVar[int]
    AESTHETIC_SCORE_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_ORIGINAL_SIZE_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_CROP_TOP_LEFT_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_TARGET_SIZE_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_AESTHETIC_SCORE_FIELD_NUMBER: _ClassVar[int]
    VARIATION_STRENGTH_FIELD_NUMBER: _ClassVar[int]
    VARIATION_SEED_FIELD_NUMBER: _ClassVar[int]
    NOISE_SIZE_FIELD_NUMBER: _ClassVar[int]
    HIRES_FIELD_NUMBER: _ClassVar[int]
    SCRIPTS_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: str
    eta: float
    seed: int
    images: int
    preview_every: int
    image: bytes
    strength: float
    mask: bytes
    mask_blur: float
    keep_unmasked: bool
    extend: Edges
    mask_fill: str
    controls: _containers.RepeatedCompositeFieldContainer[Control]
    styles: _containers.RepeatedCompositeFieldContainer[Style]
    guess_mode: bool
    loras: _containers.ScalarMap[str, float]
    guidance_start: float
    guidance_end: float
    forecast: str
    prompt_weights: bool
    denoising_end: float
    denoising_start: float
    latents: _containers.RepeatedCompositeFieldContainer[Latents]
    original_size: Pixels
    crop_top_left: Pixels
    target_size: Pixels
    aesthetic_score: float
    negative_original_size: Pixels
    negative_crop_top_left: Pixels
    negative_target_size: Pixels
    negative_aesthetic_score: float
    variation_strength: float
    variation_seed: int
    noise_size: Pixels
    hires: Hires
    scripts: _containers.RepeatedCompositeFieldContainer[_common_pb2.Script]
    terms: _common_pb2.Terms
    def __init__(self, model: _Optional[str] = ..., prompt: _Optional[str] = ..., negative_prompt: _Optional[str] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., steps: _Optional[int] = ..., guidance_scale: _Optional[float] = ..., sampler: _Optional[str] = ..., eta: _Optional[float] = ..., seed: _Optional[int] = ..., images: _Optional[int] = ..., preview_every: _Optional[int] = ..., image: _Optional[bytes] = ..., strength: _Optional[float] = ..., mask: _Optional[bytes] = ..., mask_blur: _Optional[float] = ..., keep_unmasked: _Optional[bool] = ..., extend: _Optional[_Union[Edges, _Mapping]] = ..., mask_fill: _Optional[str] = ..., controls: _Optional[_Iterable[_Union[Control, _Mapping]]] = ..., styles: _Optional[_Iterable[_Union[Style, _Mapping]]] = ..., guess_mode: _Optional[bool] = ..., loras: _Optional[_Mapping[str, float]] = ..., guidance_start: _Optional[float] = ..., guidance_end: _Optional[float] = ..., forecast: _Optional[str] = ..., prompt_weights: _Optional[bool] = ..., denoising_end: _Optional[float] = ..., denoising_start: _Optional[float] = ..., latents: _Optional[_Iterable[_Union[Latents, _Mapping]]] = ..., original_size: _Optional[_Union[Pixels, _Mapping]] = ..., crop_top_left: _Optional[_Union[Pixels, _Mapping]] = ..., target_size: _Optional[_Union[Pixels, _Mapping]] = ..., aesthetic_score: _Optional[float] = ..., negative_original_size: _Optional[_Union[Pixels, _Mapping]] = ..., negative_crop_top_left: _Optional[_Union[Pixels, _Mapping]] = ..., negative_target_size: _Optional[_Union[Pixels, _Mapping]] = ..., negative_aesthetic_score: _Optional[float] = ..., variation_strength: _Optional[float] = ..., variation_seed: _Optional[int] = ..., noise_size: _Optional[_Union[Pixels, _Mapping]] = ..., hires: _Optional[_Union[Hires, _Mapping]] = ..., scripts: _Optional[_Iterable[_Union[_common_pb2.Script, _Mapping]]] = ..., terms: _Optional[_Union[_common_pb2.Terms, _Mapping]] = ...) -> None: ...

class Hires(_message.Message):
    __slots__ = ("scale", "width", "height", "upscaler", "steps", "strength", "prompt", "negative_prompt", "sampler")
    SCALE_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    UPSCALER_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_FIELD_NUMBER: _ClassVar[int]
    scale: float
    width: int
    height: int
    upscaler: str
    steps: int
    strength: float
    prompt: str
    negative_prompt: str
    sampler: str
    def __init__(self, scale: _Optional[float] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., upscaler: _Optional[str] = ..., steps: _Optional[int] = ..., strength: _Optional[float] = ..., prompt: _Optional[str] = ..., negative_prompt: _Optional[str] = ..., sampler: _Optional[str] = ...) -> None: ...

class Pixels(_message.Message):
    __slots__ = ("down", "across")
    DOWN_FIELD_NUMBER: _ClassVar[int]
    ACROSS_FIELD_NUMBER: _ClassVar[int]
    down: int
    across: int
    def __init__(self, down: _Optional[int] = ..., across: _Optional[int] = ...) -> None: ...

class Style(_message.Message):
    __slots__ = ("name", "image", "scale")
    NAME_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    name: str
    image: bytes
    scale: float
    def __init__(self, name: _Optional[str] = ..., image: _Optional[bytes] = ..., scale: _Optional[float] = ...) -> None: ...

class Control(_message.Message):
    __slots__ = ("name", "image", "scale", "start", "end")
    NAME_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    name: str
    image: bytes
    scale: float
    start: float
    end: float
    def __init__(self, name: _Optional[str] = ..., image: _Optional[bytes] = ..., scale: _Optional[float] = ..., start: _Optional[float] = ..., end: _Optional[float] = ...) -> None: ...

class Latents(_message.Message):
    __slots__ = ("channels", "height", "width", "values")
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    channels: int
    height: int
    width: int
    values: bytes
    def __init__(self, channels: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., values: _Optional[bytes] = ...) -> None: ...

class Edges(_message.Message):
    __slots__ = ("left", "top", "right", "bottom")
    LEFT_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    RIGHT_FIELD_NUMBER: _ClassVar[int]
    BOTTOM_FIELD_NUMBER: _ClassVar[int]
    left: int
    top: int
    right: int
    bottom: int
    def __init__(self, left: _Optional[int] = ..., top: _Optional[int] = ..., right: _Optional[int] = ..., bottom: _Optional[int] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("queued", "progress", "image", "done")
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    queued: _common_pb2.Queued
    progress: ImageProgress
    image: Image
    done: ImageDone
    def __init__(self, queued: _Optional[_Union[_common_pb2.Queued, _Mapping]] = ..., progress: _Optional[_Union[ImageProgress, _Mapping]] = ..., image: _Optional[_Union[Image, _Mapping]] = ..., done: _Optional[_Union[ImageDone, _Mapping]] = ...) -> None: ...

class ImageProgress(_message.Message):
    __slots__ = ("step", "total", "eta_seconds", "preview_png")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    ETA_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_PNG_FIELD_NUMBER: _ClassVar[int]
    step: int
    total: int
    eta_seconds: float
    preview_png: bytes
    def __init__(self, step: _Optional[int] = ..., total: _Optional[int] = ..., eta_seconds: _Optional[float] = ..., preview_png: _Optional[bytes] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("png", "width", "height", "seed", "index", "latents", "prompt", "negative_prompt")
    PNG_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    png: bytes
    width: int
    height: int
    seed: int
    index: int
    latents: Latents
    prompt: str
    negative_prompt: str
    def __init__(self, png: _Optional[bytes] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., seed: _Optional[int] = ..., index: _Optional[int] = ..., latents: _Optional[_Union[Latents, _Mapping]] = ..., prompt: _Optional[str] = ..., negative_prompt: _Optional[str] = ...) -> None: ...

class ImageDone(_message.Message):
    __slots__ = ("timings", "engines", "notes")
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    timings: _common_pb2.Timings
    engines: _containers.RepeatedCompositeFieldContainer[_common_pb2.EngineUse]
    notes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, timings: _Optional[_Union[_common_pb2.Timings, _Mapping]] = ..., engines: _Optional[_Iterable[_Union[_common_pb2.EngineUse, _Mapping]]] = ..., notes: _Optional[_Iterable[str]] = ...) -> None: ...
