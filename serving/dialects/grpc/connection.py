"""How gRPC connections are protected: the credentials of a server, the channel of a client."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc

from runtime import limits
from runtime.errors import InvalidInput
from serving.security.addresses import is_loopback
from serving.security.tls import LARGEST, Identity, TlsFiles, day
from serving.security.watched import content

log = logging.getLogger(__name__)

OPTIONS: Final = {
    "grpc.max_receive_message_length": 64 << 20,
    "grpc.max_send_message_length": limits.MESSAGE.most,
    # each client has a connection of its own, which is how a server tells clients apart
    "grpc.use_local_subchannel_pool": 1,
    # a request can be sent again only while gRPC keeps it
    "grpc.per_rpc_retry_buffer_size": 2 * limits.MESSAGE.most,
    "grpc.initial_reconnect_backoff_ms": 200,
    "grpc.min_reconnect_backoff_ms": 200,
    "grpc.max_reconnect_backoff_ms": 5_000,
}
MOST_ATTEMPTS: Final = 5
"""gRPC makes no more."""
LONGEST_BACKOFF: Final = 30
"""Seconds."""


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials of a server. Each new connection uses the files as they are then."""
    watched = files.watched()
    used = watched.current()

    def renewed() -> Any:
        """The configuration for a new connection, None if it is that of the one before. Called by gRPC's threads."""
        nonlocal used
        current = watched.current()
        if current is used:
            return None
        used = current
        return _configuration(current)

    return grpc.dynamic_ssl_server_credentials(_configuration(used), renewed, files.client_ca is not None)


def _configuration(identity: Identity) -> Any:
    log.info("connections use a certificate that is valid until %s", day(identity.expires))
    return grpc.ssl_server_certificate_configuration([(identity.key, identity.certificate)], identity.client_ca)


@dataclass(frozen=True)
class Connection:
    """How a client connects: with TLS if `tls` or a file is given, and with a bearer token.

    `ca` is a PEM file of the authorities to trust, None are the public ones that gRPC ships. `cert` and `key` are the
    client's own, for servers that require them.

    A call that ends with UNAVAILABLE before its first response is sent again, `attempts` times in all and within its
    deadline. gRPC waits about `backoff` seconds before the second attempt and twice as long before each further one,
    each time a random fifth more or less (https://github.com/grpc/proposal/blob/master/A6-client-retries.md).
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None
    token: str | None = field(default=None, repr=False)
    tls: bool = False
    attempts: int = 4
    backoff: float = 0.2

    def __post_init__(self) -> None:
        if not 1 <= self.attempts <= MOST_ATTEMPTS:
            raise InvalidInput("attempts", f"is {self.attempts}, expected 1 to {MOST_ATTEMPTS}")
        if not 0 < self.backoff <= LONGEST_BACKOFF:
            raise InvalidInput(
                "backoff", f"is {self.backoff}, expected more than 0 and at most {LONGEST_BACKOFF} seconds"
            )
        if (self.cert is None) != (self.key is None):
            raise InvalidInput("cert", "and key belong together: give both")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.token):
            raise InvalidInput("token", "is no token: it has letters, digits, - and _")

    def channel(self, address: str) -> grpc.Channel:
        """A channel to a server. Raises InvalidInput, NotFound."""
        if self.encrypted:
            return grpc.secure_channel(address, self._credentials(), options=self._options())
        if self.token is not None and not is_loopback(address):
            raise InvalidInput(
                "token", f"would be sent to {address} unencrypted: connect with TLS, by --tls or the authority's --ca"
            )
        return grpc.insecure_channel(address, options=self._options())

    @property
    def encrypted(self) -> bool:
        """Whether the connection uses TLS."""
        return self.tls or any(file is not None for file in (self.ca, self.cert, self.key))

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What is sent with every call."""
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)

    def _credentials(self) -> grpc.ChannelCredentials:
        ca, key, cert = (
            None if file is None else content(Path(file), LARGEST) for file in (self.ca, self.key, self.cert)
        )
        return grpc.ssl_channel_credentials(ca, key, cert)

    def _options(self) -> list[tuple[str, int | str]]:
        """The options of a channel, with gRPC's retries."""
        if self.attempts == 1:
            return [*OPTIONS.items()]
        policy = {
            "maxAttempts": self.attempts,
            "initialBackoff": f"{self.backoff:.3f}s",
            "maxBackoff": f"{LONGEST_BACKOFF}s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": ["UNAVAILABLE"],
        }
        config = {"methodConfig": [{"name": [{}], "retryPolicy": policy}]}
        return [*OPTIONS.items(), ("grpc.service_config", json.dumps(config))]
