"""Draw under asyncio and give up after a time: `python cancel.py bundles/shapes-diffusion "a red circle" --seconds 2`.

The event loop stays free while the picture is drawn. When the task is cancelled, the work stops after the denoising
step that runs.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import enginecast


async def draw(model: enginecast.Model, prompt: str, steps: int) -> enginecast.Drawing:
    async with model.generate_stream(prompt, steps=steps) as stream:
        async for event in stream:
            if isinstance(event, enginecast.Progress):
                print(f"step {event.step} of {event.total}")
        return await stream


async def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a picture, but not for longer than some seconds.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", type=Path, default=Path("picture.png"))
    options = parser.parse_args()
    with enginecast.load(options.bundle) as model:
        try:
            async with asyncio.timeout(options.seconds):
                drawing = await draw(model, options.prompt, options.steps)
        except TimeoutError:
            print(f"cancelled after {options.seconds:g} s")
        else:
            print(drawing.save(options.out)[0])


if __name__ == "__main__":
    asyncio.run(main())
