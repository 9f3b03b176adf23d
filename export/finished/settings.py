"""Changes of the settings of a finished bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.finished.artifacts import Signed, changing, swap
from runtime.bundle.manifest import Bundle
from runtime.files import key_of


def store_config(root: Path, changes: Mapping[str, Any], signed: Signed | None = None) -> Bundle:
    """Put settings into `Manifest.config` of a bundle, in place of those of the same names. Returns the bundle.

    Raises NotFound, BundleError, InvalidInput, Unavailable or ResourceExhausted; the bundle is unchanged then.
    """
    signed = signed or Signed()
    with changing(root) as bundle:
        signed.check(bundle)
        bundle.verify(unknown=False)
        manifest = bundle.manifest
        config, key = {**manifest.config, **changes}, key_of(manifest.key, dict(changes))
        swap(bundle, manifest.model_copy(update={"config": config, "key": key}), signed)
    return Bundle(root)
