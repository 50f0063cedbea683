"""A real Valkey for the session; a namespace and a bench of its own for each test."""

from __future__ import annotations

from tests.services.agents.conftest import bench, short_path, store, valkey

__all__ = ["bench", "short_path", "store", "valkey"]
