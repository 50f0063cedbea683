"""Callbacks as the settings want them: which receivers, which secrets, how often; and the sender made of all that."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import random
from collections.abc import Callable, Iterator

import psutil
import structlog
from prometheus_client import CollectorRegistry, Counter

from fleet_server import __version__
from fleet_server.domain.webhook import RetryPlan
from fleet_server.domain.webhook_signature import SecretBook
from fleet_server.protojson import JsonCodec
from fleet_server.services.callbacks import Address, CallbackRules, allow_rules
from fleet_server.services.views import JobViews
from fleet_server.services.webhook_hosts import HostLimits
from fleet_server.services.webhook_names import SystemNames
from fleet_server.services.webhook_post import Poster, PostSettings
from fleet_server.services.webhook_secrets import load_secrets
from fleet_server.services.webhook_sender import SenderSettings, WebhookSender
from fleet_server.settings import Settings
from fleet_server.store import Store

_log = structlog.get_logger("fleet.webhooks")


class Callbacks:
    """What of callbacks depends on settings. Raises SecretError where a secret cannot be used."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        ports = (settings.port, settings.grpc_port, settings.comfy_port, settings.s3_port)
        self._own_ports = {port for port in ports if port}
        self.rules = self._rules()
        self._secrets = self._load()

    def own_port(self, port: int | None) -> None:
        """A port on which this server listens: no receiver."""
        if port:
            self._own_ports.add(port)

    def sender(
        self, store: Store, views: JobViews, codec: JsonCodec, clock: Callable[[], int], registry: CollectorRegistry
    ) -> WebhookSender:
        """The sender of this replica; its tries are counted in `registry`."""
        settings = self._settings
        words = "Tries to deliver callbacks, by how the callback stands afterwards"
        tries = Counter("fleet_webhook_tries_total", words, ["state"], registry=registry)
        post = PostSettings(
            seconds=settings.webhook_timeout_seconds, connect_seconds=settings.webhook_timeout_seconds / 3
        )
        return WebhookSender(
            store,
            functools.partial(views.message, payload=False),
            codec,
            Poster(self.rules, SystemNames(), clock=clock, settings=post),
            self._secrets,
            clock=clock,
            draw=random.random,
            tell=lambda state: tries.labels(state.value).inc(),
            settings=SenderSettings(
                plan=RetryPlan(
                    tuple(int(seconds * 1000) for seconds in settings.webhook_schedule_seconds),
                    longest_ms=int(settings.webhook_retry_after_seconds * 1000),
                ),
                limits=HostLimits(
                    total=settings.webhook_concurrency,
                    per_host=settings.webhook_host_concurrency,
                    defer_seconds=settings.webhook_defer_seconds,
                ),
                seconds=settings.webhook_timeout_seconds,
                lease_seconds=settings.webhook_lease_seconds,
                poll_seconds=settings.webhook_poll_seconds,
                user_agent=f"fleet-commander/{__version__}",
            ),
        )

    def _rules(self) -> CallbackRules:
        """FLEET_CALLBACK_ALLOW is the whole list; without it loopback too is welcome where nobody else reaches us."""
        settings = self._settings
        words = settings.callback_allow
        if words is None:
            words = ("public", "loopback") if settings.loopback and not settings.keyed else ("public",)
        return allow_rules(words, own_ports=self._own_ports, own_addresses=frozenset(_own_addresses()))

    def _load(self) -> SecretBook:
        settings = self._settings
        given = None if settings.webhook_secret is None else settings.webhook_secret.get_secret_value()
        loaded = load_secrets(settings.data_dir, given, settings.webhook_secrets_file)
        if loaded.made is not None:
            _log.info("callbacks are signed with a new secret: read it in the file", file=str(loaded.made))
            if settings.mode == "production":
                _log.warning("each replica must sign alike: give all of them the same FLEET_WEBHOOK_SECRET")
        return loaded.book


def _own_addresses() -> Iterator[Address]:
    for addresses in psutil.net_if_addrs().values():
        for entry in addresses:
            with contextlib.suppress(ValueError):
                yield ipaddress.ip_address(entry.address.partition("%")[0])
