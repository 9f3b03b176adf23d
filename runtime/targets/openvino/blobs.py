"""Models compiled for the processor, kept in the user's cache where the variable ENGINECAST_BLOBS says how much.

OpenVINO then reads in a later process what it compiled in an earlier one, which takes about half of the time. A blob is
as large as the weights or larger, and each fixed shape has its own, so nothing is kept unless the user says
how much: beyond that, the blobs that were used longest ago are removed.

<cache>/openvino-cpu/*.blob   named by OpenVINO after the model, the settings, the processor and its own version
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from runtime.errors import ResourceExhausted
from runtime.files import cache_folder
from runtime.placing.memory import parse_size

VARIABLE: Final = "ENGINECAST_BLOBS"


@contextmanager
def kept(processor: bool) -> Iterator[dict[str, str]]:
    """OpenVINO's settings for compiling a model in the block. Its blob is kept where the user allows it and the device
    is the `processor`; other devices have a cache of their own.

    Raises InvalidInput for a wrong size, EngineError where others can write the folder, since blobs are native code,
    and ResourceExhausted where the folder cannot be made.
    """
    from runtime.placing.portable import require_own

    text = os.environ.get(VARIABLE, "")
    most = parse_size(VARIABLE, text, 0) if text and processor else 0
    if not most:
        yield {}
        return
    folder = cache_folder() / "openvino-cpu"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceExhausted(
            f"cannot write {folder}, the cache of compiled models: {error.strerror}. Set ENGINECAST_CACHE to another "
            f"folder, or leave {VARIABLE} out"
        ) from None
    require_own(folder)
    yield {"CACHE_DIR": str(folder)}
    prune(folder, most)


def prune(folder: Path, most: int) -> None:
    """Remove the blobs that were used longest ago until the others take at most so many bytes."""
    found = []
    for path in folder.glob("*.blob"):
        try:
            stat = path.stat()
        except FileNotFoundError:  # another process removed it
            continue
        found.append((max(stat.st_atime_ns, stat.st_mtime_ns), stat.st_size, path))
    left = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if left <= most:
            return
        with suppress(OSError):  # Windows does not remove what a process has mapped
            path.unlink(missing_ok=True)
            left -= size
