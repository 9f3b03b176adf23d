"""Make the Python stubs of proto/ in serving/enginecast_pb/: `python -m serving.generate`.

protoc derives import paths from the .proto's folder (enginecast/v1), which is no Python package of ours; the imports
are rewritten to where the stubs lie, so that proto/ holds nothing but .proto files.

Protobuf keeps the messages of a process in one pool, by name. Those of interfaces of others get a pool of their own, so
that a program may import another library's stubs of the same interface, such as tritonclient's.
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
OWN: Final = "enginecast"
"""The folder of proto/ with the interfaces of this program."""
MARKER: Final = '"""Stubs of proto/, made by `python -m serving.generate`. Do not edit."""\n'


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
        made = [_move(path, Path(temporary), output) for path in sorted(Path(temporary).rglob("*.py*"))]
    package = output / "__init__.py"
    package.write_text(MARKER)
    return [*made, package]


def _move(path: Path, root: Path, output: Path) -> Path:
    folder, text = path.parent.relative_to(root), path.read_text()
    text = re.sub(rf"\bfrom {'.'.join(folder.parts)} import\b", "from serving.enginecast_pb import", text)
    if folder.parts[0] != OWN:
        text = text.replace("_descriptor_pool.Default()", "_descriptor_pool.DescriptorPool()")
    moved = output / path.name
    moved.write_text(text)
    return moved


if __name__ == "__main__":
    for written in generate(STUBS):
        sys.stdout.write(f"{written.relative_to(ROOT)}\n")
