"""When much is going on, and when it is over."""

from __future__ import annotations

from types import ModuleType

import pytest

from fleet_agent import flow as agent_flow
from fleet_server.services import flow as server_flow


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("module", [agent_flow, server_flow], ids=["agent", "server"])
def test_many_in_a_moment_are_much_until_a_moment_passes_without(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType
) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    flow = module.Flow()
    flow.note(module.MANY - 1)
    assert not flow.busy
    flow.note(1)
    assert flow.busy
    clock.now += 1.01 * module.SPAN_SECONDS
    assert flow.busy
    clock.now += 1.01 * module.SPAN_SECONDS
    assert not flow.busy


@pytest.mark.parametrize("module", [agent_flow, server_flow], ids=["agent", "server"])
def test_few_at_a_time_are_never_much(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    flow = module.Flow()
    for _ in range(100):
        clock.now += module.SPAN_SECONDS / (module.MANY - 2)
        flow.note(1)
        assert not flow.busy
