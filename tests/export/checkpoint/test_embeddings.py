"""Learned tokens get the ids and rows that diffusers' load_textual_inversion gives them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from export.build.build import build
from export.build.options import Options
from export.build.state import Build
from export.checkpoint.additions import Addition
from runtime.bundle.manifest import Bundle
from runtime.diffusion.tokenizing import ClipTokenizer
from runtime.errors import SourceError
from runtime.placing.loading import load_model

PROMPTS = ("a <cat-toy> in red", "house", "<cat-toy> house <cat-toy>", "no learned token")
ENCODERS = (("text_encoder", "tokenizer", "clip_l", 16), ("text_encoder_2", "tokenizer_2", "clip_g", 24))


def saved(path: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of three vectors in diffusers' form, of one in A1111's, and of both encoders of SDXL."""
    folder = tmp_path_factory.mktemp("embeddings")
    torch.manual_seed(0)
    return {
        "toy": saved(folder / "toy.safetensors", **{"<cat-toy>": torch.randn(3, 16)}),
        "house": saved(folder / "house.safetensors", emb_params=torch.randn(1, 16)),
        "xl": saved(folder / "xl.safetensors", clip_l=torch.randn(2, 16), clip_g=torch.randn(2, 24)),
    }


def hidden(pipe: Any, encoder: str, tokenizer: str, prompt: str) -> tuple[list[int], Any]:
    """diffusers' ids and hidden states."""
    own = getattr(pipe, tokenizer)
    text = pipe.maybe_convert_prompt(prompt, own)
    ids = own(text, padding="max_length", max_length=own.model_max_length, return_tensors="pt").input_ids
    with torch.no_grad():
        return ids[0].tolist(), getattr(pipe, encoder)(ids, output_hidden_states=True)


def test_tokens_of_one_and_of_several_vectors(tiny_diffusion: Path, files: dict[str, Path], tmp_path: Path) -> None:
    import diffusers

    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(tiny_diffusion, dtype=torch.float32)
    pipe.load_textual_inversion(str(files["toy"]))
    pipe.load_textual_inversion(str(files["house"]), token="house")
    additions = (Addition("embedding", files["toy"]), Addition("embedding", files["house"]))
    bundle, _ = build(Options(str(tiny_diffusion), tmp_path / "b", additions=additions))
    assert [one.name for one in bundle.manifest.source.additions] == ["toy", "house"]
    tokenizer, model = ClipTokenizer(bundle.root / "tokenizer"), load_model(bundle.root, "onnxruntime")
    for prompt in PROMPTS:
        ids, wanted = hidden(pipe, "text_encoder", "tokenizer", prompt)
        assert tokenizer(prompt).tolist() == ids
        got = model.engines["text_encoder"].run({"input_ids": np.array([ids], np.int64)})["last_hidden_state"]
        np.testing.assert_allclose(got, wanted.last_hidden_state, atol=1e-4)
    model.close()


def test_both_text_encoders_of_xl(tiny_xl: Path, files: dict[str, Path], tmp_path: Path) -> None:
    import diffusers
    from safetensors.torch import load_file

    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(tiny_xl, dtype=torch.float32)
    for encoder, tokenizer, key, _ in ENCODERS:
        pipe.load_textual_inversion(
            load_file(files["xl"])[key], token="<cat-toy>", text_encoder=getattr(pipe, encoder),
            tokenizer=getattr(pipe, tokenizer),
        )  # fmt: skip
    named = tmp_path / "xl.safetensors"
    shutil.copy(files["xl"], named)
    state = Build.open(Options(str(tiny_xl), tmp_path / "b", additions=(Addition("embedding", named, "cat-toy"),)))
    state.check_weights()
    for part, (encoder, tokenizer, _, width) in zip(state.parts, ENCODERS, strict=False):
        table = next(ref for name, ref in state.weights(part).items() if name.endswith("token_embedding.weight"))
        wanted = getattr(pipe, encoder).get_input_embeddings().weight.detach()
        assert table.shape == tuple(wanted.shape) and wanted.shape[1] == width
        np.testing.assert_array_equal(table.array(), wanted)
        decoded = json.loads(state.family.assets(state.source)[f"{tokenizer}/added_tokens.json"].read_text())
        assert list(decoded) == ["cat-toy", "cat-toy_1"]


def refused(source: Path, path: Path, tmp_path: Path, name: str = "") -> str:
    with pytest.raises(SourceError) as error:
        Build.open(Options(str(source), tmp_path / "b", additions=(Addition("embedding", path, name),)))
    return str(error.value)


def test_files_that_do_not_fit_are_refused(
    tiny_diffusion: Path, tiny_xl: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    wide = saved(tmp_path / "wide.safetensors", wide=torch.ones(1, 17))
    assert "vectors of width 17, the text encoder's embedding has 16" in refused(tiny_diffusion, wide, tmp_path)
    assert "expected one tensor" in refused(tiny_diffusion, files["xl"], tmp_path)
    assert "has two text encoders" in refused(tiny_xl, files["toy"], tmp_path)
    assert "has already: give it another name" in refused(tiny_diffusion, files["house"], tmp_path, "a")
    whole = saved(tmp_path / "whole.safetensors", whole=torch.ones(1, 16, dtype=torch.int32))
    assert "expected floating-point vectors" in refused(tiny_diffusion, whole, tmp_path)
    nan = saved(tmp_path / "nan.safetensors", nan=torch.full((1, 16), float("nan")))
    assert "nan" in refused(tiny_diffusion, nan, tmp_path)


def test_bundles_without_learned_tokens_keep_the_published_files(diffusion_bundle: Path) -> None:
    assert not (diffusion_bundle / "tokenizer" / "added_tokens.json").exists()
    assert Bundle(diffusion_bundle).manifest.source.additions == ()
