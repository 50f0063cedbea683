"""S3 as the settings want it: your server, one of ours as a child process, or none."""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import structlog

from fleet_server.embedded.s3 import EmbeddedS3
from fleet_server.http import PortTakenError, bind
from fleet_server.settings import DOCUMENTED_S3_SECRET, Settings
from fleet_server.storage.s3 import S3Store
from fleet_server.storage.s3_types import S3Config

_log = structlog.get_logger("fleet.s3")
_SECRET_FILE = "s3-secret-key"


@asynccontextmanager
async def opened_s3(settings: Settings, *, lock_fd: int) -> AsyncIterator[S3Store]:
    """The S3 of this server, its look-out running, for as long as the context lasts.

    Raises PortTakenError where a port that was asked for is taken, OSError where its folder cannot be used. A port that
    is taken at its default is no error: then there is no S3, and the status says so.
    """
    async with AsyncExitStack() as stack:
        s3 = await _made(settings, lock_fd, stack)
        await s3.open()
        stack.push_async_callback(s3.aclose)
        yield s3


async def _made(settings: Settings, lock_fd: int, stack: AsyncExitStack) -> S3Store:
    if settings.s3_endpoint is not None:
        return S3Store(_config(settings, settings.s3_endpoint, _given(settings) or DOCUMENTED_S3_SECRET))
    if settings.s3_port is None:
        return S3Store(None)
    try:
        sockets = bind(settings.host, settings.s3_port, "s3-port")
    except PortTakenError as error:
        if "s3_port" in settings.model_fields_set:
            raise
        _log.warning("going on without S3", reason=str(error))
        return S3Store(None, off_detail=f"the embedded S3 is not running: {error}", missed=True)
    secret = _secret(settings)
    server = EmbeddedS3(
        settings.data_dir / "s3",
        sockets,
        access_key=settings.s3_access_key,
        secret_key=secret,
        region=settings.s3_region,
        disk_floor_bytes=settings.disk_floor_bytes,
        lock_fds=(lock_fd,),
    )
    stack.push_async_callback(server.stop)
    await server.start()
    endpoint = f"http://{_bracketed(_near(settings.host))}:{server.port}"
    return S3Store(_config(settings, endpoint, secret, _public(settings, server.port)))


def _config(settings: Settings, endpoint: str, secret: str, public: str = "") -> S3Config:
    return S3Config(
        endpoint=endpoint,
        access_key=settings.s3_access_key,
        secret_key=secret,
        region=settings.s3_region,
        public_url=settings.s3_public_url or public,
    )


def _secret(settings: Settings) -> str:
    """Of our own server: as given; else the documented one where nobody else reaches us, else one drawn once."""
    given = _given(settings)
    if given is not None:
        return given
    if settings.loopback:
        return DOCUMENTED_S3_SECRET
    path = settings.data_dir / _SECRET_FILE
    with contextlib.suppress(FileNotFoundError):
        kept = path.read_text().strip()
        if kept:
            return kept
    drawn = secrets.token_hex(20)
    fresh = path.with_suffix(".new")
    fresh.touch(mode=0o600)
    fresh.write_text(drawn + "\n")
    fresh.replace(path)
    _log.info("the embedded S3 has a secret key of its own: read it in the file", file=str(path))
    return drawn


def _given(settings: Settings) -> str | None:
    return None if settings.s3_secret_key is None else settings.s3_secret_key.get_secret_value()


def _near(host: str) -> str:
    """How we ourselves reach a socket bound to `host`."""
    address = _address(host)
    if address is not None and address.is_unspecified:
        return "::1" if address.version == 6 else "127.0.0.1"
    return "127.0.0.1" if host == "localhost" else host.strip("[]")


def _public(settings: Settings, port: int) -> str:
    """How others reach it: as the reference writes it on loopback, else by the address they would see."""
    if settings.loopback:
        return f"http://localhost:{port}"
    address = _address(settings.host)
    host = _outward(address.version) if address is not None and address.is_unspecified else settings.host.strip("[]")
    return f"http://{_bracketed(host)}:{port}"


def _outward(version: int) -> str:
    """This machine's address on the way out, its name where it has none. Nothing is sent."""
    family, far = (socket.AF_INET6, "2001:db8::1") if version == 6 else (socket.AF_INET, "192.0.2.1")
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((far, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
