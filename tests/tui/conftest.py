"""The application in a pilot, with a real tiny model in a real engine process."""

from __future__ import annotations

import asyncio
import contextlib
import io
import time

import msgspec
import pytest
from PIL import Image

from tests.tiny import save_llama
from w2c_tui.core.config import (
    GenerationParams,
    InterfaceSettings,
    LoadSpec,
    Settings,
    paths,
)
from w2c_tui.core.store import Store
from w2c_tui.engine.client import EngineClient
from w2c_tui.tui.app import W2CApp


async def wait_until(pilot, condition, timeout_s=60.0):
    """Let the application run until `condition()` is true, and its value."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        await pilot.pause()
        if value := condition():
            return value
        await asyncio.sleep(0.02)
    raise AssertionError(f"waited {timeout_s} s in vain")


def shows_ready(app):
    """Whether the model is loaded and the screen says so: it is told a moment later."""
    lines = app.screen.query("#status")
    return app.model_state == "ready" and not any("loading" in str(s.content) for s in lines)


@pytest.fixture(scope="session")
def shared_engine(tmp_path_factory):
    """One engine process for all tests: starting one takes seconds."""
    with EngineClient(tmp_path_factory.mktemp("engine") / "engine.log") as engine:
        yield engine


@pytest.fixture
def store(own_folders):
    with Store.open(paths().sessions) as store:
        yield store


@pytest.fixture
def settings(tiny_llama):
    return Settings(
        model=LoadSpec(name=str(tiny_llama), dtype="float32", device_map="cpu", threads=1),
        generation=GenerationParams(temperature=0, max_new_tokens=40),
        interface=InterfaceSettings(pictures="half-cells"),
        ocr="off",
    )


@pytest.fixture(scope="session")
def slow_llama(tmp_path_factory):
    """Some 80 tokens/s, and it does not end by itself: the end has next to no probability."""
    import torch
    from transformers import LlamaForCausalLM

    folder = save_llama(
        tmp_path_factory.mktemp("models") / "slow-llama",
        hidden_size=384,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=6,
    )
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.lm_head.weight.data[model.config.eos_token_id] = 0
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def slow_settings(settings, slow_llama):
    """For what is done while an answer is being written."""
    return msgspec.structs.replace(
        settings,
        model=msgspec.structs.replace(settings.model, name=str(slow_llama)),
        generation=GenerationParams(temperature=1.0, max_new_tokens=900, seed=2),
    )


@pytest.fixture
def start(own_folders, store, settings, shared_engine):
    """Starts the application, with the model loaded unless told otherwise."""

    @contextlib.asynccontextmanager
    async def start(size=(120, 40), *, engine=shared_engine, loaded=True, **options):
        chosen = options.pop("settings", settings)
        sessions = options.pop("store", store)
        app = W2CApp(chosen, paths(), sessions, engine=engine, **options)
        async with app.run_test(size=size) as pilot:
            if loaded:
                await wait_until(pilot, lambda: shows_ready(app), 60)
            yield pilot
            await wait_until(pilot, lambda: not app.answers)

    return start


@pytest.fixture
def picture(tmp_path):
    """Saves a small picture under a name and returns its path."""

    def save(name="shot.png", color="red", size=(90, 60)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", size, color)
        image.paste("white", (10, 10, 40, 30))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        path.write_bytes(buffer.getvalue())
        return path

    return save
