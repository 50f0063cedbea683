"""The node's HTTP and WebSocket surface."""

from __future__ import annotations

import asyncio
import contextlib
import json
import posixpath
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from tests.comfy_node import classes, files
from tests.comfy_node.execution import Executor, Item
from tests.comfy_node.graph import InvalidPromptError, Validation, refusal
from tests.comfy_node.script import Script

FEATURES = {"supports_preview_metadata": True, "max_upload_size": 104857600}


@dataclass
class Call:
    """A request as it came."""

    method: str
    path: str
    query: dict[str, str]
    body: Any


class _Sockets:
    """Clients by id; the newest socket of an id takes its place."""

    def __init__(self) -> None:
        self.queues: dict[str, asyncio.Queue[str | bytes | None]] = {}
        self.with_metadata: set[str] = set()

    def send(self, frame: str | bytes, client_id: str | None) -> None:
        for name, queue in self.queues.items():
            if client_id in (None, name):
                queue.put_nowait(frame)


class NodeApp:
    """One life of a node: what it knows is gone with it."""

    def __init__(self, script: Script, calls: list[Call]) -> None:
        self._script = script
        self._calls = calls
        self._counter = 0
        self.files = files.Files()
        self.sockets = _Sockets()
        self.executor = Executor(script, self.files, self._say, self._say_preview)

    def routes(self) -> Starlette:
        table: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
            ("POST", "/prompt", self._post_prompt),
            ("GET", "/prompt", self._get_prompt),
            ("GET", "/queue", self._get_queue),
            ("POST", "/queue", self._post_queue),
            ("POST", "/interrupt", self._interrupt),
            ("GET", "/history", self._get_history),
            ("GET", "/history/{prompt_id}", self._get_history_of),
            ("POST", "/history", self._post_history),
            ("GET", "/view", self._view),
            ("POST", "/upload/image", self._upload),
            ("POST", "/upload/mask", self._upload),
            ("GET", "/object_info", self._object_info),
            ("GET", "/object_info/{name}", self._object_info),
            ("GET", "/models", self._models),
            ("GET", "/models/{folder}", self._models),
            ("GET", "/embeddings", self._nothing_listed),
            ("GET", "/extensions", self._nothing_listed),
            ("GET", "/system_stats", self._system_stats),
            ("POST", "/free", self._free),
            ("GET", "/features", self._features),
            ("GET", "/", self._index),
        ]
        routes: list[Route | WebSocketRoute] = []
        for prefix in ("", "/api"):
            for method, path, handler in table:
                routes.append(Route(prefix + path, self._noted(path, handler), methods=[method]))
            routes.append(WebSocketRoute(f"{prefix}/ws", self._ws))
        return Starlette(routes=routes)

    def _noted(
        self, path: str, handler: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            body: Any = None
            if request.method == "POST" and "json" in request.headers.get("content-type", "json"):
                with contextlib.suppress(ValueError):
                    body = json.loads(await request.body() or b"null")
            self._calls.append(Call(request.method, path, dict(request.query_params), body))
            await self._script.until(lambda: path not in self._script.hold_paths)
            if path in self._script.refuse:
                return Response(status_code=self._script.refuse[path])
            return await handler(request)

        return answer

    def _say(self, kind: str, data: dict[str, Any], client_id: str | None) -> None:
        self.sockets.send(json.dumps({"type": kind, "data": data}), client_id)

    def _say_preview(self, image: bytes, node_id: str, prompt_id: str, client_id: str | None) -> bool:
        """Sends a preview with its metadata where the client takes that (node_id given), or else without."""
        takes = client_id is not None and client_id in self.sockets.with_metadata
        if node_id and takes:
            self.sockets.send(files.preview_with_metadata_frame(image, node_id, prompt_id), client_id)
        elif not node_id:
            self.sockets.send(files.preview_frame(image), client_id)
        return bool(node_id) and takes

    async def _post_prompt(self, request: Request) -> Response:
        try:
            body = json.loads(await request.body())
        except ValueError:
            return Response("500 Internal Server Error\n\nServer got itself in trouble", 500, media_type="text/plain")
        try:
            return _json(self._take(body))
        except InvalidPromptError as error:
            return _json(error.body, 400)

    def _take(self, body: dict[str, Any]) -> dict[str, Any]:
        number = body.get("number")
        if number is None:
            number, self._counter = self._counter, self._counter + 1
            number = -number if body.get("front") else number
        if "prompt" not in body:
            raise refusal("no_prompt", "No prompt provided", "No prompt provided")
        prompt_id = str(body.get("prompt_id") or uuid.uuid4())
        if self._script.prompt_ids == "ignored":
            prompt_id = str(uuid.uuid4())
        elif self._script.prompt_ids == "uuid" and not _is_uuid(prompt_id):
            raise refusal("invalid_prompt_id", "prompt_id must be a valid UUID")
        has_input = lambda name: self.files.input_named(name) in self.files.data  # noqa: E731
        outputs, errors = Validation(body["prompt"], self.object_info(), has_input).outputs()
        extra = dict(body.get("extra_data") or {})
        if "client_id" in body:
            extra["client_id"] = body["client_id"]
        self.executor.put(Item(number, prompt_id, body["prompt"], extra, outputs))
        return {"prompt_id": prompt_id, "number": number, "node_errors": errors}

    async def _get_prompt(self, request: Request) -> Response:
        return _json({"exec_info": {"queue_remaining": self.executor.remaining}})

    async def _get_queue(self, request: Request) -> Response:
        run = self.executor.running
        running = [] if run is None else [run.item.shown()]
        return _json({"queue_running": running, "queue_pending": [item.shown() for item in self.executor.pending]})

    async def _post_queue(self, request: Request) -> Response:
        body = await request.json()
        if body.get("clear"):
            self.executor.delete(None)
        if "delete" in body:
            self.executor.delete(body["delete"])
        return Response()

    async def _interrupt(self, request: Request) -> Response:
        raw = await request.body()
        self.executor.interrupt((json.loads(raw) if raw else {}).get("prompt_id"))
        return Response()

    async def _get_history(self, request: Request) -> Response:
        entries = list(self.executor.history.items())
        most = int(request.query_params.get("max_items", len(entries)))
        offset = request.query_params.get("offset")
        first = max(0, len(entries) - most) if offset is None else int(offset)
        return _json(dict(entries[first : first + most]))

    async def _get_history_of(self, request: Request) -> Response:
        name = request.path_params["prompt_id"]
        entry = self.executor.history.get(name)
        return _json({} if entry is None else {name: entry})

    async def _post_history(self, request: Request) -> Response:
        body = await request.json()
        for name in list(self.executor.history) if body.get("clear") else body.get("delete", []):
            self.executor.history.pop(name, None)
        return Response()

    async def _view(self, request: Request) -> Response:
        query = request.query_params
        name, subfolder = query.get("filename", ""), query.get("subfolder", "")
        if not name or name.startswith("/") or ".." in name:
            return Response(status_code=400)
        if posixpath.normpath(subfolder or ".").startswith(("..", "/")):
            return Response(status_code=403)
        data = self.files.data.get((query.get("type", "output"), subfolder, name))
        if data is None:
            return Response(status_code=404)
        ending = name.rpartition(".")[2].lower()
        kind = {"png": "image/png", "webp": "image/webp", "mp4": "video/mp4"}.get(ending, "application/octet-stream")
        headers = {"Content-Disposition": f'filename="{name}"', "X-Content-Type-Options": "nosniff"}
        return Response(data, media_type=kind, headers=headers)

    async def _upload(self, request: Request) -> Response:
        async with request.form() as form:
            image = form.get("image")
            if image is None or isinstance(image, str):
                return Response(status_code=400)
            kind, subfolder = str(form.get("type", "input")), str(form.get("subfolder", ""))
            overwrite = str(form.get("overwrite", "")) in ("true", "1")
            name = self.files.upload(kind, subfolder, str(image.filename), await image.read(), overwrite)
        return _json({"name": name, "subfolder": subfolder, "type": kind})

    def object_info(self) -> dict[str, Any]:
        """The classes, their lists of files filled in."""
        found = json.loads(json.dumps(dict(self._script.node_classes)))
        inputs = [name for kind, folder, name in self.files.data if (kind, folder) == ("input", "")]
        for name, field_name, listed in (
            ("CheckpointLoaderSimple", "ckpt_name", list(self._script.checkpoints)),
            ("LoraLoader", "lora_name", list(self._script.loras)),
            ("LoadImage", "image", inputs),
            ("LoadImageMask", "image", inputs),
        ):
            if name in found:
                found[name]["input"]["required"][field_name][0] = listed
        return dict(found)

    async def _object_info(self, request: Request) -> Response:
        found, name = self.object_info(), request.path_params.get("name")
        return _json(found if name is None else {name: found[name]} if name in found else {})

    async def _models(self, request: Request) -> Response:
        folder = request.path_params.get("folder")
        if folder is None:
            return _json(classes.sample("models")["body"])
        listed = {"checkpoints": list(self._script.checkpoints), "loras": list(self._script.loras)}
        if folder not in classes.sample("models")["body"]:
            return Response(status_code=404)
        return _json(listed.get(folder, []))

    async def _nothing_listed(self, request: Request) -> Response:
        return _json([])

    async def _system_stats(self, request: Request) -> Response:
        stats = classes.sample("system_stats")["body"]
        total, free = self._script.vram_total, self._script.vram_free
        stats["devices"][0] |= {"vram_total": total, "vram_free": free}
        return _json(stats)

    async def _free(self, request: Request) -> Response:
        return Response()

    async def _features(self, request: Request) -> Response:
        return _json(FEATURES)

    async def _index(self, request: Request) -> Response:
        return Response("<title>ComfyUI</title>", media_type="text/html")

    async def _ws(self, socket_: WebSocket) -> None:
        client_id = socket_.query_params.get("clientId") or uuid.uuid4().hex
        await socket_.accept()
        queue: asyncio.Queue[str | bytes | None] = asyncio.Queue()
        self.sockets.queues[client_id] = queue
        self.sockets.with_metadata.discard(client_id)
        status = {"status": {"exec_info": {"queue_remaining": self.executor.remaining}}, "sid": client_id}
        queue.put_nowait(json.dumps({"type": "status", "data": status}))
        run = self.executor.running
        if run is not None and run.item.client_id == client_id and run.node_id is not None:
            queue.put_nowait(json.dumps({"type": "executing", "data": {"node": run.node_id}}))
        hearing = asyncio.create_task(self._hear(socket_, client_id, queue))
        try:
            while (frame := await queue.get()) is not None:
                await self._script.until(lambda: not self._script.frames_held)
                await (socket_.send_text(frame) if isinstance(frame, str) else socket_.send_bytes(frame))
            await socket_.close(1012)
        except (WebSocketDisconnect, RuntimeError):
            pass
        finally:
            hearing.cancel()
            if self.sockets.queues.get(client_id) is queue:
                del self.sockets.queues[client_id]

    async def _hear(self, socket_: WebSocket, client_id: str, queue: asyncio.Queue[str | bytes | None]) -> None:
        try:
            first = json.loads(await socket_.receive_text())
            if first.get("type") == "feature_flags":
                if first["data"].get("supports_preview_metadata"):
                    self.sockets.with_metadata.add(client_id)
                queue.put_nowait(json.dumps({"type": "feature_flags", "data": FEATURES}))
            while True:
                await socket_.receive_text()
        except (WebSocketDisconnect, ValueError, RuntimeError, KeyError):
            queue.put_nowait(None)


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


def _json(body: Any, status: int = 200) -> Response:
    return Response(json.dumps(body), status, media_type="application/json; charset=utf-8")
