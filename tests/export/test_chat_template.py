"""The chat template in an exported file says what our renderer says, in llama.cpp's own Jinja."""

from __future__ import annotations

import gguf
import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from tests.export import models
from tests.tiny import CHAT_TEMPLATE, hostile_texts, save_llama
from w2c_tui.core.config import ExportSpec
from w2c_tui.core.conversation import Message
from w2c_tui.core.prompt import V1, as_text, render
from w2c_tui.export.gguf_export import export


def silent(phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def said_by(path: str) -> Jinja2ChatFormatter:
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    return Jinja2ChatFormatter(
        template=fields["tokenizer.chat_template"].contents(),
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"].contents()],
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"].contents()],
    )


@pytest.fixture(scope="module")
def v1_file(tmp_path_factory):
    folder = models.save_llava(tmp_path_factory.mktemp("v1") / "v1", models.SIGLIP)
    return export(str(folder), folder, ExportSpec(quant="f16", verify=False), silent).model


def conversations():
    for text in hostile_texts()[:30]:
        yield [Message("user", text)]
        yield [Message("user", "Q"), Message("assistant", text), Message("user", f"{text} more")]
        yield [Message("system", text), Message("user", "Q")]


def test_the_template_of_a_llava_equals_the_renderer(v1_file):
    formatter = said_by(v1_file)
    for messages in conversations():
        plain = [{"role": m.role, "content": m.text} for m in messages]
        assert formatter(messages=plain).prompt == as_text(render(messages, V1))


def test_a_models_own_template_is_kept_as_it_is(tmp_path):
    folder = save_llama(tmp_path / "chatty")
    exported = export(str(folder), tmp_path, ExportSpec(quant="f16", verify=False), silent)
    fields = gguf.GGUFReader(exported.model).fields
    assert fields["tokenizer.chat_template"].contents() == CHAT_TEMPLATE
    assert fields["w2c.template"].contents() == "chat"
