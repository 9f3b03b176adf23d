"""Make the Python stubs of proto/ in serving/enginecast_pb/: `python -m serving.generate`.

protoc derives import paths from the .proto's package (enginecast.v1), which is no Python package of ours; the imports
are rewritten to where the stubs lie, so that proto/ holds nothing but .proto files.
"""

from __future__ import annotations

import importlib.resources
import re
import sys
import tempfile
from pathlib import Path
from typing import Final

from runtime.errors import EnginecastError
from runtime.optional import require

ROOT: Final = Path(__file__).parent.parent
PROTOS: Final = ROOT / "proto"
STUBS: Final = ROOT / "serving" / "enginecast_pb"
MARKER: Final = '"""Stubs of proto/enginecast/v1, made by `python -m serving.generate`. Do not edit."""\n'


def generate(output: Path) -> list[Path]:
    """Write the stubs of every .proto into the folder `output`; return the files. Needs grpcio-tools (extra "dev")."""
    protoc = require("grpc_tools.protoc", "dev")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        # protoc's own well-known types come with grpcio-tools.
        includes = [f"-I{PROTOS}", f"-I{importlib.resources.files('grpc_tools') / '_proto'}"]
        outputs = [f"--{kind}_out={temporary}" for kind in ("python", "pyi", "grpc_python")]
        sources = sorted(str(path) for path in PROTOS.rglob("*.proto"))
        if protoc.main(["protoc", *includes, *outputs, *sources]) != 0:
            raise EnginecastError("protoc refused the files of proto/: its messages stand above")
        made = [_move(path, output) for path in sorted(Path(temporary).rglob("*.py*"))]
    package = output / "__init__.py"
    package.write_text(MARKER)
    return [*made, package]


def _move(path: Path, output: Path) -> Path:
    moved = output / path.name
    moved.write_text(re.sub(r"\bfrom enginecast\.v1 import\b", "from serving.enginecast_pb import", path.read_text()))
    return moved


if __name__ == "__main__":
    for written in generate(STUBS):
        sys.stdout.write(f"{written.relative_to(ROOT)}\n")
