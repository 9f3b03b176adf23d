"""A Stable Diffusion checkpoint as one GGUF file with weights in q8_0, converted by stable-diffusion.cpp itself."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from profiles.peers.exports.weights import join

TEXT = "text_encoder"
PARTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    TEXT: "model.safetensors",
}
"""The files that it reads of a folder in the layout of diffusers."""


MODEL = "text_model."
"""What it expects before the names of the text encoder; transformers 5 writes them without."""


def published(name: str) -> str:
    """The name that a tensor of the text encoder had before transformers 5."""
    return name if name.startswith((MODEL, "text_projection")) else f"{MODEL}{name}"


def main(checkpoint: str, folder: str) -> None:
    """Write model.gguf. Raises RuntimeError where stable-diffusion.cpp refuses."""
    import stable_diffusion_cpp

    joined, output = Path(folder) / "joined", Path(folder) / "model.gguf"
    for part, name in PARTS.items():
        (joined / part).mkdir(parents=True)
        join(Path(checkpoint) / part, joined / part / name, published if part == TEXT else str)  # it reads no shards
    wanted = int(stable_diffusion_cpp.GGMLType.SD_TYPE_Q8_0)
    if not stable_diffusion_cpp.convert(str(joined).encode(), b"", str(output).encode(), wanted, b"", True):
        raise RuntimeError(f"stable-diffusion.cpp cannot convert {checkpoint}: see its messages above")
    shutil.rmtree(joined)


if __name__ == "__main__":
    main(*sys.argv[1:])
