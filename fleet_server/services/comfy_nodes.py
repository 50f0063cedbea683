"""What the ComfyUI of each node has, asked for when the node comes and then again and again, kept in the store.

So it is known of nodes that are away too: their prompts wait, and /object_info answers with every node stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import zlib
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import quote

import structlog
from fleet.v1 import command_pb2

from fleet_server.domain.comfy import ENGINE, Catalogue, merged, without_brought
from fleet_server.domain.errors import FleetError
from fleet_server.protojson import dumps_exact, loads_exact
from fleet_server.services.commands import CommandStream
from fleet_server.services.fleet import FleetView
from fleet_server.store import Store

_log = structlog.get_logger("fleet.comfy")
Json = Any


@dataclass(frozen=True, slots=True)
class ComfyNodesSettings:
    """`refresh_seconds` between two looks at a node; `asked` nodes are looked at at once."""

    refresh_seconds: float = 60.0
    ask_seconds: float = 20.0
    retry_seconds: float = 2.0
    asked: int = 4
    reply_bytes: int = 64 << 20


class Asks(Protocol):
    """Gives commands to nodes: services.commands."""

    def open(self, node_id: str, command: command_pb2.Command) -> AbstractAsyncContextManager[CommandStream]:
        """The command's answer in parts."""
        ...


@dataclass(slots=True)
class Answer:
    """A reply of a node's ComfyUI: its head, and `body` in parts, to be read within the context that gave it."""

    status: int
    content_type: str
    headers: Mapping[str, str]
    body: AsyncGenerator[bytes, None]


@dataclass(slots=True)
class _Known:
    digest: str
    bundle: dict[str, Json]
    catalogue: Catalogue
    session: str = ""
    asked_at: float = float("-inf")


@dataclass(slots=True)
class _Merged:
    """Replies made of what all nodes have, until one of them has something else."""

    digests: tuple[str, ...] = ()
    object_info: bytes = b"{}"
    classes: dict[str, Json] = field(default_factory=dict)


class ComfyNodes:
    """`run` has to be running. Reads never wait, but for those that say so."""

    def __init__(
        self, store: Store, fleet: FleetView, commands: Asks, settings: ComfyNodesSettings | None = None
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._commands = commands
        self._settings = settings or ComfyNodesSettings()
        self._known: dict[str, _Known] = {}
        self._merged = _Merged()
        self._look = asyncio.Event()
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._tried: dict[str, float] = {}
        self._places = asyncio.Semaphore(self._settings.asked)

    async def run(self) -> None:
        """Keeps what is known of the nodes fresh, until cancelled."""
        await self._load()
        stop = self._fleet.subscribe_changes(self._changed)
        try:
            while True:
                self._look.clear()
                self._forget_deleted()
                self._begin_due()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._settings.retry_seconds):
                        await self._look.wait()
        finally:
            stop()
            for task in self._asking.values():
                task.cancel()
            await asyncio.gather(*self._asking.values(), return_exceptions=True)

    def _changed(self, node_id: str) -> None:
        # The slots of other nodes are none of its business, however often they change.
        node = self._fleet.node(node_id)
        if node is None or ENGINE in node.engines:
            self._look.set()

    # What is known.

    def catalogues(self) -> list[Catalogue]:
        """What the ComfyUIs of all registered nodes have, each kind once."""
        return list({known.digest: known.catalogue for known in self._known.values()}.values())

    def online(self) -> list[str]:
        """The nodes whose ComfyUI can be asked now."""
        return [node.node_id for node in self._fleet.online() if ENGINE in node.engines]

    async def object_info(self, name: str | None = None) -> bytes:
        """The reply of /object_info for the whole fleet, or for one class."""
        whole = await self._whole()
        if name is None:
            return whole.object_info
        found = whole.classes.get(name)
        return b"{}" if found is None else dumps_exact({name: found}).encode()

    def folders(self) -> list[str]:
        """The folders of models, of all nodes."""
        return list(dict.fromkeys(folder for known in self._values() for folder in known.get("models", {})))

    def models(self, folder: str) -> list[Json] | None:
        """The files of a folder, of all nodes; None if no node has the folder."""
        lists = [known["models"][folder] for known in self._values() if folder in known.get("models", {})]
        return list(dict.fromkeys(name for files in lists for name in files)) if lists else None

    def embeddings(self) -> list[Json]:
        """The embeddings of all nodes."""
        return list(dict.fromkeys(name for known in self._values() for name in known.get("embeddings", [])))

    def stats(self, node_id: str) -> dict[str, Json] | None:
        """The node's /system_stats when it was looked at last."""
        known = self._known.get(node_id)
        found: dict[str, Json] | None = None if known is None else known.bundle.get("system_stats")
        return found

    def node_ids(self) -> list[str]:
        """The nodes of which something is known, in order."""
        return sorted(self._known)

    def features(self) -> dict[str, Json]:
        """The /features of some node."""
        return next((known["features"] for known in self._values() if known.get("features")), {})

    def stale(self, node_id: str) -> None:
        """Something has changed on that node: look soon."""
        known = self._known.get(node_id)
        if known is not None:
            known.asked_at = float("-inf")
            self._look.set()

    def _values(self) -> list[dict[str, Json]]:
        return [self._known[node_id].bundle for node_id in sorted(self._known)]

    async def _whole(self) -> _Merged:
        digests = tuple(sorted({known.digest for known in self._known.values()}))
        if digests != self._merged.digests:
            infos = [known["object_info"] for known in self._values()]
            classes, body = await asyncio.to_thread(_joined, infos)
            self._merged = _Merged(digests, body, classes)
        return self._merged

    # Asking.

    @asynccontextmanager
    async def ask(
        self, node_id: str, method: str, target: str, *, body: bytes = b"", content_type: str = ""
    ) -> AsyncGenerator[Answer, None]:
        """A request to the node's ComfyUI. Raises NODE_NOT_FOUND, NODE_OFFLINE, TIMEOUT, the agent's error."""
        request = command_pb2.EngineRequest(
            engine=ENGINE, method=method, target=target, content_type=content_type, body=body
        )
        seconds = self._settings.ask_seconds
        command = command_pb2.Command(timeout_seconds=seconds, engine_request=request)
        async with self._commands.open(node_id, command) as stream:
            parts = aiter(stream)
            try:
                async with asyncio.timeout(seconds):
                    head = await anext(parts)
            except (TimeoutError, StopAsyncIteration):
                raise FleetError("TIMEOUT", f"the ComfyUI of {node_id} did not answer within {seconds:g} s") from None
            reply = head.reply
            bodies = _bodies(parts)
            try:
                yield Answer(reply.status_code, reply.content_type, dict(reply.headers), bodies)
            finally:
                await bodies.aclose()

    async def get(self, node_id: str, target: str) -> Json:
        """The JSON of a GET; None where the answer is no 200. Raises as `ask`."""
        async with self.ask(node_id, "GET", target) as answer:
            if answer.status != 200:
                return None
            chunks, size = [], 0
            async for chunk in answer.body:
                size += len(chunk)
                if size > self._settings.reply_bytes:
                    raise FleetError("INTERNAL", f"{target} of {node_id} is larger than {self._settings.reply_bytes}")
                chunks.append(chunk)
        try:
            return await asyncio.to_thread(read_json, b"".join(chunks))
        except ValueError:
            return None

    def _begin_due(self) -> None:
        now = asyncio.get_running_loop().time()
        for node in self._fleet.online():
            if ENGINE not in node.engines or node.node_id in self._asking:
                continue
            known = self._known.get(node.node_id)
            fresh = (
                known is not None
                and known.session == node.session
                and now - known.asked_at < self._settings.refresh_seconds
            )
            if fresh or now - self._tried.get(node.node_id, float("-inf")) < self._settings.retry_seconds:
                continue
            self._tried[node.node_id] = now
            task = asyncio.create_task(self._refresh(node.node_id, node.session), name="comfy-catalogue")
            self._asking[node.node_id] = task
            task.add_done_callback(functools.partial(self._asked, node.node_id))

    def _asked(self, node_id: str, _: asyncio.Task[None]) -> None:
        self._asking.pop(node_id, None)

    async def _refresh(self, node_id: str, session: str) -> None:
        try:
            async with self._places:
                bundle = await self._bundle(node_id)
            if bundle is not None:
                await self._keep(node_id, session, bundle)
        except FleetError as error:
            _log.info("the ComfyUI of a node cannot be looked at", node_id=node_id, detail=error.detail)

    async def _bundle(self, node_id: str) -> dict[str, Json] | None:
        info = await self.get(node_id, "/object_info")
        if not isinstance(info, dict):
            return None
        folders = await self.get(node_id, "/models")
        models: dict[str, Json] = {}
        for folder in folders if isinstance(folders, list) else []:
            files = await self.get(node_id, f"/models/{quote(str(folder), safe='')}")
            models[str(folder)] = files if isinstance(files, list) else []
        return {
            "object_info": await asyncio.to_thread(without_brought, info),
            "models": models,
            "embeddings": await self.get(node_id, "/embeddings") or [],
            "system_stats": await self.get(node_id, "/system_stats"),
            "features": await self.get(node_id, "/features") or {},
        }

    async def _keep(self, node_id: str, session: str, bundle: dict[str, Json]) -> None:
        at = asyncio.get_running_loop().time()
        packed, digest = await asyncio.to_thread(_pack, bundle)
        known = self._known.get(node_id)
        if known is not None and known.digest == digest:
            known.session, known.asked_at, known.bundle = session, at, bundle
            return
        await self._store.comfy.put_catalogue(node_id, packed)
        self._know(node_id, await asyncio.to_thread(self._known_of, bundle, digest))
        self._known[node_id].session, self._known[node_id].asked_at = session, at

    def _known_of(self, bundle: dict[str, Json], digest: str) -> _Known:
        """Shares the catalogue with nodes that have the same."""
        same = next((known.catalogue for known in tuple(self._known.values()) if known.digest == digest), None)
        return _Known(digest, bundle, same or Catalogue.of(bundle["object_info"], digest, _version(bundle)))

    def _know(self, node_id: str, known: _Known) -> None:
        self._known[node_id] = known
        self._fleet.offer(node_id, known.catalogue)

    async def _load(self) -> None:
        while True:
            try:
                rows = await self._store.comfy.catalogues()
                break
            except FleetError:
                await asyncio.sleep(self._settings.retry_seconds)
        for node_id, packed in rows.items():
            if self._fleet.node(node_id) is None:
                await self._store.comfy.drop_catalogue(node_id)
                continue
            bundle, digest = await asyncio.to_thread(_unpack, packed)
            self._know(node_id, await asyncio.to_thread(self._known_of, bundle, digest))

    def _forget_deleted(self) -> None:
        for node_id in [node_id for node_id in self._known if self._fleet.node(node_id) is None]:
            del self._known[node_id]
            self._fleet.offer(node_id, None)


async def _bodies(parts: Any) -> AsyncGenerator[bytes, None]:
    async for part in parts:
        if part.WhichOneof("part") == "body":
            yield part.body


def _joined(infos: list[dict[str, Json]]) -> tuple[dict[str, Json], bytes]:
    classes = merged(infos)
    return classes, dumps_exact(classes).encode()


def _pack(bundle: dict[str, Json]) -> tuple[bytes, str]:
    """What the store keeps, and what tells it from others: free memory and the like change all the time."""
    text = dumps_exact(bundle["object_info"])
    steady = [bundle["models"], bundle["embeddings"], bundle["features"], _version(bundle)]
    digest = hashlib.sha256((text + dumps_exact(steady)).encode()).hexdigest()[:32]
    return digest.encode() + zlib.compress(dumps_exact(bundle).encode(), 6), digest


def _version(bundle: Mapping[str, Json]) -> str:
    return str(((bundle["system_stats"] or {}).get("system") or {}).get("comfyui_version") or "")


def _unpack(packed: bytes) -> tuple[dict[str, Json], str]:
    bundle: dict[str, Json] = loads_exact(zlib.decompress(packed[32:]))
    return bundle, packed[:32].decode()


def read_json(body: bytes) -> Json:
    """What a node answered. Python programs write NaN and Infinity, as limits of custom nodes do: those are null here,
    which is no limit. Raises ValueError for what is no JSON at all.
    """
    try:
        return loads_exact(body)
    except ValueError:
        return json.loads(body, parse_constant=lambda word: None)
