"""What every test gets: the same environment on each machine, and fuzzing that repeats itself."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "fleet",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fleet")

_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")


@pytest.fixture(autouse=True, scope="session")
def clean_environment() -> Iterator[None]:
    """Takes the caller's FLEET_* settings, proxies and size of terminal away, from us and from what tests start."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("FLEET_") or name.lower() in _PROXIES or name in ("COLUMNS", "LINES"):
                patch.delenv(name)
        yield


@pytest.fixture(autouse=True, scope="session")
def heeded_signals() -> None:
    """Takes back that SIGINT and SIGHUP are ignored, as in what a shell runs in the background: processes that tests
    start would ignore them too, and tests press Ctrl-C.
    """
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """An empty folder whose path leaves room for a unix socket's name (107 bytes in all, which tmp_path may exceed)."""
    folder = Path(tempfile.mkdtemp(prefix="fleet-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
