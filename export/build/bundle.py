"""The bundle of a build: finished, with its manifest on disk and every file hashed, or a draft of it. A build loads
drafts to calibrate, compare and time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from export.build.state import Build
from export.checkpoint.preflight import lay_assets
from export.graph import weights as graph
from runtime.bundle.manifest import MANIFEST, Artifact, Bundle, Manifest, Submodel, Verdict, sha256
from runtime.bundle.manifest import Source as BundleSource
from runtime.files import key_of


class Draft(Bundle):
    """A bundle without a manifest on disk. What a build wrote itself a moment ago is loaded without hashing it."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root, self.manifest, self.content = root, manifest, b""

    def verify(self, unknown: bool = True) -> None:
        """Nothing is compared."""

    def verify_again(self) -> None:
        """Nothing is compared."""


def place(submodel: str) -> str:
    """Where a submodel's graph lies in a bundle."""
    return f"onnx/{submodel}/{graph.MODEL}"


def draft(
    state: Build, folder: Path, submodels: Sequence[Submodel], artifacts: Sequence[Artifact] = (), quant: str = ""
) -> Bundle:
    """What lies in the folder so far, ready to be loaded. The model's own files are added; `quant` is the build's, if
    empty.
    """
    lay_assets(state.assets, state.tensors, folder)
    files = {path: _unhashed(folder / path) for path in _files(folder)}
    return Draft(folder, _manifest(state, submodels, artifacts, quant or state.options.quant, files))


def finish(
    state: Build,
    folder: Path,
    submodels: Sequence[Submodel],
    artifacts: Sequence[Artifact],
    verdict: Verdict | None = None,
) -> None:
    """Add the model's own files and the manifest, which has a hash of every file."""
    lay_assets(state.assets, state.tensors, folder)
    files = {path: sha256(folder / path) for path in _files(folder)}
    manifest = _manifest(state, submodels, artifacts, state.options.quant, files, verdict)
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1))


def _manifest(
    state: Build,
    submodels: Sequence[Submodel],
    artifacts: Sequence[Artifact],
    quant: str,
    files: Mapping[str, str],
    verdict: Verdict | None = None,
) -> Manifest:
    return Manifest(
        name=state.name,
        key=state.key,
        pipeline=state.family.pipeline_of(state.source),
        task=state.task,
        quant=quant,
        source=BundleSource(
            name=state.source.name,
            family=state.family.name,
            architecture=state.source.architecture,
            fingerprint=state.fingerprint,
            additions=state.additions,
        ),
        submodels=tuple(submodels),
        artifacts=tuple(artifacts),
        config=state.family.config(state.source),
        versions=state.versions,
        quality=verdict,
        notes=state.notes,
        files=files,
    )


def _files(folder: Path) -> Iterator[str]:
    return (str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file())


def _unhashed(file: Path) -> str:
    """Stands for the hash of a file of a draft: no two files have the same, so that nothing that was compiled of one is
    taken for another's.
    """
    found = file.stat()
    return key_of(str(file), found.st_ino, found.st_size, found.st_mtime_ns)
