"""Guided UNet calls and whole pictures of optimum-intel's export of a Stable Diffusion checkpoint.

Options: `precision` is what everything computes in that is not quantized, f32 or bf16; `static` reshapes the model to
the measured size first.
"""

from __future__ import annotations

from typing import Any

from profiles.asked import PROMPT
from profiles.peers.inside import Job, Loaded, call_metrics, timed, work
from profiles.protocol import Metric

GUIDANCE = 7.5
"""Any scale above 1 makes two rows of each prompt."""


def load(job: Job) -> Loaded:
    """The pipeline, its UNet compiled for the CPU; the rest is when a picture needs it."""
    import torch
    from optimum.intel import OVStableDiffusionPipeline

    width, height = job.sizes["width"], job.sizes["height"]
    settings = {"INFERENCE_PRECISION_HINT": job.options["precision"], "PERFORMANCE_HINT": "LATENCY"}
    pipeline = OVStableDiffusionPipeline.from_pretrained(job.model, compile=False, ov_config=settings)
    if job.options.get("static"):
        pipeline.reshape(batch_size=1, height=height, width=width, num_images_per_prompt=1)
    pipeline.unet.compile()
    shapes: dict[str, Any] = {port.any_name: port.partial_shape for port in pipeline.unet.model.inputs}
    torch.manual_seed(0)
    factor = pipeline.vae_scale_factor
    sample = torch.randn(2, shapes["sample"][1].get_length(), height // factor, width // factor)
    length, hidden = list(shapes["encoder_hidden_states"])[1:]
    states = torch.randn(2, length.get_length() if length.is_static else 77, hidden.get_length())
    scalar = shapes["timestep"].rank.get_length() == 0
    timestep = torch.tensor(500.0) if scalar else torch.full((1,), 500.0)

    def unet() -> float:
        return timed(lambda: pipeline.unet(sample, timestep, encoder_hidden_states=states))

    steps = job.sizes["steps"]

    def picture() -> float:
        return timed(
            lambda: pipeline(
                PROMPT, height=height, width=width, num_inference_steps=steps, guidance_scale=GUIDANCE, output_type="np"
            )
        )

    metrics = call_metrics("unet", sample=sample, encoder_hidden_states=states)
    metrics["picture"] = Metric(unit="s", settings={"width": width, "height": height, "steps": steps})
    return metrics, {"unet": unet, "picture": picture}


if __name__ == "__main__":
    work(("optimum-intel", "openvino", "diffusers", "torch"), load, "openvino")
