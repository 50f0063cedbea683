"""Services that grow and shrink with the jobs that wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from fleet.v1 import fleet_pb2, types_pb2

from fleet_server.domain.autoscale import AutoscaleRule, Calm, decide, depth_of
from fleet_server.domain.errors import FleetError, invalid_field
from fleet_server.services.swarm import Swarm
from fleet_server.services.swarm_news import SwarmNews
from fleet_server.services.words import type_word
from fleet_server.store import JobStore, SwarmStore

_log = structlog.get_logger("fleet.autoscale")
REPLICATED = "replicated"


@dataclass(frozen=True, slots=True)
class AutoscaleSettings:
    """Between looks; how long fewer replicas must have been enough before there are fewer."""

    look_seconds: float = 5.0
    calm_seconds: float = 60.0


Names = Callable[[str, str | None], str]
"""What a model is really called, of the name that callers use and the job type."""


class Autoscaler:
    """The rules, and the loop that follows them. `run` on every replica: the store lets one of them scale at a time.

    When another takes over it knows nothing of the time before, so a service shrinks later, never too early. Two that
    scale at once, as clocks may have it for a moment, do no harm: both set a number, from the same jobs.
    """

    def __init__(
        self,
        swarm: Swarm,
        news: SwarmNews,
        rules: SwarmStore,
        jobs: JobStore,
        *,
        replica: str,
        clock: Callable[[], float],
        real_name: Names = lambda name, _: name,
        settings: AutoscaleSettings | None = None,
    ) -> None:
        self._swarm = swarm
        self._news = news
        self._rules = rules
        self._jobs = jobs
        self._replica = replica
        self._clock = clock
        self._real_name = real_name
        self._settings = settings or AutoscaleSettings()
        self._calm: dict[str, Calm] = {}
        self._look_now = asyncio.Event()

    async def set_rule(self, request: fleet_pb2.AutoscaleServiceRequest) -> types_pb2.SwarmService:
        """Scales the service from now on as the request says; with `enabled` false it is left as it is, the rule kept.

        Raises INVALID_FIELD (bounds), SERVICE_NOT_REPLICATED, and what `Swarm.service` does.
        """
        if request.min_replicas > request.max_replicas:
            raise invalid_field(
                "min_replicas", f"must be at most max_replicas ({request.max_replicas})", request.min_replicas
            )
        service = await self._swarm.service(request.service_id)
        if service.mode != REPLICATED:
            raise FleetError(
                "SERVICE_NOT_REPLICATED",
                f"service_id: {service.name} is a {service.mode} service: its number of tasks follows from the nodes",
            )
        rule = types_pb2.Autoscale(
            enabled=request.enabled,
            min_replicas=request.min_replicas,
            max_replicas=request.max_replicas,
            jobs_per_replica=request.jobs_per_replica,
        )
        for name in ("target_cluster", "job_type", "target_model"):
            if request.HasField(name):
                setattr(rule, name, getattr(request, name))
        await self._rules.set_rule(service.service_id, rule.SerializeToString())
        service.autoscale.CopyFrom(rule)
        await self._news.tell(service)
        self._look_now.set()
        return service

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self._look()
            except FleetError as error:
                _log.warning("services are not scaled now", reason=error.reason, detail=error.detail)
            try:
                async with asyncio.timeout(self._settings.look_seconds):
                    await self._look_now.wait()
            except TimeoutError:
                pass
            self._look_now.clear()

    async def _look(self) -> None:
        # A replica that dies is followed after three looks.
        if not await self._rules.may_scale(self._replica, int(3000 * self._settings.look_seconds)):
            self._calm.clear()
            return
        rules = {
            service_id: types_pb2.Autoscale.FromString(rule) for service_id, rule in (await self._rules.rules()).items()
        }
        self._calm = {service_id: calm for service_id, calm in self._calm.items() if service_id in rules}
        if not any(rule.enabled for rule in rules.values()) or not self._swarm.managers:
            return
        services = {service.service_id: service for service in await self._swarm.services()}
        lanes = [(view.lane, view.waiting, view.running) for view in await self._jobs.lanes(idle=True)]
        for service_id, message in rules.items():
            service = services.get(service_id)
            if service is None:
                await self._rules.drop_rule(service_id)
                continue
            rule = self._rule(message)
            depth = depth_of(rule, lanes)
            wanted, self._calm[service_id] = decide(
                rule,
                service.replicas,
                depth,
                self._calm.get(service_id, Calm()),
                now=self._clock(),
                calm_seconds=self._settings.calm_seconds,
            )
            if wanted != service.replicas:
                await self._scale(service, wanted, depth.waiting)

    async def _scale(self, service: types_pb2.SwarmService, wanted: int, waiting: int) -> None:
        _log.info("service scaled", service=service.name, replicas=wanted, before=service.replicas, waiting=waiting)
        try:
            await self._swarm.set_replicas(service.service_id, wanted)
        except FleetError as error:
            _log.warning("service not scaled", service=service.name, reason=error.reason, detail=error.detail)

    def _rule(self, message: types_pb2.Autoscale) -> AutoscaleRule:
        job_type = type_word(message.job_type) if message.HasField("job_type") else None
        return AutoscaleRule(
            max_replicas=message.max_replicas,
            min_replicas=message.min_replicas,
            jobs_per_replica=message.jobs_per_replica,
            enabled=message.enabled,
            cluster=message.target_cluster if message.HasField("target_cluster") else None,
            job_type=job_type,
            model=self._real_name(message.target_model, job_type) if message.HasField("target_model") else None,
        )
