"""Fleets, faults and modelled times: pure, and the same for the same seed."""

from __future__ import annotations

import random

import pytest

from fleet_agent.simulation.faults import NONE, SLOW_PACE, SOME, Faults, FaultsError, afflicted, parse_faults
from fleet_agent.simulation.profiles import (
    CUSTOM,
    GPUS,
    IMAGE,
    MODELS,
    PROFILES,
    NodePlan,
    capacity,
    load_seconds,
    plan_fleet,
    run_seconds,
)


@pytest.mark.parametrize("name", PROFILES)
def test_the_same_seed_gives_the_same_fleet_and_more_nodes_begin_with_the_same(name: str) -> None:
    profile = PROFILES[name]
    fleet = plan_fleet(profile, 40, random.Random(3))
    assert plan_fleet(profile, 40, random.Random(3)) == fleet
    assert plan_fleet(profile, 60, random.Random(3))[:40] == fleet
    assert plan_fleet(profile, 40, random.Random(4)) != fleet
    assert len({plan.node_id for plan in fleet}) == 40


@pytest.mark.parametrize("name", PROFILES)
def test_every_node_has_models_that_fit_and_one_for_pictures(name: str) -> None:
    for plan in plan_fleet(PROFILES[name], 100, random.Random(1)):
        assert IMAGE in plan.job_types and CUSTOM in plan.job_types
        assert all(model.memory_gib <= plan.gpu.memory_gib for model in plan.models)


@pytest.mark.parametrize("name", PROFILES)
def test_every_job_of_a_mix_names_models_that_there_are(name: str) -> None:
    profile = PROFILES[name]
    named = {model for job in profile.jobs for model in (job.model, *job.loras) if model}
    assert named <= set(MODELS)
    there = {model.name for plan in plan_fleet(profile, 100, random.Random(1)) for model in plan.models}
    assert named <= there
    assert {gpu for _, gpu in profile.gpus} <= set(GPUS)


def test_a_homelab_is_five_unequal_gpus_in_turn() -> None:
    fleet = plan_fleet(PROFILES["homelab"], 10, random.Random(1))
    kinds = [plan.gpu.name for plan in fleet]
    assert len(set(kinds[:5])) == 5 and kinds[:5] == kinds[5:]


def test_work_takes_as_long_as_the_figures_say() -> None:
    model = MODELS["sim-sdxl.safetensors"]
    plan = NodePlan("n", GPUS["rtx-3090"], (model,))
    assert run_seconds(plan, IMAGE, model.name, 1024 * 1024 * 30) == pytest.approx(1024 * 1024 * 30 / 3.8e6)
    half = NodePlan("n", GPUS["rtx-3090"], (model,), pace=0.5)
    assert run_seconds(half, IMAGE, model.name, 1e6) == pytest.approx(2 * run_seconds(plan, IMAGE, model.name, 1e6))
    assert run_seconds(plan, CUSTOM, "", 2.5) == 2.5
    assert load_seconds(plan, model.name) == pytest.approx(6.5 * 2**30 / 1.2e9)
    assert load_seconds(plan, "") == 0


def test_capacity_counts_slots_and_speed() -> None:
    profile = PROFILES["homelab"]
    fleet = plan_fleet(profile, 5, random.Random(1))
    doubled = capacity(profile, [*fleet, *fleet])
    assert doubled == pytest.approx(2 * capacity(profile, fleet))
    assert capacity(profile, fleet) > 0


def test_faults_are_read_from_words() -> None:
    assert parse_faults("none") == NONE and not NONE.any
    assert parse_faults("some") == SOME and SOME.any
    assert parse_faults("disconnect=30, oom=0.02") == Faults(disconnect=30, oom=0.02)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("fire=1", "there is no 'fire'"),
        ("oom=2", "oom must be a share, 0 to 1, not 2"),
        ("oom", "oom needs a number"),
        ("crash=-1", "crash must be 0 or more"),
        ("slow=nan", "slow must be a share"),
    ],
)
def test_faults_that_make_no_sense_are_named(words: str, what: str) -> None:
    with pytest.raises(FaultsError, match=what):
        parse_faults(words)


def test_as_many_nodes_are_slow_or_failing_as_asked() -> None:
    fleet = plan_fleet(PROFILES["mixed"], 400, random.Random(1))
    hurt = afflicted(fleet, Faults(slow=0.25, failing=0.1), random.Random(2))
    slow = [one for one, before in zip(hurt, fleet, strict=True) if one.pace < before.pace]
    assert 60 < len(slow) < 140
    assert all(one.pace >= 0.9 * SLOW_PACE for one in slow)
    failing = [one for one in hurt if one.failing]
    assert 20 < len(failing) < 60
    assert all(one.failing in {model.name for model in one.models} for one in failing)
