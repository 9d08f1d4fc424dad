"""The model dialog: what it says about a model, and loading, stopping and unloading it."""

from __future__ import annotations

import msgspec
import pytest
from textual.widgets import Button, Input, OptionList, Select, Static

from tests.tui.conftest import wait_until
from w2c_tui.engine.client import EngineClient


async def opened(pilot):
    await pilot.press("ctrl+o")
    await wait_until(pilot, lambda: len(pilot.app.screen_stack) == 2)
    return pilot.app.screen


def said(pilot):
    return str(pilot.app.screen.query_one("#model-state", Static).content)


def about(pilot):
    return str(pilot.app.screen.query_one("#about", Static).content)


async def test_it_plans_and_loads_another_model(start, tiny_llava):
    async with start() as pilot:
        screen = await opened(pilot)
        box = screen.query_one("#name", Input)
        box.value = str(tiny_llava)
        await pilot.press("ctrl+d")
        await wait_until(pilot, lambda: "would go to cpu" in said(pilot))
        box.focus()
        await pilot.press("enter")
        await wait_until(pilot, lambda: pilot.app.info and pilot.app.info.reads_images)
        assert "sees images" in said(pilot)
        assert "float32 on cpu" in said(pilot)


async def test_it_says_what_a_model_needs_and_what_is_free(start):
    async with start() as pilot:
        screen = await opened(pilot)
        known = screen.query_one("#known", OptionList)
        names = [known.get_option_at_index(i).id for i in range(known.option_count)]
        known.highlighted = names.index("crystalchat-7b-web2code")
        await wait_until(pilot, lambda: "Needed:" in about(pilot))
        assert "Sees images." in about(pilot)
        assert "Free " in about(pilot)
        assert "> 16 bit" in about(pilot)
        screen.query_one("#quantization", Select).value = "4bit"
        await wait_until(pilot, lambda: ">  4 bit" in about(pilot))


async def test_the_number_format_is_chosen_there(start, tiny_llama):
    async with start() as pilot:
        screen = await opened(pilot)
        screen.query_one("#name", Input).value = str(tiny_llama)
        screen.query_one("#dtype", Select).value = "bfloat16"
        await pilot.press("ctrl+l")
        await wait_until(pilot, lambda: pilot.app.info and pilot.app.info.dtype == "bfloat16", 60)
        assert "bfloat16 on cpu" in said(pilot)


async def test_unload_ends_the_engine_and_the_next_prompt_loads_again(start, tmp_path, store):
    with EngineClient(tmp_path / "engine.log") as engine:
        async with start(engine=engine) as pilot:
            screen = await opened(pilot)
            await pilot.press("ctrl+u")
            await wait_until(pilot, lambda: engine.pid is None)
            await wait_until(pilot, lambda: "No model is loaded" in said(pilot))
            assert screen.query_one("#unload", Button).disabled
            await pilot.press("escape")
            status = pilot.app.screen.query_one("#status", Static)
            await wait_until(pilot, lambda: "no model loaded" in str(status.content))
            pilot.app.screen.prompt.text = "Prices?"
            await pilot.press("enter")
            await wait_until(pilot, lambda: engine.pid is not None, 60)
            await wait_until(
                pilot, lambda: not pilot.app.answers and pilot.app.screen.transcript.messages, 60
            )
            assert store.branch(store.sessions()[0].id)[-1].text


async def test_loading_can_be_stopped(start, settings, slow_llama, tmp_path):
    model = msgspec.structs.replace(settings.model, name=str(slow_llama))
    with EngineClient(tmp_path / "engine.log") as engine:
        async with start(
            engine=engine, loaded=False, settings=msgspec.structs.replace(settings, model=model)
        ) as pilot:
            screen = await opened(pilot)
            await wait_until(pilot, lambda: pilot.app.model_state == "loading")
            stop = screen.query_one("#stop-loading", Button)
            await wait_until(pilot, lambda: stop.display)
            # The engine is asked as soon as it can hear.
            while pilot.app.model_state == "loading":
                stop.press()
                await pilot.pause(0.05)
            await wait_until(pilot, lambda: "cancelled" in said(pilot))
            assert pilot.app.info is None
            await pilot.press("ctrl+l")
            await wait_until(pilot, lambda: pilot.app.info is not None, 60)


@pytest.mark.parametrize("name", ["", "no/such-thing", "nothing-of-that-name"])
async def test_what_is_no_model_is_said_before_loading(start, name):
    async with start() as pilot:
        screen = await opened(pilot)
        screen.query_one("#name", Input).value = name
        expected = {
            "": "Choose a model",
            "no/such-thing": "model hub",
            "nothing-of-that-name": "Not in the catalogue",
        }[name]
        await wait_until(pilot, lambda: expected in about(pilot))
