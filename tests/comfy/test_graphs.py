"""Graphs judged as ComfyUI judges them (the recorded refusals), and what they need of a node."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from fleet_server.domain.comfy import (
    Catalogue,
    FileName,
    Need,
    ancestors,
    merged,
    needs_of,
    weights_of,
    without_brought,
)
from fleet_server.domain.comfy_check import check
from fleet_server.domain.feasibility import feasible
from fleet_server.domain.job import Lane, Priority
from fleet_server.domain.node import LoadedView, NodeStatus, NodeView
from fleet_server.domain.placement import Situation, load_seconds, place
from fleet_server.domain.recorded import RecordedTiming
from fleet_server.services.comfy_nodes import read_json
from fleet_server.services.decisions import DecisionLog, read_decisions, replay
from fleet_server.services.dispatch import Decision, Wanted
from tests.comfy_node import STANDARD, combo, node_class, sample

Graph = dict[str, dict[str, Any]]


def catalogue(*, without: tuple[str, ...] = (), version: str = "", **lists: list[str]) -> Catalogue:
    """The standard classes, with checkpoints and LoRAs of one's own."""
    classes = {name: copy.deepcopy(one) for name, one in STANDARD.items() if name not in without}
    if "CheckpointLoaderSimple" in classes:
        classes["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0] = lists.get("checkpoints", [])
    return Catalogue.of(classes, f"{hash(str((without, lists))):x}", version)


CHAIN: Graph = sample("chain_post_prompt")["request"]["json"]["prompt"]
CHECKPOINT: Graph = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "a.safetensors"}},
    "2": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["1", 2]}},
    "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    "4": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}},
}


@pytest.mark.parametrize(
    "name",
    [
        *("err_ckpt_missing", "err_loadimage_missing", "err_missing_input"),
        *("err_no_outputs", "err_unknown_node", "err_value_too_big"),
    ],
)
def test_a_recorded_refusal_is_given_word_for_word(name: str) -> None:
    recorded = sample(name)
    verdict = check(recorded["request"]["json"]["prompt"], catalogue())
    assert {"error": verdict.error, "node_errors": verdict.node_errors} == recorded["body"]


@pytest.mark.parametrize(("version", "newer"), [("", False), ("0.11.1", False), ("0.12.0", True), ("v1.0", True)])
def test_a_missing_class_in_the_words_of_each_version(version: str, newer: bool) -> None:
    graph = copy.deepcopy(CHAIN)
    graph["3"] |= {"class_type": "NoSuchNode", "_meta": {"title": "Soft"}}
    error = check(graph, catalogue(version=version)).error
    assert error is not None and error["details"] == "Node ID '#3'"
    if not newer:
        assert (error["type"], error["extra_info"]) == ("invalid_prompt", {})
        return
    assert error["type"] == "missing_node_type"
    assert error["message"] == "Node 'Soft' not found. The custom node may not be installed."
    assert error["extra_info"] == {"node_id": "3", "class_type": "NoSuchNode", "node_title": "Soft"}
    del graph["3"]["class_type"]
    error = check(graph, catalogue(version=version)).error
    assert error is not None and error["extra_info"]["class_type"] is None
    assert error["message"].startswith("Node 'Soft' has no class_type.")


def test_a_graph_that_runs_is_taken_with_its_outputs() -> None:
    verdict = check(CHAIN, catalogue())
    assert (verdict.error, verdict.node_errors, verdict.outputs, verdict.faults) == (None, {}, ("5",), 0)


def _with(node: str, **inputs: Any) -> Graph:
    graph = copy.deepcopy(CHAIN)
    graph[node]["inputs"] |= inputs
    return graph


@pytest.mark.parametrize(
    ("graph", "node", "kind", "words"),
    [
        (_with("3", sigma=0.01), "3", "value_smaller_than_min", "Value 0.01 smaller than min of 0.1"),
        (_with("2", crop="middle"), "2", "value_not_in_list", "Value not in list"),
        (_with("2", width="wide"), "2", "invalid_input_type", "Failed to convert an input value to a INT value"),
        (_with("4", image=["3"]), "4", "bad_linked_input", "Bad linked input, must be a length-2 list"),
        (_with("4", image=["77", 0]), "4", "exception_during_inner_validation", "Exception when validating inner node"),
        (_with("4", image=["3", 9]), "4", "exception_during_inner_validation", "Exception when validating inner node"),
        (_with("2", image=["4", 0]), "2", "dependency_cycle", "Dependency cycle detected"),
        (_with("5", images=["5", 0]), "5", "exception_during_inner_validation", "Exception when validating inner node"),
    ],
)
def test_each_fault_is_named_at_its_node(graph: Graph, node: str, kind: str, words: str) -> None:
    verdict = check(graph, catalogue())
    assert verdict.error is not None and verdict.error["type"] == "prompt_outputs_failed_validation"
    (error,) = verdict.node_errors[node]["errors"]
    assert error["type"] == kind and error["message"].startswith(words)
    assert verdict.node_errors[node]["dependent_outputs"] == ["5"]
    orjson.dumps(verdict.node_errors)


@pytest.mark.parametrize("value", [512.0, "512", True, {"__value__": 512}])
def test_values_are_converted_as_comfyui_does(value: Any) -> None:
    assert check(_with("2", width=value), catalogue()).error is None


def test_one_good_output_is_enough_and_the_bad_one_is_told() -> None:
    graph = {**CHAIN, "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}}
    verdict = check(graph, catalogue())
    assert (verdict.error, verdict.outputs) == (None, ("5",))
    assert verdict.node_errors["9"]["errors"][0]["type"] == "required_input_missing"
    only = check(graph, catalogue(), targets=frozenset({"9"}))
    assert only.error is not None and only.outputs == ()


def test_a_long_list_is_not_printed() -> None:
    found = check(CHECKPOINT, catalogue(checkpoints=[f"{n}.safetensors" for n in range(21)]))
    (error,) = found.node_errors["1"]["errors"]
    assert error["details"] == "ckpt_name: 'a.safetensors' not in (list of length 21)"
    assert error["extra_info"]["input_config"] is None


def test_a_chain_of_ten_thousand_nodes_is_walked() -> None:
    graph: Graph = {"0": CHAIN["1"]}
    for n in range(1, 10_000):
        graph[str(n)] = {"class_type": "ImageInvert", "inputs": {"image": [str(n - 1), 0]}}
    graph["end"] = {"class_type": "SaveImage", "inputs": {"images": ["9999", 0], "filename_prefix": "x"}}
    assert check(graph, catalogue()).outputs == ("end",)
    assert len(ancestors(graph, ["end"])) == 10_001


def test_a_file_that_we_bring_needs_not_be_on_the_node() -> None:
    graph: Graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "ours.png"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    }
    assert check(graph, catalogue()).error is not None
    assert check(graph, catalogue(), has_file=lambda name: name == "ours.png").error is None
    needs = needs_of(graph, [catalogue()], own=[("1", "image")])
    assert needs == (Need("LoadImage"), Need("SaveImage"))


def test_needs_are_classes_and_values_of_lists_and_decide_who_can_run_it() -> None:
    needs = needs_of(CHECKPOINT, [catalogue(checkpoints=["a.safetensors"])])
    assert Need("CheckpointLoaderSimple", "ckpt_name", "a.safetensors") in needs
    assert {need.class_type for need in needs if not need.input} == {
        *("CheckpointLoaderSimple", "VAEDecode", "EmptyLatentImage", "SaveImage")
    }
    assert not list(catalogue(checkpoints=["a.safetensors", "b.safetensors"]).missing(needs))
    (lacked,) = catalogue(checkpoints=["b.safetensors"]).missing(needs)
    assert lacked.words == "CheckpointLoaderSimple.ckpt_name = 'a.safetensors'"
    assert Need("VAEDecode") in list(catalogue(without=("VAEDecode",)).missing(needs))


def test_lists_of_several_nodes_are_united_class_by_class() -> None:
    one = {"L": node_class("L", {"m": combo("a", "b")}), "Only": node_class("Only")}
    two = {"L": node_class("L", {"m": [["b", "c"], {"tooltip": "?"}]}), "New": node_class("New")}
    modern = {"L": node_class("L", {"m": ["COMBO", {"options": ["d"]}]})}
    whole = merged([one, two, modern])
    assert set(whole) == {"L", "Only", "New"}
    assert whole["L"]["input"]["required"]["m"] == [["a", "b", "c", "d"]]
    assert one["L"]["input"]["required"]["m"] == [["a", "b"]], "what it is made of stays as it is"
    flipped = merged([modern, one])
    assert flipped["L"]["input"]["required"]["m"] == ["COMBO", {"options": ["d", "a", "b"]}]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a.png", FileName("a.png")),
        ("sub/dir/a.png", FileName("a.png", "sub/dir")),
        ("a (1).png [output]", FileName("a (1).png", "", "output")),
        ("käse [x].png", FileName("käse [x].png")),
        ("clipspace/m.png [temp]", FileName("m.png", "clipspace", "temp")),
    ],
)
def test_file_names_are_read_as_graphs_write_them(text: str, name: FileName) -> None:
    assert FileName.of(text) == name


def test_a_recorded_decision_of_graphs_is_made_again(tmp_path: Path) -> None:
    """What a node's ComfyUI has is written down only as far as some lane needs it."""
    lanes = [
        Lane(name, "vision", "image_gen", needs=needs_of(CHECKPOINT, [catalogue(checkpoints=[file])]))
        for name, file in (("one", "a.safetensors"),)
    ]
    offers = {"has": ["a.safetensors", "b.safetensors"], "lacks": ["b.safetensors"]}
    nodes = [
        NodeView(
            node_id,
            NodeStatus.ONLINE,
            clusters=frozenset({"vision"}),
            job_types=frozenset({"image_gen"}),
            engines=frozenset({"comfyui"}),
            slots=1,
            slots_free=1,
            offers=catalogue(checkpoints=files),
        )
        for node_id, files in offers.items()
    ]
    situation = Situation(nodes, [Wanted(lane, 1, 0, Priority.NORMAL, 0, lane.lane_id) for lane in lanes], 1_000)
    timing = RecordedTiming(None)
    plan = place(situation, timing=timing)
    assert [(one.node_id, one.lane_id) for one in plan.placed] == [("has", "one")]
    log = DecisionLog(tmp_path / "decisions")
    line = log._line(Decision(situation, timing, plan))
    assert len(line) < 4_000 and b"b.safetensors" not in line
    assert replay([line]).differences == []
    (again,) = read_decisions([line])
    assert feasible(again.situation.nodes[1], lanes[0]) == feasible(nodes[1], lanes[0]) is not None


def _graph_lane(file: str, *loras: str) -> Lane:
    needs = [Need("CheckpointLoaderSimple"), Need("CheckpointLoaderSimple", "ckpt_name", file)]
    needs += [Need("LoraLoader", "lora_name", lora) for lora in loras]
    return Lane(f"{file}+{len(loras)}", "vision", "image_gen", needs=tuple(needs))


def _graph_node(node_id: str, *loaded: LoadedView) -> NodeView:
    info = copy.deepcopy(dict(STANDARD))
    info["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0] = ["a.safetensors", "b.safetensors"]
    info["LoraLoader"]["input"]["required"]["lora_name"][0] = ["ink.safetensors"]
    ready = NodeView(node_id, NodeStatus.ONLINE, clusters=frozenset({"vision"}), job_types=frozenset({"image_gen"}))
    engines = frozenset({"comfyui"})
    return replace(ready, engines=engines, slots=1, slots_free=1, loaded=loaded, offers=Catalogue.of(info, "all"))


def test_graphs_go_where_their_models_are_in_memory() -> None:
    """As all jobs: the node that has the checkpoint takes it first, and swaps for what is more urgent by far."""
    first, second = _graph_node("1", LoadedView("b.safetensors")), _graph_node("2", LoadedView("a.safetensors"))
    lanes = [_graph_lane("a.safetensors"), _graph_lane("b.safetensors")]
    demands = [Wanted(lane, 1, 0, Priority.NORMAL, 0, lane.lane_id) for lane in lanes]
    placed = place(Situation([first, second], demands, 1_000), timing=RecordedTiming(None)).placed
    assert {(one.node_id, one.lane_id[0]) for one in placed} == {("1", "b"), ("2", "a")}
    for age_ms, taken in ((100_000, "a"), (1_000_000, "b")):
        older = [Wanted(lanes[0], 1, 0, Priority.NORMAL, 0, ""), Wanted(lanes[1], 1, -age_ms, Priority.NORMAL, 0, "")]
        (one,) = place(Situation([second], older, 1_000), timing=RecordedTiming(None)).placed
        assert one.lane_id[0] == taken
    styled, plain = _graph_lane("a.safetensors", "ink.safetensors"), _graph_lane("a.safetensors")
    with_ink = _graph_node("3", LoadedView("a.safetensors", loras=("ink.safetensors",)))
    costs = [load_seconds(node, lane) for node in (first, second, with_ink) for lane in (plain, styled)]
    assert costs == [10.0, 11.0, 0.0, 1.0, 0.0, 0.0]
    words = (Need("CLIPTextEncode", "text", "a.safetensors"), Need("KSampler", "sampler_name", "euler"))
    assert weights_of(words) == ((), ()) and load_seconds(first, replace(plain, needs=words)) == 0


def test_files_that_were_brought_for_somebody_are_in_no_list() -> None:
    brought = f"3d/fleet-{'0a' * 16}-x.glb"
    for form in ([["a.glb", brought]], ["COMBO", {"options": ["a.glb", brought]}], [[brought], {"file_upload": True}]):
        shown = without_brought({"L": node_class("L", {"m": form, "n": ["INT", {}]}), "odd": []})
        assert brought not in orjson.dumps(shown).decode() and shown["L"]["input"]["required"]["n"] == ["INT", {}]
    other = {"L": node_class("L", {"m": combo("fleet-x-a.png", "a.png")})}
    assert without_brought(other) == other


def test_limits_that_are_no_json_are_no_limits() -> None:
    """A custom node's `float("inf")` must not hide all that its node has."""
    answer = (
        b'{"Endless": {"input": {"required": {"x": ["FLOAT", {"min": -Infinity, "max": Infinity, "default": NaN}]}}}}'
    )
    options = {"min": None, "max": None, "default": None}
    assert read_json(answer) == {"Endless": {"input": {"required": {"x": ["FLOAT", options]}}}}
    with pytest.raises(ValueError, match="Expecting"):
        read_json(b"<html>")
