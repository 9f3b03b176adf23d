"""LoRA files as diffusers reads them: the sums of weights and products equal those of its load_lora_weights and
fuse_lora.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from export.checkpoint.lora import read_lora
from runtime.errors import NotFound, SourceError, UnsupportedModel
from tests.export.checkpoint import loras

pytest.importorskip("peft", reason="diffusers reads LoRA files with it")
XL = ("unet", "text_encoder", "text_encoder_2")


def pipeline(folder: Path) -> Any:
    import diffusers

    return diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)


def models(pipe: Any) -> dict[str, nn.Module]:
    return {name: getattr(pipe, name) for name in XL if getattr(pipe, name, None) is not None}


def weights(pipe: Any) -> dict[str, dict[str, torch.Tensor]]:
    return {
        folder: {name: one.detach().clone() for name, one in model.named_parameters()}
        for folder, model in models(pipe).items()
    }


def summed(pipe: Any, *files: tuple[Path, float]) -> dict[str, dict[str, torch.Tensor]]:
    """The weights with ours added."""
    found = weights(pipe)
    for path, scale in files:
        for folder, layers in read_lora(path).matched(models(pipe), "pipeline").items():
            for name, low_rank in layers.items():
                found[folder][name] += scale * torch.from_numpy(low_rank.delta(tuple(found[folder][name].shape)))
    return found


def assert_equal(ours: Mapping[str, Any], theirs: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    changed = set()
    for folder, tensors in theirs.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(ours[folder][name], tensor, rtol=1e-5, atol=1e-6)
            if not torch.equal(tensor, before[folder][name]):
                changed.add(folder)
    assert changed == set(theirs)


def attention(path: str) -> bool:
    return "to_" in path or "_proj" in path or ".ff." in path or ".mlp." in path


@pytest.mark.parametrize("source", ["tiny_diffusion", "tiny_xl"])
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_products_equal_those_of_diffusers(
    source: str, layout: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(source)
    pipe = pipeline(folder)
    before = weights(pipe)
    make = loras.of_diffusers if layout == "diffusers" else loras.of_kohya
    path = make(tmp_path / "a.safetensors", models(pipe), attention, ranks=(2, 4, 3))
    ours = summed(pipe, (path, 0.7))
    loras.fused(pipe, (path, 0.7))
    assert_equal(ours, weights(pipe), before)


def test_convolutions_and_the_names_of_the_original_code(tiny_xl: Path, tmp_path: Path) -> None:
    pipe = pipeline(tiny_xl)
    before = weights(pipe)
    path = loras.of_kohya(tmp_path / "a.safetensors", models(pipe), lambda name: True, original=True, ranks=(2, 3))
    assert any("input_blocks_3_1" in name for name in load_file(path))
    ours = summed(pipe, (path, 0.5))
    loras.fused(pipe, (path, 0.5))
    assert_equal(ours, weights(pipe), before)


@pytest.fixture(scope="module")
def small() -> dict[str, nn.Module]:
    """A component with one layer of each kind."""
    return {"unet": nn.ModuleDict({"conv_in": nn.Conv2d(4, 8, 3), "proj": nn.Linear(8, 6)})}


def saved(path: Path, **tensors: torch.Tensor) -> Path:
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, path)
    return path


PROJ = {"unet__proj__lora_A__weight": torch.ones(2, 8), "unet__proj__lora_B__weight": torch.ones(6, 2)}


def test_older_names_of_diffusers(tmp_path: Path) -> None:
    attention = nn.ModuleDict({"to_q": nn.Linear(8, 8), "to_out": nn.ModuleList([nn.Linear(8, 8)])})
    text = nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(8, 8)}), "fc1": nn.Linear(8, 8)})
    names = {
        "unet.attn.processor.to_q_lora": ("unet", "attn.to_q.weight"),
        "unet.attn.processor.to_out_lora": ("unet", "attn.to_out.0.weight"),
        "text_encoder.text_model.self_attn.to_q_lora": ("text_encoder", "self_attn.q_proj.weight"),
        "text_encoder.text_model.fc1.lora_linear_layer": ("text_encoder", "fc1.weight"),
    }
    tensors = {f"{name}.{way}.weight": torch.ones(8, 8) for name in names for way in ("down", "up")}
    save_file(tensors, tmp_path / "a.safetensors")
    found = read_lora(tmp_path / "a.safetensors").matched(
        {"unet": nn.ModuleDict({"attn": attention}), "text_encoder": text}, "model"
    )
    assert {(folder, name) for folder, layers in found.items() for name in layers} == set(names.values())


def test_each_layer_has_its_own_alpha_and_rank(tmp_path: Path, small: dict[str, nn.Module]) -> None:
    path = saved(
        tmp_path / "a.safetensors", lora_unet_proj__lora_down__weight=torch.ones(2, 8),
        lora_unet_proj__lora_up__weight=torch.ones(6, 2), lora_unet_proj__alpha=torch.tensor(1.0),
        lora_unet_conv_in__lora_down__weight=torch.ones(4, 4, 3, 3),
        lora_unet_conv_in__lora_up__weight=torch.ones(8, 4, 1, 1), lora_unet_conv_in__alpha=torch.tensor(8.0),
    )  # fmt: skip
    layers = read_lora(path).matched(small, "model")["unet"]
    assert {name: (one.rank, one.factor) for name, one in layers.items()} == {
        "proj.weight": (2, 0.5), "conv_in.weight": (4, 2.0)
    }  # fmt: skip
    assert (layers["conv_in.weight"].delta((8, 4, 3, 3)) == 8).all()


@pytest.mark.parametrize(
    ("setting", "factor"),
    [({"unet.lora_alpha": 4}, 2.0), ({"unet.lora_alpha": 4, "unet.use_rslora": True}, 4 / 2**0.5),
        ({"unet.lora_alpha": 4, "unet.alpha_pattern": {"proj": 1}}, 0.5)],
)  # fmt: skip
def test_alpha_of_the_configuration_in_the_header(
    setting: dict[str, Any], factor: float, tmp_path: Path, small: dict[str, nn.Module]
) -> None:
    tensors = {name.replace("__", "."): tensor for name, tensor in PROJ.items()}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(setting)})
    layers = read_lora(tmp_path / "a.safetensors").matched(small, "model")["unet"]
    assert layers["proj.weight"].factor == pytest.approx(factor)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"unet__proj__lora_A__weight": torch.ones(2, 8)}, r"unet\.proj \(no up\)"),
        ({"unet__proj__lora_B__weight": torch.ones(6, 2)}, r"unet\.proj \(no down\)"),
        (PROJ | {"unet__bias": torch.ones(1)}, r"belong to no layer: 1 \(unet\.bias\)"),
        (PROJ | {"unet__other__alpha": torch.ones(1)}, r"belong to no layer: 1 \(unet\.other\.alpha\)"),
        ({}, "no tensor of a LoRA"),
        ({"unet__proj__lora_A__weight": torch.ones(0, 8), "unet__proj__lora_B__weight": torch.ones(6, 0)}, "rank 0"),
        (PROJ | {"unet__proj__alpha": torch.tensor(float("nan"))}, "alpha nan"),
    ],
)
def test_incomplete_files_are_refused(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=message):
        read_lora(saved(tmp_path / "a.safetensors", **tensors))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("proj__dora_scale", "DoRA"), ("proj__lora_magnitude_vector", "DoRA"), ("proj__hada_w1_a", "LoHa"),
        ("proj__lokr_w1", "LoKr"), ("proj__lora_mid__weight", "Tucker"), ("proj__oft_blocks", "OFT"),
        ("proj__diff", "difference of whole weights"), ("proj__lora_B__bias", "biases"),
        ("base_model__model__proj__lora_A__weight", "adapter_config.json")],
)  # fmt: skip
def test_other_kinds_are_refused_by_name(name: str, kind: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=kind):
        read_lora(saved(tmp_path / "a.safetensors", **PROJ, **{name: torch.ones(1)}))


def test_a_lora_of_another_model_is_refused(tmp_path: Path, small: dict[str, nn.Module]) -> None:
    other = {name.replace("proj", "transformer"): tensor for name, tensor in PROJ.items()}
    with pytest.raises(SourceError, match=r"1 \(unet\.transformer\) which no layer of this model matches"):
        read_lora(saved(tmp_path / "a.safetensors", **other)).matched(small, "model")
    wide = PROJ | {"unet__proj__lora_A__weight": torch.ones(2, 9)}
    with pytest.raises(SourceError, match=r"unet\.proj \(\[6, 2\] times \[2, 9\], its layer's weight is \[6, 8\]\)"):
        read_lora(saved(tmp_path / "a.safetensors", **wide)).matched(small, "model")


def test_files_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "a.pt")
    (tmp_path / "a.safetensors").write_bytes(b"no")
    for name, message in (("a.pt", "pickle"), ("a.safetensors", "is no safetensors file")):
        with pytest.raises(SourceError, match=message):
            read_lora(tmp_path / name)
    with pytest.raises(NotFound):
        read_lora(tmp_path / "absent.safetensors")
