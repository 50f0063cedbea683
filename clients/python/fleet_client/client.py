"""The blocking client."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from types import TracebackType
from typing import Any, Self

import httpx
from PIL import Image

from fleet_client import calls
from fleet_client.calls import Json, segment
from fleet_client.containers import ContainerCalls
from fleet_client.errors import ApiError, ConnectionFailedError, FleetError, JobFailedError, check, unreachable
from fleet_client.events import Event, EventReader, Resume, ended_early, lost_events
from fleet_client.machines import MachineCalls
from fleet_client.outputs import OutputCalls
from fleet_client.swarm import SwarmCalls


class FleetCommander(ContainerCalls, MachineCalls, OutputCalls, SwarmCalls):
    """One fleet, by the address of its server: `FleetCommander()`, `FleetCommander("http://gpu.lan:8765")`.

    Without arguments the address is FLEET_URL or this machine, the key FLEET_API_KEY; proxies of the environment are
    not used. Raises SettingError for a bad address or key; every call raises ApiError where the server refuses,
    ConnectionFailedError where it cannot be reached. A stream of events that breaks is taken up again where it broke,
    for `patience_seconds`. Safe to share between threads.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_seconds: float = 35,
        patience_seconds: float = 60,
    ) -> None:
        self.base_url = calls.base_url(base_url)
        self.patience_seconds = patience_seconds
        self.session = httpx.Client(
            base_url=self.base_url,
            headers=calls.headers(api_key),
            timeout=calls.timeout(timeout_seconds),
            trust_env=False,
            verify=calls.trust(self.base_url),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self.session.close()

    def call(self, method: str, path: str, *, json: Any = None, **options: Any) -> httpx.Response:
        """Any call of the API; the response is a success. Options are those of httpx."""
        if json is not None:
            options["json"] = json
        try:
            return check(self.session.request(method, path, **options))
        except httpx.TransportError as error:
            raise unreachable(self.base_url, error) from error

    def connect(self) -> Json:
        """Test the connection, and the key where one is set."""
        return self._json("GET", "/api/fleet/connect")

    def status(self) -> Json:
        """How the fleet is."""
        return self._json("GET", "/api/fleet/status")

    def capabilities(self) -> Json:
        """What the fleet can do."""
        return self._json("GET", "/api/fleet/capabilities")

    def generate_image(self, prompt: str, **kwargs: Any) -> Image.Image:
        """Generate a picture and wait for it. Keywords are image fields: negative_prompt, width, height, steps,
        guidance_scale, seed, model, loras, … What the server said of it is in `info`: seed, filename, job_id."""
        body = calls.image_fields(prompt, kwargs)
        timeout = calls.timeout(calls.GENERATE_SECONDS)
        response = self.call("POST", "/api/fleet/generate", json=body, timeout=timeout)
        return calls.to_image(response.content, response.headers)

    def queue_job(self, prompt: str, priority: str = "normal", callback_url: str | None = None, **kwargs: Any) -> Json:
        """Queue a picture; the receipt has its `job_id`. Keywords are image fields, or fields of the job such as
        max_retries, after and request_id: with the same request_id, the same job. With `n` it is a group of n jobs."""
        return self.submit_job(calls.job_body(prompt, priority, callback_url, kwargs))

    def submit_job(self, job: Mapping[str, Any]) -> Json:
        """Queue a job of any type, as POST /api/queue/jobs takes it; the receipt."""
        return self._json("POST", "/api/queue/jobs", json=calls.exact(job))

    def submit_batch(self, jobs: Sequence[Mapping[str, Any]], request_id: str | None = None) -> list[Json]:
        """Queue up to 1,000 jobs, all or none; the receipts in order."""
        reply = self._json("POST", "/api/queue/jobs/batch", json=calls.batch_body(jobs, request_id))
        receipts: list[Json] = reply["jobs"]
        return receipts

    def get_job(self, job_id: str) -> Json:
        """A job as it is now."""
        return self._json("GET", f"/api/queue/jobs/{segment(job_id)}")

    def list_jobs(self, **filters: Any) -> Json:
        """A page of jobs, newest first: `jobs` and `next_page_token`."""
        return self._json("GET", "/api/queue/jobs", params=calls.given(filters))

    def cancel_job(self, job_id: str) -> Json:
        """Cancel a job, queued or running; the job as it was left."""
        return self._json("DELETE", f"/api/queue/jobs/{segment(job_id)}")

    def retry_job(self, job_id: str, request_id: str | None = None) -> Json:
        """Run a failed job again, under its id; the job."""
        params = calls.given({"request_id": request_id})
        return self._json("POST", f"/api/queue/jobs/{segment(job_id)}/retry", params=params)

    def list_deliveries(self, job_id: str, **filters: Any) -> Json:
        """A page of a job's callbacks, newest first: `deliveries` and `next_page_token`."""
        path = f"/api/queue/jobs/{segment(job_id)}/deliveries"
        return self._json("GET", path, params=calls.given(filters))

    def redeliver(self, job_id: str, delivery_id: str, request_id: str | None = None) -> Json:
        """Send a callback again, at once; the delivery, pending."""
        path = f"/api/queue/jobs/{segment(job_id)}/deliveries/{segment(delivery_id)}/redeliver"
        return self._json("POST", path, params=calls.given({"request_id": request_id}))

    def explain_job(self, job_id: str) -> Json:
        """Why a job waits, and what each node says to it."""
        return self._json("GET", f"/api/queue/jobs/{segment(job_id)}/explain")

    def dry_run_job(self, job: Mapping[str, Any]) -> Json:
        """Where a job would run, and when; nothing is stored."""
        return self._json("POST", "/api/queue/dry-run", json=calls.exact(job))

    def list_dead(self, **filters: Any) -> Json:
        """A page of jobs that failed for good, newest end first: `jobs` and `next_page_token`. Filters are job_type,
        target_cluster, target_model and reason."""
        return self._json("GET", "/api/queue/dead", params=calls.given(filters))

    def redrive_jobs(self, job_ids: Sequence[str] = (), request_id: str | None = None, **filters: Any) -> Json:
        """Run failed jobs again, by their ids or by the filters of `list_dead`, at most `limit`; the reply has
        `redriven`, `remaining` and `failures`."""
        body = {"job_ids": list(job_ids) or None, "request_id": request_id, **filters}
        return self._json("POST", "/api/queue/dead/redrive", json=calls.given(body))

    def pause_queue(self, **what: Any) -> Json:
        """Hold queued jobs back: all, or those of a target_cluster, job_type or priority; all `pauses` in force."""
        return self._json("POST", "/api/queue/pause", json=calls.given(what))

    def resume_queue(self, **what: Any) -> Json:
        """End the pause that was made with just these; all `pauses` in force."""
        return self._json("POST", "/api/queue/resume", json=calls.given(what))

    def queue_stats(self) -> Json:
        """Depths, rates and waits."""
        return self._json("GET", "/api/queue/stats")

    def watch_job(
        self, job_id: str, *, previews: bool = False, timeout_seconds: float | None = None
    ) -> Generator[Event, None, None]:
        """The job as it is, then what happens to it, up to its job_complete; after a break the job as it is again.
        Raises WaitTimeoutError after `timeout_seconds`."""
        resume = Resume(self.patience_seconds, timeout_seconds)
        path = f"/api/queue/jobs/{segment(job_id)}/events"
        with closing(self._events(path, {"previews": previews}, resume)) as events:
            for event in events:
                yield event
                if event["type"] == "job_complete":
                    return

    def watch_events(self, **filters: Any) -> Generator[Event, None, None]:
        """What happens in the fleet, without end; filters as GET /api/events takes them. A `gap` says that events
        were lost to you: read the lists again."""
        params = calls.given(filters)
        yield from self._events("/api/events", params, Resume(self.patience_seconds, live=calls.is_live(params)))

    def wait(self, job_id: str, timeout_seconds: float | None = None) -> Json:
        """The job once it has succeeded. Raises JobFailedError where it failed or was cancelled, WaitTimeoutError
        where it has not ended in time."""
        for event in self.watch_job(job_id, timeout_seconds=timeout_seconds):
            if event["type"] == "job_complete":
                job: Json = event["data"]
                if job["status"] != "succeeded":
                    raise JobFailedError(job)
                return job
        raise ended_early(self.base_url)

    def list_nodes(self, **filters: Any) -> Json:
        """All nodes: `nodes`."""
        return self._json("GET", "/api/nodes", params=calls.given(filters))

    def get_node(self, node_id: str) -> Json:
        """One node."""
        return self._json("GET", f"/api/nodes/{segment(node_id)}")

    def list_heartbeats(self) -> Json:
        """What each node measured last: `heartbeats`."""
        return self._json("GET", "/api/nodes/heartbeats")

    def list_models(self) -> Json:
        """Checkpoints that the fleet has: `models`."""
        return self._json("GET", "/api/vision/models/available")

    def list_loaded_models(self) -> Json:
        """Which node has which model in memory: `models`."""
        return self._json("GET", "/api/vision/models/loaded")

    def list_loras(self) -> Json:
        """LoRAs that the fleet has: `loras`."""
        return self._json("GET", "/api/vision/loras")

    def load_model(self, node_id: str, model: str, pin: bool = False, request_id: str | None = None) -> Json:
        """Have a node load a model into memory, from S3 if need be; with `pin` it stays there. Again with another `pin`
        changes that. The model as it is loaded."""
        body = calls.given({"node_id": node_id, "model": model, "pin": pin, "request_id": request_id})
        return self._json("POST", "/api/vision/models/load", json=body, timeout=calls.timeout(calls.MODEL_SECONDS))

    def unload_model(self, node_id: str, model: str, request_id: str | None = None) -> Json:
        """Have a node free a model, pinned or not; the model as it was."""
        body = calls.given({"node_id": node_id, "model": model, "request_id": request_id})
        return self._json("POST", "/api/vision/models/unload", json=body, timeout=calls.timeout(calls.MODEL_SECONDS))

    def download_model(self, name: str, node_ids: Sequence[str], request_id: str | None = None) -> Json:
        """Have nodes bring a model or LoRA from S3 to their disks; `downloads` says what became of it on each."""
        body = calls.given({"name": name, "node_ids": list(node_ids), "request_id": request_id})
        return self._json("POST", "/api/vision/models/download", json=body, timeout=calls.timeout(calls.MODEL_SECONDS))

    def get_gallery(self, limit: int = 50, **filters: Any) -> Json:
        """A page of pictures, newest first: `images` and `next_page_token`."""
        return self._json("GET", "/api/vision/gallery", params=calls.given({"limit": limit, **filters}))

    def get_output(self, filename: str, width: int | None = None) -> bytes:
        """The bytes of an output; with `width` a small WebP of a picture."""
        path = f"/api/vision/outputs/{segment(filename)}"
        return self.call("GET", path, params=calls.given({"width": width})).content

    def get_output_metadata(self, filename: str) -> Json:
        """How an output was made: prompt, seed, model and all."""
        return self._json("GET", f"/api/vision/outputs/{segment(filename)}/metadata")

    def delete_output(self, filename: str) -> Json:
        """Remove an output everywhere."""
        return self._json("DELETE", f"/api/vision/outputs/{segment(filename)}")

    def _json(self, method: str, path: str, **options: Any) -> Json:
        reply: Json = self.call(method, path, **options).json()
        return reply

    def _events(self, path: str, params: Json, resume: Resume) -> Generator[Event, None, None]:
        """Events of a stream; one that breaks, or ends, is taken up again."""
        while True:
            error: FleetError
            try:
                with self.session.stream(
                    "GET", path, params=params, headers=resume.headers(), timeout=calls.timeout(calls.SILENCE_SECONDS)
                ) as response:
                    if not response.is_success:
                        response.read()
                        check(response)
                    resume.opened()
                    reader = EventReader()
                    for chunk in response.iter_bytes():
                        for event in reader.feed(chunk):
                            resume.saw(event)
                            yield event
                error = ended_early(self.base_url)
            except httpx.TransportError as problem:
                error = unreachable(self.base_url, problem)
            except (ApiError, ConnectionFailedError) as problem:
                error = problem
            time.sleep(resume.pause(error))
            if resume.lost_events:
                yield lost_events()
