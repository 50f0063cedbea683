"""Docker's own library, connected."""

from __future__ import annotations

import socket

import docker
import requests

_UNIX = "unix://"


def connected_client(url: str, *, timeout_seconds: float = 60, pool_size: int = 10) -> docker.DockerClient:
    """A client of the engine at `url`, its API version agreed on.

    Raises docker.errors.DockerException and requests.exceptions.RequestException where no engine answers.
    """
    if url.startswith(_UNIX):
        # Where nobody listens, the library would leave the socket of its attempt open until it is collected.
        _knock(url.removeprefix(_UNIX), timeout_seconds)
    return docker.DockerClient(
        base_url=url,
        version="auto",
        timeout=timeout_seconds,  # type: ignore[arg-type]  # the stubs want whole seconds, requests does not
        max_pool_size=pool_size,
    )


def _knock(path: str, timeout_seconds: float) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as attempt:
        attempt.settimeout(timeout_seconds)
        try:
            attempt.connect(path)
        except OSError as error:
            raise requests.exceptions.ConnectionError(str(error)) from error
