"""Labels: exactly the answers, over templates, tokenizers, turns, images and hostile contents."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tiny import CHAT_TEMPLATE, byte_level_tokenizer, hostile_texts, word_mark_tokenizer
from trainer.samples import IGNORE_INDEX, Encoded, encode
from w2c_tui.core.conversation import Attachment, Message
from w2c_tui.core.prompt import PLAIN, V1
from w2c_tui.models.tokenize import PromptTokenizer

IMAGE = Attachment(data=b"", sha256="", width=0, height=0)
TOKENIZERS = {
    "byte-level": byte_level_tokenizer,
    "no-bos": lambda: word_mark_tokenizer(bos=False),
    "bos": lambda: word_mark_tokenizer(bos=True),
    "bos-first": lambda: word_mark_tokenizer(bos=True, scheme="first"),
}
ANSWERS = [
    "<p>plain</p>",
    "<p>Now <s>old price</s> 19.99</p>",
    "</s>",
    "an <image> in a page, and <unk>",
    "  leading  and trailing  ",
    "line\n\n  line\tend\n",
    "naïve 日本 🎉",
    *hostile_texts()[5:25],
]


@pytest.fixture(params=TOKENIZERS, scope="module")
def tokenizer(request):
    return PromptTokenizer(TOKENIZERS[request.param](), "<image>")


def encoded(messages, template, tokenizer, max_length=None, tokens_per_image=16) -> Encoded:
    return encode(
        messages,
        template,
        tokenizer,
        image_token_id=tokenizer.tokenizer.convert_tokens_to_ids("<image>"),
        tokens_per_image=tokens_per_image,
        max_length=max_length,
    )


def conversation(answers, *, image=True):
    messages = []
    for at, text in enumerate(answers):
        images = (IMAGE,) if image and at == 0 else ()
        messages += [Message("user", f"  Question {at} </s> <image>?", images)]
        messages += [Message("assistant", text)]
    return messages


def supervised_texts(sample: Encoded, tokenizer: PromptTokenizer, end: int | None) -> list[str]:
    """What the supervised runs say, each decoded after the token before it; `end` closes a run."""
    texts: list[str] = []
    run: list[int] = []
    before: list[int] = []

    def close() -> None:
        if run:
            lead = tokenizer.decode(before)
            texts.append(tokenizer.decode([*before, *run])[len(lead) :])
            run.clear()

    for ident, label in zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True):
        if label == IGNORE_INDEX:
            close()
            before = [ident]
            continue
        assert label == ident
        if ident == end:
            close()
            texts[-1] += "<eos>"
            before = [ident]
        else:
            run.append(ident)
    close()
    return texts


@pytest.mark.parametrize("image", [True, False], ids=["image", "text"])
@pytest.mark.parametrize("num_turns", [1, 2, 3, 5])
def test_v1_supervises_exactly_the_answers_and_eos(tokenizer, num_turns, image):
    for first in range(len(ANSWERS)):
        answers = [ANSWERS[(first + turn) % len(ANSWERS)] for turn in range(num_turns)]
        sample = encoded(conversation(answers, image=image), V1, tokenizer)
        expected = [f" {text}<eos>" for text in answers]
        assert supervised_texts(sample, tokenizer, tokenizer.eos_id) == expected
        assert sample.num_supervised > 0


@pytest.mark.parametrize("image", [True, False], ids=["image", "text"])
@pytest.mark.parametrize("text", ANSWERS)
def test_plain_supervises_the_caption_and_a_newline_and_drops_the_question(tokenizer, text, image):
    sample = encoded(conversation([text], image=image), PLAIN, tokenizer)
    kept = sample.input_ids[sample.labels != IGNORE_INDEX].tolist()
    text_ids = [i for i in sample.input_ids.tolist() if i not in tokenizer.special_ids]
    # Nothing predicts the very first token of a text that has neither an image nor a BOS before it.
    unpredicted = int(not image and sample.input_ids[0] not in tokenizer.special_ids)
    assert kept == text_ids[unpredicted:]
    # Some tokenizers cannot tell a leading space from the mark that begins every text.
    own = tokenizer.tokenizer(" a", add_special_tokens=False).input_ids
    if text.startswith(" ") and tokenizer.decode(own) == "a":
        text = text[1:]
    assert tokenizer.decode(text_ids) == text + "\n"
    assert tokenizer.eos_id not in kept


@pytest.mark.parametrize("num_turns", [1, 3])
def test_a_tokenizers_own_chat_template_supervises_answers_and_their_end(num_turns):
    tokenizer = PromptTokenizer(byte_level_tokenizer(), "<image>")
    template = tokenizer.chat_template(CHAT_TEMPLATE, "<image>")
    for first in range(len(ANSWERS)):
        answers = [ANSWERS[(first + turn) % len(ANSWERS)] for turn in range(num_turns)]
        sample = encoded(conversation(answers), template, tokenizer)
        expected = [f"{text}<eos>" for text in answers]
        assert supervised_texts(sample, tokenizer, tokenizer.eos_id) == expected


def test_images_are_runs_of_the_image_token_and_nothing_else_is(tokenizer):
    sample = encoded(conversation(["an <image> tag", "<image>"]), V1, tokenizer)
    token = tokenizer.tokenizer.convert_tokens_to_ids("<image>")
    places = np.flatnonzero(sample.input_ids == token)
    assert sample.images == (places[0],)
    assert places.tolist() == list(range(places[0], places[0] + 16))


def test_length_counts_expanded_images_once_and_truncation_is_told(tokenizer):
    messages = conversation(["<p>hello</p>" * 5])
    whole = encoded(messages, V1, tokenizer)
    assert not whole.truncated
    assert len(encoded(messages, V1, tokenizer, tokens_per_image=20).input_ids) == (
        len(whole.input_ids) + 4
    )
    exact = encoded(messages, V1, tokenizer, max_length=len(whole.input_ids))
    assert not exact.truncated
    assert exact.labels[-1] == tokenizer.eos_id
    cut = encoded(messages, V1, tokenizer, max_length=len(whole.input_ids) - 3)
    assert cut.truncated
    assert cut.input_ids.tolist() == whole.input_ids[:-3].tolist()
    assert cut.labels.tolist() == whole.labels[:-3].tolist()


def test_truncation_never_splits_an_image(tokenizer):
    messages = conversation(["<p>hello</p>"])
    (start,) = encoded(messages, V1, tokenizer).images
    cut = encoded(messages, V1, tokenizer, max_length=start + 7)
    assert cut.images == ()
    assert len(cut.input_ids) == start
    assert cut.num_supervised == 0
