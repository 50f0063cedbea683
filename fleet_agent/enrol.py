"""The agent's identity over its life: taken up or joined for at the start, renewed long before it ends."""

from __future__ import annotations

import asyncio
import datetime as dt
import random

import grpc
import structlog

from fleet_agent.identity import Door, Identity, IdentityError, Token
from fleet_agent.joining import join, renew
from fleet_agent.settings import AgentSettings

_log = structlog.get_logger("fleet.agent.enrol")
_RENEW_AT = 2 / 3
"""Share of a certificate's life after which another is asked for."""
_LOOK_SECONDS, _AGAIN_SECONDS = 3_600.0, 300.0


async def enrolled(settings: AgentSettings) -> tuple[AgentSettings, Door]:
    """The door to the server, and the settings with the name under which the agent joined.

    An identity that is there is taken, and a token then left unused. Raises IdentityError.
    """
    folder = settings.data_dir
    identity = await asyncio.to_thread(Identity.load, folder)
    if identity is None and settings.join is None:
        authority = None
        if settings.ca_file is not None:
            try:
                authority = await asyncio.to_thread(settings.ca_file.read_bytes)
            except OSError as error:
                raise IdentityError(f"{error.filename}: {error.strerror}: correct FLEET_AGENT_CA_FILE") from error
        return settings, Door(settings.server, authority=authority)
    if identity is None:
        assert settings.join is not None
        token = Token.read(settings.join.get_secret_value())
        servers = (settings.server,) if "server" in settings.model_fields_set else ()
        identity = await join(token, settings.node_id, servers)
        try:
            await asyncio.to_thread(identity.save, folder)
        except OSError as error:
            raise IdentityError(f"{folder}: {error.strerror}: the identity cannot be kept there") from error
    else:
        if settings.join is not None:
            _log.info("this machine has joined before: the token is not needed", node_id=identity.node_id)
        if "node_id" in settings.model_fields_set and settings.node_id != identity.node_id:
            raise IdentityError(
                f"{folder} holds the identity of the node {identity.node_id}, not of {settings.node_id}: give another "
                "--data-dir, or leave --node-id out"
            )
    if identity.span[1] <= dt.datetime.now(dt.UTC):
        raise IdentityError(
            f"the certificate of {identity.node_id} has expired: delete the node (fleet nodes rm {identity.node_id}), "
            f"remove {folder}/identity.json, and join again with a token"
        )
    changes = {"node_id": identity.node_id, "server": identity.agents_server}
    return settings.model_copy(update=changes), Door(identity.server, identity=identity)


async def keep_fresh(settings: AgentSettings, door: Door) -> None:
    """Renews the door's certificate in time, until cancelled; returns where there is none."""
    while door.identity is not None:
        begun, ends = door.identity.span
        left = (begun + (ends - begun) * _RENEW_AT - dt.datetime.now(dt.UTC)).total_seconds()
        if left > 0:
            # Looked at again and again: a machine that sleeps meanwhile has slept through a long timer.
            await asyncio.sleep(min(left, _LOOK_SECONDS))
            continue
        try:
            fresh = await renew(door)
            await asyncio.to_thread(fresh.save, settings.data_dir)
        except (grpc.aio.AioRpcError, TimeoutError, OSError) as error:
            _log.warning("the certificate could not be renewed yet", ends=ends.isoformat(), error=str(error))
            await asyncio.sleep(_AGAIN_SECONDS * random.uniform(0.5, 1))
            continue
        door.identity = fresh
        _log.info("the certificate is renewed", ends=fresh.span[1].isoformat())
