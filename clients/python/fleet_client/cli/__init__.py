"""The command `fleet`."""

from fleet_client.cli.app import main

__all__ = ["main"]
