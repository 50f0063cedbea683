"""A replaying ComfyUI node for each test; the engines that it made are closed after it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.agent.engines.comfyui.making import made
from tests.comfy_node import ComfyNode


@pytest.fixture
def node() -> Iterator[ComfyNode]:
    with ComfyNode(checkpoints=("base.safetensors", "other.safetensors"), loras=("ink.safetensors",)) as node:
        yield node


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while made:
        made.pop().close()
