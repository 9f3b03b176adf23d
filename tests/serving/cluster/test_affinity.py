from __future__ import annotations

from collections import Counter

from serving.cluster.affinity import ranked, session
from serving.dialects.grpc.task import GrpcTask, grpc_tasks
from serving.enginecast_pb import chat_pb2, image_pb2

CHAT: GrpcTask = grpc_tasks()["chat"]
USER, MODEL, SYSTEM = chat_pb2.ROLE_USER, chat_pb2.ROLE_ASSISTANT, chat_pb2.ROLE_SYSTEM


def conversation(*turns: tuple[chat_pb2.Role, str | bytes], **fields: object) -> chat_pb2.ChatRequest:
    parts = [
        chat_pb2.Part(text=content) if isinstance(content, str) else chat_pb2.Part(image=content)
        for _, content in turns
    ]
    messages = [chat_pb2.Message(role=role, parts=[part]) for (role, _), part in zip(turns, parts, strict=True)]
    return chat_pb2.ChatRequest(model="talk", messages=messages, **fields)  # type: ignore[arg-type]


def test_a_conversation_that_goes_on_has_the_session_of_its_beginning() -> None:
    first = conversation((SYSTEM, "Be brief."), (USER, "Hello"))
    later = conversation((SYSTEM, "Be brief."), (USER, "Hello"), (MODEL, "Hi"), (USER, "And?"), max_tokens=3)
    other = conversation((SYSTEM, "Be brief."), (USER, "Goodbye"))
    assert session(CHAT, first) == session(CHAT, later) != session(CHAT, other)


def test_questions_about_one_picture_have_one_session() -> None:
    first = conversation((USER, b"picture"))
    first.messages[0].parts.add(text="What is it?")
    second = conversation((USER, b"picture"))
    second.messages[0].parts.add(text="What colour has it?")
    assert session(CHAT, first) == session(CHAT, second) != session(CHAT, conversation((USER, b"another")))


def test_a_picture_in_a_later_turn_does_not_change_the_session() -> None:
    first = conversation((USER, "Hello"))
    assert session(CHAT, first) == session(CHAT, conversation((USER, "Hello"), (MODEL, "Hi"), (USER, b"picture")))


def test_requests_without_a_beginning_have_no_session() -> None:
    assert session(grpc_tasks()["image"], image_pb2.GenerateRequest(model="draw", prompt="x")) == ""
    assert session(CHAT, conversation()) == ""


def test_ranks_are_even_and_stay_when_a_replica_is_lost() -> None:
    names, keys = [f"replica-{i}" for i in range(5)], [f"key-{i}" for i in range(1000)]
    first = {key: ranked(key, names) for key in keys}
    assert all(150 < count < 250 for count in Counter(order[0] for order in first.values()).values())
    left = names[1:]
    assert all(ranked(key, left[::-1]) == [name for name in first[key] if name in left] for key in keys)
