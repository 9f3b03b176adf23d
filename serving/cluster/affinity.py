"""Which requests go to the same replica, and to which."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final

from serving.dialects.grpc.task import GrpcTask

DIGEST_BYTES: Final = 16


def session(task: GrpcTask, message: Any) -> str:
    """The name that requests share which begin alike: a replica keeps what it has read. "" for others."""
    opening = task.opening(message)
    return hashlib.blake2b(opening, digest_size=DIGEST_BYTES).hexdigest() if opening else ""


def ranked(key: str, names: Sequence[str]) -> list[str]:
    """The names in an order that depends on `key`. The others keep theirs if one joins or leaves (rendezvous hashing,
    Thaler and Ravishankar 1996).
    """

    def weight(name: str) -> bytes:
        return hashlib.blake2b(f"{key}\0{name}".encode(), digest_size=DIGEST_BYTES).digest()

    return sorted(names, key=weight)
