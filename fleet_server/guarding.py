"""The guard of Host and Origin as the settings want it; every HTTP door of the server has it outermost."""

from __future__ import annotations

import contextlib
import ipaddress

from starlette.types import ASGIApp

from fleet_server.bridge.guard import HostOriginGuard
from fleet_server.settings import Settings


def guarded_by(settings: Settings, app: ASGIApp) -> HostOriginGuard:
    """The application behind its guard."""
    return HostOriginGuard(
        app,
        settings.allowed_hosts,
        settings.allowed_origins,
        bound_addresses=[settings.host] if _is_address(settings.host) else [],
        loopback_bind=settings.loopback,
    )


def _is_address(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return not ipaddress.ip_address(host).is_unspecified
    return False
