"""A server of toys in a process of its own: the real pipelines over engines that compute nothing."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

ROOT: Final = Path(__file__).parents[2]
SAMPLES: Final = ROOT / "samples"
DRAW: Final = "draw"
TALK: Final = "talk"
"""The models of the server."""


def toy_bundle(root: Path, kind: str) -> Path:
    """A bundle whose tokenizer and settings are a sample's, and which has no engines."""
    from runtime.bundle.manifest import MANIFEST, Manifest, Source

    sample = SAMPLES / ("shapes-diffusion" if kind == "diffusion" else "shapes-vlm")
    root.mkdir()
    if kind == "diffusion":
        shutil.copytree(sample / "tokenizer", root / "tokenizer")
        config: dict[str, Any] = {
            "scheduler": json.loads((sample / "scheduler" / "scheduler_config.json").read_bytes()),
            "vae": {"scaling_factor": 1.0, "scale_factor": 8, "latent_channels": 4},
            "sizes": {"min": 64, "max": 512, "default": 64, "multiple": 8},
        }
    else:
        settings = json.loads((sample / "config.json").read_bytes())
        (root / "tokenizer").mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(sample / name, root / "tokenizer")
        (root / "preprocessor").mkdir()
        shutil.copy(sample / "processor_config.json", root / "preprocessor")
        config = {
            "context_length": 512, "vocab_size": settings["text_config"]["vocab_size"], "hidden_size": 8,
            "bos_token_id": None,
            "eos_token_ids": [], "image_token_id": settings.get("image_token_id", settings.get("image_token_index")),
            "tokens_per_image": 4,
        }  # fmt: skip
    source = Source(name=root.name, family="toy", architecture="Toy", fingerprint="")
    manifest = Manifest(
        name=root.name,
        key="",
        pipeline=kind,
        task="image" if kind == "diffusion" else kind,
        quant="none",
        source=source,
        submodels=(),
        artifacts=(),
        config=config,
        versions={},
        files={},
    )
    (root / MANIFEST).write_text(manifest.model_dump_json())
    return root


def toy_engines(kind: str) -> dict[str, Any]:
    from runtime.bundle.manifest import Submodel
    from runtime.bundle.precision import Precision
    from runtime.engine import FakeEngine

    zeros = np.zeros
    functions: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
        "text_encoder": lambda i: {"last_hidden_state": zeros((*i["input_ids"].shape, 8), np.float32)},
        "unet": lambda i: time.sleep(0.01) or {"noise_pred": zeros(i["sample"].shape, np.float32)},
        "vae_decoder": lambda i: {
            "image": zeros((1, 3, i["latents"].shape[2] * 8, i["latents"].shape[3] * 8), np.float32)
        },
    }
    if kind == "chat":
        functions = {
            "vision_encoder": lambda i: {"image_features": zeros((len(i["pixel_values"]), 4, 8), np.float32)},
            "token_embedding": lambda i: {"inputs_embeds": zeros((*i["input_ids"].shape, 8), np.float32)},
            "decoder": lambda i: {"logits": np.eye(1, 1000, 40, dtype=np.float32)[None]},
        }
    engines = {}
    for name, function in functions.items():
        engines[name] = FakeEngine(function)
        engines[name].submodel = Submodel(
            name=name, signature=signature_of(name), graph="g", precision=Precision.parse("none"), nbytes=0
        )
        engines[name].calls = type("Nothing", (list,), {"append": lambda *_: None})()
    return engines


def signature_of(name: str) -> Any:
    """The denoiser's inputs and outputs, so that it can be called by itself; those of others are not stated."""
    from runtime.bundle.signature import BATCH, Dim, Signature, Tensor

    if name != "unet":
        return Signature(inputs=(), outputs=())
    height, width = (Dim(name=edge, min=8, opt=8, max=64) for edge in ("height", "width"))
    latents = (BATCH, 4, height, width)
    states = (BATCH, Dim(name="sequence", min=1, opt=8, max=77), 8)
    return Signature(
        inputs=(
            Tensor(name="sample", dtype="float32", dims=latents, values="normal"),
            Tensor(name="timestep", dtype="int64", dims=(BATCH,), values="below", limit=1000),
            Tensor(name="encoder_hidden_states", dtype="float32", dims=states, values="normal"),
        ),
        outputs=(Tensor(name="noise_pred", dtype="float32", dims=latents, values="normal"),),
    )


class Toy:
    """A loaded model of the real pipeline and engines that compute nothing."""

    target, device, notes = "fake", "none", ()
    rest = None

    def __init__(self, root: Path) -> None:
        from runtime.bundle.manifest import Bundle
        from runtime.placing.loading import open_pipeline

        bundle = Bundle(root)
        self.task = bundle.manifest.task
        self.engines = toy_engines(bundle.manifest.pipeline)
        self.pipeline = open_pipeline(bundle)

    def close(self) -> None: ...

    def broken(self) -> tuple[str, ...]:
        return ()

    def elsewhere(self, broken: Any) -> Toy:
        raise NotImplementedError


def serve_toys(folder: Path, grace: float, address: str, load_forever: bool) -> None:
    """Serve a toy of each kind, and with `load_forever` one whose loading never ends."""
    from serving.dialects.grpc.server import serve
    from serving.host.models import ModelHost
    from serving.host.offers import Limits, Offer

    roots = [toy_bundle(folder / "draw", "diffusion"), toy_bundle(folder / "talk", "chat")]
    offers = [Offer.of(root) for root in roots]
    if load_forever:
        offers.append(Offer.of(toy_bundle(folder / "stuck", "chat")))
        os.mkfifo(folder / "fifo")

    def load(bundle: Any, target: str | None) -> Any:
        root = getattr(bundle, "root", bundle)
        if root.name == "stuck":
            (folder / "fifo").read_bytes()
        return Toy(root)

    async def run() -> None:
        await serve(ModelHost(offers, load, Limits(grace_seconds=grace)), address, lambda line: print(line, flush=True))

    asyncio.run(run())


@contextmanager
def process(
    folder: Path, grace: float, *options: str, address: str = "127.0.0.1:0", log_file: Path | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of toys in a process, and its address. Its log is the file `log` of the folder, if none is given."""
    with (log_file or folder / "log").open("w") as log:
        command = [sys.executable, "-m", "tests.fakes.toys", str(folder), str(grace), address, *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT) as started:
            try:
                assert started.stdout is not None
                address = started.stdout.readline().split()[-1]
                for _ in range(2):
                    assert " is ready on " in started.stdout.readline()
                yield started, address
            finally:
                started.kill()


if __name__ == "__main__":
    serve_toys(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3], "stuck" in sys.argv)
