"""Segments to ids: whole runs, exact labels, hostile contents; and ids back to streamed text."""

from __future__ import annotations

import pytest

from tests.tiny import byte_level_tokenizer, hostile_texts, word_mark_tokenizer
from w2c_tui.core.conversation import Attachment, Message
from w2c_tui.core.prompt import PLAIN, V1, as_text, render
from w2c_tui.models.tokenize import ImageSlot, PromptTokenizer, TextStream, Tokens

IMAGE = Attachment(data=b"x", sha256="0" * 64, width=10, height=20)
TOKENIZERS = {
    "byte-level": byte_level_tokenizer,
    "no-bos": lambda: word_mark_tokenizer(bos=False),
    "bos": lambda: word_mark_tokenizer(bos=True),
    "bos-first": lambda: word_mark_tokenizer(bos=True, scheme="first"),
}


@pytest.fixture(params=TOKENIZERS, scope="module")
def tokenizer(request):
    return TOKENIZERS[request.param]()


def conversation(num_turns: int, content: str = "<div>Prices</div>", *, image: bool = True):
    messages = []
    for turn in range(num_turns):
        images = (IMAGE,) if image and turn == 0 else ()
        messages.append(Message("user", f"Please generate  html {turn}", images))
        messages.append(Message("assistant", f"{content} naïve {turn}"))
    return messages


@pytest.mark.parametrize("num_turns", [1, 2, 5])
def test_runs_equal_the_tokenizers_own_reading_around_the_image(tokenizer, num_turns):
    """LLaVA: split at `<image>`, tokenise each part as a text of its own, BOS once if at all."""
    messages = conversation(num_turns)
    segments = render(messages, V1, for_answer=False)
    pieces = PromptTokenizer(tokenizer, "<image>").encode(segments)
    text = as_text(segments, eos=tokenizer.eos_token)
    before, after = text.split("<image>")
    adds_bos = bool(tokenizer("").input_ids)
    first, slot, second = pieces
    assert first.ids == tokenizer(before).input_ids
    assert slot == ImageSlot(0)
    assert second.ids == tokenizer(after).input_ids[adds_bos:]


def test_an_encoding_does_not_depend_on_those_before_it(tokenizer):
    """Prompts are remembered; more of them than there is room for, some more than once."""
    used = PromptTokenizer(tokenizer, "<image>")
    for at in [*range(20), *range(20)]:
        asked = [*conversation(2, str(at), image=at % 2 == 0), Message("user", f"  more {at}\n")]
        segments = render(asked, V1, for_answer=False)
        assert used.encode(segments) == PromptTokenizer(tokenizer, "<image>").encode(segments)


@pytest.mark.parametrize("num_turns", [1, 3])
def test_chat_template_ids_equal_apply_chat_template(num_turns):
    tokenizer = byte_level_tokenizer()
    ours = PromptTokenizer(tokenizer, "<image>")
    messages = [*conversation(num_turns, image=False), Message("user", "one  more\n")]
    template = ours.chat_template(tokenizer.chat_template, "<image>")
    (tokens,) = ours.encode(render(messages, template))
    plain = [{"role": m.role, "content": m.text} for m in messages]
    expected = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=True)
    assert tokens.ids == list(expected["input_ids"])


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("num_turns", [1, 2, 5])
@pytest.mark.parametrize("content", ["x", *hostile_texts()[:12]])
def test_supervised_ids_decode_to_exactly_the_answers(tokenizer, num_turns, content, image):
    messages = conversation(num_turns, content, image=image)
    ours = PromptTokenizer(tokenizer, "<image>")
    pieces = ours.encode(render(messages, V1, for_answer=False))
    answers: list[str] = []
    run: list[int] = []
    before = -1
    for tokens in [piece for piece in pieces if isinstance(piece, Tokens)]:
        for ident, supervised in zip(tokens.ids, tokens.supervised, strict=True):
            if not supervised:
                assert not run
                before = ident
            elif ident == ours.eos_id:
                lead = ours.decode([before])
                answers.append(ours.decode([before, *run])[len(lead) :])
                run = []
            else:
                run.append(ident)
    assert not run
    assert answers == [" " + m.text for m in messages if m.role == "assistant"]


def test_plain_supervises_caption_and_newline(tokenizer):
    ours = PromptTokenizer(tokenizer, "<image>")
    messages = [Message("user", "", (IMAGE,)), Message("assistant", "Shop <s>Prices</s>")]
    pieces = ours.encode(render(messages, PLAIN, for_answer=False))
    tokens = pieces[-1]
    assert isinstance(tokens, Tokens)
    assert all(tokens.supervised)
    assert ours.decode(tokens.ids) == "Shop <s>Prices</s>\n"


@pytest.mark.parametrize("content", hostile_texts())
def test_special_strings_in_content_never_become_special_ids(tokenizer, content):
    ours = PromptTokenizer(tokenizer, "<image>")
    own = render([Message("user", "Q")], V1)
    hostile = render([Message("user", content)], V1)
    count = lambda pieces: sum(i in ours.special_ids for p in pieces for i in p.ids)  # noqa: E731
    assert count(ours.encode(hostile)) == count(ours.encode(own))


def test_the_given_tokenizer_keeps_parsing_special_tokens(tokenizer):
    before = tokenizer("a <image> b").input_ids
    PromptTokenizer(tokenizer, "<image>").encode(render([Message("user", "<image>")], V1))
    assert tokenizer("a <image> b").input_ids == before


@pytest.mark.parametrize(
    "text", ["日本語 and 🎉🚀 done", "naïve café", "a  b\n\tc <s>x</s>", "\ufffd?"]
)
def test_streamed_text_is_whole_and_never_shows_half_a_character(tokenizer, text):
    ours = PromptTokenizer(tokenizer, "<image>")
    (prompt,) = ours.encode(render([Message("user", "Q")], V1))
    messages = [Message("user", "Q"), Message("assistant", text)]
    (whole,) = ours.encode(render(messages, V1))
    assert whole.ids[: len(prompt.ids)] == prompt.ids
    stream = TextStream(ours, prompt.ids)
    parts = [stream.push(ident) for ident in whole.ids[len(prompt.ids) :]]
    assert "".join([*parts, stream.flush()]) == " " + text
    assert len([part for part in parts if part]) > 1
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


def test_bytes_that_never_become_a_character_are_flushed_at_the_end():
    tokenizer = word_mark_tokenizer(bos=False)
    ours = PromptTokenizer(tokenizer)
    stream = TextStream(ours)
    half = tokenizer.convert_tokens_to_ids(["<0xE6>", "<0x97>"])
    assert [stream.push(ident) for ident in half] == ["", ""]
    assert set(stream.flush()) == {"\ufffd"}
