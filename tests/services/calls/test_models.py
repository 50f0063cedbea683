"""Models, aliases, LoRAs and what is loaded, from what nodes report."""

from __future__ import annotations

from pathlib import Path

import pytest
from fleet.v1 import types_pb2, vision_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.services.models import CatalogSettings
from fleet_server.services.pages import page_by_name
from fleet_server.store import Store
from tests.services.calls.desk import ALIAS, Desk, asked, desk_on


async def test_models_and_their_aliases_are_listed_as_such(desk: Desk) -> None:
    await desk.add_node("agx0", models=["sketch"], loaded=["sketch"])
    await desk.add_node("agx1", models=["sketch", "other"])
    models = {model.name: model for model in desk.catalog.models()}
    assert set(models) == {"sketch", "other", ALIAS}
    alias, real = models[ALIAS], models["sketch"]
    assert alias.alias_of == "sketch" and not real.HasField("alias_of")
    assert alias.is_default and not real.is_default and not models["other"].is_default
    assert list(alias.node_ids) == list(real.node_ids) == ["agx0", "agx1"]
    assert list(alias.loaded_node_ids) == ["agx0"]
    assert (real.architecture, real.format, real.size_bytes, real.sha256) == ("sketch", "safetensors", 7, "ab" * 32)
    assert list(real.job_types) == [types_pb2.JOB_TYPE_IMAGE_GEN] and not real.in_s3
    assert {model.name for model in desk.catalog.models(node_id="agx0")} == {"sketch", ALIAS}
    assert desk.catalog.models(job_type=types_pb2.JOB_TYPE_LLM_INFERENCE) == []
    assert desk.catalog.default_model() == ALIAS
    assert desk.catalog.alias_notes() == [f"{ALIAS} is an alias of sketch, which is no diffusion model"]


async def test_a_real_model_wins_over_an_alias_of_its_name(desk: Desk) -> None:
    await desk.add_node("agx0", models=["sketch", ALIAS], loaded=["sketch"])
    models = {model.name: model for model in desk.catalog.models()}
    assert len(models) == 2 and not models[ALIAS].HasField("alias_of")
    assert desk.catalog.resolve(ALIAS, "image_gen").resolved == ALIAS
    assert desk.catalog.alias_notes() == []
    assert [model.name for model in desk.catalog.loaded(running={})] == ["sketch"]


async def test_names_are_judged_only_where_somebody_serves_the_type(desk: Desk) -> None:
    assert desk.catalog.resolve("anything", "image_gen").resolved == "anything"
    assert desk.catalog.resolve(None, "image_gen").resolved == "sketch"
    assert desk.catalog.resolve(None, "llm_inference").target is None
    desk.catalog.check_loras(["ink"], "image_gen")
    await desk.add_node("agx0", loras=["ink"])
    assert desk.catalog.resolve("anything", "llm_inference").resolved == "anything"
    with pytest.raises(FleetError) as caught:
        desk.catalog.resolve("anything", "image_gen", path="payload.model")
    assert (caught.value.reason, caught.value.violations[0].field) == ("MODEL_NOT_FOUND", "payload.model")
    desk.catalog.check_loras(["ink"], "image_gen")
    with pytest.raises(FleetError) as caught:
        desk.catalog.check_loras(["ink", "blot"], "image_gen")
    assert (caught.value.reason, caught.value.violations[0].field) == ("LORA_NOT_FOUND", "loras[1].name")
    with pytest.raises(FleetError):
        desk.catalog.resolve("ink", "image_gen")


async def test_a_node_that_is_away_keeps_its_models_known(desk: Desk) -> None:
    await desk.add_node()
    desk.nodes.set_status("agx0", desk.nodes.nodes()[0].status.DOWN)
    assert desk.catalog.resolve("sketch", "image_gen").resolved == "sketch"
    with pytest.raises(FleetError):
        desk.catalog.resolve("none", "image_gen")


async def test_the_default_falls_back_to_what_is_there(store: Store, tmp_path: Path) -> None:
    async with desk_on(store, tmp_path, catalog=CatalogSettings({}, "wanted")) as desk:
        assert desk.catalog.resolve(None, "image_gen").target == "wanted"
        await desk.add_node("agx0", models=["b", "a"])
        assert desk.catalog.resolve(None, "image_gen").target == "a"
    async with desk_on(store, tmp_path, catalog=CatalogSettings()) as desk:
        assert desk.catalog.default_model() is None
        await desk.add_node("agx0", models=[])
        assert desk.catalog.resolve(None, "image_gen").resolved is None


async def test_loaded_models_say_node_alias_and_use(desk: Desk) -> None:
    await desk.add_node("agx0", loaded=["sketch"])
    loaded = {model.name: model for model in desk.catalog.loaded(running={("agx0", "sketch"): 2})}
    assert set(loaded) == {"sketch", ALIAS}
    assert (loaded[ALIAS].alias_of, loaded[ALIAS].running_jobs, loaded[ALIAS].node_id) == ("sketch", 2, "agx0")
    assert (loaded["sketch"].engine, loaded["sketch"].memory_bytes) == ("sketch", 5)
    assert loaded["sketch"].HasField("load_time") and not loaded["sketch"].HasField("gpu_index")
    assert desk.catalog.loaded(node_id="agx9", running={}) == []
    await desk.submit()
    claim = await desk.start()
    assert await desk.queue.running_models([claim.job.job_id, "nobody"]) == {("agx0", "sketch"): 1}


async def test_loras_are_listed_with_their_words(desk: Desk) -> None:
    await desk.add_node("agx0", loras=["ink"])
    await desk.add_node("agx1", loras=["ink", "blot"])
    loras = {lora.name: lora for lora in desk.catalog.loras()}
    assert set(loras) == {"ink", "blot"} and list(loras["ink"].node_ids) == ["agx0", "agx1"]
    assert list(loras["ink"].trigger_words) == ["ink"] and not loras["ink"].HasField("sha256")
    assert [lora.name for lora in desk.catalog.loras(node_id="agx0")] == ["ink"]


async def test_lists_by_name_come_whole_or_in_pages(desk: Desk) -> None:
    names = [f"m{n:02}" for n in range(7)]
    await desk.add_node("agx0", models=names[::-1])
    whole, token = page_by_name(asked(vision_pb2.ListModelsRequest), desk.catalog.models(), lambda m: (m.name,))
    assert [model.name for model in whole] == names and token == ""
    found: list[str] = []
    while True:
        request = asked(vision_pb2.ListModelsRequest, limit=3, page_token=token)
        page, token = page_by_name(request, desk.catalog.models(), lambda m: (m.name,))
        found += [model.name for model in page]
        if not token:
            break
    assert found == names
    _, token = page_by_name(asked(vision_pb2.ListModelsRequest, limit=3), desk.catalog.models(), lambda m: (m.name,))
    with pytest.raises(FleetError) as caught:
        page_by_name(
            asked(vision_pb2.ListModelsRequest, node_id="agx0", page_token=token), desk.catalog.models(),
            lambda m: (m.name,),
        )  # fmt: skip
    assert caught.value.reason == "INVALID_PAGE_TOKEN"
    with pytest.raises(FleetError):
        page_by_name(
            asked(vision_pb2.ListLorasRequest, page_token=token), desk.catalog.loras(), lambda lora: (lora.name,)
        )
