"""stable-diffusion.cpp: one guided step of a Stable Diffusion checkpoint, its two UNet calls and the sampler's sum.

A drawing in another thread is held after each of its steps until the next one is measured.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from profiles.peers.inside import Job, Loaded, threads, timed, work
from profiles.protocol import Metric

STEPS = 500
"""Of a drawing: more than are ever measured, and pictures are never decoded."""


class Steps:
    """A drawing that goes one step further at a time."""

    def __init__(self, model: Any, width: int, height: int) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._failure: Exception | None = None
        self._draw = {"prompt": "a lighthouse", "negative_prompt": "blurred", "width": width, "height": height}
        threading.Thread(target=self._run, args=(model,), daemon=True).start()
        self._wait()

    def _run(self, model: Any) -> None:
        try:
            model.generate_image(
                **self._draw,
                cfg_scale=7.5,
                sample_method="euler",
                sample_steps=STEPS,
                seed=0,
                progress_callback=self._reached,
            )
            raise RuntimeError(f"all {STEPS} steps of the drawing were measured: repeat less often")
        except Exception as error:  # told to the one who waits
            self._failure = error
            self._done.release()

    def _reached(self, step: int, steps: int, seconds: float) -> None:
        if steps == STEPS:  # others are of loading
            self._done.release()
            self._go.acquire()

    def _wait(self) -> None:
        self._done.acquire()
        if self._failure is not None:
            raise self._failure

    def step(self) -> None:
        """Compute the next step."""
        self._go.release()
        self._wait()


def load(job: Job) -> Loaded:
    """The only GGUF file in the export."""
    from stable_diffusion_cpp import StableDiffusion

    (file,) = Path(job.model).glob("*.gguf")
    width, height = job.sizes["width"], job.sizes["height"]
    model = StableDiffusion(
        model_path=str(file),
        n_threads=threads(),
        diffusion_flash_attn=bool(job.options.get("flash_attention")),
        verbose=True,
    )
    steps = Steps(model, width, height)
    settings: dict[str, int | float | str] = {"sample": f"2x4x{height // 8}x{width // 8}"}
    return {"unet": Metric(unit="s", settings=settings)}, {"unet": lambda: timed(steps.step)}


if __name__ == "__main__":
    work(("stable-diffusion-cpp-python",), load, "stable-diffusion.cpp", "q8_0")
