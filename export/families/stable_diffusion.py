"""Stable Diffusion 1.x: CLIP text encoder, UNet with cross attention, AutoencoderKL (Rombach et al. 2022,
arXiv:2112.10752).

What the families descended from it share with it stands here: `configs`, `require`, `Grid`, the parts, the settings and
the notes. Everything that diffusers' pipeline would do otherwise with a checkpoint is refused by name, from the small
files, or reported.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from diffusers import AutoencoderTiny, UNet2DConditionModel
from packaging.version import InvalidVersion, Version
from pydantic import ValidationError
from torch import Tensor as TorchTensor
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from export.architecture import controlnet, ip_adapter
from export.architecture.autoencoder import AUTOENCODERS, Autoencoder, coder_parts
from export.architecture.unet import ADDED, UNet, library
from export.checkpoint.embeddings import ENCODERS, Vocabulary
from export.checkpoint.source import PIPELINE, Source, read_json
from export.family import Component, Family, Part, Reference
from export.graph.trace import without_weights
from runtime.bundle.signature import BATCH, Dim, Signature, Tensor
from runtime.diffusion.config import DiffusionConfig, Sizes
from runtime.diffusion.controls import PICTURE, Controls
from runtime.diffusion.defaults import ImageDefaults
from runtime.diffusion.published import CLASS, SchedulerConfig
from runtime.diffusion.published import CLASSES as SCHEDULERS
from runtime.diffusion.tokenizing import ClipTokenizer
from runtime.errors import BundleError, InvalidInput, NotFound, SourceError, UnsupportedModel
from runtime.limits import PROMPT_CHUNKS

ADDITIONS: Final = ("lora", "adapter", "embedding", "controlnet", "ip_adapter", "vae")
"""The kinds of additions that the family and those descended from it take."""

COMPONENTS: Final[Mapping[str, tuple[str, ...]]] = {
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
}
"""The classes that model_index.json may name for each component."""

CLASSES: Final[Mapping[str, Any]] = {
    "text_encoder": CLIPTextConfig,
    "text_encoder_2": CLIPTextConfig,
    "unet": UNet2DConditionModel,
}
"""What reads the config.json of a component, an autoencoder apart."""

ONE: Final = BATCH.model_copy(update={"opt": 1})
"""The rows of an autoencoder's call: pictures are encoded and decoded one by one."""
CLIP: Final = "clip"
CLIP_TEXT: Final = "clip_text_model"
"""The `model_type` of a whole CLIP model, whose config holds that of its text encoder, and of a text encoder alone."""

LABELS: Final = "it takes class labels, which a request has not got. Build a text-to-image model"
PICTURES: Final = "it takes features of a picture besides the prompt. Build a text-to-image model"
COLORS: Final = "pictures have the three channels red, green and blue. Take an autoencoder of such pictures"
ACCEPTED: Final[Mapping[str, Mapping[str, tuple[tuple[object, ...], str]]]] = {
    "text_encoder": {
        "use_attention_mask": (
            (None, False),
            "prompts are read with their padding. Take a text encoder that was trained so",
        )
    },
    "unet": {
        "class_embed_type": ((None,), LABELS),
        "num_class_embeds": ((None,), LABELS),
        "encoder_hid_dim_type": ((None, "text_proj"), PICTURES),
        "attention_type": (("default",), "its attention takes boxes besides the prompt. Build a text-to-image model"),
        "dual_cross_attention": ((None, False), "it takes two prompts at once. Build a text-to-image model"),
    },
    "vae": {"in_channels": ((3,), COLORS), "out_channels": ((3,), COLORS)},
}
"""Fields of a component's config.json that ask for inputs or outputs other than the pipeline's: their values here, and
why no others.
"""

OLD_UNET: Final = Version("0.9.0.dev0")
OLD_EDGE: Final = 64
"""UNets written by diffusers before this version say too little for `sample_size`: diffusers' StableDiffusionPipeline
takes this then.
"""

FEWER: Final[Mapping[str, Mapping[str, Any]]] = {
    "text_encoder": {"num_hidden_layers": 2},
    "text_encoder_2": {"num_hidden_layers": 2},
    "unet": {"layers_per_block": 1, "transformer_layers_per_block": 1, "reverse_transformer_layers_per_block": None},
    "vae": {"layers_per_block": 1},
}
"""The twin has one layer where the model repeats several."""

NO_STATISTICS: Final = {"latents_mean": None, "latents_std": None}
"""Of an autoencoder without these fields."""


class TextEncoder(nn.Module):
    def __init__(self, model: CLIPTextModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: TorchTensor) -> tuple[TorchTensor, ...]:
        return (self.model(input_ids=input_ids).last_hidden_state,)


@dataclass(frozen=True)
class Grid:
    """How long the edges of latents and pictures may be. `edge` is the latents' in training, `scale` pixels lie along
    one latent.

    The UNet halves an edge until `step` latents have become one: no edge is shorter.
    """

    edge: int
    scale: int
    step: int

    @classmethod
    def of(cls, source: Source, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> Grid:
        """From the configs of both networks, in which each block but the last halves the edge. Raises SourceError."""
        scale, step = (2 ** (len(config["block_out_channels"]) - 1) for config in (vae, unet))
        edge = unet["sample_size"]
        if isinstance(edge, list | tuple) and len(set(edge)) == 1:
            edge = edge[0]
        if type(edge) is not int or edge < 1:
            raise SourceError(
                f"{_config(source, 'unet')} says sample_size {edge!r}, expected one number: the edge of the latents "
                "that the model was "
                "trained on, such as 64. Correct it; requests may give width and height"
            )
        return cls(edge, scale, step)

    @property
    def longest(self) -> int:
        """The longest latent edge that is accepted."""
        return max(128, 4 * self.edge)

    @property
    def sizes(self) -> Sizes:
        """Of pictures, in pixels."""
        least, most = self.step * self.scale, self.longest * self.scale
        return Sizes(min=least, max=most, default=self.edge * self.scale, multiple=self.scale)

    def latent(self, name: str) -> Dim:
        return Dim(name=name, min=self.step, opt=self.edge, max=self.longest)

    def pixel(self, name: str) -> Dim:
        sizes = self.sizes
        return Dim(name=name, min=sizes.min, opt=sizes.default, max=sizes.max, multiple=sizes.multiple)

    def latents(self, name: str, channels: int, rows: Dim = BATCH) -> Tensor:
        """[batch, channels, height, width]"""
        return Tensor(name=name, dtype="float32", dims=(rows, channels, self.latent("height"), self.latent("width")))

    def picture(self, name: str, channels: int, rows: Dim = BATCH) -> Tensor:
        """[batch, channels, image_height, image_width]"""
        dims = (rows, channels, self.pixel("image_height"), self.pixel("image_width"))
        return Tensor(name=name, dtype="float32", dims=dims)


def configs(source: Source, *names: str, reduced: bool = False) -> list[dict[str, Any]]:
    """The config.json of each named component, with the library's value for what it leaves out.

    Without the precision it was saved in, which transformers gives to models inside a model: graphs compute in float32.
    Raises NotFound, SourceError, or UnsupportedModel for another class than the pipeline's and for networks with other
    inputs than it has.
    """
    found = []
    for name in names:
        reader = _reader(source, name)
        parameters = inspect.signature(reader).parameters.values()
        config = {p.name: p.default for p in parameters if p.default is not p.empty} | _published(source, name)
        if reader is AutoencoderTiny:
            config |= {"block_out_channels": config["decoder_block_out_channels"], **NO_STATISTICS}
        config |= {key: value for key, value in FEWER[name].items() if reduced and key in config}
        for key, (values, why) in ACCEPTED.get(name, {}).items():
            if config.get(key) not in values:
                raise UnsupportedModel(
                    f"{_config(source, name)} says {key} {config[key]!r}, expected {values[0]!r}: {why}"
                )
        if name in ENCODERS:
            config["vocab_size"] = Vocabulary.of(source, name).size(config["vocab_size"])
        found.append({key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")})
    return found


def _reader(source: Source, component: str) -> Any:
    """The class that reads a component's config.json. Raises what `check_class` raises, InvalidInput for several
    autoencoders, and UnsupportedModel for an added one of no class here.
    """
    added = source.added(component)
    if len(added) > 1:
        raise InvalidInput(component, f"is given {len(added)} times, and a model has one: leave the others out")
    if not added:
        check_class(source, component)
    if component in CLASSES:
        return CLASSES[component]
    name = read_json(_config(source, component)).get("_class_name") if added else class_of(source, component)
    if name not in AUTOENCODERS:
        raise UnsupportedModel(
            f"{_config(source, component)} is of the class {name}, expected {' or '.join(AUTOENCODERS)}: take the "
            "folder of an autoencoder of Stable Diffusion"
        )
    return AUTOENCODERS[str(name)]


def check_class(source: Source, component: str) -> None:
    """Raises UnsupportedModel where model_index.json names no class for a component, or one that the pipeline does not
    work with.
    """
    expected, named = COMPONENTS[component], class_of(source, component)
    if named not in expected:
        what = f"says that {component} is of the class {named}" if named else f"names no {component}"
        raise UnsupportedModel(
            f"{source.root / PIPELINE} {what}, expected {expected[0]}: a {source.architecture} with anything else "
            "cannot be built. Save the pipeline again with one of that class"
        )


def class_of(source: Source, component: str) -> str | None:
    """The class that model_index.json names for a component; None where the pipeline has none."""
    match read_json(source.root / PIPELINE).get(component):
        case [str(), str(name)]:
            return name
        case _:
            return None


def _published(source: Source, component: str) -> dict[str, Any]:
    """The config.json of a component, as its library finds it. Raises UnsupportedModel where another class wrote it."""
    config = _without_defaults(read_json(_config(source, component)))
    written, expected = config.get("_class_name"), _reader(source, component).__name__
    if CLASSES.get(component) is CLIPTextConfig:
        written, expected = config.get("model_type"), CLIP_TEXT
        if written == CLIP and isinstance(config.get("text_config"), dict):
            return dict(config["text_config"])
    if written not in (None, expected):
        raise UnsupportedModel(
            f"{_config(source, component)} is of the kind {written}, expected {expected}: a {source.architecture} with "
            "anything "
            f"else cannot be built. Take the {component} of the model it was derived from"
        )
    return config


def _without_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Without what a file says of itself that only its class's defaults wrote it: diffusers takes today's defaults
    then.
    """
    written = config.pop("_use_default_values", None) or ()
    return {key: value for key, value in config.items() if key not in written}


def _config(source: Source, component: str) -> Path:
    return (_place(source, component) or source.root / component) / "config.json"


def _place(source: Source, component: str) -> Path | None:
    """The folder of a component that is added in place of the source's."""
    return next((one.path for one in source.added(component)), None)


def require(source: Source, component: str, config: Mapping[str, Any], **expected: object) -> None:
    """Raises UnsupportedModel where the config of a component says something else than what is expected."""
    other = [f"{key} {config[key]!r} (expected {value!r})" for key, value in expected.items() if config[key] != value]
    if other:
        raise UnsupportedModel(
            f"{_config(source, component)} says {', '.join(other)}: a {source.architecture} of that kind cannot be "
            "built. "
            "Take a checkpoint of the model it was derived from"
        )


def require_unet(source: Source, unet: Mapping[str, Any], vae: Mapping[str, Any], width: int) -> None:
    """Raises UnsupportedModel where a UNet does not fit its autoencoder, or hidden states of this `width`."""
    channels = vae["latent_channels"]
    inputs = inpainting_channels(vae) if unet["in_channels"] == inpainting_channels(vae) else channels
    require(source, "unet", unet, in_channels=inputs, out_channels=channels)
    widths = set(widths_of(unet))
    if widths != {width}:
        raise UnsupportedModel(
            f"{_config(source, 'unet')} expects hidden states of width {', '.join(map(str, sorted(widths)))} "
            "(encoder_hid_dim or "
            f"cross_attention_dim), the text encoders give {width}: take them all from the same checkpoint"
        )


def inpainting_channels(vae: Mapping[str, Any]) -> int:
    """The input channels of a UNet for inpainting: latents, the mask, and the masked picture's latents."""
    return 2 * int(vae["latent_channels"]) + 1


def widths_of(unet: Mapping[str, Any]) -> list[int]:
    """The widths of the hidden states that the blocks of a UNet read."""
    width = unet["encoder_hid_dim"] or unet["cross_attention_dim"]
    return list(width) if isinstance(width, list | tuple) else [width]


def text_part(
    name: str, model: Any, module: nn.Module, reference: Reference, outputs: Mapping[str, tuple[int | Dim, ...]]
) -> Part:
    """A CLIP text encoder. `outputs` are the shapes, behind the batch, of what `module` gives; the token dim is
    `tokens(model)`.
    """
    ids = Tensor(
        name="input_ids", dtype="int64", dims=(BATCH, tokens(model)), values="below", limit=model.config.vocab_size
    )
    return Part(
        name,
        (Component(name, model),),
        module,
        reference,
        Signature(
            inputs=(ids,),
            outputs=tuple(Tensor(name=n, dtype="float32", dims=(BATCH, *dims)) for n, dims in outputs.items()),
        ),
        least_bits=8,  # its error bends every step alike: at int4 the sample draws 7 of 100 prompts wrong by that alone
    )


def tokens(model: Any) -> Dim:
    """The tokens that a text encoder reads."""
    length = model.config.max_position_embeddings
    return Dim(name="sequence", min=1, opt=length, max=length)


def denoising_parts(
    source: Source, model: UNet2DConditionModel, grid: Grid, length: int, *added: Tensor, reduced: bool
) -> list[Part]:
    """The UNet on prompts of usually `length` tokens, the control networks that are added to it, and the encoder of its
    image adapters. `added` are its inputs behind sample, timestep and hidden states. A model that was distilled from
    guided predictions has one more, an embedding of the guidance scale.
    """
    if width := model.config.time_cond_proj_dim:
        added = (*added, Tensor(name="timestep_cond", dtype="float32", dims=(BATCH, width)))
    inputs = (*_unet_inputs(model, grid, length), *added)
    latents = grid.latents("sample", model.config.out_channels)
    picture = grid.picture(PICTURE, 3).following(latents, times=grid.scale)
    conditions = tuple(tensor for tensor in added if tensor.name in ADDED)
    base = controlnet.Base(model.config, (latents, *inputs[1:3], *conditions), picture, grid.scale)
    controls = [base.part(addition, reduced) for addition in source.added("controlnet")]
    # rows of a guided batch differ in them: a network reads the prompt
    residuals = [one.model_copy(update={"condition": inputs[2].condition}) for one in base.residuals if controls]
    adapters = ip_adapter.adapt(source, model, inputs[2].condition, reduced)
    more = (*added, *residuals, *adapters.inputs)
    names = [tensor.name for tensor in more]
    return [
        Part(
            "unet",
            (Component("unet", model), *adapters.components),
            UNet(model, *names),
            library(model, *names),
            Signature(inputs=(*inputs[:3], *more), outputs=(grid.latents("noise_pred", model.config.out_channels),)),
            convolutional=True,
        ),
        *controls,
        *adapters.parts,
    ]


def _unet_inputs(model: UNet2DConditionModel, grid: Grid, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sample, timestep and hidden states."""
    context = Dim(name="sequence", min=1, opt=length, max=PROMPT_CHUNKS.most * length)
    timestep = Tensor(name="timestep", dtype="float32", dims=(BATCH,), values="below", limit=1000)
    states = Tensor(
        name="encoder_hidden_states",
        dtype="float32",
        dims=(BATCH, context, widths_of(model.config)[0]),
        # what is added to the time embedding is of the prompt, too: then rows differ from the first block on
        condition=model.config.addition_embed_type is None,
    )
    return grid.latents("sample", model.config.in_channels), timestep, states


def autoencoder(source: Source, config: Mapping[str, Any]) -> Autoencoder:
    """The source's autoencoder, or the one that is added, of its config."""
    model = _reader(source, "vae")
    known = inspect.signature(model).parameters
    return model.from_config({key: value for key, value in config.items() if key in known}).eval()


def vae_parts(source: Source, model: Autoencoder, grid: Grid, float16: bool = True) -> list[Part]:
    """Decoder and encoder. `float16` as in `Part`."""
    image = grid.picture("image", model.config.in_channels, ONE)
    latents = grid.latents("latents", model.config.latent_channels, ONE)
    return coder_parts(model, _place(source, "vae"), image, latents, grid.scale, float16)


def settings(
    source: Source, grid: Grid, scheduler: SchedulerConfig, defaults: ImageDefaults, **more: Any
) -> dict[str, Any]:
    """The pipeline's settings; `grid` and `scheduler` are what the library's pipeline makes of the model's own,
    `defaults` what a request leaves open, `more` what a family adds.

    Raises SourceError naming every value that no model can have.
    """
    unet, vae = configs(source, "unet", "vae")
    if width := unet["time_cond_proj_dim"]:
        more["guidance_embedding"] = width
    # No shift_factor: diffusers' pipelines of these families do not read it.
    scaling = {
        "scaling_factor": vae["scaling_factor"],
        "scale_factor": grid.scale,
        "latent_channels": vae["latent_channels"],
        "encoder": True,
    }
    sampler = defaults.sampler or scheduler.sampler
    if names := tuple(addition.name for addition in source.added("controlnet")):
        more["controls"] = Controls(names=names, residuals=tuple(controlnet.residual_shapes(unet)))
    more |= {"inpainting": True} if unet["in_channels"] == inpainting_channels(vae) else {}
    if (adapters := ip_adapter.styles(source)) is not None:
        more["styles"] = adapters
    found: Any = {
        "scheduler": scheduler, "sampler": sampler, "vae": scaling, "sizes": grid.sizes, "defaults": defaults, **more
    }  # fmt: skip
    try:
        return DiffusionConfig(**found).dump()
    except ValidationError as error:
        reasons = "; ".join(
            f"{'.'.join(map(str, fault['loc']))} {fault['input']!r}: {fault['msg']}" for fault in error.errors()
        )
        raise SourceError(
            f"{source.root}: its config files say what no model can have: {reasons}. Correct them"
        ) from None


def schedule(source: Source, **corrected: object) -> SchedulerConfig:
    """The model's noise schedule, read by the class that model_index.json names, with what the library's pipeline
    corrects.

    Raises NotFound, SourceError, or UnsupportedModel for a class or a value that no sampler here follows.
    """
    file = source.root / "scheduler" / "scheduler_config.json"
    published = _without_defaults(read_json(file))
    named = class_of(source, "scheduler")
    if named is None:
        raise UnsupportedModel(
            f"{source.root / PIPELINE} names no scheduler: save the pipeline again with one, such as DDIMScheduler"
        )
    written = SCHEDULERS.get(str(published.get(CLASS, named)))
    try:
        if written is None or written.refused:  # the weights may be made for that class
            SchedulerConfig.parse({CLASS: published.get(CLASS, named)})
        return SchedulerConfig.parse({**published, CLASS: named, **corrected})
    except InvalidInput as error:
        raise UnsupportedModel(f"{file}: {error.reason}") from None


def notes(source: Source, scheduler: SchedulerConfig) -> tuple[str, ...]:
    """What is done otherwise than diffusers' pipeline would: another sampler, no check of pictures."""
    written = read_json(source.root / "scheduler" / "scheduler_config.json").get(CLASS)
    found = [] if ImageDefaults.read(source.root).sampler else [scheduler.note]
    if written not in (None, scheduler.root[CLASS]):
        found.append(
            f"{PIPELINE} names {scheduler.root[CLASS]}, scheduler_config.json {written}: the first counts, as in "
            "diffusers"
        )
    if checker := class_of(source, "safety_checker"):
        found.append(f"the safety checker ({checker}) is left out: pictures are not checked")
    return tuple(filter(None, found))


def files(source: Source, encoders: Mapping[str, str]) -> dict[str, Path]:
    """The files of scheduler and tokenizers by their path in the bundle. `encoders` are the text encoders by their
    tokenizer's folder.

    Raises NotFound for a missing folder, and SourceError for a tokenizer that cannot be read or reads more tokens than
    its encoder.
    """
    found: dict[str, Path] = {}
    for name in (*encoders, "scheduler"):
        folder = source.root / name
        if name in encoders:
            check_class(source, name)
        if not folder.is_dir():
            raise NotFound(
                f"{folder} does not exist: a {source.architecture} needs it. Download the checkpoint again, with all "
                "its folders"
            )
        published = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}
        own = Vocabulary.of(source, encoders[name]).files(published) if name in encoders else published
        found |= {f"{name}/{file}": path for file, path in own.items()}
    lengths = {name: _length(source, name, encoder) for name, encoder in encoders.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise SourceError(
            f"{source.root}: its tokenizers make prompts of different lengths ({listed} tokens). Download the "
            "checkpoint again"
        )
    return found


def _length(source: Source, tokenizer: str, encoder: str) -> int:
    """The tokens of a prompt, which the text encoder must have positions for."""
    folder = source.root / tokenizer
    try:
        length = ClipTokenizer(folder).limit
    except BundleError as error:
        raise SourceError(str(error)) from None
    (config,) = configs(source, encoder)
    if length > config["max_position_embeddings"]:
        raise SourceError(
            f"{folder} makes prompts of {length} tokens (model_max_length in tokenizer_config.json), {encoder} reads "
            "at most "
            f"{config['max_position_embeddings']} (max_position_embeddings in config.json): take both from the same "
            "checkpoint"
        )
    return length


def parts(source: Source, reduced: bool) -> list[Part]:
    text_config, unet_config, vae_config = configs(source, "text_encoder", "unet", "vae", reduced=reduced)
    if unet_config["addition_embed_type"] != "text":  # made of the prompt's hidden states alone
        require(source, "unet", unet_config, addition_embed_type=None)
    require_unet(source, unet_config, vae_config, text_config["hidden_size"])
    with without_weights():
        text = CLIPTextModel(CLIPTextConfig(**text_config)).eval()
        unet = UNet2DConditionModel.from_config(unet_config).eval()
        vae = autoencoder(source, vae_config)
    grid, length = _grid(source, unet_config, vae_config), tokens(text)
    return [
        text_part(
            "text_encoder",
            text,
            TextEncoder(text),
            lambda ids: (text(ids).last_hidden_state,),
            {"last_hidden_state": (length, text.config.hidden_size)},
        ),
        *denoising_parts(source, unet, grid, length.opt, reduced=reduced),
        *vae_parts(source, vae, grid),
    ]


def _grid(source: Source, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> Grid:
    """As diffusers' StableDiffusionPipeline corrects old UNets on load."""
    written, edge = unet.get("_diffusers_version"), unet["sample_size"]
    try:
        old = written is not None and Version(Version(written).base_version) < OLD_UNET
    except (InvalidVersion, TypeError):
        raise SourceError(
            f"{_config(source, 'unet')} says _diffusers_version {written!r}, expected one such as 0.30.0: remove it"
        ) from None
    if old and type(edge) is int and edge < OLD_EDGE:
        unet = {**unet, "sample_size": OLD_EDGE}
    return Grid.of(source, unet, vae)


def _schedule(source: Source) -> SchedulerConfig:
    """As diffusers' StableDiffusionPipeline corrects old files on load: they were written before these
    fields existed.
    """
    return schedule(source, steps_offset=1, clip_sample=False)


def config(source: Source) -> dict[str, Any]:
    grid = _grid(source, *configs(source, "unet", "vae"))
    return settings(source, grid, _schedule(source), ImageDefaults.read(source.root))


def assets(source: Source) -> Mapping[str, Path]:
    return files(source, {"tokenizer": "text_encoder"})


FAMILY = Family(
    "stable-diffusion",
    "diffusion",
    ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    parts,
    config,
    assets,
    lambda source: notes(source, _schedule(source)),
    ADDITIONS,
)
