"""A checkpoint with additions as a build reads it, each submodel computed by the library's own network: a pipeline
draws without graphs and engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from export.build.options import Options
from export.build.state import Build
from export.checkpoint.additions import Addition
from export.checks.parity import mapped
from export.family import Part
from runtime.bundle.signature import Array
from runtime.diffusion.adapters import Adapters
from runtime.diffusion.config import DiffusionConfig
from runtime.engine import FakeEngine
from runtime.pipeline import drive
from runtime.pipelines.diffusion import DiffusionPipeline, encoders_of
from runtime.tasks.image import ImageReady, ImageRequest
from runtime.vision.images import Picture


@dataclass(frozen=True)
class LibraryModel:
    """A model that draws, without a bundle."""

    pipeline: DiffusionPipeline
    engines: Mapping[str, FakeEngine]

    @classmethod
    def of(cls, source: Path, folder: Path, *additions: Addition) -> LibraryModel:
        """That of a checkpoint. `folder` is for what it needs on disk."""
        build = Build.open(Options(str(source), folder / "bundle", additions=additions))
        for path, file in build.assets.items():
            if path.startswith("adapters/"):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(file.read_bytes())
        config = DiffusionConfig.parse(build.family.config(build.source))
        tokenizers = (source / encoder.tokenizer for encoder in encoders_of(config))
        pipeline = DiffusionPipeline(config, *tokenizers, adapters=Adapters.open(folder))
        return cls(pipeline, {part.name: _engine(build, part) for part in build.parts})

    def draw(self, request: ImageRequest) -> Picture:
        (ready,) = (one for one in drive(self.pipeline(request), self.engines) if isinstance(one, ImageReady))
        return ready.image


def _engine(build: Build, part: Part) -> FakeEngine:
    weights, signature = build.weights(part), part.signature
    names = [tensor.name for tensor in signature.outputs]

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        feed: list[Any] = [torch.from_numpy(inputs[tensor.name]) for tensor in signature.inputs]
        with mapped(part, weights), torch.inference_mode():
            return {name: found.float().numpy() for name, found in zip(names, part.reference(*feed), strict=True)}

    return FakeEngine(run)
