"""Every family: parts that fit its checkpoints, and the same bundle whatever names, shards or precision they were
published with.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline
from safetensors.torch import load_file, save_file

from export.build.build import build
from export.build.options import Options
from export.checkpoint.source import open_component, resolve
from export.family import Family, families, family_of
from runtime.errors import NotFound, SourceError, UnsupportedModel
from tests.export.families.conftest import save_next
from tests.export.families.test_distilled import distilled

Rename = Callable[[str], str]
Tensors = dict[str, torch.Tensor]
SAMPLES = Path(__file__).parents[2] / "samples"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


# Names as the hub has them


def hub_vae(name: str) -> str:
    """The VAE of Stable Diffusion 1.x: attention as diffusers 0.18 and older called it."""
    if ".attentions." in name:
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{new}.", f".{old}.")
    return name


def hub_clip(name: str) -> str:
    """CLIP's text encoder, as transformers 4 wrote it."""
    return f"text_model.{name}"


def hub_llava(name: str) -> str:
    """LLaVA 1.5, as transformers before 4.52 wrote it."""
    name = re.sub(r"^model\.language_model\.", "language_model.model.", new_llava(name))
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    name = re.sub(r"^model\.vision_tower\.", "vision_tower.vision_model.", name)
    return re.sub(r"^model\.multi_modal_projector\.", "multi_modal_projector.", name)


def new_llava(name: str) -> str:
    """LLaVA 1.5, as the library's model has it today."""
    name = re.sub(r"^language_model\.model\.", "model.language_model.", name)
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    return re.sub(r"^(vision_tower|multi_modal_projector)\.", r"model.\1.", name)


def same(name: str) -> str:
    return name


HUB = {"vae": hub_vae, "text_encoder": hub_clip, "unet": same, "": hub_llava}
NEW = {"vae": same, "text_encoder": same, "unet": same, "": new_llava}


def publish(
    source: Path, folder: Path, names: dict[str, Rename], dtype: torch.dtype = torch.float16, shards: int = 1
) -> Path:
    """A copy of a checkpoint under other names, in another precision or in shards with an index."""
    shutil.copytree(source, folder)
    for file in folder.rglob("*.safetensors"):
        rename = names[file.parent.name if file.parent != folder else ""]
        state = {rename(name): tensor.to(dtype) for name, tensor in load_file(file).items()}
        if shards == 1:
            save_file(state, file, metadata={"format": "pt"})
        else:
            _save_shards(state, file, shards)
    return folder


def _save_shards(state: Tensors, file: Path, count: int) -> None:
    owners = {}
    for i in range(count):
        shard = file.with_name(f"{file.stem}-{i + 1:05}-of-{count:05}.safetensors")
        part = {name: state[name] for name in list(state)[i::count]}
        save_file(part, shard, metadata={"format": "pt"})
        owners |= dict.fromkeys(part, shard.name)
    file.unlink()
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": owners}))


def graphs(bundle: Path) -> dict[str, bytes]:
    """The canonical graphs and weights."""
    return {
        str(path.relative_to(bundle)): path.read_bytes()
        for path in sorted((bundle / "onnx").rglob("*"))
        if path.is_file()
    }


def cast(source: Path, output: Path) -> dict[str, bytes]:
    build(Options(str(source), output))
    return graphs(output)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_vlm_with_old_names_is_the_same_byte_for_byte(vlm_bundle: Path, tmp_path: Path, shards: int) -> None:
    source = publish(SAMPLES / "shapes-vlm", tmp_path / "old", HUB, shards=shards)
    assert {"language_model.lm_head.weight", "vision_tower.vision_model.pre_layrnorm.weight"} <= open_component(
        source
    ).tensors.keys()
    assert cast(source, tmp_path / "bundle") == graphs(vlm_bundle)


def test_a_vlm_with_new_names_is_the_same_byte_for_byte(vlm_bundle: Path, tmp_path: Path) -> None:
    source = publish(SAMPLES / "shapes-vlm", tmp_path / "new", NEW)
    assert "model.language_model.embed_tokens.weight" in open_component(source).tensors
    assert cast(source, tmp_path / "bundle") == graphs(vlm_bundle)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_diffusion_model_with_old_names_is_the_same_byte_for_byte(
    diffusion_bundle: Path, tmp_path: Path, shards: int
) -> None:
    source = publish(SAMPLES / "shapes-diffusion", tmp_path / "old", HUB, shards=shards)
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in open_component(source / "vae").tensors
    assert cast(source, tmp_path / "bundle") == graphs(diffusion_bundle)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_precision_with_old_names(tiny_vlm: Path, tmp_path: Path, dtype: str) -> None:
    twins = {
        name: publish(tiny_vlm, tmp_path / name, names, DTYPES[dtype]) for name, names in (("new", NEW), ("old", HUB))
    }
    bundles = {name: tmp_path / f"{name}-bundle" for name in twins}
    bundle, _ = build(Options(str(twins["new"]), bundles["new"], targets=("onnxruntime", "openvino")))
    assert {str(submodel.precision) for submodel in bundle.manifest.submodels} == {dtype}
    assert cast(twins["old"], bundles["old"]) == graphs(bundles["new"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_any_precision_of_a_diffusion_model_with_old_names(tiny_diffusion: Path, tmp_path: Path, dtype: str) -> None:
    twins = {
        name: publish(tiny_diffusion, tmp_path / name, names, DTYPES[dtype])
        for name, names in (("new", NEW), ("old", HUB))
    }
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in open_component(twins["old"] / "vae").tensors
    assert cast(twins["new"], tmp_path / "a") == cast(twins["old"], tmp_path / "b")


def test_tied_weights_are_written_once(tiny_vlm: Path, tmp_path: Path) -> None:
    source = publish(tiny_vlm, tmp_path / "tied", NEW)
    config = json.loads((source / "config.json").read_bytes())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (source / "config.json").write_text(json.dumps(config))
    file = source / "model.safetensors"
    save_file(
        {name: tensor for name, tensor in load_file(file).items() if name != "lm_head.weight"},
        file,
        metadata={"format": "pt"},
    )
    build(Options(str(source), tmp_path / "bundle"))
    written = load_file(tmp_path / "bundle" / "onnx" / "decoder" / "weights.safetensors")
    assert sum(tensor.shape == (512, 32) for tensor in written.values()) == 1


# What a family declares


@pytest.fixture(scope="module")
def tiny_next(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_next(tmp_path_factory.mktemp("sources") / "tiny-next")


CHECKPOINTS = ("tiny_diffusion", "tiny_vlm", "tiny_xl", "tiny_next", "tiny_blip2", "tiny_blip2_t5", "tiny_instructblip",
    "tiny_clip", "tiny_siglip", "tiny_blip2_retrieval", "tiny_lcm")  # fmt: skip


@pytest.fixture(scope="module")
def tiny_lcm(tiny_diffusion: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distilled(
        tiny_diffusion,
        tmp_path_factory.mktemp("sources") / "tiny-lcm",
        LatentConsistencyModelPipeline,
        requires_safety_checker=False,
    )


@pytest.fixture(params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def test_every_family_is_found_and_tested(request: pytest.FixtureRequest) -> None:
    tested = {family_of(resolve(str(request.getfixturevalue(name)))).name for name in CHECKPOINTS}
    assert tested == {family.name for family in families().values()}
    assert all(
        isinstance(family, Family) and architecture in family.architectures
        for architecture, family in families().items()
    )


def test_an_unknown_architecture_gets_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDifusionPipeline"}')
    with pytest.raises(
        UnsupportedModel, match=r"is a StableDifusionPipeline, .* did you mean 'StableDiffusionPipeline'\?"
    ):
        family_of(resolve(str(tmp_path)))


@pytest.mark.parametrize("reduced", [False, True])
def test_parts_have_no_weights_and_run(checkpoint: Path, reduced: bool) -> None:
    """On the meta device a module runs without values: its outputs must have the shapes that the signature says."""
    source = resolve(str(checkpoint))
    for part in family_of(source).parts(source, reduced):
        assert all(parameter.is_meta for parameter in part.module.parameters()), part.name
        assert all(not buffer.is_meta for buffer in part.module.buffers()), part.name
        assert set(part.parameters().values()) <= part.components[0].model.state_dict().keys()
        signature, lengths = part.signature, part.signature.sample_lengths()
        assert len({tensor.name for tensor in (*signature.graph_inputs, *signature.graph_outputs)}) == len(
            signature.graph_inputs
        ) + len(signature.graph_outputs)
        assert all(dim.min <= dim.opt <= dim.max for dim in signature.dims.values())
        inputs = [
            torch.zeros(t.shape(lengths), dtype=getattr(torch, t.dtype), device="meta") for t in signature.graph_inputs
        ]
        with torch.no_grad():
            outputs = part.module(*inputs)
        for tensor, output in zip(signature.graph_outputs, outputs, strict=True):
            assert len(tensor.dims) == output.ndim and str(output.dtype).endswith(tensor.dtype), tensor.name
            known = zip(tensor.dims, output.shape, strict=True)
            assert all(
                length == (dim if isinstance(dim, int) else lengths.get(dim.name, length)) for dim, length in known
            ), tensor.name


def test_the_twin_is_made_of_the_same_modules(checkpoint: Path) -> None:
    source = resolve(str(checkpoint))
    family = family_of(source)
    for part, twin in zip(family.parts(source, False), family.parts(source, True), strict=True):
        assert part.name == twin.name and part.floor == twin.floor and part.activations == twin.activations
        count = len(twin.signature.inputs)  # a decoder may get keys and values of an encoder for each layer
        assert part.signature.inputs[:count] == twin.signature.inputs
        kinds, reduced = ({type(module).__name__ for module in p.module.modules()} for p in (part, twin))
        assert kinds == reduced


def test_assets_are_the_model_s_own_files(checkpoint: Path) -> None:
    source = resolve(str(checkpoint))
    for path, file in family_of(source).assets(source).items():
        assert (
            file.is_file()
            and file.is_relative_to(checkpoint)
            and re.fullmatch(
                r"(tokenizer(_2)?|qformer_tokenizer|scheduler|preprocessor)/(additional_chat_templates/)?[^/]+", path
            )
        )


@pytest.mark.parametrize("folder", ["tokenizer", "scheduler"])
def test_a_missing_asset_is_named(tiny_diffusion: Path, tmp_path: Path, folder: str) -> None:
    copy = Path(shutil.copytree(tiny_diffusion, tmp_path / "copy"))
    shutil.rmtree(copy / folder)
    with pytest.raises(NotFound, match=rf"{folder} does not exist: a StableDiffusionPipeline needs it\. Download"):
        family_of(resolve(str(copy))).assets(resolve(str(copy)))


def test_a_unet_of_other_channels_is_refused(tiny_diffusion: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_diffusion, tmp_path / "copy"))
    file = copy / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"in_channels": 8}))
    with pytest.raises(UnsupportedModel, match=r"in_channels 8 \(expected 4"):
        family_of(resolve(str(copy))).parts(resolve(str(copy)), False)


def test_a_model_may_say_how_it_is_best_drawn_with(tiny_diffusion: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_diffusion, tmp_path / "model"))
    file = folder / "enginecast.json"
    family = family_of(resolve(str(folder)))

    def defaults(text: str) -> object:
        file.write_text(text)
        return family.config(resolve(str(folder)))["defaults"]

    assert (
        "defaults" not in family.config(resolve(str(folder))) or family.config(resolve(str(folder)))["defaults"] == {}
    )
    assert defaults('{"steps": 20, "guidance_scale": 1.5}') == {"steps": 20, "guidance_scale": 1.5}
    for text, field in (('{"steps": 0}', "steps"), ('{"guidance": 2}', "guidance"), ("[]", "object"), ("{", "JSON")):
        with pytest.raises(SourceError, match=rf"enginecast\.json.*{field}"):
            defaults(text)
