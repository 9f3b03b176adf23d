"""optimum-intel's hybrid int8 of a Stable Diffusion checkpoint: convolutions with int8 inputs, other
layers int8 weights.
"""

from __future__ import annotations

import sys

PROMPTS = [
    "a photograph of an old lighthouse on a cliff at sunset, waves below",
    "portrait of an elderly fisherman in a yellow raincoat, soft light",
    "a bowl of ripe oranges on a wooden table, oil painting",
    "a small red bicycle leaning against a white brick wall",
]
SAMPLES = 8


def main(checkpoint: str, folder: str) -> None:
    """Write it."""
    from optimum.intel import OVStableDiffusionPipeline, OVWeightQuantizationConfig

    config = OVWeightQuantizationConfig(bits=8, dataset=PROMPTS, num_samples=SAMPLES, quant_method="hybrid")
    pipeline = OVStableDiffusionPipeline.from_pretrained(
        checkpoint, export=True, quantization_config=config, compile=False
    )
    pipeline.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
