"""Graphs of models of their published sizes, from config files alone: what they need of memory, and that they have the
published number of weights.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import (
    Blip2Config,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    MistralConfig,
)

from export.graph.trace import without_weights
from profiles.memory import measure
from tests.export.families.blip import save as save_blip
from tests.export.families.conftest import save_next

pytestmark = pytest.mark.full

MOST_BYTES: Final = 1.5e9
"""Anonymous memory that making the graphs of any model may take."""

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
}  # fmt: skip
VAE: Final[dict[str, Any]] = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
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
OPT_2_7B: Final[dict[str, Any]] = {
    "model_type": "opt", "vocab_size": 50304, "hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32,
    "num_attention_heads": 32, "word_embed_proj_dim": 2560, "max_position_embeddings": 2048,
}  # fmt: skip
FLAN_T5_XL: Final[dict[str, Any]] = {
    "model_type": "t5", "vocab_size": 32128, "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24,
    "num_decoder_layers": 24, "num_heads": 32, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip
Make = Callable[[Path, pytest.FixtureRequest], None]


def diffusion(kind: str, **texts: Mapping[str, Any]) -> Make:
    """The small files of a tiny checkpoint with the configs of a published one."""

    def make(folder: Path, request: pytest.FixtureRequest) -> None:
        tiny = request.getfixturevalue("tiny_xl" if "text_encoder_2" in texts else "tiny_diffusion")
        _small_files(tiny, folder)
        with without_weights():
            unet: Any = UNet2DConditionModel(**UNETS[kind])
            vae: Any = AutoencoderKL(**VAE)
        unet.save_config(folder / "unet")
        vae.save_config(folder / "vae")
        for name, fields in texts.items():
            file = folder / name / "config.json"
            config = CLIPTextConfig(**json.loads(file.read_bytes()) | {"vocab_size": 49408, **fields})
            config.save_pretrained(folder / name)

    return make


def llava(text: Any) -> Make:
    def make(folder: Path, request: pytest.FixtureRequest) -> None:
        _small_files(request.getfixturevalue("tiny_vlm"), folder)
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**TOWER), text_config=text, image_token_index=_placeholder(folder)
        )
        _save(config, "LlavaForConditionalGeneration", folder)

    return make


def llava_next(text: Any) -> Make:
    def make(folder: Path, request: pytest.FixtureRequest) -> None:
        tiny = save_next(request.getfixturevalue("tmp_path") / "tiny", grids=GRIDS)
        _small_files(tiny, folder)
        config = LlavaNextConfig(
            vision_config=CLIPVisionConfig(**TOWER),
            text_config=text,
            image_token_index=_placeholder(folder),
            image_grid_pinpoints=GRIDS,
        )
        _save(config, "LlavaNextForConditionalGeneration", folder)

    return make


def blip2(text: Mapping[str, Any]) -> Make:
    def make(folder: Path, request: pytest.FixtureRequest) -> None:
        _small_files(save_blip(request.getfixturevalue("tmp_path") / "tiny"), folder)
        known = json.loads((folder / "config.json").read_bytes())
        config = Blip2Config(  # its vision tower and Q-Former are those of the published checkpoints by default
            text_config=text, image_token_index=known["image_token_index"], num_query_tokens=32
        )
        _save(config, "Blip2ForConditionalGeneration", folder)

    return make


MODELS: Final[dict[str, tuple[Make, float]]] = {
    "stable-diffusion-1.5": (diffusion("stable-diffusion-1.5", text_encoder=CLIP_L), 1.066e9),
    "stable-diffusion-2.1": (diffusion("stable-diffusion-2.1", text_encoder=CLIP_H), 1.290e9),
    "stable-diffusion-xl": (diffusion("stable-diffusion-xl", text_encoder=CLIP_L, text_encoder_2=CLIP_G), 3.469e9),
    "llava-1.5-7b": (llava(LLAMA_7B), 7.06e9),
    "llava-1.5-13b": (llava(LLAMA_13B), 13.35e9),
    "bakllava-7b": (llava(MISTRAL_7B), 7.57e9),
    "llava-next-mistral-7b": (llava_next(MISTRAL_7B), 7.57e9),
    "llava-next-34b": (llava_next(YI_34B), 34.75e9),
    "blip2-opt-2.7b": (blip2(OPT_2_7B), 3.873e9),
    "blip2-flan-t5-xl": (blip2(FLAN_T5_XL), 3.94e9),
}
"""Each model's config files, and the number of weights of the published checkpoint. OPT's table of tokens, which its
decoder shares, counts twice.
"""


@pytest.mark.parametrize("name", MODELS)
def test_graphs_take_little_memory(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    make, published = MODELS[name]
    make(tmp_path / name, request)
    command = [sys.executable, "-m", "export", "build", str(tmp_path / name), "--graph-only"]
    measured = measure([*command, "--output", str(tmp_path / "graphs")], lambda stretch: None)
    assert measured.exit_code == 0
    graphs = json.loads((tmp_path / "graphs" / "graphs.json").read_bytes())
    weights = sum(graph["weights"] for graph in graphs)
    print(f"{name}: {weights / 1e9:.3f} billion weights, {measured.whole}")
    assert weights == pytest.approx(published, rel=0.02)
    assert measured.whole.anonymous <= MOST_BYTES


def _small_files(tiny: Path, folder: Path) -> None:
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors*"))


def _placeholder(folder: Path) -> int:
    """The id of the token that stands for a picture."""
    return int(json.loads((folder / "config.json").read_bytes())["image_token_index"])


def _save(config: Any, architecture: str, folder: Path) -> None:
    config.architectures = [architecture]
    config.save_pretrained(folder)
