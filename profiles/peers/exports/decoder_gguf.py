"""The language decoder of a LLaVA checkpoint with a Llama as a GGUF file, quantized to Q4_0 by llama.cpp itself.

It has no tokenizer: what is measured are token numbers. Names and the order of rotary rows are those of llama.cpp's
own conversion of Llama (GGUF specification; `convert_hf_to_gguf.py`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from profiles.peers.exports.weights import tensors

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
ROTARY = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
NONE = "no_vocab"
"""The tokenizer of a file that has none."""


def gguf_name(name: str) -> str | None:
    """What GGUF calls a tensor of the decoder, None of another one."""
    if "vision" in name or "projector" in name or not name.endswith(".weight"):
        return None
    parts = name.removesuffix(".weight").split(".")
    if "layers" not in parts:
        return f"{WHOLE[parts[-1]]}.weight"
    number = parts[parts.index("layers") + 1]
    return f"blk.{number}.{LAYER['.'.join(parts[parts.index(number) + 1 :])]}.weight"


def interleaved(weight: Any, heads: int) -> Any:
    """Rows of a rotary projection from halves, as transformers has them, to pairs, as llama.cpp has them."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def decoder(checkpoint: Path, config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The decoder's tensors in llama.cpp's names and order of rows."""
    for name, weight in tensors(checkpoint):
        if (found := gguf_name(name)) is None:
            continue
        heads = next((config[key] for part, key in ROTARY.items() if f".{part}." in found), 0)
        yield found, interleaved(weight, heads) if heads else weight


def write(checkpoint: Path, output: Path) -> None:
    """The decoder in float16. Raises ValueError for one that is no Llama."""
    import gguf
    import numpy as np

    config = json.loads((checkpoint / "config.json").read_bytes())["text_config"]
    if config["model_type"] != "llama" or config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError(f"the decoder is a {config['model_type']}, expected a llama without biases")
    writer = gguf.GGUFWriter(output, "llama")
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope.get("rope_theta", 10_000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model(NONE)
    for name, weight in decoder(checkpoint, config):
        writer.add_tensor(name, np.ascontiguousarray(weight, np.float32 if weight.ndim == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, output: Path) -> None:
    """To Q4_0 with llama.cpp's own choice for the embeddings and the logits. Raises RuntimeError."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    if llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), params):
        raise RuntimeError(f"llama.cpp cannot quantize {source}: see its messages above")


def main(checkpoint: str, folder: str) -> None:
    """Write decoder.gguf."""
    whole = Path(folder) / "decoder-f16"
    write(Path(checkpoint), whole)
    quantize(whole, Path(folder) / "decoder.gguf")
    whole.unlink()


if __name__ == "__main__":
    main(*sys.argv[1:])
