"""Manifests of older schemas, restated in the present one.

Schema 1 had one label for a submodel's precision and `compute` beside it; its first bundles named activation ranges
`spans` and no task. Schema 2 knew no additions to a source, of which its bundles have none. See decision 24.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from runtime.bundle.precision import Precision


def present(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """The manifest of whatever older schema in the present one. What it cannot restate stays, for validation to name.

    `manifest` is parsed JSON with the known `schema_version` of an older schema.
    """
    submodels = manifest.get("submodels")
    restated = list(map(_submodel, submodels)) if isinstance(submodels, list) else submodels
    task = {} if "task" in manifest else {"task": _task_of(manifest.get("pipeline"))}
    return {**task, **manifest, "schema_version": 3, "submodels": restated}


def _submodel(old: Any) -> Any:
    if not isinstance(old, dict):
        return old
    found = dict(old)
    if "spans" in found:
        found.setdefault("activation_ranges", found.pop("spans"))
    label, compute = found.get("precision"), found.get("compute", "float32")
    if isinstance(label, str):
        with suppress(ValidationError):
            found["precision"] = Precision.parse(label, compute).model_dump(mode="json")
            found.pop("compute", None)
    return found


def _task_of(pipeline: Any) -> str:
    """The task of a pipeline; empty where this program lacks the pipeline, so that the bundle cannot be loaded."""
    from runtime.pipeline import pipelines  # it stands above the manifest, and only older bundles need it

    known = pipelines()
    return known[pipeline].task if isinstance(pipeline, str) and pipeline in known else ""
