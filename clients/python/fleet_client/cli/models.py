"""`fleet models` and `fleet loras`: what there is, where it is, and having nodes load, pin and bring it."""

from __future__ import annotations

from typing import Annotated

import typer

from fleet_client.calls import Json
from fleet_client.cli.bars import with_bars
from fleet_client.cli.console import (
    CONTEXT,
    FAILED,
    JsonOption,
    KeyOption,
    UrlOption,
    errors_told,
    fail,
    print_json,
    print_table,
    say,
)
from fleet_client.cli.words import age, size
from fleet_client.client import FleetCommander

app = typer.Typer(
    help="List models; load, pin and bring them to nodes.", context_settings=CONTEXT, invoke_without_command=True
)
NodeArgument = Annotated[str, typer.Argument(help="The node's name.")]
ModelArgument = Annotated[str, typer.Argument(help="One of `fleet models`.")]


@app.callback()
def models(
    context: typer.Context, as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None
) -> None:
    """List checkpoints and LoRAs, and the nodes that have them."""
    if context.invoked_subcommand is None:
        _list(as_json, url, api_key)


@app.command("list")
def list_models(as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """List checkpoints and LoRAs, and the nodes that have them."""
    _list(as_json, url, api_key)


def _list(as_json: bool, url: str | None, api_key: str | None) -> None:
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        checkpoints, loras = fleet.list_models()["models"], fleet.list_loras()["loras"]
    if as_json:
        print_json({"models": checkpoints, "loras": loras})
        return
    rows = [
        [
            model["name"] + (" (default)" if model["is_default"] else ""),
            f"alias of {model['alias_of']}" if model["alias_of"] else model["architecture"] or "",
            size(model["size_bytes"]) if model["size_bytes"] else "",
            _places(model),
            ", ".join(model["loaded_node_ids"]),
        ]
        for model in checkpoints
    ]
    for lora in loras:
        kind = f"LoRA, {lora['architecture']}" if lora["architecture"] else "LoRA"
        rows.append([lora["name"], kind, size(lora["size_bytes"]), _places(lora), ""])
    print_table(["MODEL", "KIND", "SIZE", "ON", "LOADED ON"], rows, "no models: no node has reported one")


def _places(file: Json) -> str:
    return ", ".join([*(["S3"] if file["in_s3"] else []), *file["node_ids"]])


def loras(as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """List LoRAs, and the nodes that have them."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        reply = fleet.list_loras()
    if as_json:
        print_json(reply)
        return
    rows = [
        [
            lora["name"],
            lora["architecture"] or "",
            ", ".join(lora["trigger_words"]),
            size(lora["size_bytes"]),
            _places(lora),
        ]
        for lora in reply["loras"]
    ]
    print_table(["LORA", "FOR", "TRIGGER WORDS", "SIZE", "ON"], rows, "no LoRAs: no node or bucket has one")


@app.command()
def loaded(as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """List the models in the nodes' memory."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        reply = fleet.list_loaded_models()
    if as_json:
        print_json(reply)
        return
    rows = [
        [
            model["node_id"],
            model["name"],
            model["engine"],
            size(model["memory_bytes"]) if model["memory_bytes"] else "",
            ", ".join(model["loras"]),
            "pinned" if model["pinned"] else "",
            f"{age(model['last_used_time'])} ago" if model["last_used_time"] else "",
        ]
        for model in reply["models"]
    ]
    print_table(["NODE", "MODEL", "ENGINE", "MEMORY", "LORAS", "PIN", "USED"], rows, "no node has a model in memory")


@app.command()
def load(
    node_id: NodeArgument,
    model: ModelArgument,
    pin: Annotated[bool, typer.Option("--pin/--no-pin", help="Keep it in memory for good.")] = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Load a model into a node's memory, bringing it from S3 first if need be."""
    _load(node_id, model, pin, as_json, url, api_key)


@app.command()
def pin(
    node_id: NodeArgument,
    model: ModelArgument,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Load a model and keep it in memory for good; `load --no-pin` or `unload` end that."""
    _load(node_id, model, True, as_json, url, api_key)


def _load(node_id: str, model: str, pinned: bool, as_json: bool, url: str | None, api_key: str | None) -> None:
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        reply = with_bars(fleet, lambda request_id: fleet.load_model(node_id, model, pinned, request_id))
    if as_json:
        print_json(reply)
    else:
        say(f"{reply['name']} is loaded on {reply['node_id']}" + (", pinned" if reply["pinned"] else ""))


@app.command()
def unload(
    node_id: NodeArgument,
    model: ModelArgument,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Free a model from a node's memory, pinned or not."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        reply = fleet.unload_model(node_id, model)
    if as_json:
        print_json(reply)
    else:
        say(f"{reply['name']} is not in the memory of {reply['node_id']} any more")


@app.command()
def download(
    name: Annotated[str, typer.Argument(help="A model or LoRA in S3.")],
    node_ids: Annotated[list[str], typer.Argument(metavar="NODE...", help="The nodes.")],
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Bring a model or LoRA from S3 to the disks of nodes."""
    with errors_told(), FleetCommander(url, api_key=api_key) as fleet:
        reply = with_bars(fleet, lambda request_id: fleet.download_model(name, node_ids, request_id))
    failed = [one for one in reply["downloads"] if one["status"] == "failed"]
    if as_json:
        print_json(reply)
    else:
        rows = [
            [one["node_id"], one["status"], size(one["size_bytes"]) if one["size_bytes"] else "", one["detail"] or ""]
            for one in reply["downloads"]
        ]
        print_table(["NODE", "STATUS", "SIZE", "WHY"], rows, "no nodes were named")
    if failed:
        fail(f"{len(failed)} of {len(reply['downloads'])} nodes have not got it", FAILED)
