"""A target for tests whose compiled files fit one kind of machine, as TensorRT's do. Which machine this is, a test
says.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import ClassVar

import numpy as np

from runtime.bundle.manifest import Artifact, Submodel, sha256
from runtime.engine import Availability, Compiled, CompileOptions, Engine, FakeEngine, Options
from runtime.errors import EngineError, EngineUnavailable
from runtime.settings import Texts


class BoundSettings(Texts):
    """What the fake's `compile_with` takes."""

    shapes: str = ""


class Bound(FakeEngine):
    """Compiles a graph into a file that has its sha256, the settings and the machine's name; run, it returns that
    text's bytes.
    """

    target = "bound"
    rank = 98
    compile_settings = BoundSettings
    here: ClassVar[str] = "this machine"
    seconds: ClassVar[float] = 0.0
    """How long a compilation takes; it reports its progress in ten steps."""

    @classmethod
    def available(cls) -> Availability:
        return Availability(True, (cls.here,), version="1")

    @classmethod
    def compile_with(cls, options: CompileOptions, submodel: Submodel, graph: Path, output: Path) -> Artifact:
        output.mkdir(parents=True, exist_ok=True)
        text = f"{sha256(graph)} {dict(options.settings)} {cls.here}"
        file = output / f"{submodel.name}.bound"
        file.write_text(text[:10])
        for step in range(10):
            options.progress(step / 10, "Sliding beads")
            time.sleep(cls.seconds / 10)
        file.write_text(text)
        return Artifact(
            target=cls.target,
            submodel=submodel.name,
            files=(file.name,),
            key={"here": cls.here},
            settings=options.settings,
        )

    @classmethod
    def load(cls, submodel: Submodel, root: Path, options: Options) -> Engine:
        compiled = options.compiled or Compiled(
            Artifact(target=cls.target, submodel=submodel.name, files=(f"{submodel.name}.bound",)),
            root / "engines" / cls.target,
        )
        text = (compiled.folder / compiled.artifact.files[0]).read_bytes()
        if not text.endswith(cls.here.encode()):
            raise EngineError(f"{submodel.name} was compiled for another machine than {cls.here}")
        return cls(lambda inputs: {"text": np.frombuffer(text, np.uint8)})

    @classmethod
    def emulate(cls, submodel: Submodel, root: Path, options: Options) -> Engine:
        raise EngineUnavailable("a fake computes nothing to compare")

    @classmethod
    def misfit(cls, artifact: Artifact) -> str:
        compiled = artifact.key.get("here")
        return "" if compiled == cls.here else f"was compiled for {compiled}, and here is {cls.here}"

    @classmethod
    def reads_graph(cls, artifact: Artifact) -> bool:
        return False
