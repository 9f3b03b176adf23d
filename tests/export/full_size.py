"""Checkpoints of published sizes: their config files, and random weights for those that are built whole."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import diffusers
import numpy as np
import pytest
import transformers
from safetensors.numpy import save_file
from transformers import CLIPTextConfig, CLIPVisionConfig, LlamaConfig, MistralConfig

from export.graph.trace import without_weights
from tests.export.families.blip import save as save_blip
from tests.export.families.blip import save_instruct
from tests.export.families.conftest import save_next

SHARD: Final = 1 << 30
"""Bytes of weights in one file, about."""
Fields = Mapping[str, Any]
CLIP_L: Final[dict[str, Any]] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768,
}  # fmt: skip
CLIP_H: Final[dict[str, Any]] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "projection_dim": 512, "hidden_act": "gelu",
}  # fmt: skip
CLIP_G: Final[dict[str, Any]] = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
UNET: Final[dict[str, Any]] = {"block_out_channels": (320, 640, 1280, 1280), "sample_size": 64}
UNETS: Final[dict[str, dict[str, Any]]] = {
    "stable-diffusion-1.5": UNET | {"cross_attention_dim": 768, "attention_head_dim": 8},
    "stable-diffusion-2.1": UNET
    | {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "stable-diffusion-xl": {
        "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2, 10), "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "stable-diffusion-xl-refiner": {
        "sample_size": 128, "cross_attention_dim": 1280, "attention_head_dim": (6, 12, 24, 24),
        "block_out_channels": (384, 768, 1536, 1536),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "use_linear_projection": True, "transformer_layers_per_block": 4, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2560,
    },
}  # fmt: skip
VAE: Final[dict[str, Any]] = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
CLIP_VISION_H: Final[dict[str, Any]] = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 14, "projection_dim": 1024, "hidden_act": "gelu",
}  # fmt: skip
TOWER: Final[dict[str, Any]] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
VICUNA: Final[dict[str, Any]] = {"vocab_size": 32064, "max_position_embeddings": 4096}
LLAMA_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, **VICUNA
)
LLAMA_13B = LlamaConfig(
    hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, **VICUNA
)
MISTRAL_7B = MistralConfig(vocab_size=32064, max_position_embeddings=32768, sliding_window=None)
YI_34B = LlamaConfig(
    vocab_size=64064, hidden_size=7168, intermediate_size=20480, num_hidden_layers=60, num_attention_heads=56,
    num_key_value_heads=8, max_position_embeddings=4096,
)  # fmt: skip
GRIDS: Final = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
Make = Callable[[Path, pytest.FixtureRequest], None]
OPT_2_7B: Final[dict[str, Any]] = {
    "model_type": "opt", "vocab_size": 50304, "hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32,
    "num_attention_heads": 32, "word_embed_proj_dim": 2560, "max_position_embeddings": 2048,
}  # fmt: skip
FLAN_T5_XL: Final[dict[str, Any]] = {
    "model_type": "t5", "vocab_size": 32128, "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24,
    "num_decoder_layers": 24, "num_heads": 32, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip


def diffusion(kind: str, **texts: Fields) -> Make:
    """The small files of a tiny checkpoint with the configs of a published one."""

    def make(folder: Path, request: pytest.FixtureRequest) -> None:
        tiny = request.getfixturevalue("tiny_xl" if "text_encoder_2" in texts else "tiny_diffusion")
        _small_files(tiny, folder)
        _save_config(diffusers.UNet2DConditionModel, UNETS[kind], folder / "unet")
        _save_config(diffusers.AutoencoderKL, VAE, folder / "vae")
        for name, fields in texts.items():
            file = folder / name / "config.json"
            config = CLIPTextConfig(**json.loads(file.read_bytes()) | {"vocab_size": 49408, **fields})
            config.save_pretrained(folder / name)

    return make


def refiner(folder: Path, request: pytest.FixtureRequest) -> None:
    """The refiner has no first text encoder."""
    diffusion("stable-diffusion-xl-refiner", text_encoder_2=CLIP_G)(folder, request)
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / name)
    file = folder / "model_index.json"
    index = json.loads(file.read_bytes()) | {
        "_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None], "tokenizer": [None, None],
        "requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False,
    }  # fmt: skip
    file.write_text(json.dumps(index))


def controlled(make: Make) -> Make:
    """A checkpoint with a control network beside it, in `controlnet`."""

    def both(folder: Path, request: pytest.FixtureRequest) -> None:
        make(folder, request)
        with without_weights():
            unet: Any = diffusers.UNet2DConditionModel.from_config(folder / "unet")
            network: Any = diffusers.ControlNetModel.from_unet(unet, load_weights_from_unet=False)
        network.save_config(folder / "controlnet")

    return both


NORM: Final = {"proj.bias": 4, "norm.weight": 1, "norm.bias": 1}
"""Vectors of an image adapter's projection, in widths of the text's states."""


def styled(make: Make) -> Make:
    """A checkpoint with an image adapter and its encoder beside it, in `adapter`."""

    def both(folder: Path, request: pytest.FixtureRequest) -> None:
        make(folder, request)
        config = CLIPVisionConfig(**CLIP_VISION_H)
        config.architectures = ["CLIPVisionModelWithProjection"]
        config.save_pretrained(folder / "adapter" / "image_encoder")
        with without_weights():
            unet: Any = diffusers.UNet2DConditionModel.from_config(folder / "unet")
        context, width = unet.config.cross_attention_dim, config.projection_dim
        shapes = {"image_proj.proj.weight": (4 * context, width)}
        shapes |= {f"image_proj.{name}": (times * context,) for name, times in NORM.items()}
        layers = [name.removesuffix(".processor") for name in unet.attn_processors if name.endswith("attn2.processor")]
        for number, layer in enumerate(layers):
            for which in ("to_k_ip", "to_v_ip"):
                key = f"ip_adapter.{2 * number + 1}.{which}.weight"
                shapes[key] = (unet.get_submodule(layer).to_k.out_features, context)
        _save_weights(shapes, folder / "adapter", "adapter")

    return both


def llava(text: Any) -> Make:
    def make(folder: Path, request: pytest.FixtureRequest) -> None:
        _small_files(request.getfixturevalue("tiny_vlm"), folder)
        _save_language(
            transformers.LlavaConfig(
                vision_config=CLIPVisionConfig(**TOWER), text_config=text, image_token_index=_placeholder(folder)
            ),
            "LlavaForConditionalGeneration",
            folder,
        )

    return make


def llava_next(text: Any) -> Make:
    def make(folder: Path, request: pytest.FixtureRequest) -> None:
        _small_files(save_next(request.getfixturevalue("tmp_path") / "tiny", grids=GRIDS), folder)
        _save_language(
            transformers.LlavaNextConfig(
                vision_config=CLIPVisionConfig(**TOWER),
                text_config=text,
                image_token_index=_placeholder(folder),
                image_grid_pinpoints=GRIDS,
            ),
            "LlavaNextForConditionalGeneration",
            folder,
        )

    return make


def blip2(text: Fields) -> Make:
    """Vision tower and Q-Former are those of the published checkpoints by default."""

    def make(folder: Path, request: pytest.FixtureRequest) -> None:
        _small_files(save_blip(request.getfixturevalue("tmp_path") / "tiny"), folder)
        config = transformers.Blip2Config(text_config=text, image_token_index=_placeholder(folder), num_query_tokens=32)
        _save_language(config, "Blip2ForConditionalGeneration", folder)

    return make


def instructblip(text: Fields) -> Make:
    def make(folder: Path, request: pytest.FixtureRequest) -> None:
        _small_files(save_instruct(request.getfixturevalue("tmp_path") / "tiny"), folder)
        config = transformers.InstructBlipConfig(
            text_config=text, image_token_index=_placeholder(folder), num_query_tokens=32
        )
        _save_language(config, "InstructBlipForConditionalGeneration", folder)

    return make


@dataclass(frozen=True)
class Model:
    """A published checkpoint: who writes its config files, how many values its weights have, and what is added at
    build (options of `enginecast build`, paths relative to its folder). OPT's table of tokens, which its decoder
    shares, counts twice.
    """

    make: Make
    weights: float
    additions: tuple[tuple[str, str], ...] = ()

    def options(self, folder: Path) -> list[str]:
        return [text for option, path in self.additions for text in (option, str(folder / path))]


SD15: Final = diffusion("stable-diffusion-1.5", text_encoder=CLIP_L)
SDXL: Final = diffusion("stable-diffusion-xl", text_encoder=CLIP_L, text_encoder_2=CLIP_G)
CONTROL: Final = (("--controlnet", "controlnet"),)
ADAPTER: Final = (("--ip-adapter", "adapter/adapter.safetensors"),)
MODELS: Final[dict[str, Model]] = {
    "stable-diffusion-1.5": Model(SD15, 1.066e9),
    "stable-diffusion-1.5-controlnet": Model(controlled(SD15), 1.427e9, CONTROL),
    "stable-diffusion-1.5-ip-adapter": Model(styled(SD15), 1.72e9, ADAPTER),
    "stable-diffusion-2.1": Model(diffusion("stable-diffusion-2.1", text_encoder=CLIP_H), 1.290e9),
    "stable-diffusion-xl": Model(SDXL, 3.469e9),
    "stable-diffusion-xl-controlnet": Model(controlled(SDXL), 4.72e9, CONTROL),
    "stable-diffusion-xl-refiner": Model(refiner, 3.04e9),
    "llava-1.5-7b": Model(llava(LLAMA_7B), 7.06e9),
    "llava-1.5-13b": Model(llava(LLAMA_13B), 13.35e9),
    "bakllava-7b": Model(llava(MISTRAL_7B), 7.57e9),
    "llava-next-mistral-7b": Model(llava_next(MISTRAL_7B), 7.57e9),
    "llava-next-34b": Model(llava_next(YI_34B), 34.75e9),
    "blip2-opt-2.7b": Model(blip2(OPT_2_7B), 3.873e9),
    "blip2-flan-t5-xl": Model(blip2(FLAN_T5_XL), 3.94e9),
    "instructblip-flan-t5-xl": Model(instructblip(FLAN_T5_XL), 4.02e9),
}


def fill(folder: Path) -> int:
    """Write random float16 weights beside every config file of a checkpoint; return their bytes. They are one block of
    noise over and over, from another place on for each tensor: tools store equal tensors once.
    """
    return sum(_save_weights(_shapes(file), file.parent, stem) for file, stem in _models(folder))


def _models(folder: Path) -> Iterator[tuple[Path, str]]:
    for file in sorted(folder.rglob("config.json")):
        yield file, "diffusion_pytorch_model" if "_class_name" in json.loads(file.read_bytes()) else "model"


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of the model that a config file describes."""
    config = json.loads(file.read_bytes())
    with without_weights():
        if "_class_name" in config:
            model: Any = getattr(diffusers, config["_class_name"]).from_config(file.parent)
        else:
            kind = getattr(transformers, config["architectures"][0])
            model = kind(kind.config_class.from_pretrained(file.parent))
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    return {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if name not in tied and value.dtype.is_floating_point
    }


def _save_weights(shapes: Mapping[str, tuple[int, ...]], folder: Path, stem: str) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    noise = (np.random.default_rng(0).standard_normal((1 << 24) - 3, np.float32) * 0.02).astype(np.float16)
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, shape in shapes.items():
        if size > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * int(np.prod(shape))
    places: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _values(name, shapes[name], noise) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return total


def _values(name: str, shape: tuple[int, ...], noise: np.ndarray[Any, np.dtype[np.float16]]) -> Any:
    if name.endswith("bias"):
        return np.zeros(shape, np.float16)
    return np.ones(shape, np.float16) if "norm" in name else np.resize(np.roll(noise, zlib.crc32(name.encode())), shape)


def _small_files(tiny: Path, folder: Path) -> None:
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors*"))


def _placeholder(folder: Path) -> int:
    """The id of the token that stands for a picture."""
    return int(json.loads((folder / "config.json").read_bytes())["image_token_index"])


def _save_config(kind: Any, fields: Fields, folder: Path) -> None:
    with without_weights():
        model: Any = kind(**fields)
    model.save_config(folder)


def _save_language(config: Any, architecture: str, folder: Path) -> None:
    config.architectures = [architecture]
    config.save_pretrained(folder)
    _resize_pictures(folder, config.vision_config.image_size, config.vision_config.patch_size)
    if config.text_config.model_type == "t5":  # the library writes that all of T5 are tied, as published files do not
        file = folder / "config.json"
        fields = json.loads(file.read_bytes())
        fields["text_config"]["tie_word_embeddings"] = False
        file.write_text(json.dumps(fields))


def _resize_pictures(folder: Path, edge: int, patch: int) -> None:
    """Let the files of a tiny checkpoint's processor make pictures of a vision tower's size."""
    for file in (folder / "processor_config.json", folder / "preprocessor_config.json"):
        if file.is_file():
            fields = json.loads(file.read_bytes())
            pictures = fields.get("image_processor", fields)
            for name in {"size", "crop_size"} & pictures.keys():
                pictures[name] = dict.fromkeys(pictures[name], edge)
            if "patch_size" in fields:
                fields["patch_size"] = patch
            file.write_text(json.dumps(fields))
