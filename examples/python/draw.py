"""Draw a picture: `python draw.py bundles/shapes-diffusion "a large red circle on a white background"`."""

from __future__ import annotations

import argparse
from pathlib import Path

import enginecast


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a picture with a bundle.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", type=Path, default=Path("picture.png"))
    options = parser.parse_args()
    with enginecast.load(options.bundle) as model:
        drawing = model.generate(options.prompt, steps=options.steps, seed=options.seed)
    height, width, _ = drawing.image.shape
    print(f"{drawing.save(options.out)[0]}: {width}x{height}, seed {drawing.images[0].seed}")


if __name__ == "__main__":
    main()
