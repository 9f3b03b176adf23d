"""Changes of a finished bundle: adding engines for another target, removing its canonical graphs, renewing its
signature.

A bundle changes by renaming its new manifest over the old one. New files are written before, old files are removed
after. If the process is killed at any moment, the bundle is the old or the new one, complete. It may have left unlisted
files, which `Bundle.unknown_files` returns and the next change removes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from filelock import FileLock, Timeout

from calibration.quantize.recipes import RECIPES
from export.finished.agreement import Reference, agree, summary
from export.report.progress import Listener, Progress, ProgressStep
from runtime.bundle.manifest import MANIFEST, SIGNATURE, Artifact, Bundle, Manifest, Submodel, sha256
from runtime.bundle.signing import private_key, sign
from runtime.engine import CompileOptions, Engine, check_precisions, target, targets
from runtime.errors import BundleError, EngineUnavailable, InvalidInput, ResourceExhausted, Unavailable
from runtime.files import FULL, cache_folder, key_of, vanishing, written

ENGINES: Final = "engines"
UNFINISHED: Final = ".adding-"
TRIES: Final = 50
SECONDS_BETWEEN_TRIES: Final = 0.1
AUTO: Final = "auto"
CHECKED_BYTES: Final = 1 << 30
"""Engines added to bundles with at most this many bytes of weights are compared with their graphs. For larger ones that
takes minutes.
"""
TOO_LARGE: Final = "it was added to a bundle of more than 1 GiB of weights, where comparing takes long"


@dataclass(frozen=True)
class Signed:
    """What to do with a signature that a change invalidates: `key` signs again, `drop` leaves the bundle unsigned."""

    key: Path | None = None
    drop: bool = False

    def check(self, bundle: Bundle) -> None:
        """Raise InvalidInput if the bundle is signed and neither was chosen, or if the key is invalid."""
        if self.key is not None:
            private_key(self.key)
        elif (bundle.root / SIGNATURE).exists() and not self.drop:
            raise InvalidInput(
                "key",
                f"is missing: {bundle.root} is signed, sign it anew with --key PRIVATE.pem, or --force drops the "
                "signature",
            )


def every_target(quant: str = "none") -> tuple[str, ...]:
    """The targets that can be compiled on this machine and have kernels for a recipe's layers, by preference."""
    needed = RECIPES[quant].precisions if quant in RECIPES else frozenset[str]()
    found = {name: engine.available() for name, engine in targets().items() if needed <= engine.precisions}
    return tuple(name for name, one in found.items() if one.usable or one.compiles)


def resolve_targets(names: Sequence[str], quant: str = "none") -> tuple[str, ...]:
    """The named targets; "auto" stands for all that can be compiled here. Raises EngineUnavailable if none can."""
    found = [name for one in names for name in (every_target(quant) if one == AUTO else (one,))]
    if not found:
        raise EngineUnavailable(f"no target can be compiled here for --quant {quant}: see `enginecast targets`")
    return tuple(dict.fromkeys(found))


def add_target(
    root: Path,
    name: str,
    settings: Mapping[str, str] | None = None,
    signed: Signed | None = None,
    listen: Listener = lambda report: None,
) -> tuple[Bundle, tuple[Artifact, ...]]:
    """Compile a bundle's canonical graphs for one more target or one more kind of machine. Returns the bundle and its
    new artifacts.

    Artifacts with the same key are replaced. Raises NotFound, BundleError, InvalidInput, EngineError or
    ResourceExhausted; the bundle is unchanged then.
    """
    signed, settings = signed or Signed(), settings or {}
    with changing(root) as bundle:
        engine = _compiler(bundle, name)
        engine.check_settings(settings)
        signed.check(bundle)
        bundle.verify(unknown=False)
        submodels = bundle.manifest.submodels
        steps = [
            ProgressStep(part.name, f"{what} {name}", 0.5 + 5 * part.nbytes / 1e9)
            for what in ("compile", "check")
            for part in submodels
        ]
        progress = Progress(steps, listen)
        with vanishing(root, UNFINISHED) as folder:
            made = folder / ENGINES / name
            made.mkdir(parents=True)
            compiled = [_compile(engine, bundle, part, made, settings, progress) for part in submodels]
            artifacts = _checked(engine, bundle, folder, compiled, progress)
            _commit(bundle, name, made, artifacts, signed)
    after = Bundle(root)
    return after, tuple(one for one in after.manifest.artifacts if one not in bundle.manifest.artifacts)


@contextmanager
def changing(root: Path) -> Iterator[Bundle]:
    """The bundle, locked for changes. Raises Unavailable if another process changes it, ResourceExhausted if it cannot
    be written.
    """
    bundle = Bundle(root)
    lock = FileLock(cache_folder() / f"{key_of(str(root.resolve()))}.lock")
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise Unavailable(f"{root} is being changed by another program: try again when it is done") from None
    except (OSError, NotImplementedError) as error:
        raise ResourceExhausted(
            f"cannot lock {root} in the cache {cache_folder()}: {error}. Set ENGINECAST_CACHE to another folder"
        ) from None
    try:
        _remove_unfinished(root)
        yield bundle
    except OSError as error:
        if error.errno in FULL:
            raise ResourceExhausted(f"the disk of {root} is full: free some space there") from None
        raise ResourceExhausted(f"cannot change {root}: {error}. Change a copy that can be written") from None
    finally:
        lock.release()


def _remove_unfinished(root: Path) -> None:
    """Remove the files of a killed change. Its own janitor process may be removing them at the same time."""
    for _ in range(TRIES):
        left = list(root.glob(f"{UNFINISHED}*"))
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
        if not left:
            return
        time.sleep(SECONDS_BETWEEN_TRIES)


def _compiler(bundle: Bundle, name: str) -> type[Engine]:
    """The target, if it can compile the bundle's graphs here. Raises EngineUnavailable, InvalidInput, BundleError."""
    engine, manifest = target(name), bundle.manifest
    found = engine.available()
    if not (found.usable or found.compiles):
        raise EngineUnavailable(f"cannot compile for {name}: {found.reason}")
    if manifest.quant in RECIPES:
        check_precisions([name], RECIPES[manifest.quant].precisions)
    if not all(bundle.graph_files(submodel) for submodel in manifest.submodels):
        raise BundleError(
            f"{bundle.root} has no canonical graphs, which a target is compiled from: build it without "
            "--strip-canonical"
        )
    return engine


def _compile(
    engine: type[Engine], bundle: Bundle, part: Submodel, made: Path, settings: Mapping[str, str], progress: Progress
) -> Artifact:
    with progress.step(part.name, f"compile {engine.target}"):
        options = CompileOptions(settings, progress.compiling)
        return engine.compile_with(options, part, bundle.root / part.graph, made)


def _checked(
    engine: type[Engine], bundle: Bundle, folder: Path, artifacts: list[Artifact], progress: Progress
) -> list[Artifact]:
    """The artifacts with the results of their comparison. Raises EngineError if one does not agree with its graph.

    `folder` has the compiled files. A manifest and links to the graphs are added, which engines expect in a bundle.
    """
    submodels = bundle.manifest.submodels
    for top in {PurePosixPath(part.graph).parts[0] for part in submodels}:
        (folder / top).symlink_to(bundle.root.resolve() / top, target_is_directory=True)
    (folder / MANIFEST).write_text(bundle.manifest.model_copy(update={"artifacts": tuple(artifacts)}).model_dump_json())
    small = sum(part.nbytes for part in submodels) <= CHECKED_BYTES
    found = []
    for part, artifact in zip(submodels, artifacts, strict=True):
        with progress.step(part.name, f"check {engine.target}") as notes:
            one = (
                agree(engine, Reference(part, folder), artifact)
                if small
                else artifact.model_copy(update={"unchecked": TOO_LARGE})
            )
            notes.append(summary(one))
            found.append(one)
    return found


def _commit(bundle: Bundle, name: str, made: Path, artifacts: list[Artifact], signed: Signed) -> None:
    """Move the compiled files into the bundle and write its new manifest.

    The files go to engines/<target>, or to a folder in it that is named by their hash if the bundle has engines there.
    """
    manifest, root = bundle.manifest, bundle.root
    hashes = {path.relative_to(made).as_posix(): sha256(path) for path in sorted(made.rglob("*")) if path.is_file()}
    place = PurePosixPath(ENGINES, name)
    taken = any(place in PurePosixPath(path).parents for path in manifest.files)
    inside = key_of(hashes)[:8] if taken and hashes else ""
    added = [one.model_copy(update={"folder": inside if one.files else ""}) for one in artifacts]
    replaced = {(one.target, one.submodel, tuple(sorted(one.key.items()))) for one in added}
    kept = [
        one for one in manifest.artifacts if (one.target, one.submodel, tuple(sorted(one.key.items()))) not in replaced
    ]
    all_artifacts = (*kept, *added)
    needed = {str(PurePosixPath(ENGINES, one.target, one.folder, file)) for one in all_artifacts for file in one.files}
    before = {
        path: known for path, known in manifest.files.items() if not path.startswith(f"{ENGINES}/") or path in needed
    }
    after = before | {str(place / inside / path): found for path, found in hashes.items()}
    if hashes and not all(str(place / inside / path) in manifest.files for path in hashes):
        final = root / place / inside
        shutil.rmtree(final, ignore_errors=True)  # left by a killed change: the manifest lists nothing there
        final.parent.mkdir(parents=True, exist_ok=True)
        made.rename(final)
    swap(bundle, manifest.model_copy(update={"artifacts": all_artifacts, "files": dict(sorted(after.items()))}), signed)


def swap(bundle: Bundle, manifest: Manifest, signed: Signed) -> None:
    """Replace the manifest by one rename, remove files that it no longer lists, and sign again if requested."""
    root = bundle.root
    if Bundle(root).content != bundle.content:
        raise BundleError(f"{root} was changed by another program meanwhile: try again")
    (root / SIGNATURE).unlink(missing_ok=True)
    with written(root / MANIFEST) as file:
        file.write(manifest.model_dump_json(indent=1).encode())
    for left in root.glob(f"{UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)
    gone = {
        *(set(bundle.manifest.files) - set(manifest.files)),
        *(path for path in Bundle(root).unknown_files() if path.startswith(f"{ENGINES}/")),
    }
    for path in gone:
        (root / path).unlink(missing_ok=True)
    for folder in sorted(
        {parent for path in gone for parent in PurePosixPath(path).parents}, key=lambda one: -len(one.parts)
    ):
        if folder.parts and (root / folder).is_dir() and not any((root / folder).iterdir()):
            (root / folder).rmdir()
    if signed.key is not None:
        sign(Bundle(root), signed.key)


def check_strippable(artifacts: Sequence[Artifact], submodels: Sequence[str]) -> None:
    """Raise InvalidInput unless every submodel is compiled and no artifact needs the canonical graphs.

    Before a build has artifacts, it passes ones whose key is the target's settings.
    """
    readers = dict.fromkeys(
        one.target for one in artifacts if one.target not in targets() or target(one.target).reads_graph(one)
    )
    if readers:
        raise InvalidInput(
            "strip-canonical",
            f"leaves out graphs and weights that are read when these targets are loaded: {', '.join(readers)}. Keep "
            "them, or build only for targets whose engines hold all they need, such as tensorrt-rtx",
        )
    compiled = {one.submodel for one in artifacts}
    missing = [name for name in submodels if name not in compiled]
    if missing:
        raise InvalidInput(
            "strip-canonical", f"would leave nothing of {', '.join(missing)}, of which nothing was compiled"
        )


def remove_graphs(folder: Path, submodels: Sequence[Submodel], artifacts: Sequence[Artifact]) -> None:
    """Remove the graphs of a bundle during a build, before its files are hashed. Raises InvalidInput if a target needs
    them.
    """
    check_strippable(artifacts, [submodel.name for submodel in submodels])
    for submodel in submodels:
        graphs = (folder / submodel.graph).parent
        shutil.rmtree(graphs)
        if not any(graphs.parent.iterdir()):
            graphs.parent.rmdir()


def strip(root: Path, signed: Signed | None = None) -> tuple[Bundle, int]:
    """Remove a bundle's canonical graphs and weights. Returns the bundle and the freed bytes, 0 if it had no graphs.

    The bundle then runs only on machines that its engines fit. Raises NotFound, BundleError, InvalidInput or
    ResourceExhausted.
    """
    signed = signed or Signed()
    with changing(root) as bundle:
        manifest = bundle.manifest
        gone = {path for submodel in manifest.submodels for path in bundle.graph_files(submodel)}
        if not gone:
            return bundle, 0
        check_strippable(manifest.artifacts, [submodel.name for submodel in manifest.submodels])
        signed.check(bundle)
        bundle.verify(unknown=False)
        freed = sum((root / path).stat().st_size for path in gone)
        kept = {path: known for path, known in manifest.files.items() if path not in gone}
        swap(bundle, manifest.model_copy(update={"files": kept, "key": key_of(manifest.key, "stripped")}), signed)
    return Bundle(root), freed
