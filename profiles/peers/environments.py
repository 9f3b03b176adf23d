"""Environments of peers and what these make of checkpoints: made once, whole or not at all, in folders that last."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from profiles.bench import Say
from profiles.memory import Measured, measure
from profiles.peers.declared import Environment, Export, Peer
from profiles.peers.inside import Job
from profiles.peers.measuring import Party
from profiles.process import Worker
from runtime.errors import EngineError
from runtime.files import vanishing

ROOT: Final = Path(__file__).parents[1]
TRAVELS: Final = ("asked.py", "protocol.py", "serving/load.py", "peers/inside.py", "peers/workers", "peers/exports")
"""The files of this package that need nothing but Python and the peer's own libraries."""
PYTHON: Final = "python"
LINES: Final = 3
"""Last lines of a failed command that are shown."""


@contextmanager
def inside() -> Iterator[dict[str, str]]:
    """Variables for commands of a peer's environment, which find there the files of ours that may run in it. Nothing
    else of ours, and nothing of what is installed beside it, can be imported.
    """
    with TemporaryDirectory(prefix="enginecast-peers-") as folder:
        package = Path(folder) / "profiles"
        for name in TRAVELS:
            (package / name).parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, package / name)
        for above in (package, package / "serving", package / "peers"):
            (above / "__init__.py").touch()
        yield {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Workplace:
    """The folder with the environments of peers and their exports of one checkpoint."""

    folder: Path
    checkpoint: Path
    key: str
    """Tells checkpoints of one name apart."""

    def python(self, environment: Environment) -> Path:
        """The Python of an environment, whether or not it is there."""
        return self._environment(environment) / "bin" / PYTHON

    def _environment(self, environment: Environment) -> Path:
        return self.folder / "environments" / environment.name

    def _export(self, export: Export) -> Path:
        return self.folder / "exports" / f"{self.checkpoint.name}-{self.key}" / export.name

    def model(self, peer: Peer) -> Path:
        """What a peer loads."""
        return self._export(peer.export) if peer.export else self.checkpoint

    def party(self, peer: Peer, sizes: Mapping[str, int], variables: Mapping[str, str], failure: str) -> Party:
        """A peer that is to be measured, with files of ours as `inside` gives them."""
        model = self.model(peer)
        job = Job(model=str(model), sizes=sizes, options=peer.options)
        command = [str(self.python(peer.environment)), "-P", "-m", f"profiles.peers.workers.{peer.worker}", job.line]
        log = self.folder / "logs" / f"{peer.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        files = [file for file in model.rglob("*") if file.is_file()] if peer.export else []
        size = sum(file.stat().st_size for file in files) or None
        return Party(
            peer.name,
            Worker(command, environment=variables, log=log, name=peer.name),
            size,
            dict.fromkeys(peer.metrics, peer.form),
            failure,
        )

    def make_environment(self, environment: Environment, say: Say) -> None:
        """Make it unless it is there. Raises EngineError."""
        place = self._environment(environment)
        if self.python(environment).exists():
            say(f"environment {environment.name}: {place}")
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        with vanishing(place.parent, f".{environment.name}-") as folder:
            say(f"environment {environment.name}: installing {', '.join(environment.requirements)}")
            _run([sys.executable, "-m", "venv", str(folder)], {})
            pip = [str(folder / "bin" / PYTHON), "-m", "pip", "--disable-pip-version-check"]
            # what was built before was built with other variables
            fresh = ["--no-cache-dir"] if environment.variables else []
            _run([*pip, "install", "--quiet", *fresh, *environment.requirements], environment.variables)
            if environment.removed:
                _run([*pip, "uninstall", "--quiet", "--yes", *environment.removed], {})
            folder.rename(place)

    def make_export(self, export: Export, say: Say) -> None:
        """Make it unless it is there. Raises EngineError."""
        place = self._export(export)
        if place.is_dir():
            say(f"export {export.name}: {place}")
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        with vanishing(place.parent, f".{export.name}-") as folder, inside() as variables:
            output = folder / "output"
            output.mkdir()
            words = {"checkpoint": str(self.checkpoint.absolute()), "output": str(output)}
            command = (word.format(**words) for word in export.command)
            made = _run([str(self.python(export.environment)), "-P", *command], variables)
            say(f"export {export.name}: {made.whole}")
            output.rename(place)


def _run(command: Sequence[str], variables: Mapping[str, str]) -> Measured:
    """Run a command to its end. Raises EngineError with the end of what it said."""
    measured = measure(command, variables=variables, errors=subprocess.STDOUT)
    if measured.exit_code:
        said = [one.line.strip() for one in measured.stretches if one.line.strip()][-LINES:]
        name = " ".join(Path(word).name if os.sep in word else word for word in command[:4])
        raise EngineError(f"{name} ended with exit code {measured.exit_code}: {' | '.join(said) or 'it said nothing'}")
    return measured
