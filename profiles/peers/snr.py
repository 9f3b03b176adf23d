"""SNR of one guided UNet call on unit noise, of our bundles and of optimum-intel's exports, against a bundle of ours:
`python -m profiles.peers.snr REFERENCE_BUNDLE BUNDLE|EXPORT...`
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import numpy as np

from runtime.bundle.manifest import MANIFEST, Bundle
from runtime.bundle.signature import Array
from runtime.engine import Options
from runtime.optional import require
from runtime.targets.openvino.engine import OpenVINO

TIMESTEPS: Final = (500.0, 999.0)


def feed() -> dict[str, Array]:
    """Inputs of a guided call at 512x512 of a Stable Diffusion 1.5: noise, the same in both rows."""
    rng = np.random.default_rng(0)
    latents, states = rng.standard_normal((1, 4, 64, 64)), rng.standard_normal((2, 77, 768))
    sample = np.repeat(latents, 2, 0).astype(np.float32)
    return {"sample": sample, "encoder_hidden_states": states.astype(np.float32)}


def ours(root: Path, timestep: float) -> Array:
    """The UNet's output of a bundle."""
    engine = OpenVINO.load(Bundle(root).submodel("unet"), root, Options())
    (found,) = engine.run({**feed(), "timestep": np.full(2, timestep, np.float32)}).values()
    engine.close()
    return found


def theirs(root: Path, timestep: float) -> Array:
    """That of an export, at fixed shapes, in float32 but for its int8 layers."""
    openvino: Any = require("openvino", "openvino")
    inputs, core = feed(), openvino.Core()
    model = core.read_model(root / "unet" / "openvino_model.xml")
    shapes = {port: inputs[port.any_name].shape for port in model.inputs if port.any_name in inputs}
    single = {port: [1] for port in model.inputs if port.any_name not in inputs and len(port.partial_shape)}
    model.reshape(shapes | single)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    step = np.full([1] if len(compiled.input("timestep").shape) else [], timestep, np.float32)
    (found,) = compiled({**inputs, "timestep": step}).values()
    return np.asarray(found)


def main(reference: str, *others: str) -> None:
    """Print a line for each timestep and model."""
    for timestep in TIMESTEPS:
        wanted = ours(Path(reference), timestep)
        for root in map(Path, others):
            found = ours(root, timestep) if (root / MANIFEST).is_file() else theirs(root, timestep)
            noise = np.square(np.subtract(found, wanted)).sum()
            print(f"{root} at {timestep:g}: {10 * np.log10(np.square(wanted).sum() / noise):.2f} dB")


if __name__ == "__main__":
    main(*sys.argv[1:])
