"""A published-layout CrystalChat checkpoint from its folder to an answer."""

from __future__ import annotations

import pytest
import torch

from tests.backends.contract import (
    HOT,
    assert_the_same,
    at_once,
    events,
    one_by_one,
    picture,
    stats,
    text_of,
    user,
)
from tests.backends.test_hf import load
from tests.models import tiny
from w2c_tui.core.conversation import Message
from w2c_tui.core.errors import ContextOverflowError
from w2c_tui.core.image import open_image, pixel_values


@pytest.fixture(scope="module")
def crystal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "crystal"
    folder.mkdir()
    config, tensors = tiny.published_llava_crystal()
    tiny.write_safetensors(folder, tensors, 1)
    tiny.write_tokenizer(folder, bos=False)
    tiny.write_json(folder / "config.json", config)
    return folder


def conversation():
    return [
        user("Code?", picture("red")),
        Message("assistant", "<p>old</p>"),
        user("Bigger"),
    ]


def test_it_uses_v1_and_pad_whatever_its_path_is(crystal):
    backend = load(crystal)
    assert backend._template.name == "v1"
    assert backend._loaded.image_spec.aspect == "pad"
    assert backend._incremental


def test_kept_context_and_chunks_equal_one_forward_pass(crystal):
    backend = load(crystal)
    messages = conversation()
    events(backend, messages[:1])
    prompt = backend.encode(messages)
    with torch.inference_mode():
        *_, kept = backend.read(prompt)
        pixels = pixel_values(open_image(messages[0].attachments[0]), backend._loaded.image_spec)
        whole = backend._model(
            input_ids=torch.tensor([prompt.ids]), pixel_values=torch.from_numpy(pixels)[None]
        ).logits[0, -1]
        whole = whole.numpy()
    assert abs(kept - whole).max() < 1e-3 * abs(whole).max()


def test_turns_answer_as_fresh_runs_do(crystal):
    backend = load(crystal)
    messages = conversation()
    events(backend, messages[:1])
    kept = events(backend, messages)
    assert stats(kept).reused_tokens > 4
    assert text_of(kept) == text_of(events(load(crystal), messages))


def test_candidates_written_at_once_are_what_each_seed_gives(crystal):
    backend = load(crystal)
    messages = conversation()
    alone = one_by_one(backend, messages, HOT)
    batch = at_once(backend, messages, HOT)
    assert_the_same(batch, alone)
    assert stats(batch[2]).reused_tokens == stats(batch[2]).prompt_tokens


def test_a_conversation_past_its_positions_is_refused_clearly(crystal):
    backend = load(crystal)
    with pytest.raises(ContextOverflowError):
        events(backend, [user("word " * 3000)])
