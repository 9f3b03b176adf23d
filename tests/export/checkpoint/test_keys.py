"""`Checkpoint.mapped` gives, byte for byte, what from_pretrained loads, whatever form the checkpoint was
published in.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter

from export.checkpoint.keys import map_names
from export.checkpoint.source import Checkpoint, open_component
from export.checkpoint.tensors import TensorRef
from runtime.errors import SourceError, UnsupportedModel

Rename = Callable[[str], str]
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype).split(".")[-1]
)

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
BLOCKS: dict[str, Any] = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def clip() -> Any:
    return CLIPTextModel(CLIPTextConfig(**TEXT))


def unet() -> Any:
    return UNet2DConditionModel(  # type: ignore[no-untyped-call]
        sample_size=8,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **BLOCKS,
    )


def vae() -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**blocks, **BLOCKS)  # type: ignore[no-untyped-call]


def llava(tied: bool = False) -> Any:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    text = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision},
        text_config={"model_type": "llama", "tie_word_embeddings": tied, **text},
        image_token_index=49,
        tie_word_embeddings=tied,
    )
    return LlavaForConditionalGeneration(config)


def rewrite(
    folder: Path,
    rename: Rename = lambda name: name,
    extra: dict[str, torch.Tensor] | None = None,
    drop: tuple[str, ...] = (),
) -> None:
    """Change the names in the folder's one weight file."""
    (file,) = folder.glob("*.safetensors")
    state = {rename(name): value for name, value in load_file(file).items() if name not in drop}
    save_file({**state, **(extra or {})}, file, metadata={"format": "pt"})


def assert_as_loaded(folder: Path, model: Any, dtype: torch.dtype) -> dict[str, TensorRef]:
    """Compare the mapping for a model on the meta device with the published dtype's from_pretrained."""
    key = "dtype" if hasattr(model, "all_tied_weights_keys") else "torch_dtype"
    loaded = type(model).from_pretrained(folder, **{key: dtype}).state_dict()
    found = open_component(folder).mapped(model.to("meta"))
    assert found.keys() == loaded.keys()
    for name, value in loaded.items():
        data = np.ascontiguousarray(found[name].array())
        assert data.shape == tuple(value.shape), name
        assert data.tobytes() == value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), name
    return found


@DTYPES
def test_clip_text_model(tmp_path: Path, dtype: torch.dtype) -> None:
    clip().to(dtype).save_pretrained(tmp_path)
    assert_as_loaded(tmp_path, clip(), dtype)


def test_clip_text_model_as_sd_publishes_it(tmp_path: Path) -> None:
    clip().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda name: f"text_model.{name}", {"text_model.embeddings.position_ids": torch.arange(77)[None]})
    assert_as_loaded(tmp_path, clip(), torch.float32)


def test_clip_text_model_from_a_model_with_a_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    CLIPTextModelWithProjection(CLIPTextConfig(**TEXT)).save_pretrained(tmp_path)
    with caplog.at_level("INFO", "export.checkpoint.keys"):
        assert_as_loaded(tmp_path, clip(), torch.float32)
    assert "no use for 1 (text_projection.weight)" in caplog.text


@pytest.mark.parametrize(
    ("rename", "extra", "named"),
    [
        (lambda name: f"_orig_mod.{name}", {}, r"_orig_mod\..* are of a model compiled by torch: save the model in it"),
        (lambda name: f"module.{name}", {}, "wrapped for training on several devices"),
        (lambda name: name.replace("q_proj.", "q_proj.base_layer."), {},
            r"base_layer.* adapter \(LoRA\) that is not merged"),
        (
            lambda name: name.replace("q_proj.", "q_proj.base_layer."),
            {"encoder.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 16)},
            r"adapter \(LoRA\) that is not merged into its model: merge it",
        ),
        (lambda name: name, {"encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 16)}, "merge it"),
        (lambda name: name, {"encoder.layers.0.self_attn.to_q_lora.down.weight": torch.ones(2, 16)}, "merge it"),
        (lambda name: name.replace("q_proj.weight", "q_proj.qweight"), {}, "are quantized already"),
    ],
)  # fmt: skip
def test_names_that_say_how_the_weights_were_saved(
    tmp_path: Path, rename: Rename, extra: dict[str, torch.Tensor], named: str
) -> None:
    """What a wrapper or an adapter adds would be left out, so it is refused."""
    clip().save_pretrained(tmp_path)
    rewrite(tmp_path, rename, extra)
    with pytest.raises(UnsupportedModel, match=named) as caught:
        open_component(tmp_path).mapped(clip().to("meta"))
    assert "ownload" not in str(caught.value)


@pytest.mark.parametrize("make", [unet, clip])
def test_of_shards_and_a_whole_file_the_library_s_choice_is_taken(tmp_path: Path, make: Callable[[], Any]) -> None:
    """They hold other values here, as where a checkpoint was saved into the folder of another."""
    make().save_pretrained(tmp_path)
    make().save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    for file in (tmp_path / "shards").glob("*model*"):
        file.rename(tmp_path / file.name)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_as_loaded(tmp_path, make(), torch.float32)


@pytest.mark.parametrize("make", [unet, clip])
def test_a_pickle_beside_is_not_read(tmp_path: Path, make: Callable[[], Any]) -> None:
    make().save_pretrained(tmp_path)
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.ckpt"):
        (tmp_path / name).write_bytes(b"no weights")
    assert_as_loaded(tmp_path, make(), torch.float32)


@DTYPES
def test_unet(tmp_path: Path, dtype: torch.dtype) -> None:
    unet().to(dtype).save_pretrained(tmp_path)
    assert_as_loaded(tmp_path, unet(), dtype)


def test_sharded_unet(tmp_path: Path) -> None:
    unet().save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_as_loaded(tmp_path, unet(), torch.float32)


@DTYPES
def test_vae(tmp_path: Path, dtype: torch.dtype) -> None:
    vae().to(dtype).save_pretrained(tmp_path)
    assert_as_loaded(tmp_path, vae(), dtype)


def old_vae(name: str) -> str:
    """As the SD 1.x VAE on the hub is published."""
    if ".attentions." in name:
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{new}.", f".{old}.")
    return name


def test_vae_with_old_names(tmp_path: Path) -> None:
    vae().save_pretrained(tmp_path)
    rewrite(tmp_path, old_vae)
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in open_component(tmp_path).tensors
    assert_as_loaded(tmp_path, vae(), torch.float32)


@DTYPES
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_llava(tmp_path: Path, dtype: torch.dtype, tied: bool, old: bool) -> None:
    llava(tied).to(dtype).save_pretrained(tmp_path, save_original_format=old)
    names = open_component(tmp_path).tensors.keys()
    assert ("language_model.model.layers.0.self_attn.q_proj.weight" in names) == old
    assert any("lm_head" in name for name in names) != tied
    found = assert_as_loaded(tmp_path, llava(tied), dtype)
    assert (found["lm_head.weight"] is found["model.language_model.embed_tokens.weight"]) == tied


def test_sharded_llava(tmp_path: Path) -> None:
    llava().save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_as_loaded(tmp_path, llava(), torch.float32)


def test_llava_as_the_hub_has_it(tmp_path: Path) -> None:
    """transformers 4 wrote `vision_tower.vision_model.`, and older ones the buffers that are now computed."""
    llava().save_pretrained(tmp_path, save_original_format=True)
    buffers = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(5)[None],
    }
    rewrite(tmp_path, lambda name: name.replace("vision_tower.", "vision_tower.vision_model."), buffers)
    assert_as_loaded(tmp_path, llava(), torch.float32)


def test_old_and_new_names_map_to_the_same_bytes(tmp_path: Path) -> None:
    model = llava()
    for old in (False, True):
        model.save_pretrained(tmp_path / str(old), save_original_format=old)
    new, old_ = (open_component(tmp_path / str(old)).mapped(model) for old in (False, True))
    assert {name: ref.array().tobytes() for name, ref in new.items()} == {
        name: ref.array().tobytes() for name, ref in old_.items()
    }


def test_tied_weights_that_are_both_published(tmp_path: Path) -> None:
    model = llava(tied=True)
    model.save_pretrained(tmp_path, save_original_format=False)
    embedding = model.get_input_embeddings().weight.detach()
    rewrite(tmp_path, extra={"lm_head.weight": embedding.clone()})
    found = assert_as_loaded(tmp_path, llava(tied=True), torch.float32)
    assert found["lm_head.weight"] is found["model.language_model.embed_tokens.weight"]

    rewrite(tmp_path, extra={"lm_head.weight": embedding + 1})
    with pytest.raises(
        SourceError, match=r"tied by config\.json but hold other values: set tie_word_embeddings to false"
    ):
        open_component(tmp_path).mapped(model)


def test_tied_weights_published_under_the_other_name(tmp_path: Path) -> None:
    model = llava(tied=True)
    model.save_pretrained(tmp_path, save_original_format=False)
    rewrite(tmp_path, lambda name: "lm_head.weight" if name.endswith("embed_tokens.weight") else name)
    assert_as_loaded(tmp_path, llava(tied=True), torch.float32)


def test_a_reduced_twin_takes_its_layers(tmp_path: Path) -> None:
    """Fewer layers than the checkpoint has: the rest is left out."""
    clip().save_pretrained(tmp_path)
    twin = CLIPTextModel(CLIPTextConfig(**{**TEXT, "num_hidden_layers": 1}))
    assert open_component(tmp_path).mapped(twin).keys() == twin.state_dict().keys()


def test_a_module_of_neither_library_keeps_its_names(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert list(open_component(tmp_path).mapped(torch.nn.Linear(3, 2))) == ["weight", "bias"]


def test_missing_names_are_listed(tmp_path: Path) -> None:
    clip().save_pretrained(tmp_path)
    rewrite(tmp_path, drop=("final_layer_norm.bias", "final_layer_norm.weight"))
    with pytest.raises(SourceError, match=r"missing 2 \(final_layer_norm\.weight, final_layer_norm\.bias\)"):
        open_component(tmp_path).mapped(clip())


def test_other_shapes_are_listed(tmp_path: Path) -> None:
    clip().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_bytes())
    wider = CLIPTextModel(CLIPTextConfig(**{**TEXT, "vocab_size": config["vocab_size"] + 1}))
    expected = r"of another shape 1 \(embeddings\.token_embedding\.weight \(expected \[65, 16\], found \[64, 16\]\)\)"
    with pytest.raises(SourceError, match=expected):
        open_component(tmp_path).mapped(wider)


def test_two_tensors_for_one_name(tmp_path: Path) -> None:
    clip().save_pretrained(tmp_path)
    rewrite(tmp_path, extra={"text_model.final_layer_norm.bias": torch.zeros(16)})
    with pytest.raises(SourceError, match=r"are both 'final_layer_norm\.bias' of CLIPTextModel"):
        open_component(tmp_path).mapped(clip())


def test_a_conversion_that_computes_is_refused(tmp_path: Path) -> None:
    """No family's model needs one today, so one is registered."""
    clip().save_pretrained(tmp_path)
    before = get_checkpoint_conversion_mapping("CLIPTextModel")  # type: ignore[no-untyped-call]
    converter = WeightConverter("fused.weight", ["fc1.weight", "fc2.weight"], [Chunk(0)])
    register_checkpoint_conversion_mapping("CLIPTextModel", [*before, converter], overwrite=True)
    rewrite(
        tmp_path, lambda name: name.replace("fc1.weight", "fused.weight"), drop=("encoder.layers.0.mlp.fc2.weight",)
    )
    try:
        with pytest.raises(
            UnsupportedModel,
            match=r"fused\.weight' becomes 'encoder.*mlp\.fc1\.weight' of CLIPTextModel only by computing it",
        ):
            open_component(tmp_path).mapped(clip())
    finally:
        register_checkpoint_conversion_mapping("CLIPTextModel", before, overwrite=True)


def test_the_checkpoint_is_left_as_it_is(tmp_path: Path) -> None:
    """The renaming of diffusers works in place; it must not reach the checkpoint's own table."""
    vae().save_pretrained(tmp_path)
    rewrite(tmp_path, old_vae)
    checkpoint: Checkpoint = open_component(tmp_path)
    before = dict(checkpoint.tensors)
    map_names(tmp_path, checkpoint.tensors, vae())
    assert checkpoint.tensors == before


def test_a_copy_elsewhere_maps_to_its_own_file(tmp_path: Path) -> None:
    clip().save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    refs = open_component(tmp_path / "b").mapped(clip()).values()
    assert {ref.file for ref in refs} == {tmp_path / "b" / "model.safetensors"}
