"""`make demo`: the main job from end to end, as a user would do it, with the commands of the README.

Builds both samples at int8, starts a server, draws a prompt over gRPC, asks the other model about the picture, stops
the server. `make ui` serves the samples with the web page instead, until Ctrl-C.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

PROMPT: Final = "a large red circle on the left and a small blue square on the right on a white background"
QUESTION: Final = "describe the picture."
BUNDLES: Final = Path("bundles")
PICTURE: Final = BUNDLES / "demo.png"
ENGINECAST: Final = [sys.executable, "-m", "serving.cli.commands"]


def ui() -> None:
    """Serve the samples with the web page."""
    arguments = ["ui", *built()]
    print(f"$ enginecast {' '.join(arguments)}", flush=True)
    os.execv(sys.executable, [*ENGINECAST, *arguments])  # noqa: S606 - the server gets the signals itself


def built() -> list[str]:
    """The folders of both samples' bundles, which are built if they are not there."""
    outputs = []
    for sample in ("shapes-diffusion", "shapes-vlm"):
        outputs.append(str(BUNDLES / f"{sample}-int8"))
        run(
            "build",
            f"sample:{sample}",
            "--target",
            "onnxruntime",
            "--target",
            "openvino",
            "--quant",
            "int8",
            "--output",
            outputs[-1],
            "--force",
        )
    return outputs


def main() -> None:
    """Exit code 0 only when a picture and an answer came back."""
    outputs = built()
    print(f"$ enginecast serve {' '.join(outputs)}", flush=True)
    command = [*ENGINECAST, "serve", *outputs, "--address", "127.0.0.1:0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    ) as server:
        try:
            address = _address(server, len(outputs))
            run(
                "generate",
                "--model",
                "shapes-diffusion",
                "--prompt",
                PROMPT,
                "--seed",
                "7",
                "--out",
                str(PICTURE),
                "--address",
                address,
            )
            answer = run(
                "chat", "--model", "shapes-vlm", "--image", str(PICTURE), "--prompt", QUESTION, "--address", address
            )
        finally:
            server.send_signal(signal.SIGTERM)
    print(f"\nprompt   {PROMPT}\npicture  {PICTURE.resolve()}\nquestion {QUESTION}\nanswer   {answer.strip()}")
    if not answer.strip():
        raise SystemExit("the model gave no answer")


def run(*arguments: str) -> str:
    """One `enginecast` command; its standard output, which is shown too. Ends the demo with the command's exit code if
    it fails.
    """
    print(f"$ enginecast {' '.join(arguments)}", flush=True)
    found = subprocess.run([*ENGINECAST, *arguments], stdout=subprocess.PIPE, text=True)
    print(found.stdout, end="", flush=True)
    if found.returncode:
        raise SystemExit(found.returncode)
    return found.stdout


def _address(server: subprocess.Popen[str], models: int) -> str:
    """Where the server listens, once it has said so and that each of its models is ready."""
    assert server.stdout is not None
    address, ready = "", 0
    for line in server.stdout:
        print(line, end="", flush=True)
        if found := re.search(r"listening on (\S+)", line):
            address = found[1]
        ready += " is ready on " in line
        if address and ready == models:
            return address
    raise SystemExit("the server did not start")


if __name__ == "__main__":
    ui() if sys.argv[1:] == ["ui"] else main()
