"""The agent of Fleet Commander: runs on a node, dials the server, works through its slots."""

import os

# We fork only to exec at once. gRPC's handlers for other forks start its threads again in the child, which may then end
# by SIGSEGV before its program begins. It is read at gRPC's import, and so it stands before every other.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

__version__ = "1.0.0"
PROTOCOL_VERSION = 1
