"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html) with JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

MEDIA: Final = "text/event-stream"
DONE: Final = "data: [DONE]\n\n"
"""Ends the stream of a chat."""


def event(content: Mapping[str, Any], name: str = "") -> str:
    """One event, with a name if it has one."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
