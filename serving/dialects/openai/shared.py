"""What answers of several endpoints have: ids and times."""

from __future__ import annotations

import time
import uuid
from typing import Any


def identity(kind: str) -> dict[str, Any]:
    """A new id that begins with `kind`, and the time in seconds since the epoch."""
    return {"id": f"{kind}-{uuid.uuid4().hex}", "created": now()}


def now() -> int:
    """The time in seconds since the epoch."""
    return int(time.time())
