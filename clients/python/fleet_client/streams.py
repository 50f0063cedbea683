"""Streams that cannot be taken up again where they broke: a log as it grows."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator

import httpx

from fleet_client import calls
from fleet_client.calls import Json
from fleet_client.errors import check, unreachable
from fleet_client.events import EventReader

_HEADERS = {"Accept": "text/event-stream"}
"""As events come keep-alives: a server that is gone is noticed."""


def entries(session: httpx.Client, path: str, params: Json) -> Generator[Json, None, None]:
    """The objects of a stream to its end. Raises ApiError, and ConnectionFailedError where it breaks."""
    timeout = calls.timeout(calls.SILENCE_SECONDS)
    try:
        with session.stream("GET", path, params=params, headers=_HEADERS, timeout=timeout) as response:
            if not response.is_success:
                response.read()
                check(response)
            reader = EventReader()
            for chunk in response.iter_bytes():
                yield from reader.feed(chunk)
    except httpx.TransportError as error:
        raise unreachable(str(session.base_url).rstrip("/"), error) from error


async def async_entries(session: httpx.AsyncClient, path: str, params: Json) -> AsyncGenerator[Json, None]:
    """The objects of a stream to its end. Raises ApiError, and ConnectionFailedError where it breaks."""
    timeout = calls.timeout(calls.SILENCE_SECONDS)
    try:
        async with session.stream("GET", path, params=params, headers=_HEADERS, timeout=timeout) as response:
            if not response.is_success:
                await response.aread()
                check(response)
            reader = EventReader()
            async for chunk in response.aiter_bytes():
                for entry in reader.feed(chunk):
                    yield entry
    except httpx.TransportError as error:
        raise unreachable(str(session.base_url).rstrip("/"), error) from error
