from __future__ import annotations

from pathlib import Path

import pytest

from runtime.errors import BundleError, InvalidInput, MissingDependency
from serving.host.shown import concealed, without_paths


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "bundle /srv/models/a b is damaged: onnx/unet/model.onnx was altered",
            "bundle mine is damaged: onnx/unet/model.onnx was altered",
        ),
        ("cannot read '/root/.cache/enginecast/x.blob' (full)", "cannot read '...' (full)"),
        (r"cannot read C:\Users\me\x.bin", "cannot read ..."),
        ("Load model from ~/models/x.onnx failed:File doesn't exist", "Load model from ... failed:File doesn't exist"),
        (
            "expected int8/int4 and/or 1/2, see https://example.org/a/b",
            "expected int8/int4 and/or 1/2, see https://example.org/a/b",
        ),
        ("x" * 5_000_000, "x" * 999 + "…"),
        ("half \udcff", "half ?"),
    ],
)
def test_clients_get_no_paths_and_no_novels(text: str, shown: str) -> None:
    assert without_paths(text, Path("/srv/models/a b"), "mine") == shown


def test_an_error_stays_of_its_class() -> None:
    error = concealed(InvalidInput("place", "has /etc/x"), Path("/srv/m"), "mine")
    assert isinstance(error, InvalidInput) and error.field == "place" and str(error) == "place: has ..."
    assert str(concealed(MissingDependency("openvino", "openvino"), Path("/srv/m"), "mine")).startswith(
        "openvino is not installed"
    )
    assert str(concealed(BundleError("/srv/m is none"), Path("/srv/m"), "mine")) == "mine is none"
