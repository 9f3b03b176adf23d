"""Switches the telemetry of libraries off, before any of them is imported.

`runtime/__init__.py` calls `keep_silent`, and every other package imports `runtime` first. Child processes inherit the
environment variables.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

from runtime.errors import EnginecastError
from runtime.files import cache_folder

SILENT: Final[Mapping[str, str]] = {
    "ORT_DISABLE_TELEMETRY": "1",
    # ONNX Runtime 1.31 writes a device id and events to the user's cache; its API call comes too late
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, and through it transformers, diffusers and optimum
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "DISABLE_TELEMETRY": "1",  # older versions of these
    "DO_NOT_TRACK": "1",  # https://donottrack.sh
    "GRADIO_ANALYTICS_ENABLED": "False",
    "RAY_USAGE_STATS_ENABLED": "0",
    "NNCF_CI": "1",  # NNCF has no other switch
}
"""Environment variables. They replace values of the user, because any other value would enable telemetry."""
BLOCKED: Final = ("openvino_telemetry",)
"""Packages for telemetry alone. OpenVINO's tools and NNCF work without them."""
TORCH_CACHE: Final = "TORCHINDUCTOR_CACHE_DIR"
"""The folder that torch makes on import, by default among the temporary files. A value of the user is kept."""


def keep_silent() -> None:
    """Set the environment variables and make imports of the blocked packages fail. Call it before libraries are
    imported.
    """
    os.environ.update(SILENT)
    sys.modules.update(dict.fromkeys(BLOCKED))  # type: ignore[arg-type]  # None: imports raise ModuleNotFoundError
    with suppress(EnginecastError):  # there is no cache folder; code that needs one raises
        os.environ.setdefault(TORCH_CACHE, str(cache_folder() / "torch"))
