"""FastAPI with pydantic models, as its documentation writes it: typed parameters, the reply's model as return type.

To be run by uvicorn with uvloop and httptools. It has the same limits of fields, but neither a key nor metrics nor
request ids.
"""

from __future__ import annotations

import datetime
from enum import StrEnum
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field

from bench.peers.sample import JOB

Text64 = Annotated[str, Field(max_length=64)]


class JobState(StrEnum):
    queued = "queued"
    running = "running"
    completed = "completed"
    failed = "failed"


class Resources(BaseModel):
    gpus: Annotated[int, Field(ge=0, le=64)] = 0
    memory_bytes: Annotated[int, Field(ge=0)] = 0
    cpu: Annotated[float, Field(ge=0)] = 0
    gpu_model: Text64 = ""
    features: Annotated[list[str], Field(max_length=32)] = []


class Job(BaseModel):
    job_id: Annotated[str, Field(min_length=1, max_length=64)]
    tenant: Text64 = ""
    queue: Text64 = ""
    kind: Text64 = ""
    state: JobState = JobState.queued
    priority: Annotated[int, Field(ge=0, le=10)] = 0
    attempt: Annotated[int, Field(ge=0)] = 0
    version: Annotated[int, Field(ge=0)] = 0
    create_time: datetime.datetime | None = None
    update_time: datetime.datetime | None = None
    resources: Resources | None = None
    labels: Annotated[dict[str, str], Field(max_length=32)] = {}
    payload: dict[str, Any] | None = None
    worker_id: Text64 = ""
    progress: Annotated[float, Field(ge=0, le=1)] = 0
    cancel_requested: bool = False
    artifacts: Annotated[list[str], Field(max_length=64)] = []


class CreateJobRequest(BaseModel):
    parent: Annotated[str, Field(max_length=128)] = ""
    job: Job
    request_id: Annotated[str, Field(max_length=128)] = ""


_sample = Job.model_validate(JOB)
JOBS = {_sample.job_id: _sample}
app = FastAPI()


@app.get("/v1/jobs/{job_id}")
async def get_job(job_id: str) -> Job:
    if job_id not in JOBS:
        raise HTTPException(404, f"there is no job {job_id}")
    return JOBS[job_id]


@app.post("/v1/jobs")
async def create_job(request: CreateJobRequest) -> Job:
    return request.job
