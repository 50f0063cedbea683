"""The server of Fleet Commander: REST and gRPC doors, queue, scheduler, agents' sessions."""

__version__ = "1.0.0"
