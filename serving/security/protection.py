"""How one server is protected: all of it in one object, which every protocol of the server reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from runtime.errors import InvalidInput
from serving.security.addresses import check_listening, is_loopback
from serving.security.gate import Gate
from serving.security.tls import TlsFiles


@dataclass(frozen=True)
class Security:
    """TLS, whether a server may be reached from other machines without it, and the tokens of its clients."""

    tls: TlsFiles | None = None
    insecure: bool = False
    gate: Gate = field(default_factory=Gate)

    def check(self, address: str) -> None:
        """Raise InvalidInput unless the server may listen here, and the errors of its files."""
        check_listening(address, self.tls is not None, self.insecure)
        if self.gate.closed and self.tls is None and not is_loopback(address):
            raise InvalidInput(
                "tokens",
                f"would be sent to {address} unencrypted: give --tls-cert and --tls-key, or listen on 127.0.0.1 behind "
                "a proxy that has TLS",
            )
        if self.tls is not None:
            self.tls.read()


OPEN: Final = Security()
"""For loopback: no TLS, no tokens."""
