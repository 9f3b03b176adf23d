"""Ray Serve's choice of a replica for each request."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from serving.cluster.affinity import ranked


class Affinity(RequestRouter):  # type: ignore[misc]  # mypy skips Ray
    """Requests with the same session id go to the same replica as long as it takes more, else to the next one in their
    order. Requests without an id go where fewest run.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, the preferred first."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # while all are busy, wait between two rounds
        key = pending_request.metadata.session_id
        if not key:
            return [candidate_replicas]
        names = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[names[name]] for name in ranked(key, list(names))]
