"""The Python client of Fleet Commander.

from fleet_client import FleetCommander

fleet = FleetCommander("http://localhost:8765")
fleet.generate_image("a cyberpunk city at night").save("city.png")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fleet_client.aio import AsyncFleetCommander
    from fleet_client.client import FleetCommander
    from fleet_client.errors import (
        ApiError,
        ConnectionFailedError,
        FleetError,
        JobFailedError,
        SettingError,
        Violation,
        WaitTimeoutError,
    )

__all__ = [
    "ApiError",
    "AsyncFleetCommander",
    "ConnectionFailedError",
    "FleetCommander",
    "FleetError",
    "JobFailedError",
    "SettingError",
    "Violation",
    "WaitTimeoutError",
]


def __getattr__(name: str) -> Any:
    """Imports what is asked for: `fleet up` needs no client, and nobody should wait for what others need."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    where = {"AsyncFleetCommander": "aio", "FleetCommander": "client"}.get(name, "errors")
    value = globals()[name] = getattr(import_module(f"{__name__}.{where}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
