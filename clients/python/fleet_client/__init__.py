"""The Python client of Fleet Commander.

from fleet_client import FleetCommander

fleet = FleetCommander("http://localhost:8765")
fleet.generate_image("a cyberpunk city at night").save("city.png")
"""

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
