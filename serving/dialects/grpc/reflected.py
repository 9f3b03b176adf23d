"""Server reflection over interfaces that are in several descriptor pools."""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha import reflection, reflection_pb2


def enable_reflection(services: Iterable[ServiceDescriptor], server: grpc.aio.Server) -> None:
    """Let clients read the interfaces of these services, and that of reflection, from the server."""
    shown = [*services, *reflection_pb2.DESCRIPTOR.services_by_name.values()]
    reflection.enable_server_reflection([service.full_name for service in shown], server, joined(shown))


def joined(services: Iterable[ServiceDescriptor]) -> DescriptorPool:
    """One pool that holds the files of all services, and what they import."""
    pool, added = DescriptorPool(), set[str]()

    def add(file: FileDescriptor) -> None:
        if file.name in added:
            return
        added.add(file.name)
        for needed in file.dependencies:
            add(needed)
        message = FileDescriptorProto()
        file.CopyToProto(message)
        pool.Add(message)

    for service in services:
        add(service.file)
    return pool
