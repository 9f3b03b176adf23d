"""Nothing of the build side is imported while both kinds of model are served: shown in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FORBIDDEN = (
    "torch",
    "transformers",
    "diffusers",
    "optimum",
    "accelerate",
    "nncf",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "export",
    "calibration",
)

PROGRAM = """
import asyncio, io, json, sys
from pathlib import Path
from PIL import Image
from runtime.bundle.manifest import Bundle
from runtime.placing.loading import load_model
from serving.dialects.grpc.client import Client
from serving.enginecast_pb import chat_pb2, image_pb2
from serving.host.models import ModelHost
from serving.dialects.grpc.server import Server
import enginecast, serving.cli.commands, serving.cli.terminal

bundles = [Bundle(Path(path)) for path in sys.argv[1:]]
draw, talk = (bundle.name for bundle in bundles)


def requests(address):
    with Client(address) as client:
        wanted = image_pb2.GenerateRequest(model=draw, prompt="a large red circle", steps=2, seed=1)
        drawn = list(client.generate(wanted, timeout=120))
        png = next(response.image.png for response in drawn if response.HasField("image"))
        parts = [chat_pb2.Part(image=png), chat_pb2.Part(text="what color is the circle?")]
        turn = chat_pb2.Message(role=chat_pb2.ROLE_USER, parts=parts)
        answered = list(client.chat(chat_pb2.ChatRequest(model=talk, messages=[turn], max_tokens=4), timeout=120))
        refused = None
        try:
            list(client.generate(image_pb2.GenerateRequest(model=draw, prompt="circle " * 20_000), timeout=120))
        except Exception as error:
            refused = str(error)
        return {
            "size": Image.open(io.BytesIO(png)).size,
            "target": drawn[-1].done.engines[0].target,
            "tokens": answered[-1].done.completion_tokens,
            "refused": refused,
        }


async def main():
    host = ModelHost(bundles, load_model)
    server = Server(host, "127.0.0.1:0")
    await server.start()
    for bundle in bundles:
        await host.load(bundle.name)
    found = await asyncio.to_thread(requests, f"127.0.0.1:{server.port}")
    await server.stop(0)
    print(json.dumps(found | {"modules": sorted({name.partition(".")[0] for name in sys.modules})}))


asyncio.run(main())
"""


@pytest.fixture(scope="module")
def served(diffusion_bundle: Path, vlm_bundle: Path) -> dict[str, Any]:
    """What a clean process says after serving both bundles."""
    command = [sys.executable, "-c", PROGRAM, str(diffusion_bundle), str(vlm_bundle)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def test_nothing_of_the_build_side_is_imported(served: dict[str, Any]) -> None:
    assert not set(FORBIDDEN) & set(served["modules"])


def test_both_kinds_of_request_were_answered(served: dict[str, Any]) -> None:
    assert min(served["size"]) >= 64 and served["tokens"] >= 1
    assert served["target"] in ("onnxruntime", "openvino")


def test_a_prompt_of_20000_words_is_refused(served: dict[str, Any]) -> None:
    assert served["refused"].startswith("prompt: ")
