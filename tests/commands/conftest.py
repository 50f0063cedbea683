"""A server's agents' side on a real store, and real agents on it."""

from __future__ import annotations

from tests.services.agents.conftest import bench, short_path, store, valkey

__all__ = ["bench", "short_path", "store", "valkey"]
