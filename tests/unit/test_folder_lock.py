"""The lock of a data folder, with real processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleet_server.embedded.lock import FolderInUseError, FolderLock
from tests.waiting import has_ended, wait_until_now

_SERVER = """
import subprocess, sys, time
from pathlib import Path
from fleet_server.embedded.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.acquire()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], pass_fds=(lock.fileno(),))
print(child.pid, flush=True)
time.sleep(300)
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    process = subprocess.Popen([sys.executable, "-c", _SERVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    yield process, child
    for pid in (process.pid, child):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_a_second_server_is_refused_by_the_pid_of_the_first(
    server: tuple[subprocess.Popen[str], int], tmp_path: Path
) -> None:
    process, _ = server
    with pytest.raises(FolderInUseError, match=f"pid {process.pid}"):
        FolderLock(tmp_path).acquire()
    assert process.poll() is None


def test_orphans_of_a_dead_server_are_ended(server: tuple[subprocess.Popen[str], int], tmp_path: Path) -> None:
    process, child = server
    process.kill()
    process.wait()
    assert Path(f"/proc/{child}").exists()
    with FolderLock(tmp_path):
        # Its lock is free a moment before it has ended.
        wait_until_now(lambda: has_ended(child))


def test_release_lets_the_next_one_in(tmp_path: Path) -> None:
    with FolderLock(tmp_path) as lock:
        assert os.get_inheritable(lock.fileno()) is False
        with pytest.raises(FolderInUseError, match=f"pid {os.getpid()}"):
            FolderLock(tmp_path).acquire()
    with FolderLock(tmp_path):
        pass
