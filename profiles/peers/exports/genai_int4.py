"""optimum-intel's int4 export of a LLaVA checkpoint, as openvino-genai loads it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Final

PROCESSOR: Final = "processor_config.json"
PREPROCESSOR: Final = "preprocessor_config.json"


def complete(checkpoint: Path, folder: Path) -> None:
    """Without a preprocessor_config.json openvino-genai accepts no pictures: newer checkpoints have that as a part of
    processor_config.json.
    """
    if (checkpoint / PROCESSOR).is_file() and not (checkpoint / PREPROCESSOR).is_file():
        part = json.loads((checkpoint / PROCESSOR).read_bytes())["image_processor"]
        (folder / PREPROCESSOR).write_text(json.dumps(part))


def main(checkpoint: str, folder: str) -> None:
    """Write it. Raises CalledProcessError where optimum-intel refuses."""
    command = ["-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", checkpoint]
    command += ["--task", "image-text-to-text", "--weight-format", "int4", folder]
    subprocess.run([sys.executable, *command], check=True)
    complete(Path(checkpoint), Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
