"""One guided UNet call of diffusers in PyTorch.

Options: `precision` is float32 or bfloat16; `compiled` runs it through torch.compile.
"""

from __future__ import annotations

from profiles.peers.inside import Job, Loaded, call_metrics, threads, timed, work


def load(job: Job) -> Loaded:
    """The UNet of the checkpoint itself."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.set_num_threads(threads())
    torch.manual_seed(0)
    precision = getattr(torch, job.options["precision"])
    unet = UNet2DConditionModel.from_pretrained(job.model, subfolder="unet", torch_dtype=precision).eval()
    width, height = job.sizes["width"] // 8, job.sizes["height"] // 8
    sample = torch.randn(2, unet.config.in_channels, height, width, dtype=precision)
    states = torch.randn(2, 77, unet.config.cross_attention_dim, dtype=precision)
    called = torch.compile(unet) if job.options.get("compiled") else unet

    def run() -> float:
        with torch.inference_mode():
            return timed(lambda: called(sample, 500, encoder_hidden_states=states))

    return call_metrics("unet", sample=sample, encoder_hidden_states=states), {"unet": run}


if __name__ == "__main__":
    work(("diffusers", "torch"), load, "torch")
