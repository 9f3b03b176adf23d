"""Reading checkpoints: where a source lies, which files are its weights, and what happens when they are damaged."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from calibration.ground.progress import Position, listening
from export.checkpoint import source as sources
from export.checkpoint.source import Source, check_finite, open_component, release, resolve
from export.checkpoint.tensors import DTYPES, EXPONENTS, PREFIX, read_header
from runtime.errors import EnginecastError, NotFound, SourceError, UnsupportedModel

WEIGHTS = {
    "layer.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "layer.bias": torch.tensor([1, -2, 3], dtype=torch.bfloat16),
    "scale": torch.tensor(0.5, dtype=torch.float16),
    "empty": torch.zeros(0, 4),
    "ids": torch.arange(5),
}


@pytest.fixture
def component(tmp_path: Path) -> Path:
    """A folder with config.json and model.safetensors."""
    (tmp_path / "config.json").write_text('{"hidden_size": 4, "architectures": ["LlavaForConditionalGeneration"]}')
    save_file(WEIGHTS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def raw(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file of any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# --- byte ranges


def test_arrays_are_views_of_the_file(component: Path) -> None:
    tensors = open_component(component).tensors
    assert tensors.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        array = tensors[name].array()
        assert array.shape == tensors[name].shape == tuple(value.shape)
        assert array.astype(np.float64).tolist() == value.double().tolist()
        assert not array.flags.writeable and not array.flags.owndata


def test_ranges_are_absolute(component: Path) -> None:
    ref = open_component(component).tensors["layer.weight"]
    data = ref.file.read_bytes()[ref.offset : ref.offset + ref.nbytes]
    assert data == WEIGHTS["layer.weight"].numpy().tobytes()


def test_an_unaligned_file_is_read(tmp_path: Path) -> None:
    """Early writers did not pad the header."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(
        raw(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} ', np.array([1, 2], np.float32).tobytes())
    )
    ref = read_header(file)[1]["a"]
    assert ref.offset % 4 and ref.array().tolist() == [1, 2]


def test_a_rewritten_file_is_seen(component: Path) -> None:
    assert open_component(component).tensors["scale"].array() == 0.5
    save_file({**WEIGHTS, "scale": torch.tensor(2.0, dtype=torch.float16)}, component / "model.safetensors")
    assert open_component(component).tensors["scale"].array() == 2.0


def test_release_leaves_living_views_usable(component: Path) -> None:
    array = open_component(component).tensors["layer.weight"].array()
    release()
    assert array.sum() == 66


def test_every_dtype_has_its_size(tmp_path: Path) -> None:
    for name, dtype in DTYPES.items():
        (tmp_path / "x").write_bytes(raw({"a": entry(0, 3 * dtype.itemsize, [3], name)}, bytes(3 * dtype.itemsize)))
        assert read_header(tmp_path / "x")[1]["a"].array().dtype == dtype


# --- damaged files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has 0 bytes"),
        (b"1234567", "it has 7 bytes"),
        (struct.pack("<Q", 1 << 40), "its header would have"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "is a git-lfs pointer"),
        (struct.pack("<Q", 50) + b"{}", "its header has 50 bytes, 2 are there"),
        (raw(b"{nonsense"), "expected JSON"),
        (raw(b"\xff\xfe"), "expected JSON"),
        (raw(b"[" * 100_000), "expected JSON"),
        (raw(b"[]"), "expected a JSON object, found list"),
        (raw(b'{"a": 1, "a": 2}'), "twice"),
        (raw({"a": [1, 2]}), "expected dtype, shape and data_offsets"),
        (raw({"a": entry(0, 4, [True])}, bytes(4)), "expected dtype, shape and data_offsets"),
        (raw({"a": entry(0, 4, [-1])}, bytes(4)), "expected dtype, shape and data_offsets"),
        (raw({"a": entry(0, 4, [1], "F12")}, bytes(4)), "dtype 'F12', known are BOOL"),
        (raw({"a": entry(0, 4, [2])}, bytes(4)), r"needs 8 bytes, its range 0:4 has 4"),
        (raw({"a": entry(4, 0, [1])}, bytes(4)), r"needs 4 bytes, its range 4:0 has -4"),
        (raw({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, bytes(4)), "overlap or leave a hole"),
        (raw({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)), "overlap or leave a hole"),
        (raw({"a": entry(0, 4, [1])}, bytes(8)), r"damaged: expected \d+ bytes, found \d+"),
        (raw({"a": entry(0, 8, [2])}, bytes(7)), r"truncated: expected \d+ bytes, found \d+\. Download it again"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read_header(tmp_path / "model.safetensors")


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    """A valid file of two tensors, cut, with bytes replaced or put in; half of the time with the header length made
    right again.
    """
    header = json.dumps(
        {"__metadata__": {"format": "pt"}, "a": entry(0, 8, [2]), "b": entry(8, 14, [3, 1], "BF16")}
    ).encode()
    content = bytearray(header if draw(st.booleans()) else raw(header))
    whole = len(content) > len(header)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(content)))
        content[at : at + draw(st.integers(0, 3))] = draw(
            st.binary(max_size=3) | st.sampled_from([b"-1", b"9" * 30, b"null", b"[", b'"'])
        )
    data = bytes(draw(st.sampled_from([14, 14, 14, 13, 0, 20])))
    return bytes(content) + data if whole else raw(bytes(content), data)


@given(mutations())
def test_whatever_the_bytes_the_reader_refuses_or_gives_ranges_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    file.write_bytes(content)
    try:
        header, refs = read_header(file)
    except SourceError as error:
        assert str(file) in str(error)
        return
    end = PREFIX + len(header)
    for ref in refs.values():
        assert ref.offset == end and ref.array().nbytes == ref.nbytes
        end += ref.nbytes
    assert end == len(content)
    assert {name: list(ref.shape) for name, ref in refs.items()} == {
        name: list(value.shape) for name, value in load_file(file).items()
    }


# --- which files


def test_missing_folder_and_files(component: Path) -> None:
    with pytest.raises(NotFound, match=r"unet does not exist: expected a folder with config\.json"):
        open_component(component / "unet")
    (component / "model.safetensors").unlink()
    with pytest.raises(
        NotFound, match=r"has no weights: expected diffusion_pytorch_model\.safetensors or model\.safetensors"
    ):
        open_component(component)
    (component / "config.json").unlink()
    with pytest.raises(NotFound, match=r"config\.json does not exist"):
        open_component(component)


@pytest.mark.parametrize(("content", "message"), [("{", "is no JSON"), ("[]", "holds list, expected a JSON object")])
def test_bad_config(component: Path, content: str, message: str) -> None:
    (component / "config.json").write_text(content)
    with pytest.raises(SourceError, match=message):
        open_component(component)


def test_quantized_checkpoints_are_refused(component: Path) -> None:
    (component / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(UnsupportedModel, match="quantized already"):
        open_component(component)


POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:"
    b"4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 9\n"
)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (POINTER, "is a git-lfs pointer, .* `git lfs pull`"),
        (b"\n<!DOCTYPE html><html><head>", "is a web page, .* /resolve/"),
        (b"PK\x03\x04\x00\x00\x08\x08\x00\x00\x00\x00", "is a pickle in spite of its name"),
        (b"GGUF\x03\x00\x00\x00\x00\x00\x00\x00", "is a GGUF file"),
    ],
)
def test_files_that_are_not_what_their_names_say(component: Path, name: str, content: bytes, named: str) -> None:
    if name.endswith("index.json"):
        (component / "model.safetensors").unlink()
    (component / name).write_bytes(content)
    with pytest.raises(SourceError, match=f"{re.escape(name)} {named}"):
        open_component(component)


@pytest.mark.parametrize("length", [0x0280, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle_is_read(component: Path, length: int) -> None:
    text = json.dumps({"a": entry(0, 4, [1])})
    (component / "model.safetensors").write_bytes(raw(text.ljust(length).encode(), b"\0" * 4))
    assert (component / "model.safetensors").read_bytes()[:2] in (b"\x80\x02", b"PK")
    assert open_component(component).tensors.keys() == {"a"}


def test_an_adapter_alone_is_refused(tmp_path: Path) -> None:
    save_file({"unet.to_q.lora_A.weight": torch.ones(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    for source in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
        with pytest.raises(UnsupportedModel, match=r"holds an adapter \(LoRA\) without the model"):
            resolve(str(source))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match=r"holds an adapter \(LoRA\)"):
        resolve(str(tmp_path))


def test_whole_files_come_before_shards_and_variants(component: Path) -> None:
    save_file({"variant": torch.ones(1)}, component / "model.fp16.safetensors")
    (component / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert open_component(component).tensors.keys() == WEIGHTS.keys()


@pytest.mark.parametrize(
    "name",
    ["diffusion_pytorch_model.safetensors", "model.fp16.safetensors", "diffusion_pytorch_model.bf16.safetensors"],
)
def test_other_names_of_the_weight_file(component: Path, name: str) -> None:
    (component / "model.safetensors").rename(component / name)
    assert open_component(component).tensors.keys() == WEIGHTS.keys()


def test_of_several_variants_fp16_is_taken(component: Path) -> None:
    (component / "model.safetensors").rename(component / "model.fp16.safetensors")
    save_file({"other": torch.ones(1)}, component / "model.non_ema.safetensors")
    assert open_component(component).tensors.keys() == WEIGHTS.keys()
    (component / "model.fp16.safetensors").rename(component / "model.bf16.safetensors")
    with pytest.raises(
        SourceError,
        match=r"only variants of the weights, model\.bf16\.safetensors, model\.non_ema\.safetensors: .* --variant bf16",
    ):
        open_component(component)


def test_the_variant_that_is_chosen_is_read_where_there_is_one(component: Path) -> None:
    save_file({"half": torch.ones(1)}, component / "model.fp16.safetensors")
    assert open_component(component, "fp16").tensors.keys() == {"half"}
    assert open_component(component, "fp16").variant == "fp16"
    for plain in (open_component(component), open_component(component, "non_ema")):
        assert plain.tensors.keys() == WEIGHTS.keys() and plain.variant == ""
    (component / "model.safetensors").unlink()
    assert open_component(component).variant == "fp16"
    with pytest.raises(
        SourceError, match=r"only variants of the weights, model\.fp16\.safetensors: choose one of them"
    ):
        open_component(component, "non_ema")


INDEXES = ["model.safetensors.index.json", "model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"]


def shard(component: Path, index: str = INDEXES[0]) -> tuple[Path, Path]:
    """Split the component's weights into two shards with an index."""
    (component / "model.safetensors").unlink()
    variant = ".fp16" if "fp16" in index else ""
    first, second = (component / f"model{variant}-0000{i}-of-00002.safetensors" for i in (1, 2))
    names = list(WEIGHTS)
    parts = {first: names[:2], second: names[2:]}
    for file, part in parts.items():
        save_file({name: WEIGHTS[name] for name in part}, file)
    (component / index).write_text(
        json.dumps({"weight_map": {name: file.name for file, part in parts.items() for name in part}})
    )
    return first, second


@pytest.mark.parametrize("index", INDEXES)
def test_shards(component: Path, index: str) -> None:
    first, second = shard(component, index)
    tensors = open_component(component).tensors
    assert tensors.keys() == WEIGHTS.keys()
    assert (tensors["layer.weight"].file, tensors["ids"].file) == (first, second)


def test_missing_shard(component: Path) -> None:
    first, _ = shard(component)
    first.unlink()
    with pytest.raises(NotFound, match=r"lists 1 shards that do not exist: model-00001-of-00002\.safetensors"):
        open_component(component)


def test_truncated_shard(component: Path) -> None:
    _, second = shard(component)
    size = second.stat().st_size
    second.write_bytes(second.read_bytes()[:-10])
    with pytest.raises(
        SourceError, match=rf"00002-of-00002\.safetensors is truncated: expected {size} bytes, found {size - 10}"
    ):
        open_component(component)


def test_shards_that_do_not_fit_their_index(component: Path) -> None:
    first, second = shard(component)
    save_file({"layer.weight": WEIGHTS["layer.weight"]}, first)
    with pytest.raises(
        SourceError, match=r"00001-of-00002\.safetensors: tensor 'layer\.bias' of the index is not in it"
    ):
        open_component(component)
    save_file({**load_file(second), "layer.weight": torch.ones(1)}, second)
    with pytest.raises(SourceError, match=r"tensor 'layer\.weight' stands in model-00001-of-00002\.safetensors too"):
        open_component(component)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"metadata": {}}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "has no weight_map"),
        ('{"weight_map": {"a": "../x"}}', "its own folder"),
    ],
)
def test_bad_index(component: Path, index: str, message: str) -> None:
    shard(component)
    (component / INDEXES[0]).write_text(index)
    with pytest.raises(SourceError, match=message):
        open_component(component)


def test_shards_without_index(component: Path) -> None:
    shard(component)
    (component / INDEXES[0]).unlink()
    with pytest.raises(NotFound, match=r"has shards but no model\.safetensors\.index\.json"):
        open_component(component)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "diffusion_pytorch_model.bin", "model.ckpt", "model.pt"])
def test_pickles_are_refused(component: Path, name: str) -> None:
    (component / "model.safetensors").rename(component / name)
    with pytest.raises(SourceError, match=r"is a pickle.*Convert it to safetensors: python -c"):
        open_component(component)


def test_the_conversion_that_the_refusal_tells_works(component: Path) -> None:
    """The command in the message, run as it stands, makes the folder readable; tied tensors included."""
    (component / "model.safetensors").unlink()
    torch.save({**WEIGHTS, "tied": WEIGHTS["layer.weight"]}, component / "pytorch_model.bin")
    with pytest.raises(SourceError) as caught:
        open_component(component)
    exec(str(caught.value).partition('python -c "')[2].partition('"')[0])
    assert open_component(component).tensors.keys() == {*WEIGHTS, "tied"}


# --- fingerprint


def test_fingerprint_tells_checkpoints_apart(component: Path) -> None:
    before = open_component(component).fingerprint
    assert open_component(component).fingerprint == before
    save_file({**WEIGHTS, "ids": torch.arange(5) + 1}, component / "model.safetensors", metadata={"format": "pt"})
    retrained = open_component(component).fingerprint
    (component / "config.json").write_text("{}")
    assert len({before, retrained, open_component(component).fingerprint}) == 3


def test_fingerprint_does_not_depend_on_the_place(component: Path) -> None:
    copy = component / "copy"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        (copy / name).write_bytes((component / name).read_bytes())
    assert open_component(copy).fingerprint == open_component(component).fingerprint


# --- NaN


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2]
BAD = [(dtype, bad) for dtype in FLOATS for bad in (float("nan"), float("inf"), float("-inf"))] + [
    (torch.float8_e4m3fn, float("nan"))
]


@pytest.mark.parametrize(("dtype", "bad"), BAD)
def test_nan_and_infinity_are_found(
    component: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bad: float
) -> None:
    monkeypatch.setattr("export.checkpoint.tensors.CHUNK", 7)
    limit = torch.full((5, 4), torch.finfo(dtype).max, dtype=torch.float64)
    good = {"largest": limit.to(dtype), "lowest": (-limit).to(dtype)}
    save_file(good, component / "model.safetensors")
    check_finite(open_component(component).tensors)
    faulty = limit.clone()
    faulty[3, 1] = bad
    save_file({**good, "bad": faulty.to(dtype)}, component / "model.safetensors")
    with pytest.raises(
        SourceError, match=r"model\.safetensors: tensor 'bad' holds -?(nan|inf) at \[3, 1\], expected finite weights"
    ):
        check_finite(open_component(component).tensors)


def test_scan_reports_progress_and_skips_integers(component: Path) -> None:
    tensors = open_component(component).tensors
    reports: list[Position] = []
    with listening(reports.append):
        check_finite(tensors)
    assert len(reports) == len(tensors) and reports[0].share == 0 and reports == sorted(reports)
    assert "I64" not in EXPONENTS


# --- resolve


def test_transformers_folder(component: Path) -> None:
    expected = Source(component, component.name, "transformers", "LlavaForConditionalGeneration")
    assert resolve(str(component)) == expected


def test_diffusers_folder(component: Path) -> None:
    (component / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert resolve(f"{component}/") == Source(component, component.name, "diffusers", "StableDiffusionPipeline")


def test_a_relative_folder_has_its_own_name(component: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(component)
    assert resolve(".").name == component.name


@pytest.mark.parametrize("config", ["{}", '{"architectures": []}', '{"architectures": [3]}', '{"architectures": "x"}'])
def test_an_unnamed_architecture(component: Path, config: str) -> None:
    (component / "config.json").write_text(config)
    with pytest.raises(SourceError, match="does not say which class made it"):
        resolve(str(component))


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no model: expected model_index\.json"):
        resolve(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SourceError, match="is a pickle"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("inside", [False, True], ids=["file", "folder"])
def test_single_file_checkpoints(tmp_path: Path, inside: bool) -> None:
    file = tmp_path / "v1-5-pruned.safetensors"
    save_file({"model.diffusion_model.out.0.weight": torch.ones(1)}, file)
    with pytest.raises(UnsupportedModel, match="has no UNet of Stable Diffusion"):
        resolve(str(tmp_path if inside else file))
    save_file({"weight": torch.ones(1)}, file)
    with pytest.raises(UnsupportedModel, match="is a single file, expected a folder"):
        resolve(str(tmp_path if inside else file))


def test_a_single_file_checkpoint_named_as_a_component(component: Path) -> None:
    save_file({"first_stage_model.encoder.conv_in.weight": torch.ones(1)}, component / "model.safetensors")
    with pytest.raises(UnsupportedModel, match="original Stable Diffusion layout"):
        open_component(component)


def test_samples(component: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SAMPLES", component.parent)
    assert resolve(f"sample:{component.name}").root == component
    with pytest.raises(NotFound, match=rf"no sample '{component.name}x': did you mean '{component.name}'\?"):
        resolve(f"sample:{component.name}x")


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where/at/all", "../no", "a/b/c", ""])
def test_nothing_of_that_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("no hub id"))
    with pytest.raises(EnginecastError, match=r"does not exist|holds no model|is empty"):
        resolve(name)


def test_hub_id_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        NotFound, match=r"org/name is no folder here and could not be fetched from the hub \(\w+: .*give a folder"
    ):
        resolve("org/name")


@pytest.mark.parametrize(("pipeline", "wanted"), [(True, "*/*.safetensors"), (False, "*.safetensors")])
def test_hub_id(component: Path, monkeypatch: pytest.MonkeyPatch, pipeline: bool, wanted: str) -> None:
    asked = []

    def download(repo: str, allow_patterns: list[str], ignore_patterns: list[str] | None = None) -> str:
        asked.append((repo, allow_patterns))
        return str(component)

    if pipeline:
        (component / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = resolve("org/name")
    assert (source.root, source.name) == (component, "name")
    assert [repo for repo, _ in asked] == ["org/name"] * 2
    patterns = asked[1][1]
    assert wanted in patterns and not any(pattern.endswith((".bin", ".ckpt", ".pt", "*")) for pattern in patterns)


def test_hub_behind_a_broken_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one transport error that snapshot_download does not wrap."""

    def download(*_: object, **__: object) -> str:
        raise httpx2.ProxyError("407 Proxy Authentication Required")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(
        NotFound, match=r"could not be fetched from the hub \(ProxyError: 407 Proxy Authentication Required\)"
    ):
        resolve("org/name")


def test_samples_are_in_a_source_checkout_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.checkpoint.source.SAMPLES", tmp_path / "none")
    with pytest.raises(NotFound, match="come with a source checkout of enginecast"):
        resolve("sample:shapes-vlm")
