"""The HF backend: the common contract, and what only transformers can do."""

from __future__ import annotations

import re

import msgspec
import pytest
import torch

from tests.backends.contract import (
    GREEDY,
    HOT,
    BackendContract,
    CandidatesContract,
    assert_the_same,
    at_once,
    events,
    finish,
    one_by_one,
    picture,
    seeded,
    stats,
    text_of,
    user,
)
from w2c_tui.backends.base import Text
from w2c_tui.backends.hf import HFBackend, choose_dtype
from w2c_tui.backends.kv_cache import GrowingLayer
from w2c_tui.core.config import GenerationParams, LoadSpec
from w2c_tui.core.conversation import Message
from w2c_tui.core.errors import (
    DownloadError,
    EngineError,
    ModelNotFoundError,
    W2CError,
)
from w2c_tui.core.image import open_image, pixel_values


def load(folder, **changes) -> HFBackend:
    backend = HFBackend()
    spec = LoadSpec(name=str(folder), **({"dtype": "float32", "device_map": "cpu"} | changes))
    backend.load(spec, lambda *_: None)
    return backend


class TestContract(BackendContract, CandidatesContract):
    @pytest.fixture(scope="class")
    def fresh(self, tiny_llama, tiny_llava):
        return lambda kind: load(tiny_llava if kind == "vision" else tiny_llama)

    @pytest.fixture(scope="class")
    def vision(self, fresh):
        return fresh("vision")

    @pytest.fixture(scope="class")
    def text(self, fresh):
        return fresh("text")


@pytest.fixture(scope="module")
def llava(tiny_llava):
    return load(tiny_llava)


def conversation(*images):
    return [
        user("Please generate html code", *images),
        Message("assistant", "<html><s>old</s></html>"),
        user("Bigger"),
    ]


def test_incremental_logits_equal_one_forward_pass_of_the_model(llava):
    """Chunks, a cache and spliced features against `model(input_ids, pixel_values)`."""
    red, blue = picture("red"), picture("blue", (30, 80))
    messages = conversation(red, blue)
    prompt = llava.encode(messages)
    units, ids = prompt.units, prompt.ids
    with torch.inference_mode():
        pixels = torch.stack(
            [
                torch.from_numpy(pixel_values(open_image(image), llava._loaded.image_spec))
                for image in (red, blue)
            ]
        )
        whole = llava._model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0]
        llava._reset_context()
        rows = []
        for start in range(0, len(units), 7):
            part = units[start : start + 7]
            rows.append(llava._run(part, keep=len(part)))
    assert (torch.cat(rows) - whole).abs().max() < 1e-4
    llava._settle()


def test_kept_context_gives_the_logits_of_a_fresh_run(llava, tiny_llava):
    messages = conversation(picture("red"))
    events(llava, messages[:1])
    with torch.inference_mode():
        *_, kept = llava.read(llava.encode(messages))
        other = load(tiny_llava)
        *_, fresh = other.read(other.encode(messages))
    assert abs(kept - fresh).max() < 1e-4


def test_greedy_text_equals_transformers_generate(tiny_llama):
    backend = load(tiny_llama)
    messages = [user("Write a page with prices")]
    ours = text_of(events(backend, messages))
    ids = backend.encode(messages).ids
    inputs = torch.tensor([ids])
    output = backend._model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=24, do_sample=False
    )
    theirs = backend._tokenizer.decode(output[0, len(ids) :].tolist())
    assert ours == theirs


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantised_models_answer_and_keep_the_vision_tower_whole(tiny_llava, quantization):
    backend = load(tiny_llava, quantization=quantization, dtype="bfloat16")
    kinds = {
        name: type(module).__name__
        for name, module in backend._model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    quantised = [name for name, kind in kinds.items() if kind != "Linear"]
    assert any("language_model.layers" in name for name in quantised)
    assert not any("vision_tower" in n or "projector" in n or "lm_head" in n for n in quantised)
    assert finish(events(backend, conversation(picture("red")))).reason in ("stop", "length")


def test_cpu_and_disk_offload_gives_the_same_text(tiny_llava, tmp_path):
    messages = conversation(picture("red"))
    expected = text_of(events(load(tiny_llava), messages))
    backend = load(
        tiny_llava,
        device_map="auto",
        max_memory={"cpu": "500KB"},
        offload_folder=str(tmp_path / "offload"),
    )
    assert "disk" in {str(d) for d in backend._model.hf_device_map.values()}
    assert text_of(events(backend, messages)) == expected


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_attention_implementations_agree(tiny_llama, attn):
    assert text_of(events(load(tiny_llama, attn=attn), [user("Write")])) == text_of(
        events(load(tiny_llama), [user("Write")])
    )


def test_missing_models_say_what_to_do(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no-such"):
        load(tmp_path / "no-such-folder")
    with pytest.raises(ModelNotFoundError) as caught:
        load("smolm2-135")
    assert "smollm2-135m" in caught.value.hint
    with pytest.raises((DownloadError, ModelNotFoundError)) as caught:
        load("someone/some-model")
    assert "someone/some-model" in caught.value.message
    assert caught.value.hint


def test_an_empty_folder_is_a_clear_error(tmp_path):
    with pytest.raises(W2CError, match=tmp_path.name):
        load(tmp_path)


def test_a_failed_load_leaves_no_model_and_another_load_works(tiny_llama, tmp_path):
    backend = load(tiny_llama)
    with pytest.raises(W2CError):
        backend.load(LoadSpec(name=str(tmp_path)), lambda *_: None)
    with pytest.raises(EngineError, match="No model"):
        events(backend, [user("Write")])
    backend.load(LoadSpec(name=str(tiny_llama), dtype="float32"), lambda *_: None)
    assert text_of(events(backend, [user("Write")]))


def test_a_conversation_of_more_images_than_are_kept(llava):
    images = [picture(f"#{at * 12:02x}4080") for at in range(20)]
    messages = [user("many", *images)]
    first = text_of(events(llava, messages))
    events(llava, [user("one", picture("red"))])
    assert text_of(events(llava, messages)) == first


def test_context_can_be_capped(tiny_llama):
    backend = load(tiny_llama, context=64)
    found = events(backend, [user("Write")], GenerationParams(temperature=0, max_new_tokens=500))
    assert stats(found).context_length == 64
    assert stats(found).context_used <= 64


def test_repetition_penalty_changes_the_text(tiny_llama):
    backend = load(tiny_llama)
    params = GenerationParams(temperature=0, max_new_tokens=24, repetition_penalty=1.8)
    assert text_of(events(backend, [user("Write")], params)) != text_of(
        events(backend, [user("Write")], GREEDY)
    )


def test_an_answer_leaves_a_circle(tiny_llama):
    backend = load(tiny_llama)
    for layer in backend._model.model.layers:
        # What comes next then depends on the newest token alone: sooner or later it is a circle.
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    backend._eos_ids = set()
    params = GenerationParams(temperature=0, max_new_tokens=600)

    def circling(found):
        circles = re.finditer(r"(.{8,}?)\1{5,}", text_of(found), re.S)
        return max((len(circle[0]) for circle in circles), default=0)

    found = events(backend, [user("Write")], params)
    with_drafts = msgspec.structs.replace(params, prompt_lookup=5)
    assert text_of(events(backend, [user("Write")], with_drafts)) == text_of(found)
    endless = msgspec.structs.replace(params, max_repeats=0)
    assert 0 < 2 * circling(found) < circling(events(backend, [user("Write")], endless))


def test_automatic_dtype_is_one_this_machine_computes_in():
    assert choose_dtype("auto") in (torch.float32, torch.bfloat16, torch.float16)
    assert choose_dtype("float16") is torch.float16


def test_candidates_may_end_themselves(tiny_llama):
    """With a tenth of the vocabulary as ends, so that some of the answers are short."""
    backend = load(tiny_llama)
    backend._eos_ids = set(range(0, backend._model.config.vocab_size, 10))
    messages = [user("Write")]
    params = GenerationParams(temperature=1.0, max_new_tokens=40, seed=3)
    alone = one_by_one(backend, messages, params, 8)
    assert {finish(found).reason for found in alone} == {"stop"}
    assert len({stats(found).new_tokens for found in alone}) > 3
    assert_the_same(at_once(backend, messages, params, 8), alone)
    assert backend._branches == []


def test_without_memory_for_all_there_are_fewer_branches(tiny_llama, monkeypatch):
    backend = load(tiny_llama)
    messages = [user("Write")]
    alone = one_by_one(backend, messages, HOT)
    used = stats(alone[0]).prompt_tokens + 24
    each = sum(layer.position_bytes for layer in backend._growing_layers()) * used
    for free, reused in ((2 * each, 0), (4 * each, 1), (6 * each, 2)):
        monkeypatch.setattr("w2c_tui.backends.hf.main_memory", lambda free=free: (free, free))
        backend._reset_context()
        batch = at_once(backend, messages, HOT)
        assert_the_same(batch, alone)
        whole = [stats(found).reused_tokens == stats(found).prompt_tokens for found in batch]
        assert sum(whole) == reused


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantised_models_write_candidates(tiny_llama, quantization):
    backend = load(tiny_llama, quantization=quantization, dtype="bfloat16")
    batch = at_once(backend, [user("Write")], HOT)
    assert all(finish(found).reason in ("stop", "length") for found in batch)
    assert len({text_of(found) for found in batch}) == 3


def test_a_failure_of_the_model_drops_what_was_kept(tiny_llama):
    backend = load(tiny_llama)
    messages = [user("Write")]
    alone = one_by_one(backend, messages, HOT)

    def fail(*_: object) -> None:
        raise RuntimeError("no more")

    for number in (0, 1):
        if number:
            # What fails then goes on with what was kept.
            start = text_of(alone[0])[:8]
            events(backend, messages, HOT, ahead=2, until=start)
        until = start if number else ""
        params = seeded(HOT, number)
        stream = backend.stream(messages, params, lambda: False, 2 - number, until)
        while not isinstance(next(stream), Text):
            pass
        hook = backend._model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(EngineError, match="no more"):
            list(stream)
        hook.remove()
        assert backend.candidates is None
        assert_the_same(at_once(backend, messages, HOT), alone)


def test_loading_and_closing_drop_what_was_kept(tiny_llama):
    backend = load(tiny_llama)
    for leave in (
        backend.close,
        lambda: backend.load(LoadSpec(name=str(tiny_llama), dtype="float32"), lambda *_: None),
    ):
        if backend._loaded is None:
            backend.load(LoadSpec(name=str(tiny_llama), dtype="float32"), lambda *_: None)
        events(backend, [user("Write")], HOT, ahead=2)
        assert backend.candidates is not None
        leave()
        assert backend.candidates is None


def test_cache_is_branched_and_branches_are_selected():
    layer = GrowingLayer()
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, 2, 300, 4).unbind(0)
    layer.update(keys, values)
    layer.crop_to(290)
    branched = layer.branched(3)
    new = torch.randn(2, 3, 2, 1, 4)
    got = branched.update(*new)
    assert torch.equal(got[0][2], torch.cat([keys[0, :, :290], new[0, 2]], dim=-2))
    branched.select([0, 2])
    # Nothing holds on to the sequence that was dropped.
    assert len(branched.keys) == len(branched.values) == 2
    assert torch.equal(branched.keys[1, :, :290], keys[0, :, :290])
    newer = torch.randn(2, 2, 2, 1, 4)
    got = branched.update(*newer)
    assert torch.equal(got[1][1], torch.cat([values[0, :, :290], new[1, 2], newer[1, 1]], dim=-2))
    assert branched.get_seq_length() == 292
    # The one that was read stays as it was.
    assert layer.get_seq_length() == 290
    assert layer.position_bytes == branched.position_bytes == 2 * 2 * 4 * 4


def test_buffered_cache_grows_and_crops_without_losing_anything():
    layer = GrowingLayer()
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, 2, 700, 4).unbind(0)
    for start in range(0, 600, 7):
        end = min(start + 7, 600)
        got = layer.update(keys[..., start:end, :], values[..., start:end, :])
    assert torch.equal(got[0], keys[..., :600, :])
    layer.crop_to(250)
    got = layer.update(keys[..., 600:, :], values[..., 600:, :])
    assert torch.equal(got[0], torch.cat([keys[..., :250, :], keys[..., 600:, :]], dim=-2))
    assert torch.equal(got[1], torch.cat([values[..., :250, :], values[..., 600:, :]], dim=-2))
