"""Signed bundles: whatever was altered, added or signed by another is refused and named, before anything is loaded."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.bundle.manifest import MANIFEST, SCHEMA, SIGNATURE, Bundle, sha256
from runtime.bundle.signing import generate, private_key, public_key, require_signature, sign
from runtime.errors import BundleError, EnginecastError, InvalidInput, MissingDependency, NotFound, ResourceExhausted

FILES = {
    "onnx/unet/model.onnx": b"graph",
    "onnx/unet/weights.safetensors": bytes(64),
    "engines/bound/unet.bound": b"native",
    "empty": b"",
}


def make(root: Path) -> Bundle:
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    manifest = {
        "schema_version": SCHEMA, "name": "shapes", "key": "k", "pipeline": "diffusion", "task": "image",
        "quant": "none",
        "source": {"name": "s", "family": "f", "architecture": "a", "fingerprint": "0"}, "submodels": [],
        "artifacts": [],
        "config": {}, "versions": {}, "files": {name: sha256(root / name) for name in FILES},
    }  # fmt: skip
    (root / MANIFEST).write_text(json.dumps(manifest))
    return Bundle(root)


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with private.pem, public.pem, and another pair of keys."""
    folder = tmp_path_factory.mktemp("keys")
    generate(folder / "private.pem", folder / "public.pem")
    generate(folder / "other.pem", folder / "other-public.pem")
    return folder


@pytest.fixture(scope="session")
def signed(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Path:
    """A signed bundle, to be copied."""
    bundle = make(tmp_path_factory.mktemp("signed") / "b")
    sign(bundle, keys / "private.pem")
    return bundle.root


def check(root: Path, keys: Path) -> None:
    require_signature(Bundle(root), keys / "public.pem")


def test_what_was_signed_is_accepted(signed: Path, keys: Path, tmp_path: Path) -> None:
    check(signed, keys)
    copy = shutil.copytree(signed, tmp_path / "elsewhere")
    check(copy, keys)
    (tmp_path / "link").symlink_to(copy)
    check(tmp_path / "link", keys)
    Bundle(signed).verify()
    first = (copy / SIGNATURE).read_bytes()
    assert sign(Bundle(copy), keys / "private.pem").content == first, "Ed25519 signs the same in the same way"
    content = json.loads(first)
    assert content["algorithm"] == "ed25519" and len(base64.b64decode(content["signature"])) == 64


def test_others_can_check_it(signed: Path, keys: Path, tmp_path: Path) -> None:
    """With OpenSSL alone, as the docs say."""
    (tmp_path / "raw").write_bytes(base64.b64decode(json.loads((signed / SIGNATURE).read_bytes())["signature"]))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(keys / "public.pem"), "-rawin"]
    ended = subprocess.run(
        [*command, "-in", str(signed / MANIFEST), "-sigfile", str(tmp_path / "raw")], capture_output=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


@settings(max_examples=150)
@given(data=st.data())
def test_any_altered_byte_is_refused_and_its_file_named(
    signed: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    root = shutil.copytree(signed, tmp_path_factory.mktemp("altered") / "b")
    name = data.draw(st.sampled_from([name for name in (*FILES, MANIFEST, SIGNATURE) if name != "empty"]))
    content = bytearray((root / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (root / name).write_bytes(content)
    with pytest.raises(BundleError) as caught:
        check(root, keys)
    assert name in str(caught.value)


@settings(max_examples=50)
@given(data=st.data())
def test_any_cut_or_grown_file_is_refused_and_named(
    signed: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    root = shutil.copytree(signed, tmp_path_factory.mktemp("cut") / "b")
    name = data.draw(st.sampled_from([*FILES, MANIFEST, SIGNATURE]))
    content = (root / name).read_bytes()
    cut = content[: data.draw(st.integers(0, max(0, len(content) - 1)))] if data.draw(st.booleans()) else content
    (root / name).write_bytes(
        cut if cut != content else content + data.draw(st.sampled_from([b"\0", b" ", b"\n", b"{}"]))
    )
    with pytest.raises(BundleError) as caught:
        check(root, keys)
    assert name in str(caught.value)


def refused(root: Path, keys: Path, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        check(root, keys)


def test_what_is_exchanged_added_or_gone_is_named(signed: Path, keys: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return shutil.copytree(signed, tmp_path / name)

    swapped = copy("swapped")
    (swapped / "engines/bound/unet.bound").write_bytes(FILES["onnx/unet/model.onnx"])
    refused(swapped, keys, "engines/bound/unet.bound was altered")
    extra = copy("extra")
    (extra / "engines" / "bound" / "vae.bound").write_bytes(b"native")
    refused(extra, keys, "engines/bound/vae.bound is not in the manifest")
    gone = copy("gone")
    (gone / "engines/bound/unet.bound").unlink()
    refused(gone, keys, "engines/bound/unet.bound is missing")
    linked = copy("linked")
    (linked / "empty").unlink()
    (linked / "empty").symlink_to(signed / "empty")
    refused(linked, keys, "has links, whose files may change at any time: empty")
    folder = copy("folder")
    shutil.rmtree(folder / "engines")
    (folder / "engines").symlink_to(signed / "engines")
    refused(folder, keys, "has links, whose files may change at any time: engines")


def test_hashes_that_were_altered_along_with_the_file(signed: Path, keys: Path, tmp_path: Path) -> None:
    root = shutil.copytree(signed, tmp_path / "b")
    (root / "engines/bound/unet.bound").write_bytes(b"evil")
    content = json.loads((root / MANIFEST).read_bytes())
    content["files"]["engines/bound/unet.bound"] = sha256(root / "engines/bound/unet.bound")
    (root / MANIFEST).write_text(json.dumps(content))
    Bundle(root).verify()
    refused(
        root,
        keys,
        "is not that of its manifest.json: manifest.json or manifest.sig was altered, or the bundle was changed after",
    )


def test_without_a_signature_or_with_another_s(signed: Path, keys: Path, tmp_path: Path) -> None:
    refused(
        make(tmp_path / "unsigned").root,
        keys,
        "is not signed, and a signature is required: sign it with `enginecast sign`",
    )
    other = shutil.copytree(signed, tmp_path / "other")
    made = sign(Bundle(other), keys / "other.pem")
    refused(other, keys, f"manifest.sig is of the key {made.key[:16]}, expected [0-9a-f]{{16}} of .*public.pem")
    content = json.loads((other / SIGNATURE).read_bytes())
    content["key"] = json.loads((signed / SIGNATURE).read_bytes())["key"]
    (other / SIGNATURE).write_text(json.dumps(content, separators=(",", ":")) + "\n")
    refused(other, keys, "is not that of its manifest.json")


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"\xff", b"null", b"[" * 100_000, b'{"algorithm":"none","key":"","signature":""}\n'],
    ids=["empty", "nothing", "list", "no text", "null", "deep", "no algorithm"],
)
def test_signatures_that_are_none(signed: Path, keys: Path, tmp_path: Path, content: bytes) -> None:
    root = shutil.copytree(signed, tmp_path / "b")
    (root / SIGNATURE).write_bytes(content)
    refused(root, keys, "manifest.sig was altered, or is of another program")


@pytest.mark.parametrize("signature", ["", "AAAA", "AA==", "not base64!", "é"])
def test_signatures_of_another_length(signed: Path, keys: Path, tmp_path: Path, signature: str) -> None:
    root = shutil.copytree(signed, tmp_path / "b")
    content = json.loads((root / SIGNATURE).read_bytes()) | {"signature": signature}
    (root / SIGNATURE).write_text(json.dumps(content, separators=(",", ":"), ensure_ascii=False) + "\n")
    refused(root, keys, r"manifest\.sig was altered")


# Signing


def test_what_is_damaged_is_not_signed(signed: Path, keys: Path, tmp_path: Path) -> None:
    root = shutil.copytree(signed, tmp_path / "b")
    (root / SIGNATURE).unlink()
    (root / "notes.txt").write_text("?")
    with pytest.raises(BundleError, match=r"notes\.txt is not in the manifest"):
        sign(Bundle(root), keys / "private.pem")
    assert not (root / SIGNATURE).exists()


def test_a_bundle_that_cannot_be_written(keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make(tmp_path / "b")
    (tmp_path / "b" / f".{SIGNATURE}.part").mkdir()
    with pytest.raises(ResourceExhausted, match=r"cannot write .*manifest\.sig: .*Sign a copy that can be written"):
        sign(bundle, keys / "private.pem")


# Keys


def test_new_keys_are_for_this_user_and_never_overwritten(tmp_path: Path) -> None:
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    before = os.umask(0)
    try:
        name = generate(private, public)
    finally:
        os.umask(before)
    assert private.stat().st_mode & 0o777 == 0o600 and public.stat().st_mode & 0o777 == 0o644
    assert private_key(private).public_key() == public_key(public) and len(name) == 64
    kept = private.read_bytes()
    with pytest.raises(InvalidInput, match=r"output: .*private\.pem exists, and keys are never overwritten"):
        generate(private, tmp_path / "new.pem")
    with pytest.raises(InvalidInput, match=r"output: .*public\.pem exists"):
        generate(tmp_path / "new.pem", public)
    assert private.read_bytes() == kept and sorted(path.name for path in tmp_path.iterdir()) == [
        "private.pem",
        "public.pem",
    ]
    with pytest.raises(ResourceExhausted, match=r"cannot write .*: No such file or directory"):
        generate(tmp_path / "nowhere" / "private.pem", public)


def pem(key: Any, private: bool, password: bytes = b"") -> bytes:
    if not private:
        return bytes(
            key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
    hidden = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden))


RSA = rsa.generate_private_key(65537, 2048)
CURVE = ec.generate_private_key(ec.SECP256R1())
RIGHT = Ed25519PrivateKey.generate()


@pytest.mark.parametrize(
    ("content", "private", "public"),
    [
        (pem(RSA, True), "is of the kind RSA, expected Ed25519", "is a private key, which has no place here"),
        (
            pem(RSA, False),
            "is a public key: a bundle is signed with the private one",
            "is of the kind RSA, expected Ed25519",
        ),
        (pem(CURVE, True), "is of the kind EC, expected Ed25519", "is a private key"),
        (pem(RIGHT, True, b"secret"), "is encrypted: write a copy that is not, `openssl pkey -in", "is a private key"),
        (pem(RIGHT, True)[:60], "is no private key in PEM", "is a private key"),
        (pem(RIGHT, False)[:60], "is a public key", "is no public key in PEM"),
        (b"", "is no private key in PEM", "is no public key in PEM"),
        (b"\0\xff" * 100, "is no private key in PEM", "is no public key in PEM"),
        (b"-----BEGIN " * 9000, "cannot be read: it has more than", "cannot be read: it has more than"),
    ],
    ids=["rsa", "rsa public", "curve", "encrypted", "cut", "cut public", "empty", "garbage", "large"],
)
def test_files_that_are_no_keys(tmp_path: Path, content: bytes, private: str, public: str) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=f"key: .*key.pem {private}"):
        private_key(path)
    with pytest.raises(InvalidInput, match=f"key: .*key.pem {public}"):
        public_key(path)


def test_keys_that_are_not_there(tmp_path: Path) -> None:
    for read in (private_key, public_key):
        with pytest.raises(NotFound, match=r"key .* does not exist: make a pair with `enginecast keygen`"):
            read(tmp_path / "key.pem")
        with pytest.raises(InvalidInput, match="cannot be read: it is a folder"):
            read(tmp_path)


@settings(max_examples=60)
@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=100).map(lambda data: b"-----BEGIN PUBLIC KEY-----\n" + base64.b64encode(data)),
    )
)
def test_no_file_breaks_the_reader(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("garbage") / "key.pem"
    path.write_bytes(content)
    for read in (private_key, public_key):
        with pytest.raises(EnginecastError):
            read(path)


def test_the_library_is_optional(monkeypatch: pytest.MonkeyPatch, signed: Path, keys: Path, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.startswith("cryptography")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    Bundle(signed).verify()
    for use in (lambda: check(signed, keys), lambda: generate(tmp_path / "a", tmp_path / "b")):
        with pytest.raises(
            MissingDependency,
            match=r"cryptography.* is not installed, which this needs: pip install 'enginecast\[signing\]'",
        ):
            use()
