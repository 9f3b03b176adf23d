"""Loaded models whose engines are functions: measured and scored in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bundle.manifest import MANIFEST, Bundle, Manifest, Source, Submodel
from runtime.bundle.precision import Precision
from runtime.bundle.signature import BATCH, Array, Dim, Signature, Tensor
from runtime.diffusion.config import DiffusionConfig
from runtime.engine import FakeEngine
from runtime.pipelines.diffusion import DiffusionPipeline
from runtime.placing.loading import LoadedModel

SAMPLE = Path(__file__).parents[2] / "samples" / "shapes-diffusion"
EDGE = Dim(name="edge", min=4, opt=8, max=32)
CONFIG: dict[str, Any] = {
    "scheduler": {
        "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False, "steps_offset": 1,
    },
    "vae": {"scaling_factor": 1.0, "scale_factor": 16, "latent_channels": 4},
    "sizes": {"min": 64, "max": 512, "default": 128, "multiple": 16},
    "defaults": {"steps": 3},
}  # fmt: skip


def tensor(name: str, *dims: int | Dim, dtype: Any = "float32", limit: int = 0) -> Tensor:
    return Tensor(name=name, dtype=dtype, dims=dims, values="below" if limit else "normal", limit=limit)


def submodel(name: str, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> Submodel:
    return Submodel(
        name=name,
        signature=Signature(inputs=inputs, outputs=outputs),
        graph=f"onnx/{name}/model.onnx",
        precision=Precision.parse("float32"),
        nbytes=100,
    )


LATENT = (BATCH, 4, EDGE, EDGE.model_copy(update={"name": "other_edge"}))
PIXELS = (BATCH, 3, Dim(name="height", min=64, opt=128, max=512), Dim(name="width", min=64, opt=128, max=512))
SEQUENCE = Dim(name="sequence", min=1, opt=32, max=77)
SUBMODELS = (
    submodel(
        "text_encoder",
        (tensor("input_ids", BATCH, SEQUENCE, dtype="int64", limit=9),),
        (tensor("last_hidden_state", BATCH, SEQUENCE, 8),),
    ),
    submodel(
        "unet",
        (tensor("sample", *LATENT), tensor("timestep", BATCH), tensor("encoder_hidden_states", BATCH, SEQUENCE, 8)),
        (tensor("noise_pred", *LATENT),),
    ),
    submodel("vae_decoder", (tensor("latents", *LATENT),), (tensor("image", *PIXELS),)),
    submodel("vae_encoder", (tensor("image", *PIXELS),), (tensor("latents", *LATENT),)),
)


def write_bundle(root: Path) -> Bundle:
    """A manifest and nothing else."""
    root.mkdir()
    manifest = Manifest(
        name="fake", key="", pipeline="diffusion", task="image",
        quant="none", submodels=SUBMODELS, artifacts=(), config=CONFIG,
        versions={}, files={},
        source=Source(name="fake-source", family="fake", architecture="Fake", fingerprint=""),
    )  # fmt: skip
    (root / MANIFEST).write_text(manifest.model_dump_json())
    return Bundle(root)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "fake")


@pytest.fixture
def drawing(bundle: Bundle) -> LoadedModel:
    """A diffusion model that shrinks its noise: its picture depends on the seed and the prompt."""

    def encode(inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {"last_hidden_state": np.repeat(inputs["input_ids"][..., None], 8, axis=2).astype(np.float32) / 500}

    def predict(inputs: Mapping[str, Array]) -> dict[str, Array]:
        told = inputs["encoder_hidden_states"].mean(axis=(1, 2)).reshape(-1, 1, 1, 1)
        return {"noise_pred": np.asarray(inputs["sample"] * np.float32(0.5) + told, np.float32)}

    def decode(inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {"image": inputs["latents"][:, :3].repeat(16, axis=2).repeat(16, axis=3)}

    engines = {
        "text_encoder": FakeEngine(encode),
        "unet": FakeEngine(predict),
        "vae_decoder": FakeEngine(decode),
        "vae_encoder": FakeEngine(lambda inputs: {"latents": inputs["image"]}),
    }
    for part in SUBMODELS:
        engines[part.name].submodel = part
    return LoadedModel(
        bundle,
        "image",
        "fake",
        "none",
        engines,
        DiffusionPipeline(DiffusionConfig.parse(CONFIG), SAMPLE / "tokenizer"),
    )
