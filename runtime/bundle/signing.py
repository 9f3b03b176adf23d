"""Signed bundles: an Ed25519 signature (RFC 8032) over the manifest, whose hashes cover every other file of the bundle.

`manifest.sig` is one line of JSON: the algorithm, the sha256 of the public key, and the signature of the bytes of
manifest.json in base64. Keys are PEM files as in OpenSSL, which can verify the signature, too: `openssl pkeyutl -verify
-rawin`.
"""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ValidationError

from runtime.bundle.manifest import MANIFEST, SIGNATURE, Bundle, Frozen
from runtime.errors import BundleError, InvalidInput, NotFound, ResourceExhausted
from runtime.files import TooLarge, read_regular, written
from runtime.optional import require

EXTRA: Final = "signing"
LONGEST_KEY: Final = 1 << 16
"""The most bytes of a key file."""


class Signature(Frozen):
    """The content of manifest.sig. `key` is the hex sha256 of the public key's 32 bytes."""

    algorithm: Literal["ed25519"] = "ed25519"
    key: str
    signature: str

    @property
    def content(self) -> bytes:
        return self.model_dump_json().encode() + b"\n"


def generate(private: Path, public: Path) -> str:
    """Write a new pair of keys. Only this user can read the private one. Returns the sha256 of the public one.

    Raises InvalidInput if one of the files exists: keys are never overwritten. Raises MissingDependency without
    `cryptography`.
    """
    serialization = require("cryptography.hazmat.primitives.serialization", EXTRA)
    key = require("cryptography.hazmat.primitives.asymmetric.ed25519", EXTRA).Ed25519PrivateKey.generate()
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    _create(private, key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain), 0o600)
    try:
        _create(public, key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo), 0o644)
    except BaseException:
        private.unlink()
        raise
    return _name(key.public_key())


def sign(bundle: Bundle, private: Path) -> Signature:
    """Compare every file with its hash, then sign the bundle. An existing signature is replaced.

    Raises BundleError if the bundle is damaged or has unknown files, InvalidInput or NotFound if the key is invalid.
    """
    key = private_key(private)
    bundle.verify()
    made = Signature(key=_name(key.public_key()), signature=base64.b64encode(key.sign(bundle.content)).decode())
    try:
        with written(bundle.root / SIGNATURE) as file:
            file.write(made.content)
    except OSError as error:
        raise ResourceExhausted(
            f"cannot write {bundle.root / SIGNATURE}: {error.strerror}. Sign a copy that can be written"
        ) from None
    return made


def require_signature(bundle: Bundle, public: Path) -> None:
    """Raise BundleError unless the bundle has exactly the files that were signed with the key, and no links.

    Call it before any file of the bundle is used: engines are native code. Raises InvalidInput or NotFound if the key
    is invalid.
    """
    key = public_key(public)
    signature = _read(bundle)
    if signature.key != _name(key):
        raise BundleError(
            f"{bundle.root / SIGNATURE} is of the key {signature.key[:16]}, expected {_name(key)[:16]} of {public}: it "
            "was signed by another, or altered"
        )
    try:
        key.verify(base64.b64decode(signature.signature), bundle.content)
    except require("cryptography.exceptions", EXTRA).InvalidSignature:
        raise BundleError(
            f"the signature of {bundle.root} is not that of its {MANIFEST}: {MANIFEST} or {SIGNATURE} was altered, or "
            "the bundle was changed after it was signed. Copy it again, or have it signed again"
        ) from None
    links = [path.relative_to(bundle.root).as_posix() for path in bundle.root.rglob("*") if path.is_symlink()]
    if links:
        raise BundleError(
            f"{bundle.root} has links, whose files may change at any time: {', '.join(sorted(links))}. Copy it with "
            "its files"
        )
    bundle.verify()


def _read(bundle: Bundle) -> Signature:
    """Read manifest.sig. It must be byte for byte as `sign` writes it, so that no change goes unnoticed."""
    path = bundle.root / SIGNATURE
    try:
        content = read_regular(path, LONGEST_KEY)
    except FileNotFoundError:
        raise BundleError(
            f"{bundle.root} is not signed, and a signature is required: sign it with `enginecast sign`"
        ) from None
    except TooLarge:
        content = b""
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None
    try:
        found = Signature.model_validate_json(content)
        if (
            found.content != content
            or base64.b64encode(base64.b64decode(found.signature, validate=True)).decode() != found.signature
        ):
            raise ValueError("it is not as it was written")
    except (ValidationError, ValueError):
        raise BundleError(f"{path} was altered, or is of another program: have the bundle signed again") from None
    return found


def private_key(path: Path) -> Any:
    """The Ed25519PrivateKey of a PEM file. Raises NotFound, or InvalidInput that says what the file is instead."""
    content, serialization = _key_file(path), require("cryptography.hazmat.primitives.serialization", EXTRA)
    if b"PUBLIC KEY-----" in content:
        raise InvalidInput("key", f"{path} is a public key: a bundle is signed with the private one")
    try:
        key = serialization.load_pem_private_key(content, None)
    except TypeError:
        raise InvalidInput(
            "key", f"{path} is encrypted: write a copy that is not, `openssl pkey -in {path} -out COPY`"
        ) from None
    except Exception as error:  # ValueError, UnsupportedAlgorithm, and what OpenSSL says
        raise InvalidInput(
            "key", f"{path} is no private key in PEM: {error}. Make one with `enginecast keygen`"
        ) from None
    return _ed25519(key, "Ed25519PrivateKey", path)


def public_key(path: Path) -> Any:
    """The Ed25519PublicKey of a PEM file. Raises NotFound, or InvalidInput that says what the file is instead."""
    content, serialization = _key_file(path), require("cryptography.hazmat.primitives.serialization", EXTRA)
    if b"PRIVATE KEY-----" in content:
        raise InvalidInput(
            "key",
            f"{path} is a private key, which has no place here: give the public one, `openssl pkey -in KEY -pubout`",
        )
    try:
        key = serialization.load_pem_public_key(content)
    except Exception as error:
        raise InvalidInput(
            "key",
            f"{path} is no public key in PEM: {error}. Expected what `enginecast keygen` writes beside the private one",
        ) from None
    return _ed25519(key, "Ed25519PublicKey", path)


def _ed25519(key: Any, kind: str, path: Path) -> Any:
    if not isinstance(key, getattr(require("cryptography.hazmat.primitives.asymmetric.ed25519", EXTRA), kind)):
        found = type(key).__name__.strip("_").removesuffix("PrivateKey").removesuffix("PublicKey")
        raise InvalidInput("key", f"{path} is of the kind {found}, expected Ed25519: make one with `enginecast keygen`")
    return key


def _key_file(path: Path) -> bytes:
    try:
        return read_regular(path, LONGEST_KEY)
    except FileNotFoundError:
        raise NotFound(f"key {path} does not exist: make a pair with `enginecast keygen`") from None
    except OSError as error:
        raise InvalidInput("key", f"{path} cannot be read: {error.strerror}. Give the PEM file of a key") from None


def _name(public: Any) -> str:
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()


def _create(path: Path, content: bytes, mode: int) -> None:
    """Create a file with these access rights from the start."""
    if not path.name:
        raise InvalidInput("output", f"'{path}' is a folder, expected the name of a file")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise InvalidInput("output", f"{path} exists, and keys are never overwritten: choose another name") from None
    except OSError as error:
        raise ResourceExhausted(f"cannot write {path}: {error.strerror}") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    except BaseException as error:
        path.unlink()
        if isinstance(error, OSError):
            raise ResourceExhausted(f"cannot write {path}: {error.strerror}. Choose another place") from None
        raise
