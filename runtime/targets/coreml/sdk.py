"""coremltools without the frameworks it can convert from: torch, TensorFlow and scikit-learn are not imported with it,
and it prints no warnings about them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, Final

from runtime.optional import require

FRAMEWORKS: Final = (
    *(
        "torch",
        "torchvision",
        "torchaudio",
        "torchao",
        "executorch",
        "tensorflow",
        "sklearn",
        "xgboost",
        "libsvm",
        "transformers",
    ),
)
"""The packages that coremltools 9.0 imports when it finds them, and warns about when it does not know their version."""
_lock: Final = Lock()


@cache
def coremltools() -> Any:
    """The package. Raises MissingDependency naming the extra.

    If another thread imports one of the frameworks for the first time during these seconds, the import fails as if the
    framework were not installed.
    """
    with _lock:
        logging.getLogger("coremltools").setLevel(logging.ERROR)  # off macOS it lists eight times what it cannot load
        hidden = {name: sys.modules.get(name) for name in FRAMEWORKS}
        try:
            sys.modules.update(dict.fromkeys(FRAMEWORKS))  # type: ignore[arg-type]  # None: import finds nothing of that name
            return require("coremltools", "coreml")
        finally:
            for name, module in hidden.items():
                if module is None:
                    sys.modules.pop(name, None)
                else:
                    sys.modules[name] = module


@contextlib.contextmanager
def converting(folder: Path) -> Iterator[None]:
    """Used around a conversion: its temporary files lie in `folder` and are removed at the end, and no progress bar is
    drawn on stderr.

    coremltools leaves its folder of weights to the garbage collector; Python warns about that, and the frames of an
    error would keep the folder.
    """
    before = tempfile.tempdir
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore", ResourceWarning)
        tempfile.tempdir = str(folder)
        try:
            yield
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            tempfile.tempdir = before
