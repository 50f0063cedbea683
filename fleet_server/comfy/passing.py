"""What only serves the stock front end is passed to one node, so that its web page works.

Only what is listed: routes of custom nodes may install and run things, and are nobody's business here.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from fleet_server.comfy.parts import ComfyParts
from fleet_server.comfy.replies import body_of, empty, who_of
from fleet_server.domain.errors import FleetError

_READ = re.compile(
    r"/(?:api/)?(?:"
    r"(?:index\.html|favicon\.ico|manifest\.json|[\w.-]+\.(?:css|js|png|svg|ico|woff2?|webmanifest))?"
    r"|(?:assets|extensions|lib|scripts|fonts|cursor|templates|i18n|workflow_templates|global_subgraphs|docs)(?:/.*)?"
    r"|users|user\.css|userdata(?:/.*)?|v2/userdata(?:/.*)?|settings(?:/.*)?|experiment/models(?:/.*)?"
    r"|internal/(?:logs(?:/raw)?|folder_paths|files/.*)|node_replacements"
    r")",
    re.DOTALL,
)
_WRITE = re.compile(
    r"/(?:api/)?(?:users|userdata/.*|v2/userdata/.*|settings(?:/.*)?|internal/logs/subscribe)", re.DOTALL
)
_READS = frozenset({"GET", "HEAD"})
_HEADERS = ("etag", "last-modified", "cache-control", "content-disposition", "content-encoding")


class Passing:
    """See `serve`. The node is the first one that is there, so that settings stay where they are."""

    def __init__(self, parts: ComfyParts) -> None:
        self._parts = parts

    async def serve(self, request: Request) -> Response:
        """The node's reply; 404 for what is not passed on, 503 where no node is there."""
        path: str = request.scope["path"]
        read = request.method in _READS
        if ".." in path or (_READ if read else _WRITE).fullmatch(path) is None:
            return empty(404)
        who = who_of(request)
        if not who.admin and (not read or "/internal/" in path):
            raise FleetError("SCOPE_MISSING", "the nodes' settings and logs are for admin keys: they are everybody's")
        body = b"" if read else await body_of(request, self._parts.settings.prompt_bytes)
        online = self._parts.nodes.online()
        if not online:
            raise FleetError("NO_NODE", "no node with ComfyUI is there: its web page needs one")
        target = request.scope["raw_path"].decode("latin-1")
        query = request.scope["query_string"].decode("latin-1")
        kind = request.headers.get("content-type", "")
        whole = f"{target}?{query}" if query else target
        stack = AsyncExitStack()
        try:
            asked = self._parts.nodes.ask(online[0], request.method, whole, body=body, content_type=kind)
            answer = await stack.enter_async_context(asked)
        except BaseException:
            await stack.aclose()
            raise
        headers = {name: value for name, value in answer.headers.items() if name in _HEADERS}
        headers["content-type"] = answer.content_type or "application/octet-stream"

        async def chunks() -> AsyncIterator[bytes]:
            async with stack:
                async for chunk in answer.body:
                    yield chunk

        return StreamingResponse(chunks(), answer.status, headers)
