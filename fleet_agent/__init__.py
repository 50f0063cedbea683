"""The agent of Fleet Commander: runs on a node, dials the server, works through its slots."""

__version__ = "1.0.0"
PROTOCOL_VERSION = 1
