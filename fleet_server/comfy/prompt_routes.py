"""prompt, queue, interrupt, history, jobs."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fleet_server.comfy.parts import ComfyParts
from fleet_server.comfy.replies import empty, json_of, json_reply, who_of
from fleet_server.domain.job import JobState
from fleet_server.services.comfy_prompts import Who
from fleet_server.services.comfy_views import JOB_STATUSES, Prompt, history_entry, job_detail, job_row

Json = Any
_QUEUED = frozenset({JobState.QUEUED})
_RUNNING = frozenset({JobState.RUNNING})
_OPEN = _QUEUED | _RUNNING
_SORTS = {"created_at": "create_time", "execution_duration": "execution_duration"}
_MOST_IDS = 10_000


class PromptRoutes:
    """Each method is one route."""

    def __init__(self, parts: ComfyParts) -> None:
        self._parts = parts
        self._prompts = parts.prompts
        self._limits = parts.settings

    async def post_prompt(self, request: Request) -> Response:
        body = await json_of(request, self._limits.prompt_bytes)
        who = who_of(request)
        return json_reply(await self._prompts.submit(body, who))

    async def get_prompt(self, request: Request) -> Response:
        return json_reply({"exec_info": {"queue_remaining": self._parts.tracker.remaining}})

    async def get_queue(self, request: Request) -> Response:
        running, pending = await self._prompts.waiting(who_of(request))
        return json_reply(
            {
                "queue_running": [prompt.item() for prompt in running],
                "queue_pending": [prompt.item() for prompt in pending],
            }
        )

    async def post_queue(self, request: Request) -> Response:
        body, who = await self._object(request), who_of(request)
        if body.get("clear"):
            await self._prompts.clear(who)
        await self._prompts.cancel(_ids(body.get("delete")), who, states=_QUEUED)
        return empty()

    async def interrupt(self, request: Request) -> Response:
        """Without a prompt_id it stops what the caller runs, and nobody else's."""
        body, who = await self._object(request), who_of(request)
        prompt_id = body.get("prompt_id")
        if prompt_id:
            job_ids = [str(prompt_id)]
        else:
            client_id = body.get("client_id") or request.query_params.get("clientId")
            job_ids = self._running_of(who, client_id if isinstance(client_id, str) else None)
        await self._prompts.cancel(job_ids, who, states=_RUNNING)
        return empty()

    def _running_of(self, who: Who, client_id: str | None) -> list[str]:
        """The running prompts of a caller: of the client that is named, else of the key, else of the address."""
        lives = [live for live in self._parts.tracker.lives() if live.at_work and live.owner == who.owner]
        if client_id is not None:
            return [live.job_id for live in lives if live.client_id == client_id]
        if who.owner:
            return [live.job_id for live in lives]
        address = self._parts.sockets.address
        return [
            live.job_id
            for live in lives
            if who.address in (live.address, address(live.owner, live.client_id) or live.address)
        ]

    async def get_history(self, request: Request) -> Response:
        most, offset = _number(request, "max_items"), _number(request, "offset")
        if offset is not None and offset < 0:
            offset = None
        found = await self._prompts.history(who_of(request), limit=most, offset=offset)
        return json_reply(await self._entries(found))

    async def get_history_of(self, request: Request) -> Response:
        prompt = await self._prompts.get(request.path_params["prompt_id"], who_of(request))
        if prompt is None or not await self._prompts.in_history(prompt):
            return json_reply({})
        return json_reply(await self._entries([prompt]))

    async def _entries(self, prompts: list[Prompt]) -> dict[str, Json]:
        notes = await self._prompts.notes(prompts)
        return {one.prompt_id: history_entry(one, note) for one, note in zip(prompts, notes, strict=True)}

    async def post_history(self, request: Request) -> Response:
        body, who = await self._object(request), who_of(request)
        if body.get("clear"):
            await self._prompts.forget_all(who)
        await self._prompts.forget(_ids(body.get("delete")), who)
        return empty()

    # /api/jobs.

    async def get_jobs(self, request: Request) -> Response:
        query = request.query_params
        statuses = [word for word in query.get("status", "").split(",") if word]
        wrong = [word for word in statuses if word not in JOB_STATUSES]
        if wrong:
            return _bad(f"Invalid status value(s): {', '.join(wrong)}. Valid values: {', '.join(JOB_STATUSES)}")
        sort, order = query.get("sort_by", "created_at"), query.get("sort_order", "desc")
        if sort not in _SORTS or order not in ("asc", "desc"):
            return _bad("sort_by must be 'created_at' or 'execution_duration', sort_order 'asc' or 'desc'")
        limit, offset = _number(request, "limit"), _number(request, "offset") or 0
        if (limit is not None and limit < 1) or offset < 0 or ("limit" in query and limit is None):
            return _bad("limit must be a positive integer, offset must not be negative")
        found = await self._prompts.everything(who_of(request))
        rows = await self._rows(found, statuses, query.get("workflow_id"))
        rows.sort(key=_by_duration if sort == "execution_duration" else _by_creation, reverse=order == "desc")
        page = rows[offset:] if limit is None else rows[offset : offset + limit]
        more = offset + len(page) < len(rows)
        pagination = {"offset": offset, "limit": limit, "total": len(rows), "has_more": more}
        return json_reply({"jobs": page, "pagination": pagination})

    async def _rows(self, prompts: list[Prompt], statuses: list[str], workflow_id: str | None) -> list[dict[str, Json]]:
        notes = await self._prompts.notes(prompts)
        rows = [job_row(prompt, note) for prompt, note in zip(prompts, notes, strict=True)]
        return [
            row
            for row in rows
            if (not statuses or row["status"] in statuses)
            and (workflow_id is None or row.get("workflow_id") == workflow_id)
        ]

    async def get_job(self, request: Request) -> Response:
        prompt = await self._prompts.get(request.path_params["job_id"], who_of(request))
        if prompt is None or (prompt.record.state.ended and not await self._prompts.in_history(prompt)):
            return json_reply({"error": "Job not found"}, 404)
        note = (await self._prompts.notes([prompt]))[0]
        return json_reply(job_detail(prompt, note))

    async def cancel_job(self, request: Request) -> Response:
        job_ids = [request.path_params["job_id"]]
        done = await self._prompts.cancel(job_ids, who_of(request), states=_OPEN)
        return json_reply({"cancelled": bool(done)})

    async def cancel_jobs(self, request: Request) -> Response:
        body = await self._object(request)
        listed = body.get("job_ids")
        if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
            invalid = [one for one in listed if not isinstance(one, str)] if isinstance(listed, list) else []
            return json_reply({"error": "job_ids must be a list of ids", "invalid_ids": invalid}, 400)
        done = await self._prompts.cancel(_ids(listed), who_of(request), states=_OPEN)
        return json_reply({"cancelled": bool(done)})

    async def _object(self, request: Request) -> dict[str, Json]:
        body = await json_of(request, self._limits.body_bytes)
        return body if isinstance(body, dict) else {}


def _ids(value: Json) -> list[str]:
    return [str(one) for one in value[:_MOST_IDS]] if isinstance(value, list) else []


def _number(request: Request, name: str) -> int | None:
    text = request.query_params.get(name)
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def _bad(error: str) -> Response:
    return json_reply({"error": error}, 400)


def _by_creation(row: dict[str, Json]) -> Json:
    return row["create_time"]


def _by_duration(row: dict[str, Json]) -> Json:
    return row.get("execution_end_time", 0) - row.get("execution_start_time", 0)
