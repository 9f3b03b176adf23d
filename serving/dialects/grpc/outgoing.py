"""What a client sends of its trace: the active span of OpenTelemetry, if the program uses it."""

from __future__ import annotations

import sys

Metadata = tuple[tuple[str, str], ...]


def active_span() -> Metadata:
    """The metadata `traceparent` and `tracestate` of the active span; none without one. OpenTelemetry is not imported
    where the program has not done so.
    """
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return tuple(carrier.items())
