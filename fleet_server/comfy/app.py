"""The routes of the gateway, each also under /api, behind the same posture as everything else."""

from __future__ import annotations

from collections.abc import Iterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ASGIApp

from fleet_server.comfy.file_routes import FileRoutes
from fleet_server.comfy.info_routes import InfoRoutes
from fleet_server.comfy.parts import ComfyParts
from fleet_server.comfy.passing import Passing
from fleet_server.comfy.posture import Keys, Posture
from fleet_server.comfy.prompt_routes import PromptRoutes
from fleet_server.comfy.replies import Handler, empty, handled
from fleet_server.comfy.socket_routes import SocketRoutes


def comfy_app(parts: ComfyParts, keys: Keys) -> ASGIApp:
    """The gateway; who serves it puts the guard of Host and Origin before it."""
    routes: list[BaseRoute] = []
    sockets = SocketRoutes(parts, keys)
    for prefix in ("", "/api"):
        routes += [Route(prefix + path, handled(handler), methods=[method]) for method, path, handler in _table(parts)]
        routes.append(WebSocketRoute(f"{prefix}/ws", sockets.ws))
    passing = handled(Passing(parts).serve)

    async def rest(request: Request) -> Response:
        return empty() if request.method == "OPTIONS" else await passing(request)

    methods = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
    routes.append(Route("/{path:path}", rest, methods=methods))
    return Posture(Starlette(routes=routes), keys)


def _table(parts: ComfyParts) -> Iterator[tuple[str, str, Handler]]:
    prompts, files, info = PromptRoutes(parts), FileRoutes(parts), InfoRoutes(parts)
    yield "POST", "/prompt", prompts.post_prompt
    yield "GET", "/prompt", prompts.get_prompt
    yield "GET", "/queue", prompts.get_queue
    yield "POST", "/queue", prompts.post_queue
    yield "POST", "/interrupt", prompts.interrupt
    yield "GET", "/history", prompts.get_history
    yield "GET", "/history/{prompt_id}", prompts.get_history_of
    yield "POST", "/history", prompts.post_history
    yield "GET", "/jobs", prompts.get_jobs
    yield "POST", "/jobs/cancel", prompts.cancel_jobs
    yield "GET", "/jobs/{job_id}", prompts.get_job
    yield "POST", "/jobs/{job_id}/cancel", prompts.cancel_job
    yield "GET", "/view", files.view
    yield "POST", "/upload/image", files.upload_image
    yield "POST", "/upload/mask", files.upload_mask
    yield "GET", "/object_info", info.object_info
    yield "GET", "/object_info/{name:path}", info.object_info
    yield "GET", "/models", info.models
    yield "GET", "/models/{folder:path}", info.models_of
    yield "GET", "/embeddings", info.embeddings
    yield "GET", "/view_metadata/{folder}", info.view_metadata
    yield "GET", "/system_stats", info.system_stats
    yield "GET", "/features", info.features
    yield "POST", "/free", info.free
