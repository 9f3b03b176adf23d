"""The certificate of a server, its key, and the authority of its clients: PEM files, checked before they are used."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from runtime.errors import InvalidInput
from runtime.optional import require
from serving.security.watched import Watched, content

EXTRA: Final = "tls"
LARGEST: Final = 1 << 20
"""Bytes of a file of certificates or of a key."""


@dataclass(frozen=True)
class Identity:
    """The content of the files: `certificate` is followed by those that lead to its authority. `client_ca` is set where
    clients must have a certificate of that authority. `expires` is the end of the certificate's validity.
    """

    certificate: bytes
    key: bytes
    client_ca: bytes | None
    expires: datetime


@dataclass(frozen=True)
class TlsFiles:
    """Where a server's certificate, its private key and the authority of its clients are."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    @classmethod
    def of(cls, cert: Path | None, key: Path | None, client_ca: Path | None) -> TlsFiles | None:
        """The files of a server, None without TLS. Raises InvalidInput if one is missing."""
        if cert is None and key is None and client_ca is None:
            return None
        if cert is None or key is None:
            raise InvalidInput("tls_cert", "and --tls-key belong together: give both")
        return cls(cert, key, client_ca)

    def watched(self) -> Watched[Identity]:
        """Their content, which is read again when they change. Raises InvalidInput, NotFound, MissingDependency."""
        files = [self.cert, self.key, *([self.client_ca] if self.client_ca else [])]
        return Watched(files, self.read)

    def read(self) -> Identity:
        """The content, if certificate and key belong together and are valid now."""
        chain, key = content(self.cert, LARGEST), content(self.key, LARGEST)
        certificate = _certificate("tls_cert", self.cert, chain)
        _check_time(self.cert, certificate)
        if certificate.public_key() != _public_key(self.key, key):
            raise InvalidInput("tls_key", f"{self.key} is not the key of the certificate {self.cert}: give its own")
        client_ca = None
        if self.client_ca is not None:
            client_ca = content(self.client_ca, LARGEST)
            _certificate("tls_client_ca", self.client_ca, client_ca)
        return Identity(chain, key, client_ca, certificate.not_valid_after_utc)


def _certificate(field: str, path: Path, data: bytes) -> Any:
    """The first certificate of a file, with all others readable."""
    load, unsupported = require("cryptography.x509", EXTRA).load_pem_x509_certificates, _unsupported()
    try:
        return load(data)[0]
    except (ValueError, unsupported):
        raise InvalidInput(field, f"{path} has no readable certificate, expected PEM (BEGIN CERTIFICATE)") from None


def _public_key(path: Path, data: bytes) -> Any:
    """The public half of a private key."""
    load = require("cryptography.hazmat.primitives.serialization", EXTRA).load_pem_private_key
    unsupported = _unsupported()
    try:
        return load(data, password=None).public_key()
    except TypeError:
        raise InvalidInput(
            "tls_key", f"{path} is encrypted: give the key decrypted, readable by this user only"
        ) from None
    except (ValueError, unsupported):
        raise InvalidInput("tls_key", f"{path} has no readable key, expected PEM (BEGIN PRIVATE KEY)") from None


def _unsupported() -> type[Exception]:
    """What cryptography raises for a kind of key that it does not know."""
    found: type[Exception] = require("cryptography.exceptions", EXTRA).UnsupportedAlgorithm
    return found


def _check_time(path: Path, certificate: Any) -> None:
    """Raise InvalidInput unless a certificate is valid now."""
    begins, ends, now = certificate.not_valid_before_utc, certificate.not_valid_after_utc, datetime.now(UTC)
    if now > ends:
        raise InvalidInput("tls_cert", f"{path} expired on {day(ends)}: clients refuse it, renew it")
    if now < begins:
        raise InvalidInput(
            "tls_cert", f"{path} is valid from {day(begins)} on: clients refuse it until then; check the clock"
        )


def day(time: datetime) -> str:
    """A time for messages and logs."""
    return f"{time:%Y-%m-%d %H:%M} UTC"
