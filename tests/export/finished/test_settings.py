"""Settings of a finished bundle that are changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.finished.artifacts import Signed
from export.finished.settings import store_config
from runtime.bundle.manifest import MANIFEST, Bundle
from runtime.errors import BundleError, InvalidInput
from tests.export.finished.test_artifacts import content, keys, root

__all__ = ["keys", "root"]  # the fixtures


def test_settings_take_the_place_of_those_of_the_same_name(root: Path) -> None:
    before, files = Bundle(root).manifest, content(root)
    store_config(root, {"forecast": {"steps": 8}})
    after = store_config(root, {"forecast": {"steps": 9}, "other": 1})
    assert after.manifest.config == {"forecast": {"steps": 9}, "other": 1}
    assert after.manifest.key != before.key and after.manifest.files == before.files
    assert {name for name, data in content(root).items() if files.get(name) != data} == {MANIFEST}
    after.verify()


def test_a_damaged_or_signed_bundle_stays_as_it_is(root: Path, keys: Path) -> None:
    (root / "tokenizer" / "vocab.json").write_bytes(b"other")
    before = content(root)
    with pytest.raises(BundleError, match=r"vocab\.json"):
        store_config(root, {"forecast": {}})
    with pytest.raises(InvalidInput, match="key: "):
        store_config(root, {"forecast": {}}, Signed(keys / "public.pem"))
    assert content(root) == before
