"""coremltools without what it is able to convert from: torch, TensorFlow and scikit-learn are not loaded with it, nor
spoken of.
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
"""What coremltools 9.0 imports when it finds it, and warns of when its version is not one it knows."""
_lock: Final = Lock()


@cache
def coremltools() -> Any:
    """The package. Raises MissingDependency naming the extra.

    Another thread that imports one of the frameworks for the first time during these seconds is told that it is not
    installed.
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
    """Around a conversion: its temporary files lie in `folder`, they are gone at the end, and nothing is drawn on
    stderr.

    coremltools leaves its folder of weights to the garbage collector, of which Python warns, and which an error's
    frames would keep.
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
