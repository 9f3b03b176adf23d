"""How one server is protected: all of it in one object, which every protocol of the server reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from serving.security.addresses import check_listening
from serving.security.tls import TlsFiles


@dataclass(frozen=True)
class Security:
    """TLS, and whether a server may be reached from other machines without it."""

    tls: TlsFiles | None = None
    insecure: bool = False

    def check(self, address: str) -> None:
        """Raise InvalidInput unless the server may listen here, and the errors of its files."""
        check_listening(address, self.tls is not None, self.insecure)
        if self.tls is not None:
            self.tls.read()


OPEN: Final = Security()
"""For loopback: no TLS, no tokens."""
