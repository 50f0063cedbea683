"""The queue's benchmark runs, of ours alone and small: its figures are of no interest here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_small_run_of_ours_prints_every_table() -> None:
    command = [sys.executable, "-m", "bench.queue", "--rounds", "1", "--jobs", "20", "--idle", "5"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "clients" / "python")])
    done = subprocess.run(
        [*command, "--only", "fleet", "--fsync", "always"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "FLEET_BENCH_SLOTS": "2"},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "appendfsync always: 1 rounds of 20 jobs" in done.stdout
    (rates,) = [line for line in done.stdout.splitlines() if line.startswith("| ours | ")]
    assert all(float(cell.split()[0]) > 0 for cell in rates.split(" | ")[1:4])
    assert "| 1 | " in done.stdout and "| 200 | " in done.stdout
