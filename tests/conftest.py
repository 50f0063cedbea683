"""What every test gets: the same environment on each machine, and fuzzing that repeats itself."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import shutil
import signal
import ssl
import tempfile
from collections.abc import Generator, Iterator
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
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

_FIXTURES_SECONDS = 480.0
"""What a test's fixtures may take in all: the first test of a file may have to start a fleet, beside other tests'. The
time of pyproject.toml is that of the test itself."""
_FLEETS = frozenset(
    (
        "bench",
        "comfy",
        "container_jobs",
        "containers",
        "diffusers",
        "e2e",
        "engine_package",
        "fundamentals",
        "models",
        "nodes",
        "openai",
        "outputs",
        "simulation",
        "swarm",
    )
)
_FLEETS_SECONDS = 180.0
"""Tests of these folders start fleets of many processes, some in each test: on a busy machine that takes its time."""
_LIGHT = ("bridge", "clients", "rpc", "services", "unit")
"""Folders of many short files, which come last: they fill the workers up while the last long file still runs."""
_TOGETHER = frozenset(("comfy", "containers", "diffusers", "fundamentals", "openai", "s3"))
"""Folders whose files go to one worker: each further one would start the folder's servers once more."""
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = len(Path(__file__).parent.parts)
    folders = {path: "".join(path.parts[here : here + 1]) for path in {item.path for item in items}}
    items.sort(key=lambda item: folders[item.path] in _LIGHT)
    if config.getoption("timeout") is not None:
        # As in `make soak`, whose tests take as long as they take.
        return
    for item in items:
        if folders[item.path] in _FLEETS and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(_FLEETS_SECONDS))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `--dist loadfile`: whole files, and some whole folders."""
    if config.getoption("dist") != "loadfile":
        return None
    scheduler = import_module("xdist.scheduler").LoadFileScheduling(config, log)

    def unit(nodeid: str) -> str:
        file = Path(nodeid.partition("::")[0])
        return str(file.parent if file.parent.name in _TOGETHER else file)

    scheduler._split_scope = unit
    return scheduler


def pytest_collection_finish() -> None:
    # Some hundred thousand objects that stay: not to be gone through again by each full collection.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup() -> Generator[None]:
    with _in_time():
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown() -> Generator[None]:
    with _in_time():
        return (yield)


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"the fixtures took more than {_FIXTURES_SECONDS:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, _FIXTURES_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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


@pytest.fixture(autouse=True, scope="session")
def authorities_read_once() -> Iterator[None]:
    """Each HTTP client would read the authorities of the world again, which takes longer than most tests' calls."""
    real = httpx.create_ssl_context
    known = functools.cache(lambda cert, trust_env, *_: real(True, cert, trust_env))

    def create(verify: ssl.SSLContext | str | bool = True, cert: Any = None, trust_env: bool = True) -> ssl.SSLContext:
        if verify is not True:
            return real(verify, cert, trust_env)
        return known(cert, trust_env, os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("httpx._transports.default.create_ssl_context", create)
        yield


@pytest.fixture
def short_path() -> Iterator[Path]:
    """An empty folder whose path leaves room for a unix socket's name (107 bytes in all, which tmp_path may exceed)."""
    folder = Path(tempfile.mkdtemp(prefix="fleet-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
