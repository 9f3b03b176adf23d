"""The committed samples are what any user of diffusers and transformers expects: they load unchanged, small and without
warnings.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2Processor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from export.checkpoint.source import resolve
from samples.world.scenes import test_prompts as picture_prompts
from samples.world.scoring import score_picture

SAMPLES = Path(__file__).parents[1] / "samples"
LIMIT = 40_000_000


def test_all_weights_are_half_precision_safetensors_within_the_limit() -> None:
    files = [path for path in SAMPLES.rglob("*") if path.suffix in (".safetensors", ".bin", ".pt", ".ckpt")]
    assert files and {path.suffix for path in files} == {".safetensors"}
    assert sum(path.stat().st_size for path in files) <= LIMIT


def test_the_picture_model_draws_with_diffusers(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pipe: Any = StableDiffusionPipeline.from_pretrained(SAMPLES / "shapes-diffusion", dtype=torch.float32)
    assert "not used" not in caplog.text and "newly initialized" not in caplog.text
    pipe.set_progress_bar_config(disable=True)
    assert pipe.unet.sample_size * pipe.vae_scale_factor >= 128
    scenes = picture_prompts(6)
    pictures = pipe([scene.caption for scene in scenes], num_inference_steps=20, guidance_scale=1.5, output_type="np",
                    generator=torch.Generator().manual_seed(0)).images  # fmt: skip
    right = [
        score_picture((picture * 255).round().astype(np.uint8), scene)
        for picture, scene in zip(pictures, scenes, strict=True)
    ]
    assert sum(map(bool, right)) >= 4


def test_the_vision_language_model_answers_with_transformers(caplog: pytest.LogCaptureFixture) -> None:
    folder = SAMPLES / "shapes-vlm"
    with caplog.at_level(logging.WARNING):
        model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    assert "not used" not in caplog.text and "newly initialized" not in caplog.text
    text = model.config.text_config
    assert text.num_key_value_heads < text.num_attention_heads
    processor: Any = LlavaProcessor.from_pretrained(folder)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is the background?"}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    inputs = processor(images=[np.full((128, 128, 3), 255, np.uint8)], text=prompt, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_the_captioning_model_answers_with_transformers(caplog: pytest.LogCaptureFixture) -> None:
    folder = SAMPLES / "shapes-blip2"
    with caplog.at_level(logging.WARNING):
        model: Any = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    assert "not used" not in caplog.text and "newly initialized" not in caplog.text
    processor: Any = Blip2Processor.from_pretrained(folder)
    white = np.full((128, 128, 3), 255, np.uint8)
    inputs = processor(images=[white], text="Question: what color is the background? Answer:", return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    assert processor.tokenizer.decode(ids, skip_special_tokens=True).strip() == "white"


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("shapes-diffusion", "StableDiffusionPipeline"),
        ("shapes-vlm", "LlavaForConditionalGeneration"),
        ("shapes-blip2", "Blip2ForConditionalGeneration"),
    ],
)
def test_samples_are_sources(name: str, architecture: str) -> None:
    source = resolve(f"sample:{name}")
    assert (source.root, source.name, source.architecture) == (SAMPLES / name, name, architecture)
