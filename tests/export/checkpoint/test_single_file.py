"""Single files in the original layout: every tensor as diffusers' from_single_file loads it, and what such a file
lacks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import export.cli.commands
from export.build.build import build
from export.build.options import Options
from export.build.state import Build
from export.checkpoint import gguf_file
from export.checkpoint.source import resolve
from export.checkpoint.tensors import read_header
from runtime.errors import InvalidInput, NotFound, SourceError, UnsupportedModel
from tests.export.checkpoint.original import small_files, write_original

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),  # torch tensors inside diffusers
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
KINDS = ("tiny_diffusion", "tiny_v2", "tiny_xl")


@pytest.fixture(scope="module", params=KINDS)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A single file, and the folder with its small files."""
    folder = request.getfixturevalue(request.param)
    output = tmp_path_factory.mktemp("single")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    return write_original(pipeline, output / "model.safetensors"), small_files(folder, output / "small")


def opened(file: Path, small: Path | None) -> Build:
    return Build.open(Options(str(file), file.parent / "bundle", config=small))


def test_every_tensor_is_that_of_diffusers(published: tuple[Path, Path]) -> None:
    file, small = published
    state = opened(file, small)
    theirs: Any = getattr(diffusers, state.source.architecture).from_single_file(
        str(file), config=str(small), local_files_only=True
    )
    seen = 0
    for part in state.parts:
        (component,) = part.components
        wanted = getattr(theirs, component.folder).state_dict()
        weights = state.weights(part)
        assert weights.keys() == component.model.state_dict().keys()
        for name, ref in weights.items():
            np.testing.assert_array_equal(ref.array().astype(np.float32), wanted[name].float().numpy(), name)
            seen += 1
            assert ref.file == file or name == "text_projection.weight"
    assert seen > 150


@pytest.mark.parametrize("published", ["tiny_diffusion"], indirect=True)
def test_a_bundle_of_a_single_file(published: tuple[Path, Path], tmp_path: Path) -> None:
    """Parity compares its graphs with the library's models on these weights."""
    file, small = published
    bundle = build(Options(str(file), tmp_path / "bundle", config=small, parity="full"))[0]
    assert bundle.manifest.name == "model" and {one.name for one in bundle.manifest.submodels} >= {"unet"}
    assert all(one.parity and one.parity.error < 1e-4 for one in bundle.manifest.submodels)


@pytest.mark.parametrize("published", ["tiny_v2"], indirect=True)
def test_what_is_missing_or_wrong_is_named(published: tuple[Path, Path], tiny_vlm: Path, tmp_path: Path) -> None:
    file, small = published
    with pytest.raises(
        InvalidInput, match=r"config: is missing: .* holds weights alone\. Name a folder with its small"
    ):
        opened(file, None)
    with pytest.raises(NotFound, match=r"unet.config\.json does not exist: --config expects a folder with model_index"):
        opened(file, tmp_path)
    with pytest.raises(InvalidInput, match="config: belongs to a single file"):
        resolve(str(tiny_vlm), config=small)
    with pytest.raises(InvalidInput, match="variant: belongs to a folder"):
        resolve(str(file), variant="fp16", config=small)

    tensors = load_file(file)
    without = {name: one for name, one in tensors.items() if not name.startswith("first_stage_model.")}
    save_file(without, tmp_path / "without.safetensors")
    with pytest.raises(
        SourceError, match=r"without\.safetensors has no weights of vae, and neither has --config: .*small.vae"
    ):
        opened(tmp_path / "without.safetensors", small)
    del tensors["model.diffusion_model.out.2.bias"]
    save_file(tensors, tmp_path / "short.safetensors")
    state = opened(tmp_path / "short.safetensors", small)
    with pytest.raises(
        SourceError, match=r"short\.safetensors, read as .*unet, do not fit .* missing 1 \(conv_out\.bias"
    ):
        state.least_bytes()


@pytest.mark.parametrize("published", ["tiny_diffusion"], indirect=True)
def test_small_files_of_another_model_are_refused(published: tuple[Path, Path], tiny_xl: Path, tmp_path: Path) -> None:
    file, _ = published
    with pytest.raises(
        SourceError, match=r"is of another model than .* reads hidden states of width 16 and latents of 4"
    ):
        opened(file, tiny_xl)
    save_file({"model.diffusion_model.double_blocks.0.weight": torch.ones(1)}, tmp_path / "flux.safetensors")
    with pytest.raises(UnsupportedModel, match="has no UNet of Stable Diffusion"):
        opened(tmp_path / "flux.safetensors", None)


@pytest.mark.parametrize(("width", "channels", "of"), [
    (768, 4, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    (768, 9, "stable-diffusion-v1-5/stable-diffusion-inpainting"),
    (1024, 4, "stabilityai/stable-diffusion-2-1"), (2048, 4, "stabilityai/stable-diffusion-xl-base-1.0"),
    (1280, 4, "stabilityai/stable-diffusion-xl-refiner-1.0"),
])  # fmt: skip
def test_the_shapes_of_a_file_say_whose_small_files_it_needs(
    tmp_path: Path,
    width: int,
    channels: int,
    of: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    unet = "model.diffusion_model.input_blocks"
    tensors = {
        f"{unet}.0.0.weight": torch.zeros(320, channels, 3, 3),
        f"{unet}.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, width),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    monkeypatch.setattr(sys, "argv", ["enginecast", "build", str(tmp_path / "model.safetensors")])
    with pytest.raises(SystemExit):
        export.cli.commands.main()
    said = capfd.readouterr().err
    assert f"hf download {of} --include" in said and "--config FOLDER" in said
    (tmp_path / "unet").mkdir()
    config = {"cross_attention_dim": width, "in_channels": 5 - channels % 2 * 4}
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=f"those of {of}"):
        resolve(str(tmp_path / "model.safetensors"), config=tmp_path)


def write_gguf(tensors: dict[str, torch.Tensor], file: Path, kind: str) -> dict[str, np.ndarray[Any, Any]]:
    """Write tensors in this quantization where their rows divide into blocks; return what the library reads of them."""
    gguf = pytest.importorskip("gguf")
    quantized = gguf.GGMLQuantizationType[kind]
    writer, read = gguf.GGUFWriter(file, "sd"), {}
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            data = gguf.quantize(values, quantized)
            writer.add_tensor(name, data, raw_dtype=quantized)
            read[name] = gguf.dequantize(data, quantized)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
@pytest.mark.parametrize("published", ["tiny_diffusion"], indirect=True)
def test_gguf_files_are_dequantized_as_their_library_does(
    published: tuple[Path, Path], tiny_diffusion: Path, tmp_path: Path, kind: str
) -> None:
    """A whole model, and a UNet alone, whose other networks are those of the folder."""
    file, small = published
    tensors = load_file(file)
    read = write_gguf(tensors, tmp_path / "model.gguf", kind)
    assert len(read) > 3
    plain = opened(file, small)
    with patch.object(gguf_file, "_opened", wraps=gguf_file._opened) as reader:
        state = opened(tmp_path / "model.gguf", small)
    assert reader.call_count == 2, "once for what it is, and once for the weights of all networks"
    unet = {name.removeprefix("model.diffusion_model."): one for name, one in tensors.items() if "diffusion" in name}
    write_gguf(unet, tmp_path / "unet.gguf", kind)
    alone = opened(tmp_path / "unet.gguf", tiny_diffusion)
    assert state.notes == ()
    lacking = "text_encoder, vae are those of the folder of small files: unet.gguf has no weights of them"
    assert alone.notes == (lacking,)
    changed = 0
    for part, other, third in zip(plain.parts, state.parts, alone.parts, strict=True):
        wanted, got, last = plain.weights(part), state.weights(other), alone.weights(third)
        originals = {ref.offset: name for name, ref in read_header(file)[1].items()}
        for name, ref in wanted.items():
            values = read.get(originals[ref.offset], ref.array())
            np.testing.assert_array_equal(got[name].array(), values, name)
            changed += originals[ref.offset] in read
            np.testing.assert_array_equal(last[name].array(), values if part.name == "unet" else ref.array(), name)
    assert changed > 3


@pytest.mark.parametrize("published", ["tiny_diffusion"], indirect=True)
def test_a_damaged_gguf_file_is_named(published: tuple[Path, Path], tmp_path: Path) -> None:
    write_gguf({"input_blocks.0.0.weight": torch.ones(4, 4, 3, 3)}, tmp_path / "a.gguf", "Q8_0")
    content = (tmp_path / "a.gguf").read_bytes()
    for number, damaged in enumerate((b"", content[:40], content[:-200], b"GGUF" + b"\xff" * 60)):
        (tmp_path / f"{number}.gguf").write_bytes(damaged)
        with pytest.raises(SourceError, match=rf"{number}\.gguf is no GGUF file that can be read"):
            opened(tmp_path / f"{number}.gguf", published[1])
