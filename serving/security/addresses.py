"""Which addresses may be listened on, and which may be sent secrets."""

from __future__ import annotations

import ipaddress

from runtime.errors import InvalidInput


def split(address: str) -> tuple[str, int]:
    """The host and the port of HOST:PORT. Raises InvalidInput."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidInput(
            "address", f"'{address}' is none, expected HOST:PORT such as 127.0.0.1:50051 (port 0 takes any free one)"
        )
    return host, int(port)


def with_port(address: str, port: int) -> str:
    """HOST:PORT of HOST or HOST:PORT; an IPv6 address is in brackets."""
    return address if ":" in address.rpartition("]")[2] else f"{address}:{port}"


def is_loopback(address: str) -> bool:
    """Whether what is sent to HOST:PORT stays on this machine."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_listening(address: str, tls: bool, insecure: bool) -> None:
    """Raise InvalidInput unless a server may listen here: on loopback, with TLS, or where `insecure` allows it."""
    split(address)
    if not (tls or insecure or is_loopback(address)):
        raise InvalidInput(
            "address",
            f"{address} can be reached from other machines, and there is no TLS: give --tls-cert and --tls-key, listen "
            "on 127.0.0.1 behind a proxy, or allow it with --insecure",
        )
