"""Finds a compiled engine that fits this machine: the bundle's, else one compiled here before, else compiles one.

Engines compiled here are stored in the user's cache folder, never in the bundle:

<cache>/engines/<key>/entry.json   the artifact and the sha256 of its files, which are in the same folder
<cache>/engines/.lock              held during a compilation: one at a time, because kernels are chosen by timing

The key is a hash of everything that the result depends on: the canonical graph, the submodel, the target, its settings,
the versions and this machine.
"""

from __future__ import annotations

import os
import platform
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Literal

from filelock import FileLock, Timeout
from pydantic import ValidationError

from runtime.bundle.manifest import LARGEST_MANIFEST, Artifact, Bundle, Frozen, Inside, Submodel, sha256
from runtime.engine import Compiled, CompileOptions, Engine, targets
from runtime.errors import EngineError, EngineUnavailable, ResourceExhausted
from runtime.files import FULL, cache_folder, key_of, read_regular, vanishing
from runtime.placing.processor import processor_features

ENTRY: Final = "entry.json"
LOCK: Final = ".lock"
UNFINISHED: Final = ".compiling-"
SECONDS_BETWEEN_TRIES: Final = 0.5
Progress = Callable[[float, str], None]
"""Called with the completed share, from 0 to 1, and the name of the phase. An exception from it stops the compilation
and is raised again.
"""


@dataclass(frozen=True)
class Fitted:
    """The engine files to load, for `Options.compiled`. `note` says what was compiled and why; it is empty if the
    bundle's own files fit.
    """

    compiled: Compiled
    note: str = ""


class Entry(Frozen):
    """An entry of the cache: the artifact, and the sha256 of its files by name."""

    artifact: Artifact
    files: Mapping[Inside, str]


@dataclass(frozen=True)
class Prospect:
    """Whether an artifact of a bundle is loaded on this machine, and the reason if it is not loaded as it is."""

    word: Literal["yes", "compiled anew", "no"]
    why: str = ""


def prospect(bundle: Bundle, artifact: Artifact) -> Prospect:
    """Predict the result of placement and `fitting` for an artifact. Nothing is loaded or compiled."""
    if artifact.target not in targets():
        return Prospect("no", "not known to this program")
    engine = targets()[artifact.target]
    found = engine.available()
    if not found.usable:
        return Prospect("no", f"does not run here: {found.reason}")
    misfit = engine.misfit(artifact)
    if not misfit:
        return Prospect("yes")
    compilable = bool(bundle.graph_files(bundle.submodel(artifact.submodel)))
    return Prospect("compiled anew" if compilable else "no", misfit)


def fitting(
    bundle: Bundle,
    submodel: Submodel,
    engine: type[Engine],
    progress: Progress = lambda share, phase: None,
    settings: Mapping[str, str] | None = None,
) -> Fitted:
    """The engine files of a submodel for this machine, compiled now if none fit. The bundle must be verified before.

    `settings` are compile settings of the target, added to those that the bundle was built with. Raises
    EngineUnavailable if nothing fits and the bundle has no canonical graph, EngineError if the compilation fails,
    ResourceExhausted if the cache is full or cannot be written. If two processes need the same engine, the second waits
    for the first and uses its result.
    """
    held = bundle.artifacts(engine.target, submodel.name)
    misfits = []
    for artifact in held:
        reason = engine.misfit(artifact)
        if not reason:
            return Fitted(Compiled.of(bundle.root, artifact))
        misfits.append(reason)
    why = "; ".join(f"one {reason}" for reason in misfits) or f"bundle {bundle.name} holds none"
    if not bundle.graph_files(submodel):
        raise EngineUnavailable(
            f"no {engine.target} engine of {submodel.name} fits here ({why}), and none can be compiled: bundle "
            f"{bundle.name} was made with "
            f"--strip-canonical. Build it with --target {engine.target} for this machine, or without --strip-canonical"
        )
    wanted = dict(held[-1].settings if held else {}) | dict(settings or {})
    key = _key(bundle, submodel, engine, wanted)
    folder = cache_folder() / "engines" / key
    found, damage = _kept(folder, engine)
    if found is None:
        with _alone(folder.parent, progress):
            found, damage = _kept(folder, engine)
            if found is None:
                start = time.perf_counter()
                found = _compile(bundle, submodel, engine, CompileOptions(wanted, progress), folder)
                again = f", again, since {damage}" if damage else ""
                done = f"compiled here in {time.perf_counter() - start:.1f} s and kept in {folder}{again}"
                return Fitted(Compiled(found, folder), _note(engine, submodel, why, done))
    return Fitted(Compiled(found, folder), _note(engine, submodel, why, f"compiled here before, taken from {folder}"))


def _note(engine: type[Engine], submodel: Submodel, why: str, done: str) -> str:
    return f"{engine.target} engine of {submodel.name}: {why}; {done}"


def _key(bundle: Bundle, submodel: Submodel, engine: type[Engine], settings: Mapping[str, str]) -> str:
    found = engine.available()
    graph = {path: bundle.manifest.files[path] for path in bundle.graph_files(submodel)}
    description = submodel.model_dump(mode="json", exclude={"parity"})
    machine = [platform.system(), platform.machine(), processor_features(), found.version, found.devices]
    return key_of(engine.target, graph, description, settings, _code(), machine)


@cache
def _code() -> str:
    """A hash of the code that lowers and compiles, so that a new version of it does not load old engines."""
    root = Path(__file__).parents[1]
    return key_of([path.read_text() for room in ("bundle", "targets") for path in sorted((root / room).rglob("*.py"))])


def _kept(folder: Path, engine: type[Engine]) -> tuple[Artifact | None, str]:
    """The artifact stored in the folder if it is intact, else None and the reason ("" if there is none).

    Raises EngineError if another user can write the folder: engines are native code.
    """
    if not folder.exists():
        return None, ""
    require_own(folder)
    try:
        entry = Entry.model_validate_json(read_regular(folder / ENTRY, LARGEST_MANIFEST))
        altered = [name for name, expected in entry.files.items() if sha256(folder / name) != expected]
    except (OSError, ValidationError):
        return None, f"the engine stored in {folder} could not be read"
    if altered or not set(entry.artifact.files) <= set(entry.files):
        return None, f"the engine stored in {folder} was damaged ({', '.join(altered or [ENTRY])})"
    reason = engine.misfit(entry.artifact)
    return (None, f"the stored engine {reason}") if reason else (entry.artifact, "")


def require_own(folder: Path) -> None:
    """Raise EngineError if others than this user can write the folder."""
    if os.name != "posix":
        return
    for one in (folder.parent, folder):
        found = one.lstat()
        if (
            not stat.S_ISDIR(found.st_mode)
            or found.st_uid != os.geteuid()
            or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        ):
            raise EngineError(
                f"other users can write {one}, and engines are native code: remove it, or set ENGINECAST_CACHE to a "
                "folder that only this user can write"
            )


@contextmanager
def _alone(engines: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock of this folder, so that no other process compiles. Makes the folder. Raises ResourceExhausted."""
    try:
        engines.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_own(engines)
        lock = FileLock(engines / LOCK)
        while not lock.is_locked:
            try:
                lock.acquire(timeout=SECONDS_BETWEEN_TRIES)
            except Timeout:
                progress(0.0, "Waiting for another process that compiles")
    except (OSError, NotImplementedError) as error:  # the second if the file system has no locks
        raise _unwritable(engines, error) from None
    try:
        for left in engines.glob(f"{UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)  # left by a crash
        yield
    finally:
        lock.release()


def _compile(
    bundle: Bundle, submodel: Submodel, engine: type[Engine], options: CompileOptions, folder: Path
) -> Artifact:
    """Compile into a temporary folder, then replace `folder` with it."""
    with ExitStack() as stack:
        try:
            made = stack.enter_context(vanishing(folder.parent, UNFINISHED))
        except OSError as error:
            raise _unwritable(folder.parent, error) from None
        try:
            artifact = engine.compile_with(options, submodel, bundle.root / submodel.graph, made)
            hashes = {
                path.relative_to(made).as_posix(): sha256(path) for path in sorted(made.rglob("*")) if path.is_file()
            }
            (made / ENTRY).write_text(Entry(artifact=artifact, files=hashes).model_dump_json())
        except OSError as error:
            if error.errno in FULL:
                raise _unwritable(folder.parent, error) from None
            raise EngineError(f"could not compile {submodel.name} for {engine.target}: {error}") from None
        reason = engine.misfit(artifact)
        if reason:
            raise EngineError(
                f"the {engine.target} engine of {submodel.name} does not fit where it was compiled: it {reason}"
            )
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return artifact


def _unwritable(folder: Path, error: OSError | NotImplementedError) -> ResourceExhausted:
    if isinstance(error, OSError) and error.errno in FULL:
        return ResourceExhausted(
            f"the disk of {folder} is full: free some space there, or set ENGINECAST_CACHE to another folder"
        )
    reason = error.strerror if isinstance(error, OSError) else error
    return ResourceExhausted(
        f"cannot write {folder}, the cache of compiled engines: {reason}. Set ENGINECAST_CACHE to another folder"
    )
