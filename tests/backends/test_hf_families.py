"""Families beyond LLaVA, each against the model's own processor and `generate`.

Idefics3 (and SmolVLM, the same shape): an image becomes many tiles with tokens between them.
Gemma 3: image tokens see each other in both directions, so the prompt is computed whole.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

from tests.backends.contract import (
    GREEDY,
    HOT,
    assert_the_same,
    at_once,
    events,
    finish,
    one_by_one,
    picture,
    stats,
    text_of,
    user,
)
from tests.backends.test_hf import load
from tests.tiny import CHAT_TEMPLATE, byte_level_tokenizer, llama_config, randomize
from w2c_tui.core.conversation import Message
from w2c_tui.core.image import open_image


def save_idefics3(folder):
    tokenizer = byte_level_tokenizer()
    rows = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": [
                "<fake_token_around_image>",
                "<global-img>",
                "<end_of_utterance>",
                *rows,
            ]
        }
    )
    config = transformers.Idefics3Config(
        text_config=llama_config(len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2),
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )  # fmt: skip
    model = transformers.Idefics3ForConditionalGeneration(config)
    processor = transformers.Idefics3Processor(
        image_processor=transformers.Idefics3ImageProcessorPil(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=CHAT_TEMPLATE,
    )
    return save(model, processor, folder)


def save_gemma3(folder):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer().backend_tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    )
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 1024, "sliding_window": 32, "eos_token_id": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "pad_token_id": 0, "bos_token_id": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 56, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    processor = transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessorPil(
            size={"height": 56, "width": 56}, image_seq_length=4
        ),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=CHAT_TEMPLATE.replace("<image>\n", "<start_of_image>"),
    )
    return save(model, processor, folder)


def save(model, processor, folder):
    torch.manual_seed(0)
    randomize(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_sliding_window_attention_equals_generate_far_past_the_window(tmp_path):
    """The kept context holds every position; only the mask knows the window."""
    tokenizer = byte_level_tokenizer()
    config = transformers.MistralConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=16, eos_token_id=2,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config)
    folder = save(model, tokenizer, tmp_path / "mistral")
    backend = load(folder)
    assert backend._incremental
    messages = [user("Write a page with many words and prices in it")]
    for _ in range(2):
        ours = text_of(events(backend, messages))
        ids = backend.encode(messages).ids
        inputs = torch.tensor([ids])
        output = model.eval().generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=24, do_sample=False
        )
        assert ours == backend._tokenizer.decode(output[0, len(ids) :].tolist())
        messages += [Message("assistant", ours), user("and more")]
    assert_the_same(at_once(backend, messages, HOT), one_by_one(backend, messages, HOT))


FAMILIES = {"idefics3": (save_idefics3, True), "gemma3": (save_gemma3, False)}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    save_family, incremental = FAMILIES[request.param]
    folder = save_family(tmp_path_factory.mktemp("models") / request.param)
    backend = load(folder)
    assert backend._incremental == incremental
    return folder, backend


def conversations():
    red, blue = picture("red"), picture("blue", (40, 80))
    one = [user("Code?", red)]
    two = [*one, Message("assistant", "<p>Prices</p>"), user("more", blue)]
    three = [user("words only"), Message("assistant", "x"), user("Code?", red)]
    return [one, two, three, [user("words only")]]


def test_greedy_text_equals_the_models_own_processor_and_generate(family):
    folder, backend = family
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    texts = set()
    for messages in conversations():
        ours = text_of(events(backend, messages))
        parts = [
            {
                "role": m.role,
                "content": [{"type": "image"} for _ in m.attachments]
                + [{"type": "text", "text": m.text}],
            }
            for m in messages
        ]
        prompt = processor.apply_chat_template(parts, add_generation_prompt=True, tokenize=False)
        pictures = [open_image(image) for m in messages for image in m.attachments]
        inputs = processor(
            text=[prompt],
            images=[pictures] if pictures else None,
            return_tensors="pt",
            add_special_tokens=False,
        )
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        theirs = output[0, inputs["input_ids"].shape[1] :].tolist()
        assert ours == backend._tokenizer.decode(theirs)
        texts.add(ours)
    assert len(texts) == len(conversations())


def test_stopping_and_going_on_work_without_a_kept_context(family):
    _, backend = family
    messages = conversations()[1]
    whole = text_of(events(backend, messages))
    seen = 0

    def soon() -> bool:
        nonlocal seen
        seen += 1
        return seen > 30

    found = events(backend, messages, GREEDY, soon)
    assert finish(found).reason == "cancelled"
    assert whole.startswith(text_of(found))
    assert text_of(events(backend, messages)) == whole
    assert stats(events(backend, messages)).prompt_tokens > 20


def test_candidates_written_at_once_are_what_each_seed_gives(family):
    """Where nothing is kept they are written one after another."""
    _, backend = family
    messages = conversations()[1]
    alone = one_by_one(backend, messages, HOT)
    batch = at_once(backend, messages, HOT)
    assert_the_same(batch, alone)
    total = stats(batch[2]).prompt_tokens
    assert stats(batch[2]).reused_tokens == (total if backend._incremental else 0)
