"""A server from start to end: the folder's lock, the store, the doors, the agent beside it, and the stop in order."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import structlog
from pydantic import SecretStr

from fleet_server.app import Server
from fleet_server.domain.errors import FleetError
from fleet_server.embedded.agent import EmbeddedAgent
from fleet_server.embedded.identity import server_name
from fleet_server.embedded.lock import FolderInUseError, FolderLock
from fleet_server.embedded.own_key import OwnKeyError, own_key
from fleet_server.embedded.stewards import Stewards
from fleet_server.http import HttpServer, PortTakenError, bind
from fleet_server.memory import settle_memory
from fleet_server.objects import opened_s3
from fleet_server.readiness import Readiness, StartError
from fleet_server.settings import Settings
from fleet_server.storage.s3 import S3Store
from fleet_server.store import Store, open_store
from fleet_server.store.valkey import EmbeddedValkey

_log = structlog.get_logger("fleet")
_STORE_SECONDS = 30.0
_AGENT_SECONDS = 120.0
"""Where a machine is that busy, its agent takes as long to come: who reads the ready line counts on it."""
_S3_SECONDS = 5.0
"""An S3 server that does not answer holds the ready line up no longer."""


async def serve(settings: Settings) -> None:
    """Runs until SIGTERM or SIGINT. Raises StartError where it cannot start."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    lock = FolderLock(settings.data_dir)
    try:
        await asyncio.to_thread(lock.acquire)
    except FolderInUseError as error:
        raise StartError(str(error)) from error
    except OSError as error:
        raise StartError(f"{settings.data_dir} cannot be used: {error.strerror}; give another --data-dir") from error
    try:
        settings, fresh_key = _keyed(settings)
        with _bound(settings) as sockets:
            async with _opened_store(settings, lock) as store, _opened_s3(settings, lock) as s3:
                readiness = Readiness(settings)
                server = Server(settings, store, readiness, s3)
                if server.key_file is not None:
                    loop.add_signal_handler(signal.SIGHUP, server.key_file.reload)
                await _run(settings, server, readiness, sockets, lock, stopping, fresh_key)
    finally:
        lock.release()


def _keyed(settings: Settings) -> tuple[Settings, str | None]:
    """The settings with a key, where --lan is to make one, and that key where it was made just now."""
    if settings.insecure_no_auth:
        _log.warning(
            "without a key everybody who reaches this server may read and submit: --insecure-no-auth",
            host=settings.host,
        )
    if settings.keyed or not settings.lan:
        return settings, None
    try:
        key, made = own_key(settings.data_dir)
    except OwnKeyError as error:
        raise StartError(str(error)) from error
    return settings.model_copy(update={"api_key": SecretStr(key)}), key if made else None


async def _say_once(server: Server, settings: Settings, port: int, key: str) -> None:
    """What --lan made at its first start. On standard error: it is for people and for no log."""
    joins = server.enrolment.joins
    lines = [f"API key (kept in {settings.data_dir / 'api-key'}, shown this once): {key}"]
    if joins is not None:
        token = await joins.token()
        host = joins.doors[0].rpartition(":")[0] if joins.doors else "THIS-MACHINE"
        lines += [
            f'Try it:  curl -H "X-API-Key: {key}" http://{host}:{port}/api/nodes',
            f"Within 15 minutes, on another machine:  fleet agent --join {token.token}",
            "REST is plain HTTP: on a network that you do not trust, put a TLS proxy in front of it.",
        ]
    sys.stderr.write("".join(f"{line}\n" for line in lines))
    sys.stderr.flush()


@contextlib.contextmanager
def _bound(settings: Settings) -> Iterator[list[socket.socket]]:
    try:
        sockets = bind(settings.host, settings.port, "port")
    except PortTakenError as error:
        raise StartError(str(error)) from error
    try:
        yield sockets
    finally:
        for listener in sockets:
            listener.close()


@asynccontextmanager
async def _opened_store(settings: Settings, lock: FolderLock) -> AsyncIterator[Store]:
    """The store: yours where a URL is given, else a child process of ours."""
    async with AsyncExitStack() as stack:
        url = settings.redis_url
        if url is None:
            folder = settings.data_dir / "store"
            valkey = EmbeddedValkey(folder, lock_fds=(lock.fileno(),), maxmemory_bytes=settings.store_memory_bytes)
            try:
                await valkey.start()
            except (RuntimeError, TimeoutError) as error:
                raise StartError(f"the embedded store does not start: {error}") from error
            stack.push_async_callback(valkey.stop)
            url = valkey.url
        store = open_store(url)
        stack.push_async_callback(store.aclose)
        try:
            async with asyncio.timeout(_STORE_SECONDS):
                await store.check()
        except (FleetError, TimeoutError) as error:
            raise StartError(
                "the store does not answer: start your Redis or Valkey, or correct --redis-url (FLEET_REDIS_URL)"
            ) from error
        yield store


@asynccontextmanager
async def _opened_s3(settings: Settings, lock: FolderLock) -> AsyncIterator[S3Store]:
    """S3: yours, a child process of ours, or none."""
    async with AsyncExitStack() as stack:
        try:
            s3 = await stack.enter_async_context(opened_s3(settings, lock_fd=lock.fileno()))
        except PortTakenError as error:
            raise StartError(str(error)) from error
        except OSError as error:
            raise StartError(f"the embedded S3 does not start: {error}") from error
        yield s3


async def _run(
    settings: Settings,
    server: Server,
    readiness: Readiness,
    sockets: Sequence[socket.socket],
    lock: FolderLock,
    stopping: asyncio.Event,
    fresh_key: str | None,
) -> None:
    """Starts the doors, says that all is ready, and stops in order."""
    port = sockets[0].getsockname()[1]
    origin = f"http://{'localhost' if settings.loopback else settings.host}:{port}"
    try:
        async with asyncio.TaskGroup() as tasks:
            grpc_port, loops = await server.start(tasks)
            door = server.enrolment.own_agent(grpc_port)
            agent = _agent(settings, server.agent_key, door, lock)
            stewards = _stewards(settings, server, door, lock)
            stewarding = tasks.create_task(stewards.run(), name="stewards")
            keeper = tasks.create_task(agent.run(), name="agent") if agent is not None else None
            # The agent's process starts while we are busy with the documents of the API.
            await asyncio.sleep(0)
            app, bridge = server.http_app(origin)
            http = HttpServer(app, sockets, settings.stop_grace_seconds)
            serving = tasks.create_task(http.run(), name="http")
            await http.started()
            settle_memory()
            await server.s3.settled(_S3_SECONDS)
            if agent is None or await _until_online(server, stopping):
                _say_ready(origin, grpc_port, server.comfy.port, server.s3.address, settings.ready_json)
                if fresh_key is not None:
                    await _say_once(server, settings, port, fresh_key)
            await stopping.wait()
            _log.info("stopping")
            readiness.stopping = True
            stewarding.cancel()
            await asyncio.wait([stewarding])
            if keeper is not None:
                # The agent gives its work back while the server can still take it.
                keeper.cancel()
                await asyncio.wait([keeper])
            await server.stop(bridge, settings.stop_grace_seconds)
            http.stop()
            await serving
            for task in loops:
                task.cancel()
    except BaseExceptionGroup as group:
        known = group.subgroup(StartError)
        if known is not None:
            raise known.exceptions[0] from None
        raise
    finally:
        await server.close_files()


def _stewards(settings: Settings, server: Server, door: dict[str, str], lock: FolderLock) -> Stewards:
    """Those who reach nodes without an agent."""
    more = {"FLEET_AGENT_LOG_LEVEL": settings.log_level, "FLEET_AGENT_RECONNECT_SECONDS": "0.5", **door}
    if server.agent_key is not None:
        more["FLEET_API_KEY"] = server.agent_key
    made = Stewards(
        server.store,
        settings.data_dir / "ssh",
        server_name(settings.data_dir),
        environment=lambda: more,
        lock_fd=lock.fileno(),
    )
    server.machines.ssh = made
    return made


def _agent(settings: Settings, key: str | None, door: dict[str, str], lock: FolderLock) -> EmbeddedAgent | None:
    """The agent beside the server; what it is told beats its own variables."""
    if not settings.agent:
        return None
    environment = {
        **door,
        "FLEET_AGENT_DATA_DIR": str(settings.data_dir / "agent"),
        "FLEET_AGENT_SLOTS": str(settings.agent_slots),
        "FLEET_AGENT_BATCH": str(settings.agent_batch),
        "FLEET_AGENT_ENGINES": " ".join(settings.engines),
        "FLEET_AGENT_LOG_LEVEL": "warning" if settings.log_level == "info" else settings.log_level,
        "FLEET_AGENT_DISK_FLOOR_BYTES": str(settings.disk_floor_bytes),
        # It is the only one, and near: a herd is not to be feared.
        "FLEET_AGENT_RECONNECT_SECONDS": "0.5",
    }
    if key is not None:
        environment["FLEET_API_KEY"] = key
    return EmbeddedAgent(environment, lock_fd=lock.fileno(), stop_seconds=settings.stop_grace_seconds + 5)


async def _until_online(server: Server, stopping: asyncio.Event) -> bool:
    """Waits for the agent's Welcome; goes on without it after two minutes, saying so. False: told to stop."""
    online = asyncio.Event()
    end = server.fleet.subscribe_changes(lambda _: online.set() if server.fleet.online() else None)
    if server.fleet.online():
        online.set()
    waiting = [asyncio.create_task(online.wait()), asyncio.create_task(stopping.wait())]
    try:
        await asyncio.wait(waiting, timeout=_AGENT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    finally:
        end()
        for task in waiting:
            task.cancel()
    if not online.is_set() and not stopping.is_set():
        _log.warning("the agent of this machine has not come yet: jobs wait for it")
    return not stopping.is_set()


def _say_ready(origin: str, grpc_port: int, comfy_port: int | None, s3_url: str | None, as_json: bool) -> None:
    if as_json:
        ready = {
            "status": "ready",
            "url": origin,
            "docs_url": f"{origin}/docs",
            "grpc_port": grpc_port,
            "comfy_port": comfy_port,
            "s3_url": s3_url,
            "pid": os.getpid(),
        }
        line = json.dumps(ready)
    else:
        s3 = "" if s3_url is None else f", S3: {s3_url}"
        comfy = "" if comfy_port is None else f", ComfyUI: localhost:{comfy_port}"
        line = f"Fleet Commander is ready at {origin} (docs: {origin}/docs, gRPC: localhost:{grpc_port}{comfy}{s3})"
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
