"""What else the engine is asked for than answers: plans, texts, conversions, GGUF files, pages."""

from __future__ import annotations

import io
import socket
from pathlib import Path

import msgspec
import pytest
from PIL import Image, ImageDraw, ImageFont

from tests.backends.contract import GREEDY, picture, user
from tests.tiny import PAGE
from w2c_tui.backends.base import Finished
from w2c_tui.core.config import ExportSpec, GenerationParams, LoadSpec
from w2c_tui.core.conversation import Message
from w2c_tui.core.errors import CheckpointError, EngineError, ModelNotFoundError, StoreError
from w2c_tui.core.image import attachment_from_bytes
from w2c_tui.core.prompt import PAGE_PROMPT
from w2c_tui.engine.client import EngineClient
from w2c_tui.engine.page_writer import Answer, write_page

QUIET = GenerationParams(temperature=0, max_new_tokens=200)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with EngineClient(tmp_path_factory.mktemp("engine") / "engine.log") as client:
        yield client


def spec(folder: Path) -> LoadSpec:
    return LoadSpec(name=str(folder), dtype="float32", device_map="cpu", threads=1)


def written(events) -> tuple[list, Answer]:
    """The events of `write_page` and what it returns."""
    seen = []
    while True:
        try:
            seen.append(next(events))
        except StopIteration as end:
            return seen, end.value


def test_a_plan_says_where_the_model_goes_and_loads_nothing(engine, tiny_llama):
    (share,) = engine.plan(spec(tiny_llama))
    assert share.device == "cpu"
    weights = sum(path.stat().st_size for path in tiny_llama.glob("*.safetensors"))
    assert 0.5 * weights < share.num_bytes < 2 * weights
    assert engine.model is None
    served = LoadSpec(base_url="http://127.0.0.1:9/v1")
    assert engine.plan(served) == ()
    with pytest.raises(EngineError, match="No model is loaded"):
        list(engine.stream([user("Code?")], GREEDY))


def test_a_conversion_and_an_export_are_done_in_the_engine(engine, tiny_llama, tmp_path):
    seen: list[str] = []
    out = tmp_path / "standard"
    engine.convert(str(tiny_llama), out, lambda phase, done, total: seen.append(phase))
    assert (out / "config.json").is_file()
    assert seen
    with pytest.raises(CheckpointError, match="standard"):
        engine.convert(str(tiny_llama), out)
    exported = engine.export(
        str(out), tmp_path / "gguf", ExportSpec(quant="f16", verify=False), name="small"
    )
    assert Path(exported.model) == tmp_path / "gguf" / "small-f16.gguf"
    (share,) = engine.plan(LoadSpec(name=exported.model, n_gpu_layers=0))
    assert share.device == "cpu"
    assert share.num_bytes > 100_000
    info = engine.load(LoadSpec(name=exported.model, n_gpu_layers=0, threads=1))
    assert info.backend == "gguf"
    with pytest.raises(ModelNotFoundError):
        engine.export("no-such-model", tmp_path, ExportSpec())


def test_the_text_of_a_picture_is_read_in_the_engine(engine):
    pytest.importorskip("rapidocr")
    image = Image.new("RGB", (400, 120), "white")
    ImageDraw.Draw(image).text((20, 40), "Prices", "black", ImageFont.load_default(48))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    shot = attachment_from_bytes(buffer.getvalue())
    (line,) = engine.read_text(shot)
    assert line.text == "Prices"
    (colored,) = engine.read_text(shot, "colors")
    assert colored.text == "Prices"
    assert colored != line


def test_a_page_ends_where_it_ends_and_its_beginning_counts(engine, page_writer):
    engine.load(spec(page_writer))
    question = Message("user", PAGE_PROMPT, (picture("red"),))
    seen, answer = written(write_page(engine, [question], QUIET))
    assert (answer.text, answer.reason, answer.page.html) == (PAGE, "stop", PAGE)
    assert isinstance(seen[-1], Finished)
    assert answer.stats == seen[-1].stats
    cut, rest = PAGE[:40], PAGE[40:]
    _, answer = written(write_page(engine, [question, Message("assistant", cut)], QUIET))
    assert answer.text == cut + rest
    short = msgspec.structs.replace(QUIET, max_new_tokens=3)
    _, answer = written(write_page(engine, [question], short))
    assert (answer.reason, answer.stats.new_tokens) == ("length", 3)


def test_a_load_can_be_cancelled_while_nothing_comes(engine, tiny_llama):
    phases: list[str] = []

    def stop(phase: str, done: int, total: int) -> None:
        phases.append(phase)
        engine.cancel()

    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(EngineError, match="cancelled"):
            engine.load(LoadSpec(base_url=f"http://127.0.0.1:{port}/v1"), stop)
    assert phases[0] == f"Asking 127.0.0.1:{port}"
    assert engine.model is None
    assert engine.load(spec(tiny_llama)).backend == "hf"


def test_a_log_that_cannot_be_written_is_said(tmp_path, tiny_llama):
    (tmp_path / "file").write_text("")
    client = EngineClient(tmp_path / "file" / "engine.log")
    with pytest.raises(StoreError, match=r"engine\.log cannot be written") as caught:
        client.load(spec(tiny_llama))
    assert "W2C_DATA_DIR" in caught.value.hint
