"""One fleet with one replaying node for all files that ask for nothing special."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.comfy.house import House, house_in


@pytest.fixture(scope="package")
def house() -> Iterator[House]:
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder, house_in(Path(folder)) as found:
        found.join("n1")
        found.settled()
        yield found


@pytest.fixture(autouse=True)
def as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test scripted is gone after it."""
    yield
    if "house" in request.fixturenames:
        found: House = request.getfixturevalue("house")
        for node in found.nodes.values():
            node.script.failures.clear()
            node.script.step_seconds, node.script.previews = 0.0, True
            node.script.release()
        found.until(lambda: found.get("/prompt")["exec_info"]["queue_remaining"] == 0, "all prompts are over")
