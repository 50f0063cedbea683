"""The commands that this package brings to `fleet`: `up` and `server`."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

Host = Annotated[str | None, typer.Option(help="Address to bind for HTTP.", show_default="127.0.0.1")]
Port = Annotated[int | None, typer.Option(min=0, max=65535, help="Port of REST, /ws and /docs.", show_default="8765")]
GrpcPort = Annotated[int | None, typer.Option(min=0, max=65535, help="Port of gRPC.", show_default="50051")]
ComfyPort = Annotated[str | None, typer.Option(help="Port of the ComfyUI door, or off.", show_default="8188")]
S3Port = Annotated[str | None, typer.Option(help="Port of the embedded S3, or off.", show_default="9010")]
AgentsPort = Annotated[
    int | None, typer.Option(min=0, max=65535, help="Port for agents with certificates.", show_default="50052")
]
Lan = Annotated[
    bool, typer.Option("--lan", help="Listen on all addresses; make a key, and TLS for agents, and tell them once.")
]
NoAuth = Annotated[
    bool, typer.Option("--insecure-no-auth", help="Let everybody read and submit without a key; all else needs one.")
]
DataDir = Annotated[Path | None, typer.Option(help="Folder for everything that is kept.", show_default="~/.fleet")]
RedisUrl = Annotated[
    str | None, typer.Option(help="Your Redis or Valkey, redis://HOST:PORT/DB.", show_default="embedded")
]
ReadyJson = Annotated[bool, typer.Option("--json", help="Say that it is ready as one line of JSON.")]
LogLevel = Annotated[str | None, typer.Option(help="debug, info, warning or error.", show_default="info")]


def up(
    host: Host = None,
    port: Port = None,
    grpc_port: GrpcPort = None,
    comfy_port: ComfyPort = None,
    s3_port: S3Port = None,
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
    lan: Lan = False,
    insecure_no_auth: NoAuth = False,
    agents_port: AgentsPort = None,
    agent: Annotated[bool | None, typer.Option("--agent/--no-agent", help="Run an agent of this machine too.")] = None,
    agent_slots: Annotated[int | None, typer.Option(min=1, max=64, help="Jobs that agent runs at once.")] = None,
    agent_batch: Annotated[
        int | None, typer.Option(min=1, max=64, help="Like jobs that each slot runs together, where its engine can.")
    ] = None,
    log_level: LogLevel = None,
    as_json: ReadyJson = False,
) -> None:
    """Start everything on this machine: server, store and an agent. Ctrl-C stops it.

    Each option is also an environment variable: FLEET_PORT, FLEET_DATA_DIR and so on.
    """
    _serve(
        host=host,
        port=port,
        grpc_port=grpc_port,
        comfy_port=comfy_port,
        s3_port=s3_port,
        data_dir=data_dir,
        redis_url=redis_url,
        lan=lan or None,
        insecure_no_auth=insecure_no_auth or None,
        agents_port=agents_port,
        agent=agent,
        agent_slots=agent_slots,
        agent_batch=agent_batch,
        log_level=log_level,
        ready_json=as_json or None,
    )


def server(
    redis_url: RedisUrl = None,
    host: Host = None,
    port: Port = None,
    grpc_port: GrpcPort = None,
    comfy_port: ComfyPort = None,
    data_dir: DataDir = None,
    lan: Lan = False,
    insecure_no_auth: NoAuth = False,
    agents_port: AgentsPort = None,
    log_level: LogLevel = None,
    as_json: ReadyJson = False,
) -> None:
    """Start the server alone, against your own Redis or Valkey; agents join with `fleet agent`."""
    _serve(
        host=host,
        port=port,
        grpc_port=grpc_port,
        comfy_port=comfy_port,
        data_dir=data_dir,
        redis_url=redis_url,
        s3_port="off",
        lan=lan or None,
        insecure_no_auth=insecure_no_auth or None,
        agents_port=agents_port,
        agent=False,
        log_level=log_level,
        ready_json=as_json or None,
        needs_redis=True,
    )


def _serve(*, needs_redis: bool = False, **options: Any) -> None:
    """Runs the server; the exit code is 0 after a stop, 2 for bad settings, 1 where it cannot start."""
    # We fork only to exec at once; gRPC's handlers for other forks would write a warning each time. Read at its import.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    # Nothing of what is imported is garbage: to look for some again and again is a tenth of the start.
    gc.disable()
    from pydantic import ValidationError

    from fleet_server.settings import Settings

    try:
        settings = Settings(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"])
            detail = problem["msg"].removeprefix("Value error, ")
            _say(f"{name}: {detail}" if name else detail)
        raise typer.Exit(2) from None
    if needs_redis and settings.redis_url is None:
        _say("redis_url: give your Redis or Valkey with --redis-url or FLEET_REDIS_URL, or use `fleet up`")
        raise typer.Exit(2)
    # Bad settings are told at once: the server, which takes a second to import, comes after them.
    import uvloop

    from fleet_server.logs import configure
    from fleet_server.readiness import StartError
    from fleet_server.serve import serve

    gc.freeze()
    gc.enable()
    configure(settings.log_level)
    # What is kept is its owner's alone, in a folder made by somebody else too; the agent inherits it.
    os.umask(0o077)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(settings))
    except StartError as error:
        _say(str(error))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _say(text: str) -> None:
    sys.stderr.write(f"fleet: {text}\n")
