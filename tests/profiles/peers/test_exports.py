"""What is made of checkpoints for tools that are not installed here: names, order of rows, files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from profiles.peers.exports import decoder_gguf, genai_int4, picture_gguf, weights


def test_safetensors_are_read_and_joined(tmp_path: Path) -> None:
    first = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "count": np.arange(2)}
    save_file(first, tmp_path / "model-1.safetensors", {"format": "pt"})
    save_file({"b": np.arange(3, dtype=np.float32)}, tmp_path / "model-2.safetensors")
    found = dict(weights.tensors(tmp_path))
    assert list(found) == ["a", "b"] and (found["a"] == first["a"]).all() and found["a"].dtype == np.float16
    joined = tmp_path / "joined"
    weights.join(tmp_path, joined, lambda name: f"model.{name}")
    assert {name: values.tolist() for name, values in load_file(joined).items()} == {
        "model.a": [[0, 1, 2], [3, 4, 5]],
        "model.count": [0, 1],
        "model.b": [0, 1, 2],
    }
    with pytest.raises(FileNotFoundError, match="has no safetensors files"):
        list(weights.headers(tmp_path / "nothing"))


def test_bfloat16_is_read(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    save_torch({"x": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    ((name, values),) = weights.tensors(tmp_path)
    assert name == "x" and values.tolist() == [1.5, -2.0]


def test_a_decoder_has_the_names_and_rows_of_llama_cpp(tiny_vlm: Path) -> None:
    """Every tensor of the decoder, none of the vision tower; rotary rows from halves to pairs."""
    config = json.loads((tiny_vlm / "config.json").read_bytes())["text_config"]
    found = dict(decoder_gguf.decoder(tiny_vlm, config))
    layer = {f"blk.0.{name}.weight" for name in decoder_gguf.LAYER.values()}
    assert layer <= set(found) and len(found) == 3 + 9 * config["num_hidden_layers"]
    assert found["token_embd.weight"].shape == (config["vocab_size"], config["hidden_size"])
    rows = np.arange(8)[:, None] * np.ones((1, 2))
    assert decoder_gguf.interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    own = dict(weights.tensors(tiny_vlm))
    name = next(name for name in own if name.endswith("layers.1.self_attn.k_proj.weight"))
    written = found["blk.1.attn_k.weight"]
    assert (written == decoder_gguf.interleaved(own[name], config["num_key_value_heads"])).all()
    assert not (written == own[name]).all()


def test_a_decoder_is_written_in_gguf(tiny_vlm: Path, tmp_path: Path) -> None:
    import gguf

    decoder_gguf.write(tiny_vlm, tmp_path / "decoder")
    reader = gguf.GGUFReader(tmp_path / "decoder")
    config = json.loads((tiny_vlm / "config.json").read_bytes())["text_config"]
    assert reader.get_field("llama.attention.head_count_kv").contents() == config["num_key_value_heads"]  # type: ignore[union-attr]
    types = {one.name: one.tensor_type.name for one in reader.tensors}
    assert types["blk.0.attn_norm.weight"] == "F32" and types["blk.0.attn_q.weight"] == "F16"
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"text_config": {"model_type": "opt"}}))
    with pytest.raises(ValueError, match="the decoder is a opt, expected a llama without biases"):
        decoder_gguf.write(other, tmp_path / "never")


def test_names_and_files_that_tools_expect(tmp_path: Path) -> None:
    assert picture_gguf.published("encoder.layers.0.mlp.fc1.weight") == "text_model.encoder.layers.0.mlp.fc1.weight"
    assert picture_gguf.published("text_model.final_layer_norm.bias") == "text_model.final_layer_norm.bias"
    source, output = tmp_path / "source", tmp_path / "output"
    source.mkdir()
    output.mkdir()
    (source / "processor_config.json").write_text('{"image_processor": {"size": 3}}')
    genai_int4.complete(source, output)
    assert json.loads((output / "preprocessor_config.json").read_bytes()) == {"size": 3}
    (source / "preprocessor_config.json").write_text("{}")
    (output / "preprocessor_config.json").unlink()
    genai_int4.complete(source, output)
    assert not list(output.iterdir())
