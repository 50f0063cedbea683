"""The asyncio client: the same methods as the blocking one, awaited."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any, Self

import httpx
from PIL import Image

from fleet_client import calls
from fleet_client.calls import Json, segment
from fleet_client.errors import ConnectionFailedError, FleetError, JobFailedError, check
from fleet_client.events import Event, EventReader


class AsyncFleetCommander:
    """One fleet, by the address of its server; use it by `async with`.

    Without arguments the address is FLEET_URL or this machine, the key FLEET_API_KEY. Raises ApiError where the server
    refuses, ConnectionFailedError where it cannot be reached. For one event loop.
    """

    def __init__(self, base_url: str | None = None, *, api_key: str | None = None, timeout_seconds: float = 35) -> None:
        self.base_url = calls.base_url(base_url)
        self.session = httpx.AsyncClient(
            base_url=self.base_url, headers=calls.headers(api_key), timeout=timeout_seconds, trust_env=False
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        await self.session.aclose()

    async def call(self, method: str, path: str, *, json: Any = None, **options: Any) -> httpx.Response:
        """Any call of the API; the response is a success."""
        if json is not None:
            options["json"] = json
        try:
            return check(await self.session.request(method, path, **options))
        except httpx.TransportError as error:
            raise ConnectionFailedError(f"{self.base_url} cannot be reached: {error}") from error

    async def connect(self) -> Json:
        """Test the connection."""
        return await self._json("GET", "/api/fleet/connect")

    async def status(self) -> Json:
        """How the fleet is."""
        return await self._json("GET", "/api/fleet/status")

    async def capabilities(self) -> Json:
        """What the fleet can do."""
        return await self._json("GET", "/api/fleet/capabilities")

    async def generate_image(self, prompt: str, **kwargs: Any) -> Image.Image:
        """Generate a picture and wait for it. Keywords are image fields: negative_prompt, width, height, steps,
        guidance_scale, seed, model, loras, … What the server said of it is in `info`: seed, filename, job_id."""
        response = await self.call(
            "POST",
            "/api/fleet/generate",
            json=calls.image_fields(prompt, kwargs),
            timeout=calls.GENERATE_SECONDS,
        )
        return calls.to_image(response.content, response.headers)

    async def queue_job(
        self, prompt: str, priority: str = "normal", callback_url: str | None = None, **kwargs: Any
    ) -> Json:
        """Queue a picture; the receipt has its `job_id`. Keywords are image fields, or fields of the job."""
        return await self.submit_job(calls.job_body(prompt, priority, callback_url, kwargs))

    async def submit_job(self, job: Mapping[str, Any]) -> Json:
        """Queue a job of any type, as POST /api/queue/jobs takes it; the receipt."""
        return await self._json("POST", "/api/queue/jobs", json=dict(job))

    async def submit_batch(self, jobs: list[Mapping[str, Any]], request_id: str | None = None) -> list[Json]:
        """Queue up to 1,000 jobs, all or none; the receipts in order."""
        body = calls.given({"jobs": [dict(job) for job in jobs], "request_id": request_id})
        reply = await self._json("POST", "/api/queue/jobs/batch", json=body)
        receipts: list[Json] = reply["jobs"]
        return receipts

    async def get_job(self, job_id: str) -> Json:
        """A job as it is now."""
        return await self._json("GET", f"/api/queue/jobs/{segment(job_id)}")

    async def list_jobs(self, **filters: Any) -> Json:
        """A page of jobs, newest first: `jobs` and `next_page_token`."""
        return await self._json("GET", "/api/queue/jobs", params=calls.given(filters))

    async def cancel_job(self, job_id: str) -> Json:
        """Cancel a job, queued or running."""
        return await self._json("DELETE", f"/api/queue/jobs/{segment(job_id)}")

    async def retry_job(self, job_id: str) -> Json:
        """Run a failed job again."""
        return await self._json("POST", f"/api/queue/jobs/{segment(job_id)}/retry")

    async def queue_stats(self) -> Json:
        """Depths, rates and waits."""
        return await self._json("GET", "/api/queue/stats")

    async def watch_job(self, job_id: str, *, previews: bool = False) -> AsyncIterator[Event]:
        """The job as it is, then what happens to it, up to its job_complete."""
        async for event in self._events(f"/api/queue/jobs/{segment(job_id)}/events", {"previews": previews}):
            yield event

    async def watch_events(self, **filters: Any) -> AsyncIterator[Event]:
        """What happens in the fleet; filters as GET /api/events takes them."""
        async for event in self._events("/api/events", calls.given(filters)):
            yield event

    async def wait(self, job_id: str) -> Json:
        """The job once it has ended well. Raises JobFailedError where it failed or was cancelled."""
        async for event in self.watch_job(job_id):
            if event["type"] == "job_complete":
                job: Json = event["data"]
                if job["status"] != "succeeded":
                    raise JobFailedError(job)
                return job
        raise FleetError(f"the server stopped telling about job {job_id}")

    async def list_nodes(self) -> Json:
        """All nodes."""
        return await self._json("GET", "/api/nodes")

    async def get_node(self, node_id: str) -> Json:
        """One node."""
        return await self._json("GET", f"/api/nodes/{segment(node_id)}")

    async def list_models(self) -> Json:
        """Checkpoints that the fleet has."""
        return await self._json("GET", "/api/vision/models/available")

    async def list_loras(self) -> Json:
        """LoRAs that the fleet has."""
        return await self._json("GET", "/api/vision/loras")

    async def get_gallery(self, limit: int = 50, **filters: Any) -> Json:
        """A page of pictures, newest first: `images` and `next_page_token`."""
        return await self._json("GET", "/api/vision/gallery", params=calls.given({"limit": limit, **filters}))

    async def get_output(self, filename: str, width: int | None = None) -> bytes:
        """The bytes of an output; with `width` a small WebP of a picture."""
        path = f"/api/vision/outputs/{segment(filename)}"
        return (await self.call("GET", path, params=calls.given({"width": width}))).content

    async def delete_output(self, filename: str) -> Json:
        """Remove an output everywhere."""
        return await self._json("DELETE", f"/api/vision/outputs/{segment(filename)}")

    async def _json(self, method: str, path: str, **options: Any) -> Json:
        reply: Json = (await self.call(method, path, **options)).json()
        return reply

    async def _events(self, path: str, params: Json) -> AsyncIterator[Event]:
        reader = EventReader()
        timeout = httpx.Timeout(35, read=60)
        try:
            async with self.session.stream(
                "GET", path, params=params, headers={"Accept": "text/event-stream"}, timeout=timeout
            ) as response:
                if not response.is_success:
                    await response.aread()
                    check(response)
                async for line in response.aiter_lines():
                    for event in reader.feed(line):
                        yield event
        except httpx.TransportError as error:
            raise ConnectionFailedError(f"{self.base_url} cannot be reached: {error}") from error
