"""The server, its client and the `enginecast` command."""

import os

import runtime  # noqa: F401 - first: it keeps libraries from calling home

# gRPC's handlers of fork() print a warning to the terminal whenever a process is started beside an open connection.
# Nothing here forks and goes on: it is for programs that do.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# By default gRPC writes a line to standard error for each failed handshake: anyone who connects could fill the log.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
