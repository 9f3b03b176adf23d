"""Stable Diffusion 1.x: CLIP text encoder, UNet with cross attention, AutoencoderKL (Rombach et al. 2022, arXiv:2112.10752).

What the families descended from it share with it stands here: `configs`, `require`, `Grid`, the parts and the settings.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from diffusers import AutoencoderKL, UNet2DConditionModel
from pydantic import ValidationError
from torch import Tensor as TorchTensor
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from export.family import Component, Family, Part, Reference
from export.source import Source, read_json
from export.trace import without_weights
from runtime.errors import BundleError, NotFound, SourceError, UnsupportedModel
from runtime.pipelines.diffusion import Defaults, DiffusionConfig, Sizes
from runtime.samplers import SchedulerConfig
from runtime.signature import BATCH, Dim, Signature, Tensor
from runtime.tokenizing import ClipTokenizer

CLASSES: Final[Mapping[str, Any]] = {
    "text_encoder": CLIPTextConfig,
    "text_encoder_2": CLIPTextConfig,
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
}
"""What reads the config.json of a component."""

FEWER: Final[Mapping[str, Mapping[str, Any]]] = {
    "text_encoder": {"num_hidden_layers": 2},
    "text_encoder_2": {"num_hidden_layers": 2},
    "unet": {"layers_per_block": 1, "transformer_layers_per_block": 1, "reverse_transformer_layers_per_block": None},
    "vae": {"layers_per_block": 1},
}
"""The twin has one layer where the model repeats several."""


class TextEncoder(nn.Module):
    def __init__(self, model: CLIPTextModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: TorchTensor) -> tuple[TorchTensor, ...]:
        return (self.model(input_ids=input_ids).last_hidden_state,)


class UNet(nn.Module):
    def __init__(self, model: UNet2DConditionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: TorchTensor, timestep: TorchTensor, encoder_hidden_states: TorchTensor) -> tuple[TorchTensor, ...]:
        return (self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0],)


class VaeDecoder(nn.Module):
    def __init__(self, model: AutoencoderKL) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: TorchTensor) -> tuple[TorchTensor, ...]:
        return (self.model.decode(latents, return_dict=False)[0],)


class VaeEncoder(nn.Module):
    """The mean of the latent distribution: deterministic, so that a picture always encodes alike."""

    def __init__(self, model: AutoencoderKL) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: TorchTensor) -> tuple[TorchTensor, ...]:
        return (self.model.encode(image).latent_dist.mode(),)


@dataclass(frozen=True)
class Grid:
    """How long the edges of latents and pictures may be. `edge` is the latents' in training, `scale` pixels lie along one latent.

    The UNet halves an edge again and again: it must be a multiple of `step` latents.
    """

    edge: int
    scale: int
    step: int

    @classmethod
    def of(cls, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> Grid:
        """From the configs of both networks, in which each block but the last halves the edge."""
        scale, step = (2 ** (len(config["block_out_channels"]) - 1) for config in (vae, unet))
        return cls(int(unet["sample_size"]), scale, step)

    @property
    def longest(self) -> int:
        """The longest latent edge that is accepted."""
        return max(128, 4 * self.edge)

    @property
    def sizes(self) -> Sizes:
        """Of pictures, in pixels."""
        least = self.step * self.scale
        return Sizes(min=least, max=self.longest * self.scale, default=self.edge * self.scale, multiple=least)

    def latent(self, name: str) -> Dim:
        return Dim(name=name, min=self.step, opt=self.edge, max=self.longest, multiple=self.step)

    def pixel(self, name: str) -> Dim:
        sizes = self.sizes
        return Dim(name=name, min=sizes.min, opt=sizes.default, max=sizes.max, multiple=sizes.multiple)

    def latents(self, name: str, channels: int) -> Tensor:
        """[batch, channels, height, width]"""
        return Tensor(name=name, dtype="float32", dims=(BATCH, channels, self.latent("height"), self.latent("width")))


def configs(source: Source, *names: str, reduced: bool = False) -> list[dict[str, Any]]:
    """The config.json of each named component, with the library's value for what it leaves out. Raises NotFound or SourceError.

    Without the precision it was saved in, which transformers gives to models inside a model: graphs compute in float32.
    """
    found = []
    for name in names:
        parameters = inspect.signature(CLASSES[name]).parameters.values()
        usual = {p.name: p.default for p in parameters if p.default is not p.empty}
        config = {**usual, **read_json(source.root / name / "config.json"), **(FEWER[name] if reduced else {})}
        found.append({key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")})
    return found


def require(source: Source, component: str, config: Mapping[str, Any], **expected: object) -> None:
    """Raises UnsupportedModel where the config of a component says something else than what is expected."""
    other = [f"{key} {config[key]!r} (expected {value!r})" for key, value in expected.items() if config[key] != value]
    if other:
        raise UnsupportedModel(
            f"{source.root / component / 'config.json'} says {', '.join(other)}: a {source.architecture} of that kind cannot be built. "
            "Take a checkpoint of the model it was derived from"
        )


def text_part(name: str, model: Any, module: nn.Module, reference: Reference, outputs: Mapping[str, tuple[int | Dim, ...]]) -> Part:
    """A CLIP text encoder. `outputs` are the shapes, behind the batch, of what `module` gives; the token dim is `tokens(model)`."""
    ids = Tensor(name="input_ids", dtype="int64", dims=(BATCH, tokens(model)), values="below", limit=model.config.vocab_size)
    return Part(
        name,
        Component(name, model),
        module,
        reference,
        Signature(inputs=(ids,), outputs=tuple(Tensor(name=n, dtype="float32", dims=(BATCH, *dims)) for n, dims in outputs.items())),
        least_bits=8,  # its error bends every step alike: at int4 the sample draws 7 of 100 prompts wrong by that alone
    )


def tokens(model: Any) -> Dim:
    """The tokens that a text encoder reads."""
    length = model.config.max_position_embeddings
    return Dim(name="sequence", min=1, opt=length, max=length)


def unet_part(model: UNet2DConditionModel, module: nn.Module, reference: Reference, grid: Grid, length: int, *added: Tensor) -> Part:
    """The UNet on prompts of usually `length` tokens. `added` are the inputs of `module` behind those that every one has."""
    config = model.config
    context = Dim(name="sequence", min=1, opt=length, max=16 * length)
    timestep = Tensor(name="timestep", dtype="float32", dims=(BATCH,), values="below", limit=1000)
    states = Tensor(
        name="encoder_hidden_states",
        dtype="float32",
        dims=(BATCH, context, config.cross_attention_dim),
        condition=not added,  # what is added to the time embedding is of the prompt, too: then rows differ from the first block on
    )
    return Part(
        "unet",
        Component("unet", model),
        module,
        reference,
        Signature(
            inputs=(grid.latents("sample", config.in_channels), timestep, states, *added),
            outputs=(grid.latents("noise_pred", config.out_channels),),
        ),
    )


def vae_parts(model: AutoencoderKL, grid: Grid, float16: bool = True) -> list[Part]:
    """Decoder and encoder. `float16` as in `Part`."""
    component = Component("vae", model)
    image = Tensor(
        name="image", dtype="float32", dims=(BATCH, model.config.in_channels, grid.pixel("image_height"), grid.pixel("image_width"))
    )
    latents = grid.latents("latents", model.config.latent_channels)
    decode, encode = Signature(inputs=(latents,), outputs=(image,)), Signature(inputs=(image,), outputs=(latents,))
    return [
        Part("vae_decoder", component, VaeDecoder(model), lambda z: (model.decode(z).sample,), decode, float16=float16),
        Part("vae_encoder", component, VaeEncoder(model), lambda x: (model.encode(x).latent_dist.mean,), encode, float16=float16),
    ]


def settings(source: Source, scheduler: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The pipeline's settings; `scheduler` is what the library's pipeline makes of the model's own, `more` what a family adds.

    Raises SourceError naming every value that no model can have, and InvalidInput for a noise schedule that no sampler here follows.
    """
    unet, vae = configs(source, "unet", "vae")
    grid = Grid.of(unet, vae)
    scaling = {
        "scaling_factor": vae["scaling_factor"],
        "shift_factor": vae["shift_factor"] or 0.0,
        "scale_factor": grid.scale,
        "latent_channels": vae["latent_channels"],
    }
    found: Any = {"scheduler": SchedulerConfig.parse(scheduler), "vae": scaling, "sizes": grid.sizes, **more}
    try:
        return DiffusionConfig(**found).dump()
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, fault['loc']))} {fault['input']!r}: {fault['msg']}" for fault in error.errors())
        raise SourceError(f"{source.root}: its config files say what no model can have: {reasons}. Download them again") from None


def scheduler_config(source: Source) -> dict[str, Any]:
    """The model's noise schedule, as published. Raises NotFound or SourceError."""
    return read_json(source.root / "scheduler" / "scheduler_config.json")


def files(source: Source, encoders: Mapping[str, str]) -> dict[str, Path]:
    """The files of scheduler and tokenizers by their path in the bundle. `encoders` are the text encoders by their tokenizer's folder.

    Raises NotFound for a missing folder, and SourceError for a tokenizer that cannot be read or reads more tokens than its encoder.
    """
    found: dict[str, Path] = {}
    for name in (*encoders, "scheduler"):
        folder = source.root / name
        if not folder.is_dir():
            raise NotFound(
                f"{folder} does not exist: a {source.architecture} needs it. Download the checkpoint again, with all its folders"
            )
        found |= {f"{name}/{file.name}": file for file in sorted(folder.iterdir()) if file.is_file()}
    lengths = {name: _length(source, name, encoder) for name, encoder in encoders.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise SourceError(f"{source.root}: its tokenizers make prompts of different lengths ({told} tokens). Download the checkpoint again")
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
            f"{folder} makes prompts of {length} tokens (model_max_length in tokenizer_config.json), {encoder} reads at most "
            f"{config['max_position_embeddings']} (max_position_embeddings in config.json): take both from the same checkpoint"
        )
    return length


def parts(source: Source, reduced: bool) -> list[Part]:
    text_config, unet_config, vae_config = configs(source, "text_encoder", "unet", "vae", reduced=reduced)
    require(source, "unet", unet_config, in_channels=vae_config["latent_channels"], time_cond_proj_dim=None, addition_embed_type=None)
    with without_weights():
        text = CLIPTextModel(CLIPTextConfig(**text_config)).eval()
        unet = UNet2DConditionModel.from_config(unet_config).eval()
        vae = AutoencoderKL.from_config(vae_config).eval()
    grid, length = Grid.of(unet_config, vae_config), tokens(text)
    return [
        text_part(
            "text_encoder",
            text,
            TextEncoder(text),
            lambda ids: (text(ids).last_hidden_state,),
            {"last_hidden_state": (length, text.config.hidden_size)},
        ),
        unet_part(unet, UNet(unet), lambda x, t, states: (unet(x, t, states).sample,), grid, length.opt),
        *vae_parts(vae, grid),
    ]


def config(source: Source) -> dict[str, Any]:
    # diffusers' StableDiffusionPipeline corrects old files so on load: they were written before these fields existed.
    scheduler = scheduler_config(source) | {"steps_offset": 1, "clip_sample": False}
    return settings(source, scheduler, defaults=Defaults.read(source.root))


def assets(source: Source) -> Mapping[str, Path]:
    return files(source, {"tokenizer": "text_encoder"})


FAMILY = Family("stable-diffusion", "diffusion", ("StableDiffusionPipeline",), parts, config, assets)
