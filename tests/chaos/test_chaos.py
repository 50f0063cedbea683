"""Two short trials of the whole fleet under faults; `make chaos` runs twenty long ones and the mutants."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.chaos.trial import trial

SECONDS = float(os.environ.get("FLEET_CHAOS_SECONDS", "15"))
SEEDS = (1, 2)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", SEEDS)
async def test_no_promise_is_broken_under_faults(seed: int, tmp_path: Path) -> None:
    verdict, history = await trial(tmp_path, seed, SECONDS)
    history.save(tmp_path / "history.json")
    assert not verdict.violations, "\n".join(verdict.violations)
    assert verdict.hard_enough, f"too little happened: {dict(verdict.counts)}; never: {sorted(verdict.missing)}"
