"""What a process does with the memory of its large buffers."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_COPIES = """
import resource
from {module} import settle_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

settle_memory()
picture = bytes(1_500_000)
for turn in range(40):
    if turn == 20:
        before = faults()
    first = bytearray(picture)
    second = bytes(first)
    del first, second
print((faults() - before) / 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is set is glibc's")
@pytest.mark.parametrize("module", ["fleet_server.memory", "fleet_agent.memory"])
def test_a_copy_of_a_picture_needs_no_new_pages(module: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _COPIES.format(module=module)], capture_output=True, text=True, check=True, timeout=30
    )

    # Two copies have 732 pages of 4 KiB.
    assert float(run.stdout) < 50
