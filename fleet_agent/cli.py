"""The commands that this package brings to `fleet`."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Annotated

import typer


def agent(
    server: Annotated[str | None, typer.Option(help="Address of the server's gRPC port.")] = None,
    join: Annotated[
        str | None, typer.Option(help="Join token (`fleet nodes token`): this machine becomes a node, once.")
    ] = None,
    join_only: Annotated[
        bool, typer.Option("--join-only", help="Join, keep the identity, and end: the agent is started later.")
    ] = False,
    node_id: Annotated[str | None, typer.Option(help="Name of this node; the host's name when left out.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder for the spool and the models.")] = None,
    models_dir: Annotated[Path | None, typer.Option(help="Folder with checkpoints/ and loras/.")] = None,
    slots: Annotated[int | None, typer.Option(min=1, max=64, help="Jobs to run at once.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, max=64, help="Like jobs that each slot runs together, where its engine can.")
    ] = None,
    clusters: Annotated[str | None, typer.Option(help="Clusters to serve, parted by commas.")] = None,
    labels: Annotated[str | None, typer.Option(help="Labels, name=value parted by commas.")] = None,
    engines: Annotated[
        str | None, typer.Option(help="Engines to run; left out: all that have what they need, but not diffusers.")
    ] = None,
    ready_json: Annotated[
        bool | None, typer.Option("--json", help="Say as one line of JSON that the server has welcomed it.")
    ] = None,
) -> None:
    """Run an agent on this machine: it dials the server and works through its slots.

    Each option is also an environment variable, FLEET_AGENT_SERVER and so on; the key, where there is one,
    is FLEET_API_KEY.
    """
    chosen = locals()
    # Nothing of what is imported is garbage: to look for some again and again is a tenth of the start.
    gc.disable()
    from pydantic import ValidationError

    from fleet_agent.agent import enrol_only, main
    from fleet_agent.settings import AgentSettings

    gc.freeze()
    gc.enable()
    given = {name: value for name, value in chosen.items() if name in AgentSettings.model_fields and value is not None}
    try:
        settings = AgentSettings(**given)
    except ValidationError as error:
        sys.stderr.write(f"{error}\n")
        raise typer.Exit(2) from None
    raise typer.Exit(enrol_only(settings) if join_only else main(settings))


def sketch_model(
    out: Annotated[Path, typer.Option(help="Model folder; checkpoints/ or loras/ is made below it.")],
    style: Annotated[str | None, typer.Option(help="Style of the file; an unknown one lists those there are.")] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Make a LoRA instead of a checkpoint.")] = False,
    name: Annotated[str | None, typer.Option(help="File name; from the style when left out.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed gives other brushes.")] = 0,
    size: Annotated[str | None, typer.Option(help="Pad the file to this size, for instance 64MB.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make a palette-and-brush file for the sketch engine; it is no diffusion model."""
    from fleet_agent.engines import sketch_model as maker

    words = ["--out", str(out), "--seed", str(seed)]
    for option, value in (("--style", style), ("--name", name), ("--size", size)):
        words += [option, value] if value is not None else []
    words += [flag for flag, given in (("--lora", lora), ("--json", as_json)) if given]
    raise typer.Exit(maker.main(words))
