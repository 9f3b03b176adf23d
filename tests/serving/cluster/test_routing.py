from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")
from serving.cluster.affinity import ranked
from serving.cluster.routing import Affinity

NAMES = ["a", "b", "c"]
REPLICAS: list[Any] = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in NAMES]


async def chosen(session: str) -> list[list[str]]:
    """The ranks of replicas for a request of this session."""
    request: Any = SimpleNamespace(metadata=SimpleNamespace(session_id=session), routing_context=SimpleNamespace())
    router = Affinity.__new__(Affinity)  # Ray's constructor needs a cluster
    ranks = await router.choose_replicas(REPLICAS, request)
    assert request.routing_context.should_backoff
    return [[replica.replica_id.unique_id for replica in rank] for rank in ranks]


async def test_a_session_has_an_order_of_replicas() -> None:
    for session in ("one", "another", "a third"):
        assert await chosen(session) == [[name] for name in ranked(session, NAMES)]


async def test_without_a_session_all_replicas_are_in_one_rank_of_which_ray_takes_the_least_busy() -> None:
    assert await chosen("") == [NAMES]
    assert await Affinity.__new__(Affinity).choose_replicas(REPLICAS) == [REPLICAS]
